"""A run's metrics.jsonl read in pieces: its end, a step's place, a curve's points, without the million lines between.

The file is a line a step in the order of steps. Lines that are no record (cut short by a kill, still being written) are
passed over. Nothing is kept between two readings, so a file that grows is opened again.
"""

import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from moe_dit.runtime.reading import open_file

Record = dict[str, Any]

BLOCK = 1 << 16  # bytes read at once where a line's place is not known closer
MOST = 1 << 20  # bytes read at once at most
LINE = 512  # bytes: more than a usual line has
FAR = 1 << 20  # bytes in which no record begins: the place is given up


def is_number(value: Any) -> bool:
    """Whether a value is a finite number that a curve can be drawn of."""
    return type(value) in (int, float) and abs(value) < 1e100


def parse(line: bytes) -> Record | None:
    """A line's record; None where it is none."""
    try:
        record = json.loads(line.decode(errors="replace"))
        step = record["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    # An axis is of floats, which hold no larger whole numbers.
    return record if type(record) is dict and type(step) is int and abs(step) < 2**53 else None


def mean(records: Sequence[Record]) -> Record:
    """The mean of each number over the records that have it; whatever is no number is left out."""
    values: dict[str, list[float]] = {}
    for record in records:
        for key, value in record.items():
            if is_number(value):
                values.setdefault(key, []).append(value)
    return {key: math.fsum(found) / len(found) for key, found in values.items()}


class Records:
    """A run's metrics.jsonl as long as it was when it was opened; close it, or use it in a ``with``.

    Args:
        file: the metrics.jsonl.

    Raises:
        OSError: it cannot be read.
    """

    def __init__(self, file: Path):
        self._file = open_file(file)
        self._descriptor = self._file.fileno()
        self.size = os.fstat(self._descriptor).st_size  # bytes

    def __enter__(self) -> "Records":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def all(self) -> Iterator[Record]:
        """Every record, in the file's order; this reads all of it."""
        return (record for _, _, record in self._records(0, MOST))

    def following(self, place: int, count: int) -> list[Record]:
        """The records that begin at byte ``place`` or behind it, ``count`` at most; none where all are far behind."""
        found: list[Record] = []
        for _, _, record in self._records(place, count * LINE, place + FAR):
            if len(found) == count:
                break
            found.append(record)
        return found

    def last(self, count: int = 1) -> list[Record]:
        """The last records, ``count`` at most, in the file's order; read from the end."""
        found: list[Record] = []
        for line in self._backwards():
            if len(found) == count:
                break
            record = parse(line)
            if record is not None:
                found.append(record)
        return found[::-1]

    def newest(self, key: str, within: int) -> Record | None:
        """The last record that has a key, searched from the end.

        Args:
            key: such as "expert_load".
            within: bytes from the end to search; None is given where they hold no such record.
        """
        name = json.dumps(key).encode()
        for line in self._backwards(max(0, self.size - within)):
            if name in line and key in (record := parse(line) or {}):
                return record
        return None

    def behind(self, step: int) -> int:
        """The byte behind the last record of a step that is at most ``step``; 0 where there is none.

        It is found by bisection, so the records must be in the order of steps. Lines that are no record and follow that
        record lie behind this byte.
        """
        low, high = 0, self.size  # bytes: the record before low is of step or earlier, none from high on is
        while high - low > BLOCK:
            middle = (low + high) // 2
            start, end, record = next(self._records(middle, LINE, high), (middle, middle, None))
            if record is not None and record["step"] <= step:
                low = end
            else:
                high = start
        for _, end, record in self._records(low, BLOCK, high):
            if record["step"] > step:
                break
            low = end
        return low

    def at(self, step: int) -> Record | None:
        """A step's record, found by bisection; None where there is none."""
        record = next((record for _, _, record in self._records(self.behind(step - 1), LINE)), None)
        return record if record is not None and record["step"] == step else None

    def thinned(self, points: int, neighbours: int = 8) -> list[Record]:
        """The means (:func:`mean`) of neighbouring records at places spread evenly over the file.

        A file so short that this would read all of it is cut into ``points`` equal parts instead, so that every record
        is in one of them.

        Args:
            points: most means, at least 2.
            neighbours: records that a mean is of.
        """
        if self.size <= points * neighbours * LINE:
            records = list(self.all())
            parts = min(points, len(records))
            bounds = [i * len(records) // parts for i in range(parts + 1)] if parts else []
            groups = [records[a:b] for a, b in pairwise(bounds)]
        else:
            places = (self.size * i // (points - 1) for i in range(points - 1))
            groups = [*(self.following(place, neighbours) for place in places), self.last(neighbours)]
        return [mean(group) for group in groups if group]

    def at_places(self, places: Iterable[float]) -> Iterator[Record]:
        """The record that begins next behind each place.

        Args:
            places: in [0, 1], shares of the file.
        """
        for place in places:
            yield from self.following(int(place * self.size), 1)

    def having(self, *beginnings: str) -> Iterator[Record]:
        """Every record that has a key which begins so; the file is searched at memory speed, and little of it parsed.

        Args:
            beginnings: of keys, such as "look_"; in ASCII.
        """
        names = [f'"{beginning}'.encode() for beginning in beginnings]
        rest = b""
        for place in range(0, self.size, 64 * BLOCK):
            block = rest + self._read(place, 64 * BLOCK)
            end = len(block) if place + 64 * BLOCK >= self.size else block.rfind(b"\n") + 1
            starts = set()
            for name in names:
                at = block.find(name, 0, end)
                while at >= 0:
                    starts.add(block.rfind(b"\n", 0, at) + 1)
                    line_end = block.find(b"\n", at, end)
                    at = block.find(name, line_end, end) if line_end >= 0 else -1
            for start in sorted(starts):
                line_end = block.find(b"\n", start, end)
                record = parse(block[start : line_end if line_end >= 0 else end])
                if record is not None:
                    yield record
            rest = block[end:]

    def copy(self, start: int, file: Any) -> None:
        """Write all bytes from ``start`` on into an open binary file."""
        for place in range(start, self.size, BLOCK):
            file.write(self._read(place, BLOCK))

    def _records(self, place: int, block: int, until: int | None = None) -> Iterator[tuple[int, int, Record]]:
        """Where each record that begins at ``place`` or behind it begins and ends (bytes), and it.

        Args:
            place: any byte.
            block: bytes to read at first; it doubles each time, up to MOST.
            until: records that begin from this byte on are not given; None for the file's end.
        """
        at = start = max(0, place - 1)  # a line begins at place if the byte before is a line's end
        rest = b""
        skipping = place > 0
        until = self.size if until is None else min(until, self.size)
        # No record is as long as MOST: where no line has ended in it, the next one begins behind what was read.
        while start < until and at < self.size and (at < until or at - start < MOST):
            *lines, rest = (rest + self._read(at, block)).split(b"\n")
            at += block
            block = min(2 * block, MOST)
            if at >= self.size and rest:
                lines.append(rest)
            for line in lines:
                if start >= until:
                    return
                end = min(start + len(line) + 1, self.size)
                record = None if skipping else parse(line)
                if record is not None:
                    yield start, end, record
                skipping = False
                start = end

    def _backwards(self, until: int = 0) -> Iterator[bytes]:
        """Lines from the last to the first that begins behind ``until``; the block that is read doubles each time."""
        place = self.size
        block = BLOCK
        rest = b""
        while place > until:
            start = max(until, place - block)
            first, *lines = (self._read(start, place - start) + rest).split(b"\n")
            yield from reversed(lines)
            rest = first
            place, block = start, 2 * block
        if until == 0:
            yield rest

    def _read(self, place: int, count: int) -> bytes:
        """Bytes of the file as it was when it was opened, fewer than ``count`` at its end."""
        parts = []
        count = min(count, self.size - place)
        while count > 0 and (part := os.pread(self._descriptor, count, place)):  # none: it was cut meanwhile
            parts.append(part)
            place, count = place + len(part), count - len(part)
        return b"".join(parts)
