"""A run's record: metrics.jsonl, its sinks and the line behind the progress bar, without making a GPU wait."""

import json
import os
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moe_dit.recipe import Recipe
from moe_dit.records import Records
from moe_dit.runtime import ranks
from moe_dit.runtime.clock import moment, seconds_between
from moe_dit.runtime.files import open_to_append, sync
from moe_dit.runtime.notes import noted
from moe_dit.runtime.progress import say
from moe_dit.sinks import Sinks
from moe_dit.times import LOAD_EVERY, excess, own_seconds


@dataclass(frozen=True)
class Report:
    """One step's numbers, on the host."""

    step: int  # counted from 1
    lr: float
    losses: dict[str, float]  # "loss", and its parts where it is a sum
    stop: bool  # some rank was told to stop
    grad_norm: float
    load: torch.Tensor  # [layers, experts] tokens
    seconds: float  # that the step took
    data_seconds: float = 0.0  # of them, that this rank's host waited for its batches
    times: torch.Tensor | None = None  # [ranks, numbers] now and then: what each rank's time went into (moe_dit.times)


class Reports:
    """Brings each step's numbers to the host without making it wait for a GPU.

    A step's copy is started when the step is queued and looked at ``lag`` steps later, when it has long arrived; every
    rank looks at the same moment, so that all can act on what they read. Times are taken where the work is done: on the
    GPU by its own events, so that a late look does not change them.
    """

    def __init__(self, device: torch.device):
        self.lag = 2 if device.type == "cuda" else 0
        self._device = device
        self._queue: deque = deque()
        self.restart_clock()

    def restart_clock(self) -> None:
        """Count the next step's time from now: what came before (a save, a look) is no part of it."""
        self._last = moment(self._device)

    def push(
        self,
        step: int,
        lr: float,
        names: list[str],
        result: dict[str, torch.Tensor],
        grad_norm: float | torch.Tensor,
        data_seconds: float = 0.0,
    ) -> None:
        """Start bringing over a step's result (of Engine.train_step); ``names`` are its losses'."""
        load = result["load"]
        terms = result["terms"]
        norm = torch.as_tensor(grad_norm, dtype=torch.float32, device=terms.device)
        times = [result["times"].flatten()] if "times" in result else []
        numbers = torch.cat([terms, torch.stack([result["stop"], norm]), load.flatten(), *times])
        host = torch.empty(numbers.shape, pin_memory=numbers.is_cuda).copy_(numbers, non_blocking=True)
        before = self._last
        self._last = moment(self._device)
        self._queue.append((step, lr, names, host, load.shape, before, self._last, data_seconds))

    def take(self, everything: bool = False) -> Iterator[Report]:
        """The reports that are due, in order; all of them, waiting for the GPU, with ``everything``."""
        while len(self._queue) > (0 if everything else self.lag):
            step, lr, names, host, shape, before, arrived, waited = self._queue.popleft()
            if self._device.type == "cuda":
                arrived.synchronize()
            seconds = seconds_between(before, arrived)
            n = len(names)
            losses = dict(zip(names, host[:n].tolist(), strict=True))
            stop, norm = host[n : n + 2].tolist()
            load = host[n + 2 : n + 2 + shape.numel()].view(shape)
            rest = host[n + 2 + shape.numel() :]
            times = rest.view(ranks.world().size, -1) if len(rest) else None
            yield Report(step, lr, losses, stop > 0, norm, load, seconds, waited, times)


def _numbers(record: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """A record's numbers by name; those of a list by name/index."""
    for key, value in record.items():
        if isinstance(value, list):
            yield from ((f"{key}/{i}", item) for i, item in enumerate(value))
        elif key != "step":
            yield key, value


def _slowest(times: torch.Tensor) -> dict[str, Any]:
    """The rank that takes longest to its first collective, and by how much, of times [ranks, numbers]."""
    own = own_seconds(times)
    rank = own.index(max(own))
    return {"slowest_rank": rank, "slowest_rank_excess": round(excess(own, rank), 6)}


def imbalance(load: torch.Tensor) -> float:
    """Largest over mean tokens of an expert, in the worst layer, of [layers, experts]; 1 is perfect balance."""
    return (load.amax(1) / load.mean(1)).amax().item() if load.numel() else 1.0


class Metrics:
    """Writes a record for each step, on rank 0.

    Args:
        run: the run's folder.
        first_step: steps done before.
        recipe: its global batch size makes a speed of a step's time.
        kept: steps whose records tell of what is continued. Others that are there, of steps that will be repeated,
            move to metrics_superseded.jsonl.
    """

    SECONDS_BETWEEN_FLUSHES = 1.0

    def __init__(self, run: Path, first_step: int, recipe: Recipe, kept: int):
        self.path = run / "metrics.jsonl"
        self.images = recipe.global_batch_size
        self._kept: int | None = kept  # until others are set aside
        self._unwritten: list[bytes] = []
        self._descriptor: int | None = None  # opened anew after a failure
        self.flush()
        self._sinks = Sinks(recipe, run, first_step)
        self._load: torch.Tensor | None = None
        self._flushed = time.perf_counter()

    def add(self, report: Report, look: dict[str, Any] | None = None) -> str:
        """Record a step, and what a look after it found; returns a note for the progress bar."""
        loss = report.losses["loss"]
        record: dict[str, Any] = {
            "step": report.step,
            "loss": loss,
            "lr": report.lr,
            "grad_norm": report.grad_norm,
            "images_per_second": round(self.images / report.seconds, 2),
            "moe_imbalance": round(imbalance(report.load), 4),
            "data_wait": round(report.data_seconds / report.seconds, 4),
        }
        record |= {name: value for name, value in report.losses.items() if name != "loss"}
        if report.times is not None and len(report.times) > 1:
            record |= _slowest(report.times)
        record |= look or {}
        self._sinks.numbers(dict(_numbers(record)), report.step)
        self._load = report.load if self._load is None else self._load + report.load
        if report.step % LOAD_EVERY == 0 and self._load.numel():
            record |= self._expert_load(report.step)
        self._unwritten.append(json.dumps(record).encode() + b"\n")
        if time.perf_counter() - self._flushed > self.SECONDS_BETWEEN_FLUSHES:
            self.flush()
        return f"loss {loss:.4f}  {record['images_per_second']:.0f} images/s  imbalance {record['moe_imbalance']:.2f}"

    def picture(self, name: str, image: np.ndarray, step: int) -> None:
        """Give a picture, uint8 [H, W, 3], to the sinks."""
        self._sinks.picture(name, image, step)

    def _expert_load(self, step: int) -> dict[str, Any]:
        """Every expert's share since the last such record; a dead expert got no token in all that time."""
        load = self._load
        self._load = None
        assert load is not None
        dead = [f"{expert} of MoE layer {layer}" for layer, expert in (load == 0).nonzero().tolist()]
        if dead:
            say(f"step {step}: no token in {LOAD_EVERY} steps for expert {', '.join(dead)}")
        shares = (load / load.sum(1, keepdim=True)).tolist()
        return {"dead_experts": len(dead), "expert_load": [[round(share, 5) for share in layer] for layer in shares]}

    def flush(self) -> None:
        """Let others see the records; those that cannot be written now are kept, and written when that works."""
        self._flushed = time.perf_counter()
        with noted(self.path, consequence="its records are kept until that works"):
            try:
                if self._kept is not None:
                    self._keep_until(self._kept)
                    self._kept = None
                if self._descriptor is None:
                    self._descriptor = open_to_append(self.path)
                while text := b"".join(self._unwritten):
                    self._unwritten = [text[os.write(self._descriptor, text) :]]
            except OSError:
                self._let_go()
                raise

    def _let_go(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def close(self) -> None:
        """Write everything out."""
        self.flush()
        self._let_go()
        self._sinks.close()

    def _keep_until(self, step: int) -> None:
        """Set records after ``step`` aside, and a last line that a kill cut short."""
        if not self.path.exists():
            return
        aside = self.path.with_name("metrics_superseded.jsonl")
        with Records(self.path) as records:
            end = records.behind(step)
            if end < records.size:
                _end_line(aside)
                with os.fdopen(open_to_append(aside), "ab") as file:
                    records.copy(end, file)
                    file.flush()
                    os.fsync(file.fileno())
                sync(aside.parent)
                first, last = records.following(end, 1), records.last()
                os.close(open_to_append(self.path))  # no other folder's file is cut
                # A kill before this line leaves these records in both files; they are set aside again then.
                os.truncate(self.path, end)
                sync(self.path)
                what = "a line that is no record"
                if first:
                    what = f"the records of steps {first[0]['step']} to {last[0]['step']}"
                say(f"{what} moved from {self.path} to {aside.name}: they are no part of what continues")
        _end_line(self.path)


def _end_line(path: Path) -> None:
    """Make a file, or end its last line where that was cut short: what follows stands on a line of its own."""
    os.close(open_to_append(path))
    with open(path, "a+b") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
