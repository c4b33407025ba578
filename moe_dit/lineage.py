"""Which checkpoint a run continues from, and which it can do without.

A run that goes back to an earlier checkpoint branches: what was saved after that step belongs to a branch that was
left. So a checkpoint's state.json says its history, the starts of the training command that led to it. Only ancestors
of the checkpoint that RUN/checkpoints/latest names are taken where that one is damaged, and those of a branch that was
left are the first to be pruned. RUN/history.json repeats the history that the newest start gives to its checkpoints,
for when the newest checkpoint's own cannot be read.
"""

import os
import sys
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from moe_dit.checkpoint_files import STATE, Attempt, Damaged, Pruned, check_complete, read_description, step_of
from moe_dit.runtime.errors import InputError
from moe_dit.runtime.files import write_json, write_text
from moe_dit.runtime.progress import say
from moe_dit.runtime.reading import read_bytes, read_json

LONGEST_NAME = 4096  # bytes of what `latest` may say


@dataclass(frozen=True)
class State:
    """A moment of a run: a step, and the starts of the command that led there (none known, before they were kept)."""

    history: Sequence[Attempt]
    step: int

    @classmethod
    def of(cls, description: Mapping[str, Any]) -> "State":
        """That of a checkpoint."""
        return cls(description["history"], description["step"])


@dataclass(frozen=True)
class Start:
    """Where a start of the training command begins.

    Attributes:
        checkpoint: what it continues; None to begin with the recipe.
        own: whether that is one of the run's own.
        history: what the checkpoints will say that it saves; this start stands last.
        records: up to which step the run's metrics.jsonl tells of what is continued.
        notes: lines that a person should read.
        changes: lines that say what differs from what that checkpoint was trained with (:mod:`moe_dit.continuing`).
    """

    checkpoint: Path | None
    own: bool
    history: Sequence[Attempt]
    records: int
    notes: Sequence[str] = field(default=())
    changes: Sequence[str] = field(default=())


def common_step(a: State, b: State) -> int:
    """The last step that two moments have in common."""
    shared = 0
    while shared < min(len(a.history), len(b.history)) and a.history[shared] == b.history[shared]:
        shared += 1
    return min(state.history[shared].first_step if len(state.history) > shared else state.step for state in (a, b))


def is_ancestor(a: State, b: State) -> bool:
    """Whether ``b`` came of ``a`` (or is it)."""
    return common_step(a, b) == a.step


# --- the run's folder -------------------------------------------------------------------------------------------------


def complete_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of RUN/checkpoints, by step; InputError where another user keeps them closed."""
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        names = []
    except OSError as error:
        raise InputError(f"{folder} cannot be looked into: {error.strerror}") from None
    found = {step_of(name): folder / name for name in names if os.path.isfile(folder / name / STATE)}
    return [path for _, path in sorted((step, path) for step, path in found.items() if step is not None)]


def set_latest(folder: Path, name: str) -> None:
    """Let ``latest`` name a checkpoint, in one indivisible step."""
    write_text(folder / "latest", name + "\n")


def named_by_latest(folder: Path) -> str | None:
    """What ``latest`` says, which may be anything; None where there is no such file."""
    try:
        return read_bytes(folder / "latest", LONGEST_NAME).decode(errors="replace").strip()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise InputError(f"{folder / 'latest'} cannot be read: {error.strerror}") from None
    except ValueError:  # whatever it is, it is no name
        return ""


def newest(folder: Path) -> Path | None:
    """The checkpoint that ``latest`` names, if it is there: the newest complete one of the branch that a run is on."""
    named = named_by_latest(folder)
    return next((path for path in complete_checkpoints(folder) if path.name == named), None)


def newest_told(folder: Path) -> str:
    """The newest complete checkpoint for a message, which the disk that fails must not hide."""
    try:
        return str(newest(folder) or "none")
    except (OSError, InputError):
        return "unknown"


def write_history(run: Path, history: Sequence[Attempt]) -> None:
    """Write RUN/history.json."""
    write_json(run / "history.json", [asdict(attempt) for attempt in history])


def superfluous(folder: Path, state: State, keep: int, milestone_every: int) -> list[Path]:
    """The checkpoints that may go, now that the one of ``state`` is saved.

    Args:
        folder: RUN/checkpoints.
        state: that of the newest checkpoint.
        keep: how many stay: first the newest among the ancestors of ``state``, then others.
        milestone_every: steps between checkpoints that stay for good; 0 for none.
    """

    def belongs(checkpoint: Path) -> bool:
        try:
            return is_ancestor(State.of(read_description(checkpoint)), state)
        except Damaged:
            return False

    by_worth = sorted(complete_checkpoints(folder), key=belongs)  # keeps the order of steps among equals
    return [path for path in by_worth[:-keep] if not milestone_every or (step_of(path.name) or 0) % milestone_every]


# --- the choice -------------------------------------------------------------------------------------------------------


def find_checkpoint(run_or_checkpoint: Path) -> Path | None:
    """The checkpoint that a path means: itself, or the newest readable one of a run; None where a run has none.

    Raises:
        InputError: a run's checkpoints are all unreadable.
    """
    notes: list[str] = []
    checkpoint = _meant(run_or_checkpoint, {}, notes)
    for note in notes:
        say(note)
    return checkpoint


def _meant(run_or_checkpoint: Path, damaged: Mapping[Path, Damaged], notes: list[str]) -> Path | None:
    if os.path.isfile(run_or_checkpoint / STATE):
        return run_or_checkpoint
    return _newest_readable(run_or_checkpoint, damaged, notes)


def choose(run: Path, resume: str = "auto", damaged: Mapping[Path, Damaged] | None = None) -> Start:
    """Decide what a start of the training command continues.

    Args:
        run: the run's folder.
        resume: "auto", "never", or a checkpoint (or another run) to start from if this run has none of its own. One of
            the run's own checkpoints is gone back to, once: the branch that begins there is continued from then on.
        damaged: checkpoints that turned out to be damaged when they were loaded.

    Raises:
        InputError: ``resume`` is "never" and there is a checkpoint, names none, or nothing there can be read.
    """
    damaged = damaged or {}
    notes: list[str] = []
    asked = None if resume in ("auto", "never") or _same(Path(resume), run) else Path(resume)
    if asked is not None and _is_own(asked, run):
        asked = run / "checkpoints" / asked.name
        if not _was_gone_back_to(asked, run):
            return _start(run, _checked(asked, resume, damaged), asked, notes)
        notes.append(f"--resume {resume} was gone back to before: what came of it continues")
    own = _newest_readable(run, damaged, notes)
    if own is not None:
        if resume == "never":
            raise InputError(f"--resume never, but {run} has {own.name}; give another --out, or --resume auto")
        if asked is not None and not _is_own(asked, run):
            notes.append(
                f"--resume {resume} is for a run without checkpoints: {run} has its own and continues; "
                f"give another --out to begin from {resume}"
            )
        return _start(run, own, asked, notes)
    if asked is None:
        return Start(None, False, [_attempt(0)], 0, notes)
    checkpoint = _checked(_meant(asked, damaged, notes), resume, damaged)
    description = read_description(checkpoint)
    return Start(checkpoint, False, [*description["history"], _attempt(description["step"])], 0, notes)


def _start(run: Path, checkpoint: Path, asked: Path | None, notes: list[str]) -> Start:
    """Begin from one of the run's own checkpoints."""
    description = read_description(checkpoint)
    state, tip = State.of(description), _tip(run)
    history = [*state.history, _attempt(state.step, asked=checkpoint == asked)]
    return Start(checkpoint, True, history, min(state.step, common_step(state, tip)) if tip else state.step, notes)


def _attempt(first_step: int, asked: bool = False) -> Attempt:
    return Attempt(uuid.uuid4().hex, first_step, asked)


def _checked(checkpoint: Path | None, resume: str, damaged: Mapping[Path, Damaged]) -> Path:
    if checkpoint is None or not os.path.isfile(checkpoint / STATE):
        raise InputError(f"--resume {resume}: no checkpoint there; give auto, never, a run or a checkpoint folder")
    if checkpoint in damaged:
        raise damaged[checkpoint]
    check_complete(checkpoint)
    return checkpoint


def _same(a: Path, b: Path) -> bool:
    return a.resolve() == b.resolve()


def _is_own(checkpoint: Path, run: Path) -> bool:
    """Whether a path is that of one of the run's own checkpoints, there or not any more."""
    return step_of(checkpoint.name) is not None and _same(checkpoint.parent, run / "checkpoints")


def _was_gone_back_to(own: Path, run: Path) -> bool:
    """Whether the run's newest checkpoint came of an earlier start that went back to this one."""
    tip = _tip(run)
    if tip is None or not any(a.asked and a.first_step == step_of(own.name) for a in tip.history):
        return False
    try:
        return is_ancestor(State.of(read_description(own)), tip)
    except Damaged:  # pruned since, it may be
        return True


def _tip(run: Path) -> State | None:
    """The moment that a run had come to: its newest checkpoint's, or else all that history.json knows; or None."""
    named = newest(run / "checkpoints")
    try:
        return State.of(read_description(named)) if named is not None else _recorded_tip(run)
    except Damaged:
        return _recorded_tip(run)


def _recorded_tip(run: Path) -> State | None:
    """What the newest start will have come to, at any step after its first."""
    try:
        history = [Attempt(**attempt) for attempt in read_json(run / "history.json")]
    except (OSError, ValueError, TypeError):
        return None  # a run of an earlier version, or damaged too: the newest that can be read decides
    return State(history, sys.maxsize)


def _newest_readable(run: Path, damaged: Mapping[Path, Damaged], notes: list[str]) -> Path | None:
    """The newest checkpoint that can be read of the branch that a run is on; None where the run has none."""
    while True:
        try:
            return _newest_there(run, damaged, notes)
        except Pruned as error:  # a run that trains prunes those only that have newer ones beside them
            notes.append(f"{error}; taking a newer one")


def _newest_there(run: Path, damaged: Mapping[Path, Damaged], notes: list[str]) -> Path | None:
    folder = run / "checkpoints"
    candidates = complete_checkpoints(folder)
    named = named_by_latest(folder)
    if not candidates:
        if named is not None:
            raise InputError(
                f"{folder / 'latest'} names {named[:80]!r}, but there is no checkpoint in {folder}; restore it, or "
                f"remove {folder / 'latest'} to begin again"
            )
        return None
    names = [path.name for path in candidates]
    if named is not None and named in names:
        # Those of later steps are of a branch that was left, or of a save that was killed just before its end.
        candidates = candidates[: names.index(named) + 1]
    else:
        wrong = "is missing" if named is None else f"names {named[:80]!r}, which is not there" if named else "is empty"
        notes.append(f"{folder / 'latest'} {wrong}; taking the newest checkpoint that the run's history leads to")
    tip = _tip(run)
    failures, others = [], []
    for checkpoint in reversed(candidates):
        try:
            state = State.of(read_description(checkpoint))
            if tip is not None and not is_ancestor(state, tip):
                others.append(checkpoint.name)
                continue
            tip = tip or state
            if checkpoint in damaged:
                raise damaged[checkpoint]
            check_complete(checkpoint)
            return checkpoint
        except Pruned:
            raise
        except Damaged as error:
            failures.append(str(error))
            notes.append(f"{error}; taking the one before it")
    left = f"; of branches that were left there are {', '.join(others)}, which --resume takes" if others else ""
    raise InputError(f"no checkpoint in {folder} can be continued ({'; '.join(failures[:2])}){left}")
