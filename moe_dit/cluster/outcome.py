"""What a job does when its training command has ended: end, be queued again, start again, or give up.

The job writes into the run's folder only while it holds it, which nobody else does then: a job whose run another one
trains writes nothing, and gives up. Times decide nothing. What stands in events.jsonl behind the job's own last event
is what the start that has just ended wrote.
"""

import os
import re
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Literal

from moe_dit.events import What, events, job, own, record
from moe_dit.records import Records
from moe_dit.run_folder import is_run
from moe_dit.runtime.errors import InputError
from moe_dit.runtime.lock import Held, lock_folder
from moe_dit.status import patience, read_status

Next = Literal["done", "again", "requeue", "give up"]
EVENT: dict[Next, What] = {"again": "restarted", "requeue": "requeued", "give up": "gave up"}
MARKS = {"queued", *EVENT.values()}  # a job's own events: one stands before each start that it makes

SILENT = "its ranks ended without a word"  # killed, by a node, the kernel for want of memory, or a person
EARLY = "it ended before its first step; see its log"  # where what was wrong was printed
MOST_SILENT = 3  # failures without a word, and without a checkpoint between them, after which a job gives up


def last_step(run: Path) -> int | None:
    """The last step that metrics.jsonl has a record of, which is written within a second of the step."""
    with suppress(OSError), Records(run / "metrics.jsonl") as records:
        for record in records.last():
            return record["step"]
    return None


def is_there(run: Path) -> bool:
    """Whether a folder is a run that has begun, or may be one, of another user: in any other nothing is written."""
    closed = os.path.isdir(run) and not os.access(run, os.X_OK)
    return closed or is_run(run)


def note_begin(run: Path, attempt: int, queued: bool, message: str) -> None:
    """Add to a run's events that the job makes another start, unless it said so when the one before had ended.

    Args:
        run: its folder; where no run has begun, nothing is noted.
        attempt: how often this job has started the training command, 1 the first time.
        queued: a person has submitted the job, and SLURM has not queued it again since.
        message: which job.

    Raises:
        InputError: another run is writing into the folder.
    """
    if not is_there(run):
        return
    with lock_folder(run, "another training run", lambda: patience(run)):
        told = own(events(run))
        if attempt == 1 and queued:
            record(run, "queued", message)
        elif told and told[-1]["what"] not in MARKS:
            record(run, "restarted" if attempt > 1 else "requeued", message)


def last_start(told: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A job's events of the start that it made last; without a word of the job, from the ranks' last "started" on."""
    marks = [i for i, event in enumerate(told, start=1) if event["what"] in MARKS]
    return list(told[marks[-1] :]) if marks else _last_ranks(told)


def _last_ranks(told: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Events from the last "started" on, of which torchrun may cause several; all, where there is none."""
    starts = [i for i, event in enumerate(told) if event["what"] == "started"]
    return list(told[starts[-1] if starts else 0 :])


def note_end(run: Path, told: Sequence[dict[str, Any]]) -> None:
    """Add to a run's events that its ranks were killed, which they could not say themselves.

    Args:
        run: its folder.
        told: events of the start that has ended.
    """
    last = _last_ranks(told)
    whats = {event["what"] for event in last}
    if whats.isdisjoint({"done", "stopped", "failed"}):
        if "started" in whats:
            record(run, "failed", SILENT, last_step(run), last[0]["start"])
        else:
            record(run, "failed", EARLY)


def gives_up(told: Sequence[dict[str, Any]]) -> str | None:
    """Why a run should not be tried again, judged by its events; None where it should.

    It gives up where the last two failures said the same at the same step, or the last :data:`MOST_SILENT` said nothing
    and nothing was saved between them. Only what came after the last event "queued" counts: whoever submits a job
    again has looked at what was wrong.
    """
    failures: list[dict[str, Any]] = []  # of them, "from": the checkpoint that the attempt began from
    begun = None  # the step of an attempt that has not ended yet
    start = None
    for event in told:
        if event["what"] in ("queued", "requeued", "done", "stopped"):
            failures, begun = [], None
        elif event["what"] == "started":
            if begun is not None:  # torchrun ended ranks that could not say so
                failures.append({"message": SILENT, "step": None, "start": None, "from": begun})
            begun = start = event["step"]
        elif event["what"] == "failed":
            if not (failures and event.get("start") and event["start"] == failures[-1]["start"]):
                # Of one start several ranks may say how it ended.
                failures.append({key: event.get(key) for key in ("message", "step", "start")} | {"from": start})
            begun = None
    last = failures[-MOST_SILENT:]
    if len(last) > 1 and last[-1]["message"] != SILENT and _same(last[-1], last[-2]):
        step, message = last[-1]["step"], last[-1]["message"]
        return f"failed twice in the same way{'' if step is None else f' at step {step}'}: {message}"
    if [failure["message"] for failure in last] == [SILENT] * MOST_SILENT and len({f["from"] for f in last}) == 1:
        return f"{SILENT}, {MOST_SILENT} times since its last checkpoint (step {last[-1]['from']})"
    return None


def _same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two failures are alike: at one step, for one cause, but for numbers such as ports and addresses."""
    causes = [re.sub(r"0x[0-9a-f]+|\d+", "N", failure["message"]) for failure in (a, b)]
    return a["step"] == b["step"] and causes[0] == causes[1]


def decide(run: Path, began: float, status: int, leaving: bool, attempt: int, note: bool = False) -> tuple[Next, str]:
    """What a job does now. Waits for the ranks that the job started, as they may be saving still.

    Args:
        run: the run's folder.
        began: not used; clocks decide nothing.
        status: that the training command's launcher ended with.
        leaving: the job was told to make room (its time is up, it is preempted).
        attempt: how often this job has started the training command, 1 the first time.
        note: add the decision to the run's events, if the job may write there.

    Returns:
        the decision, and a line that says why.

    Raises:
        InputError: the run's folder cannot be written.
    """
    if status == 0:
        return "done", "all steps are done"
    with ExitStack() as held:
        if is_there(run):
            # A job that is to make room has no time to wait.
            try:
                held.enter_context(lock_folder(run, "another training run", lambda: patience(run, hurry=leaving)))
            except Held as error:
                return _beside(run, str(error), status, leaving)
        what, why = _decide(run, status, leaving, attempt)
        if note and what in EVENT and is_there(run):
            record(run, EVENT[what], why)
    return what, why


def _beside(run: Path, why: str, status: int, leaving: bool) -> tuple[Next, str]:
    """What a job does while others hold the run's folder, where it must not write."""
    now = read_status(run)
    if job() is None or now.get("job") != job() or status == InputError.status:
        return "give up", why
    return "requeue", "told to make room" if leaving else f"its ranks do not end: {why}"


def _decide(run: Path, status: int, leaving: bool, attempt: int) -> tuple[Next, str]:
    """What a job does that holds the run's folder, or whose run has never begun."""
    told = last_start(own(events(run)))
    now = read_status(run)
    if now.get("start") not in [event["start"] for event in told]:  # whatever stands there
        now = {}  # of a start before, or another's
    refused = status == InputError.status  # which says so itself
    if is_there(run) and not leaving and not refused:  # where it leaves, ranks may have had no time to speak
        note_end(run, told)
    state = now.get("state")
    if state == "done":
        return "done", "all steps are done"
    if refused:
        return "give up", f"it refuses what it was given (status {status}); see its log"
    if state == "stopped":
        return "requeue", str(now.get("message", "it has saved"))
    if state == "failed" and now.get("exit_status") == InputError.status:
        return "give up", str(now.get("message"))
    said = str(now.get("message")) if state == "failed" else f"{SILENT} (status {status})"
    if leaving:  # perhaps before its first step: it is no failure that there was no time
        return "requeue", said
    if why := gives_up(own(events(run))) or (EARLY if attempt > 1 and not is_there(run) else None):
        return "give up", why
    return "again", said
