"""What a job does when its training command has ended: end, be queued again, start again, or give up."""

import os
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from moe_dit.events import events, record
from moe_dit.records import Records
from moe_dit.runtime.errors import InputError
from moe_dit.status import read_status

Next = Literal["done", "again", "requeue", "give up"]

SILENT = "its ranks ended without a word"  # killed, by a node, the kernel for want of memory, or a person
EARLY = "it ended before its first step; see its log"  # where what was wrong was printed
MOST_SILENT = 3  # failures without a word, and without a checkpoint between them, after which a job gives up


def last_step(run: Path) -> int | None:
    """The last step that metrics.jsonl has a record of, which is written within a second of the step."""
    with suppress(OSError), Records(run / "metrics.jsonl") as records:
        for record in records.last():
            return record["step"]
    return None


def note_end(run: Path, began: float, status: int) -> None:
    """Add to a run's events that its ranks were killed, which they could not say themselves.

    Args:
        run: its folder; where it is not there, nothing is noted.
        began: when the training command was started, in seconds since 1970.
        status: that its launcher ended with.
    """
    if not os.path.isdir(run) or status == 0:
        return
    told = {event["what"] for event in events(run) if event["time"] >= began}
    if told.isdisjoint({"done", "stopped", "failed"}):
        begun = "started" in told
        record(run, "failed", SILENT if begun else EARLY, last_step(run) if begun else None)


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
        if event["what"] in ("queued", "done", "stopped"):
            failures, begun = [], None
        elif event["what"] == "started":
            if begun is not None:  # torchrun ended ranks that could not say so
                failures.append({"message": SILENT, "step": None, "from": begun})
            begun = start = event["step"]
        elif event["what"] == "failed":
            failures.append({"message": event["message"], "step": event["step"], "from": start})
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


def decide(run: Path, began: float, status: int, leaving: bool, attempt: int) -> tuple[Next, str]:
    """What a job does now.

    Args:
        run: the run's folder.
        began: when the training command was started, in seconds since 1970.
        status: that its launcher ended with.
        leaving: the job was told to make room (its time is up, it is preempted).
        attempt: how often this job has started the training command, 1 the first time.

    Returns:
        the decision, and a line that says why.
    """
    if not leaving:  # else SLURM may have ended the launcher while its ranks still save
        note_end(run, began, status)
    now = read_status(run)
    state = now.get("state") if now.get("time", 0) >= began else None
    if state == "done" or status == 0:
        return "done", "all steps are done"
    if state == "stopped":
        return "requeue", str(now.get("message", "it has saved"))
    if state == "failed" and now.get("exit_status") == InputError.status:
        return "give up", str(now.get("message"))
    if why := gives_up(list(events(run))) or (EARLY if attempt > 1 and not os.path.isdir(run) else None):
        return "give up", why
    said = str(now.get("message")) if state == "failed" else f"{SILENT} (status {status})"
    return ("requeue" if leaving else "again"), said
