"""What happened to a run, a line an event: RUN/events.jsonl, which watchers read and restarts are decided by."""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from moe_dit.runtime.files import open_to_append
from moe_dit.runtime.notes import noted

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


def record(run: Path, what: What, message: str = "", step: int | None = None) -> None:
    """Add an event to a run's record, a note (:mod:`moe_dit.runtime.notes`); whoever calls it speaks for all ranks.

    Args:
        run: the run's folder, which is there.
        what: kind of event.
        message: one line for people.
        step: steps that were done then, where that is known.
    """
    event = {"time": round(time.time(), 3), "what": what, "step": step, "message": message}
    # One write of one line at the file's end: the job's supervisor writes here as well.
    with noted(run / "events.jsonl"):
        descriptor = open_to_append(run / "events.jsonl")
        try:
            os.write(descriptor, json.dumps(event).encode() + b"\n")
        finally:
            os.close(descriptor)


def events(run: Path) -> Iterator[dict[str, Any]]:
    """A run's events, oldest first; lines that are none (cut short by a kill) are passed over."""
    try:
        lines = (run / "events.jsonl").read_bytes().splitlines()
    except FileNotFoundError:
        return
    for line in lines:
        try:
            event = json.loads(line)
            yield {
                "time": float(event["time"]),
                "what": str(event["what"]),
                "step": event.get("step"),
                "message": str(event.get("message", "")),
            }
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            continue
