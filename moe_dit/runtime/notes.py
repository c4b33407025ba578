"""Notes: what a command keeps for people beside its work. One that fails is told of once, and costs nothing else.

A run's notes are its status, events, metrics, times, pictures and logs. The disk that they go to may be full, read-only
or broken while the run's checkpoints, perhaps on another, are fine; and where those are not, the one line that says so
must not be hidden by what else could not be written.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moe_dit.runtime.progress import say

AGAIN_SECONDS = 3600.0  # until what fails in the same way all the time is told of again

_told: dict[str, tuple[str, float]] = {}  # what was said of each note, and when


@contextmanager
def noted(
    what: Path | str, errors: type[Exception] = OSError, consequence: str = "goes on without it"
) -> Iterator[None]:
    """Write a note in the block; where that fails, :func:`tell` of it.

    Args:
        what: is written.
        errors: that are told and go no further; a library's own, where one writes.
        consequence: what the line ends with.
    """
    try:
        yield
    except errors as error:
        tell(what, error, f"cannot write {what}: {reason(error)}; {consequence}")


def tell(about: Path | str, error: Exception, line: str) -> None:
    """Say in one line from rank 0 what failed; of the same error about the same, once an hour at most."""
    why, now = reason(error), time.monotonic()
    before, when = _told.get(str(about), ("", 0.0))
    if why != before or now - when > AGAIN_SECONDS:
        _told[str(about)] = why, now
        say(line)


def reason(error: BaseException) -> str:
    """What an error says, in one line; of the operating system's, its words alone."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
