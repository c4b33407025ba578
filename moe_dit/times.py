"""What each rank's time goes into, and which rank the others wait for."""

import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch

from moe_dit.events import record
from moe_dit.runtime import ranks
from moe_dit.runtime.clock import moment, seconds_between
from moe_dit.runtime.files import write_json
from moe_dit.runtime.joining import named
from moe_dit.runtime.notes import noted
from moe_dit.runtime.progress import say

if TYPE_CHECKING:
    from moe_dit.metrics import Report

LOAD_EVERY = 50  # steps between records of every expert's load and every rank's times
# Of a rank, each a mean over the steps since the last report but memory. In seconds: the step; waiting for batches;
# computing until the first collective of the forward pass; the forward passes' exchange of tokens.
NUMBERS = ("seconds", "data", "compute", "exchange", "memory_gb")
MORE = 0.5  # a straggler takes so much more time than the others to its first collective ...
OF_STEP = 0.1  # ... and so much of its step
IN_A_ROW = 2  # reports that say so


class StepTimes:
    """Measures this rank's steps. A call marks a moment of a step (``Engine.measure`` has it called):

    "begins": the network begins; "forward": a forward pass has ended; "exchange" and "exchanged": around each exchange
    of tokens in a forward pass, outside of experts' own work where that can be told apart.

    On CPUs every step is measured by the clock. On GPUs one step of each :data:`LOAD_EVERY` is, by events that are read
    long after they have come: the host never waits for them. A start's first step, which compiles, is no measure.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._on_gpu = device.type == "cuda"
        self._warm = False
        self._measures = False
        self._sums = [0.0, 0.0, 0.0, 0.0]
        self._count = 0
        self._events: tuple[Any, Any, list[tuple[Any, Any]]] | None = None

    def begin(self, step: int) -> None:
        """Step ``step``, counted from 0, begins with waiting for its batches."""
        self._measures = self._warm and (not self._on_gpu or step % LOAD_EVERY == LOAD_EVERY // 2)
        self._began = time.perf_counter()
        self._starts = self._first = self._leaves = None
        self._spans: list[tuple[Any, Any]] = []

    def __call__(self, mark: str) -> None:
        if not self._measures:
            return
        now = moment(self._device)
        if mark == "begins":
            self._starts = now
        elif mark == "exchanged":
            self._spans.append((self._leaves, now))
        else:
            self._first = now if self._first is None else self._first
            self._leaves = now

    def end(self, data: float) -> None:
        """The step is done; ``data`` seconds of it were waited for batches."""
        if self._warm:
            self._count += 1
            self._sums[0] += time.perf_counter() - self._began
            self._sums[1] += data
        if self._measures and self._on_gpu:
            self._events = self._starts, self._first, self._spans
        elif self._measures and self._first is not None:
            # Inputs are made on the host before the network begins, and are this rank's own work too.
            self._sums[2] += self._first - self._began - data
            self._sums[3] += sum(seconds_between(*span) for span in self._spans)
        self._warm = True
        self._measures = False  # what looks at the run between steps marks nothing

    def take(self) -> list[float] | None:
        """:data:`NUMBERS` of the steps since the last time; None, on all ranks alike, where none was measured."""
        if not self._count or (self._on_gpu and self._events is None):
            return None
        seconds, data, compute, exchange = (total / self._count for total in self._sums)
        if self._events is not None:
            starts, first, spans = self._events
            compute = seconds_between(starts, first)
            exchange = sum(seconds_between(*span) for span in spans)
            memory = torch.cuda.max_memory_allocated(self._device)
        else:
            memory = psutil.Process().memory_info().rss
        self._sums, self._count, self._events = [0.0, 0.0, 0.0, 0.0], 0, None
        return [seconds, data, compute, exchange, memory / 1e9]


def slots(numbers: Sequence[float], device: torch.device) -> torch.Tensor:
    """This rank's numbers in its row of zeros [ranks, numbers], on the device; summed over ranks, everybody's."""
    this = ranks.world()
    rows = torch.zeros(this.size, len(numbers), pin_memory=device.type == "cuda")
    rows[this.rank] = torch.tensor(numbers)
    return rows.to(device, non_blocking=True)


def excess(own: Sequence[float], rank: int) -> float:
    """Seconds of ``rank`` over the median of the other ranks; of two ranks, over the other's. Alone: 0."""
    others = [seconds for other, seconds in enumerate(own) if other != rank]
    return own[rank] - statistics.median(others) if others else 0.0


def own_seconds(times: torch.Tensor) -> list[float]:
    """What each rank takes to its first collective, with waiting for data, of a report's times [ranks, numbers]."""
    return (times[:, NUMBERS.index("data")] + times[:, NUMBERS.index("compute")]).tolist()


class RankTimes:
    """Rank 0's record of all ranks' times: RUN/ranks.json, and a line and an event of a rank that others wait for.

    Args:
        run: the run's folder, which it holds.
        start: the name of the ranks' start.
    """

    def __init__(self, run: Path, start: str | None = None):
        self.run = run
        self.start = start
        self.hosts = ranks.hosts()
        self._reports = [0] * len(self.hosts)  # in a row in which a rank was slow

    def add(self, report: "Report") -> None:
        """Take up a report that has every rank's times; says what it shows."""
        assert report.times is not None
        columns = {name: [round(x, 6) for x in report.times[:, i].tolist()] for i, name in enumerate(NUMBERS)}
        head = {"step": report.step, "time": round(time.time(), 3), "hosts": self.hosts}
        with noted(self.run / "ranks.json"):
            write_json(self.run / "ranks.json", head | columns, indent=None)
        for line in self.stragglers(report.step, report.times):
            say(line)
            record(self.run, "straggler", line, report.step, self.start)

    def stragglers(self, step: int, times: torch.Tensor) -> list[str]:
        """A line for each rank that has just proved slow; one that stays slow is told of once.

        Args:
            step: of the report.
            times: float32 [ranks, numbers].
        """
        own = own_seconds(times)
        lines = []
        for rank, host in enumerate(self.hosts):
            seconds, data, *_ = times[rank].tolist()
            more = excess(own, rank)
            slow = more > MORE * (own[rank] - more) and more > OF_STEP * seconds
            self._reports[rank] = self._reports[rank] + 1 if slow else 0
            if self._reports[rank] == IN_A_ROW:
                lines.append(
                    f"step {step}: {named([rank], {rank: host})} takes {own[rank]:.2g} s to its first collective of "
                    f"each step, others {own[rank] - more:.2g}: {data:.2g} s of them waiting for data"
                )
        return lines
