"""Writing no faster than a rate, so that what else reads from the same disks is not held up."""

import os
import threading
import time
from collections.abc import Callable
from typing import Any, BinaryIO

PIECE = 16_000_000  # bytes between two looks at the clock


class Pace:
    """Holds one writer to a rate.

    Args:
        bytes_per_second: the rate; what was not used of it before is lost, so that no burst follows a pause.
        clock: gives seconds.
        sleep: waits for so many seconds; by default one that :meth:`hurry` ends.
    """

    def __init__(
        self,
        bytes_per_second: float,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Any] | None = None,
    ):
        self._rate = bytes_per_second
        self._clock = clock
        self._hurried = threading.Event()
        self._sleep = sleep or self._hurried.wait
        self._free = 0.0  # when all that was written so far may have been written

    def wrote(self, size: int) -> None:
        """Wait until ``size`` more bytes are within the rate."""
        now = self._clock()
        self._free = max(self._free, now) + size / self._rate
        if not self._hurried.is_set():
            self._sleep(self._free - now)

    def hurry(self) -> None:
        """From now on, and in the middle of a wait, hold nothing up."""
        self._hurried.set()


class PacedFile:
    """A file that is written at a pace, and to the disk at that: left to the page cache, it would go there at once."""

    def __init__(self, file: BinaryIO, pace: Pace):
        self._file = file
        self._pace = pace
        self._unpaid = 0

    def write(self, data: Any) -> int:
        """Write all of the data, a piece at a time."""
        view = memoryview(data).cast("B")
        for start in range(0, len(view), PIECE):
            self._unpaid += self._file.write(view[start : start + PIECE])
            if self._unpaid >= PIECE:
                self.flush()
        return len(view)

    def flush(self) -> None:
        """Let what was written reach the disk, and wait as long as it takes at this pace."""
        self._file.flush()
        if self._unpaid:
            os.fdatasync(self._file.fileno())
            size, self._unpaid = self._unpaid, 0
            self._pace.wrote(size)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)
