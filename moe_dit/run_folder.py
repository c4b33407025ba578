"""Which files of a folder are a training run's, and whether they are: another's are neither replaced nor removed."""

import os
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any, get_args

from moe_dit.events import What
from moe_dit.runtime.errors import InputError
from moe_dit.runtime.files import remove_unfinished
from moe_dit.runtime.reading import open_file, parse_json, parse_yaml
from moe_dit.status import State

CONFIG_COMMENT = "# Everything resolved: `--recipe` takes this file, `--ds` the ds_config.json beside it.\n"


def _mapping(*keys: str) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(key in value for key in keys)


def _list_of(*keys: str) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and bool(value) and all(map(_mapping(*keys), value))


def _is_status(value: Any) -> bool:
    return _mapping("state", "time")(value) and value["state"] in get_args(State)


def _is_event(value: Any) -> bool:
    return _mapping("time", "what", "step", "message")(value) and value["what"] in get_args(What)


# What a run writes in its folder, and what a value of each must be to be a run's.
FILES: dict[str, Callable[[Any], bool]] = {
    "config.yaml": _mapping("model", "flow", "optimizer", "ema", "max_micro_batch_size"),
    "ds_config.json": _mapping(),
    "status.json": _is_status,
    "metrics.jsonl": _mapping("step", "loss"),
    "metrics_superseded.jsonl": _mapping("step", "loss"),
    "events.jsonl": _is_event,
    "ranks.json": _mapping("step", "time", "hosts"),
    "history.json": _list_of("attempt", "first_step"),
    "starts.json": _list_of("date", "first_step"),
    "memory.json": lambda value: isinstance(value, list),
    "wandb_id": lambda value: isinstance(value, str),
    "trackio_id": lambda value: isinstance(value, str),
    "checkpoints/latest": lambda value: isinstance(value, str) and value.startswith("step_"),
}
# Nobody else writes the first of these; the others tell a run where nothing else is in their way.
CERTAIN = ("history.json", "starts.json", "checkpoints/step_*/state.json")
TELLING = ("config.yaml", "status.json", "events.jsonl")
OTHERS = ("checkpoints/step_*", "looks/step_*.png", "logs/rank_*.log")  # what else a run would replace or add to
LONGEST = 1 << 20  # bytes that are looked at,
LINES = 100  # or lines


def is_run(run: Path) -> bool:
    """Whether a folder is a training run's, of this version or an earlier one, whatever of it is damaged."""
    checkpoint = _mapping("step", "recipe")
    if any(_is_a_runs(file, FILES.get(name, checkpoint)) for name in CERTAIN for file in _found(run, name)):
        return True
    return not _in_the_way(run) and any(_is_a_runs(run / name, FILES[name]) for name in TELLING)


def check_run_folder(run: Path) -> bool:
    """Complain where a run would replace files that no run wrote; other files in its folder are left as they are.

    Returns:
        whether it is a run already.

    Raises:
        InputError: there are such.
    """
    checkpoints = run / "checkpoints"
    if os.path.lexists(checkpoints) and not os.path.isdir(checkpoints):
        raise InputError(f"{checkpoints} is not a folder; move it away, or give another --out")
    if is_run(run):
        return True
    there = _in_the_way(run) or [name for name in FILES if os.path.lexists(run / name)]
    there += [str(file.relative_to(run)) for name in OTHERS for file in _found(run, name)]
    if there:
        others = ", ".join(there[:3])
        raise InputError(f"{run} holds {others}, which no training run wrote; move it away, or give another --out")
    return False


def _found(run: Path, pattern: str) -> list[Path]:
    """The paths of a pattern, as far as they may be looked at."""
    try:
        return list(run.glob(pattern))
    except OSError:
        return []


def _in_the_way(run: Path) -> list[str]:
    """The files of a run's names that hold something else."""
    return [name for name, known in FILES.items() if _is_a_runs(run / name, known) is False]


def _is_a_runs(file: Path, known: Callable[[Any], bool]) -> bool | None:
    """Whether a file holds what a run writes; None where there is none, or what it holds cannot be read."""
    try:
        with open_file(file) as opened:
            # Of a record the first line that is one tells; a kill may have cut it short.
            texts = islice(opened, LINES) if file.suffix == ".jsonl" else iter([opened.read(LONGEST)])
            values = [value for text in texts if (value := _parsed(text, file)) is not None]
    except OSError:
        return None
    return any(map(known, values)) if values else None


def _parsed(text: bytes, file: Path) -> Any:
    """What a file says, as its suffix says how; None where it is nothing."""
    try:
        if file.suffix != ".yaml":
            return parse_json(text) if file.suffix else text.decode().strip() or None
        # A recipe of somebody's own may have the same keys.
        return parse_yaml(text.decode()) if text.decode().startswith(CONFIG_COMMENT) else text.decode()
    except ValueError:
        return None


def clear_unfinished(run: Path) -> None:
    """Remove what a kill left of a run's files and checkpoints; its lock is held."""
    for name in FILES:
        file = run / name
        remove_unfinished(file.parent, f"{file.name}.[0-9]*")
        remove_unfinished(file.parent, f"{file.name}.old.*")
    remove_unfinished(run / "looks", "step_[0-9]*")
    remove_unfinished(run / "checkpoints", "step_[0-9]*")
    remove_unfinished(run / "checkpoints", ".step_[0-9]*")
