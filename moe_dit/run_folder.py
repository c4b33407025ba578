"""Which files of a folder are a training run's, and whether they are: another's are neither replaced nor removed."""

import os
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any, get_args

from moe_dit.runtime.errors import InputError
from moe_dit.runtime.files import remove_unfinished
from moe_dit.runtime.reading import open_file, parse_json, parse_yaml
from moe_dit.status import State


def _mapping(*keys: str) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(key in value for key in keys)


# The files that a run writes in its folder, and how one is known to be a run's; None: not by this one.
FILES: dict[str, Callable[[Any], bool] | None] = {
    "config.yaml": _mapping("model", "flow", "optimizer"),
    "ds_config.json": None,
    "status.json": lambda value: _mapping("state")(value) and value["state"] in get_args(State),
    "metrics.jsonl": _mapping("step", "loss"),
    "metrics_superseded.jsonl": _mapping("step", "loss"),
    "events.jsonl": _mapping("time", "what", "step", "message"),
    "ranks.json": _mapping("step", "time", "hosts"),
    "history.json": lambda value: isinstance(value, list) and all(map(_mapping("attempt", "first_step"), value)),
    "starts.json": lambda value: isinstance(value, list) and all(map(_mapping("date", "first_step"), value)),
    "memory.json": None,
    "wandb_id": None,
    "trackio_id": None,
    "checkpoints/latest": lambda value: isinstance(value, str) and value.startswith("step_"),
}
LONGEST = 1 << 20  # bytes that are looked at,
LINES = 100  # or lines


def check_run_folder(run: Path) -> None:
    """Complain where a run would replace files that no run wrote; other files in its folder are left as they are.

    Raises:
        InputError: there are such.
    """
    there = [name for name in FILES if os.path.exists(run / name)]
    if there and not any(_is_a_runs(run / name, FILES[name]) for name in there):
        others = ", ".join(there[:3])
        raise InputError(f"{run} holds {others}, which no training run wrote; move it away, or give another --out")


def _is_a_runs(file: Path, known: Callable[[Any], bool] | None) -> bool:
    if known is None:
        return False
    try:
        with open_file(file) as opened:
            # Of a record the first line that is one tells; a kill may have cut it short.
            texts = islice(opened, LINES) if file.suffix == ".jsonl" else iter([opened.read(LONGEST)])
            return any(known(_parsed(text, file.suffix)) for text in texts)
    except OSError:
        return False


def _parsed(text: bytes, suffix: str) -> Any:
    """What a file says, as its suffix says how; None where it is nothing."""
    try:
        if suffix == ".yaml":
            return parse_yaml(text.decode())
        return parse_json(text) if suffix else text.decode()
    except ValueError:
        return None


def clear_unfinished(run: Path) -> None:
    """Remove what a kill left of a run's files and checkpoints; its lock is held."""
    for name in FILES:
        remove_unfinished((run / name).parent, f"{Path(name).name}.*")
    remove_unfinished(run / "looks", "step_*")
    remove_unfinished(run / "checkpoints", "step_*")
    remove_unfinished(run / "checkpoints", ".step_*")
