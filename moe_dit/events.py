"""What happened to a run, a line an event: RUN/events.jsonl, which watchers read and restarts are decided by.

Who writes holds the run's folder. The order of lines is what counts, never their times: clocks are set back, and differ
between nodes. Each event names the job that wrote it, which keeps starting the run, and the start of its ranks.
"""

import json
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from moe_dit.runtime.errors import InputError
from moe_dit.runtime.files import open_to_append
from moe_dit.runtime.notes import noted
from moe_dit.runtime.reading import parse_json, read_bytes

# started, done, stopped (told to, and saved) and failed are of training; queued, restarted, requeued and gave up of the
# job around it; straggler, hang and slow are what ranks find about each other; changed: a run goes on with another
# value of a key, or other data.
What = Literal[
    "changed",
    "started",
    "stopped",
    "failed",
    "done",
    "queued",
    "restarted",
    "requeued",
    "gave up",
    "straggler",
    "hang",
    "slow",
]

JOB = "MOE_DIT_JOB"  # environment variable: names the job that starts this process, the same when it is queued again


def job() -> str | None:
    """The job that this process belongs to; None where it was started by hand."""
    return os.environ.get(JOB) or None


def record(run: Path, what: What, message: str = "", step: int | None = None, start: str | None = None) -> None:
    """Add an event to a run's record, a note (:mod:`moe_dit.runtime.notes`).

    Whoever calls it speaks for all ranks, and holds the run's folder.

    Args:
        run: the run's folder, which is there.
        what: kind of event.
        message: one line for people.
        step: steps that were done then, where that is known.
        start: the name of the ranks' start that it is of; None: of none.
    """
    event = {"time": round(time.time(), 3), "what": what, "step": step, "message": message}
    line = json.dumps(event | {"job": job(), "start": start}).encode() + b"\n"
    # One write of one line at the file's end, behind a line that a full disk may have cut short.
    with noted(run / "events.jsonl"):
        descriptor = open_to_append(run / "events.jsonl")
        try:
            size = os.fstat(descriptor).st_size
            whole = size == 0 or os.pread(descriptor, 1, size - 1) == b"\n"
            line = line if whole else b"\n" + line
            while line:  # where there is room for a part only, the next try says so
                line = line[os.write(descriptor, line) :]
        finally:
            os.close(descriptor)


def events(run: Path) -> Iterator[dict[str, Any]]:
    """A run's events, oldest first; lines that are none (cut short by a kill) are passed over.

    Raises:
        InputError: there are some, and they cannot be read.
    """
    try:
        lines = read_bytes(run / "events.jsonl").splitlines()
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise InputError(f"the events of {run} cannot be read: {error.strerror}") from None
    for line in lines:
        try:
            event = parse_json(line)
            yield {
                "time": float(event["time"]),
                "what": str(event["what"]),
                "step": event.get("step"),
                "message": str(event.get("message", "")),
                "job": event.get("job"),
                "start": event.get("start"),
            }
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError):
            continue


def own(told: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The events of this process's job, and those that name none: by hand, or of before there were names."""
    return [event for event in told if event["job"] in (None, job())]
