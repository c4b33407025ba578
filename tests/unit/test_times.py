"""What each rank's time goes into, and who is slow."""

import psutil
import pytest
import torch

from moe_dit.times import RankTimes, StepTimes

CPU = torch.device("cpu")


def test_what_a_step_s_time_goes_into(monkeypatch):
    """Two measured steps by a clock of our own: 2 s of data, 1 of computing, two exchanges of 0.5 and 0.25 s."""
    now = 0.0
    monkeypatch.setattr("moe_dit.times.time.perf_counter", lambda: now)
    times = StepTimes(CPU)

    def step(scale: float) -> None:
        nonlocal now
        times.begin(0)
        marks = [(2.5, "begins"), (0.5, "exchange"), (0.5, "exchanged"), (1.0, "exchange"), (0.25, "exchanged")]
        for seconds, mark in [*marks, (0.25, "forward"), (3.0, "")]:
            now += scale * seconds
            if mark:
                times(mark)
        times.end(scale * 2.0)
        times("exchange")  # a look between steps
        now += 100.0

    assert times.take() is None
    step(7.0)
    assert times.take() is None  # the first step is no measure
    step(1.0)
    step(3.0)
    seconds, data, compute, exchange, memory = times.take()
    assert (seconds, data, compute, exchange) == (16.0, 4.0, 2.0, 1.5)
    assert memory == pytest.approx(psutil.Process().memory_info().rss / 1e9, rel=0.2)
    assert times.take() is None
    times.begin(3)
    now += 4.0
    times("forward")  # without an exchange
    times.end(1.0)
    assert times.take()[:4] == [4.0, 1.0, 3.0, 0.0]


def rows(*own: tuple[float, float, float]) -> torch.Tensor:
    return torch.tensor([[seconds, data, compute, 0.1, 1.0] for seconds, data, compute in own])


def test_stragglers(tmp_path, monkeypatch):
    monkeypatch.setattr("moe_dit.times.ranks.hosts", lambda: ["n1", "n1", "n1", "n2"])
    of = RankTimes(tmp_path)
    even = [(0.5, 0.0, 0.1)] * 3
    slow = rows(*even, (0.5, 0.25, 0.0625))
    line = "rank 3 (n2) takes 0.31 s to its first collective of each step, others 0.1: 0.25 s of them waiting for data"
    assert [of.stragglers(step, slow) for step in (50, 100, 150)] == [[], [f"step 100: {line}"], []]
    assert of.stragglers(200, rows(*even, (0.5, 0.0, 0.1))) == []
    assert [of.stragglers(step, slow) for step in (250, 300)] == [[], [f"step 300: {line}"]]
    # More by half, but little of a step; much of a step, but not more by half.
    of = RankTimes(tmp_path)
    for row in ((0.5, 0.0, 0.149), (0.5, 0.0, 0.151)):
        lines = [of.stragglers(step, rows(*even, row)) for step in (50, 100)]
        assert len(lines[1]) == (row[2] > 0.15)
    of = RankTimes(tmp_path)
    assert [of.stragglers(step, rows(*[(2.0, 0.0, 0.1)] * 3, (2.0, 0.0, 0.29))) for step in (50, 100)] == [[], []]
    # Of two ranks each is held against the other.
    monkeypatch.setattr("moe_dit.times.ranks.hosts", lambda: ["n1", "n2"])
    of = RankTimes(tmp_path)
    both = [of.stragglers(step, rows((0.5, 0.0, 0.1), (0.5, 0.0, 0.2))) for step in (50, 100)]
    (line,) = both[1]
    assert line.startswith("step 100: rank 1 (n2) takes 0.2 s to its first collective of each step, others 0.1: 0 s ")
    monkeypatch.setattr("moe_dit.times.ranks.hosts", lambda: ["n1"])
    assert RankTimes(tmp_path).stragglers(50, rows((0.5, 0.4, 0.1))) == []
