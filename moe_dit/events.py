"""What happened to a run, a line an event: RUN/events.jsonl, which watchers read and restarts are decided by."""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from moe_dit.runtime.errors import InputError
from moe_dit.runtime.reading import parse_json, read_bytes

# started, done, stopped (told to, and saved) and failed are of training; queued, restarted, requeued and gave up of the
# job around it; straggler, hang and slow are what ranks find about each other.
What = Literal[
    "started", "stopped", "failed", "done", "queued", "restarted", "requeued", "gave up", "straggler", "hang", "slow"
]


def record(run: Path, what: What, message: str = "", step: int | None = None) -> None:
    """Add an event to a run's record; whoever calls it speaks for all ranks.

    Args:
        run: the run's folder, which is there.
        what: kind of event.
        message: one line for people.
        step: steps that were done then, where that is known.
    """
    event = {"time": round(time.time(), 3), "what": what, "step": step, "message": message}
    # One write of one line at the file's end: the job's supervisor writes here as well.
    descriptor = os.open(run / "events.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        os.write(descriptor, json.dumps(event).encode() + b"\n")
    finally:
        os.close(descriptor)


def events(run: Path) -> Iterator[dict[str, Any]]:
    """A run's events, oldest first; lines that are none (cut short by a kill) are passed over.

    Raises:
        InputError: there are some, and they cannot be read.
    """
    try:
        lines = read_bytes(run / "events.jsonl").splitlines()
    except FileNotFoundError:
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
            }
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError):
            continue
