"""What became of a run's last start: RUN/status.json, whatever the launcher makes of its ranks' exit statuses."""

import errno
import json
import os
import time
from pathlib import Path
from typing import Any, Literal

from moe_dit.events import job
from moe_dit.runtime.files import write_json
from moe_dit.runtime.notes import noted
from moe_dit.runtime.reading import read_json
from moe_dit.runtime.stopping import GRACE_SECONDS, was_restarted

State = Literal["training", "stopping", "stopped", "done", "failed"]

ENDING_SECONDS = 10.0  # for the ranks of a run that was just killed to end


def write_status(run: Path, state: State, start: str | None = None, **more: Any) -> None:
    """Say what a run does now, and how it ended, a note; rank 0 calls it, holding the run's folder.

    Where there is no room for another file, it is written over the one that is there.

    Args:
        run: the run's folder.
        state: "training"; "stopping" (was told to, and saves); "stopped" (has saved); "done"; "failed".
        start: the name of the ranks' start.
        more: what else is known, such as "step" (done and saved) or "message".
    """
    value = {"state": state, "time": round(time.time(), 3), "job": job(), "start": start} | more
    with noted(run / "status.json"):
        try:
            write_json(run / "status.json", value)
        except OSError as error:
            try:
                _write_over(run / "status.json", json.dumps(value).encode() + b"\n")
            except OSError:
                raise error from None


def _write_over(file: Path, data: bytes) -> None:
    with open(file, "r+b") as opened:
        if os.fstat(opened.fileno()).st_nlink > 1:
            raise OSError(errno.EMLINK, os.strerror(errno.EMLINK))  # it is another folder's too
        opened.write(data)
        opened.truncate()


def read_status(run: Path) -> dict[str, Any]:
    """A run's status.json; empty where none can be read. A run that was killed still says what it did then."""
    try:
        return dict(read_json(run / "status.json"))
    except (OSError, ValueError, TypeError):
        return {}


def patience(run: Path, hurry: bool = False) -> float:
    """Seconds to wait for who holds a run's folder: longer for one that saves, and where it may be of this job.

    Args:
        run: the run's folder.
        hurry: there is no time.
    """
    if hurry:
        return ENDING_SECONDS
    now = read_status(run)
    ends = now.get("state") == "stopping" or (job() is not None and now.get("job") == job())
    return GRACE_SECONDS if ends or was_restarted() else ENDING_SECONDS
