"""What became of a run's last start: RUN/status.json, whatever the launcher makes of its ranks' exit statuses."""

import time
from pathlib import Path
from typing import Any, Literal

from moe_dit.runtime.files import write_json
from moe_dit.runtime.reading import read_json

State = Literal["training", "stopping", "stopped", "done", "failed"]


def write_status(run: Path, state: State, **more: Any) -> None:
    """Say what a run does now, and how it ended; rank 0 calls it, holding the run's folder.

    Args:
        run: the run's folder.
        state: "training"; "stopping" (was told to, and saves); "stopped" (has saved); "done"; "failed".
        more: what else is known, such as "step" (done and saved) or "message".
    """
    write_json(run / "status.json", {"state": state, "time": round(time.time(), 3), **more})


def read_status(run: Path) -> dict[str, Any]:
    """A run's status.json; empty where none can be read. A run that was killed still says what it did then."""
    try:
        return dict(read_json(run / "status.json"))
    except (OSError, ValueError, TypeError):
        return {}
