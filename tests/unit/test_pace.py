"""Writing at a rate, by a clock of the test's own."""

import os
import threading

import pytest

from moe_dit.runtime import pace
from moe_dit.runtime.pace import Pace, PacedFile


class Clock:
    """Seconds that pass only in sleep."""

    def __init__(self):
        self.now = 100.0
        self.slept: list[float] = []

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


def test_each_piece_takes_its_time_and_a_pause_saves_nothing():
    clock = Clock()
    held = Pace(50.0, lambda: clock.now, clock.sleep)
    held.wrote(100)
    assert clock.slept == [2.0]
    clock.now += 0.5  # writing took half a second itself
    held.wrote(100)
    assert clock.slept == [2.0, 2.0]
    clock.now += 1000.0
    held.wrote(25)
    assert clock.slept == [2.0, 2.0, 0.5]


def test_time_that_writing_took_is_part_of_its_pace():
    clock = Clock()
    held = Pace(50.0, lambda: clock.now, lambda seconds: clock.slept.append(seconds))  # returns at once
    held.wrote(100)
    clock.now += 0.5
    held.wrote(100)
    assert clock.slept == [2.0, 3.5]


def test_what_is_written_is_the_same_and_goes_to_the_disk_piece_by_piece(tmp_path, monkeypatch):
    monkeypatch.setattr(pace, "PIECE", 1000)
    clock = Clock()
    data = os.urandom(4321)
    sizes: list[int] = []
    synced = os.fdatasync
    monkeypatch.setattr(os, "fdatasync", lambda fd: (synced(fd), sizes.append(os.fstat(fd).st_size)))
    with open(tmp_path / "file", "wb") as opened:
        file = PacedFile(opened, Pace(500.0, lambda: clock.now, clock.sleep))
        assert file.write(data[:10]) == 10
        assert file.write(memoryview(data)[10:4000]) == 3990
        assert file.tell() == 4000
        file.write(data[4000:])
        file.flush()
        file.flush()
    assert (tmp_path / "file").read_bytes() == data
    assert sizes == [1010, 2010, 3010, 4321]
    assert sum(clock.slept) == pytest.approx(4321 / 500)


def test_a_run_in_a_hurry_is_not_held_up():
    held = Pace(1e-9)
    waiting = threading.Thread(target=held.wrote, args=(1,), daemon=True)  # for thirty years
    waiting.start()
    held.hurry()
    waiting.join(30)
    assert not waiting.is_alive()
    held.wrote(10**9)
