"""The one progress display: a rich bar on a terminal, a line now and then in a log, silence on ranks other than 0."""

import os
import sys
import time
from contextlib import contextmanager, suppress
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from moe_dit.runtime.world import world

LOG_EVERY_SECONDS = 10.0


class _Deaf:
    """A stream that goes on without a reader, or where its disk is full: a run has work to save, whoever listens."""

    def __init__(self, stream: Any):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()


class _Console(Console):
    @property
    def file(self) -> Any:
        """Where it prints."""
        return _Deaf(super().file)

    @file.setter
    def file(self, new: Any) -> None:
        Console.file.fset(self, new)  # type: ignore[attr-defined]


console = _Console(stderr=True, highlight=False)


def say(text: str) -> None:
    """Print one line from rank 0."""
    if world().rank == 0:
        console.print(text, markup=False, soft_wrap=True)


def leave_streams() -> bool:
    """Whether what a command gives on standard output has been written; messages that could not be are nobody's.

    Python would make status 120 of either, as it exits.
    """
    good = True
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:  # else it was closed before Python began
                stream.flush()
        except (OSError, ValueError):
            good = good and stream is not sys.stdout
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return good


class Task:
    """One piece of long work. ``advance(n, note)`` after n more units; the note stands behind the bar.

    Without a note, where the units have a name, their number a second stands there.
    """

    def __init__(self, description: str, total: int, done: int, unit: str, progress: Progress | None, log: bool):
        self.unit = unit
        self.description = description
        self.total = total
        self.done = done
        self._progress = progress
        self._log = log
        self._bar = progress.add_task(description, total=total, completed=done, note="") if progress else None
        self._start = time.monotonic()
        self._start_done = done
        self._last_line = self._start

    def advance(self, n: int = 1, note: str = "") -> None:
        self.done += n
        now = time.monotonic()
        speed = (self.done - self._start_done) / max(now - self._start, 1e-9)
        if not note and self.unit:
            note = f"{speed:.3g} {self.unit}/s"
        if self._progress is not None and self._bar is not None:
            self._progress.update(self._bar, advance=n, note=note)
        elif self._log and (now - self._last_line >= LOG_EVERY_SECONDS or self.done == self.total):
            self._last_line = now
            left = (self.total - self.done) / speed if speed else float("inf")
            console.print(
                f"{self.description} {self.done}/{self.total} {note} {left:.0f} s left".replace("  ", " "),
                markup=False,
                soft_wrap=True,
            )


@contextmanager
def task(description: str, total: int, done: int = 0, unit: str = ""):
    """Show progress over ``total`` units of work, of which ``done`` were done before; gives a :class:`Task`.

    Args:
        unit: what the units are called, where their number a second is to be shown.
    """
    if world().rank != 0:
        yield Task(description, total, done, unit, None, log=False)
    elif console.is_terminal:
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        times = (TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[note]}"))
        with Progress(*columns, *times, console=console) as progress:
            yield Task(description, total, done, unit, progress, log=False)
    else:
        yield Task(description, total, done, unit, None, log=True)
