"""A run's record: metrics.jsonl, TensorBoard and the line behind the progress bar, without making a GPU wait."""

import json
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter

from moe_dit.runtime.progress import say

LOAD_EVERY = 50  # steps between records of every expert's load


@dataclass(frozen=True)
class Report:
    """One step's numbers, on the host."""

    step: int  # counted from 1
    lr: float
    loss: float
    stop: bool  # some rank was told to stop
    grad_norm: float
    load: torch.Tensor  # [layers, experts] tokens


class Reports:
    """Brings each step's numbers to the host without making it wait for a GPU.

    A step's copy is started when the step is queued and looked at ``lag`` steps later, when it has long arrived; every
    rank looks at the same moment, so that all can act on what they read.
    """

    def __init__(self, device: torch.device):
        self.lag = 2 if device.type == "cuda" else 0
        self._queue: deque = deque()

    def push(self, step: int, lr: float, result: dict[str, torch.Tensor], grad_norm: float | torch.Tensor) -> None:
        """Start bringing over a step's result (of Engine.train_step)."""
        load, loss = result["load"], result["loss"]
        norm = torch.as_tensor(grad_norm, dtype=torch.float32, device=loss.device)
        numbers = torch.cat([torch.stack([loss, result["stop"], norm]), load.flatten()])
        host = torch.empty(numbers.shape, pin_memory=numbers.is_cuda).copy_(numbers, non_blocking=True)
        arrived = None
        if numbers.is_cuda:
            arrived = torch.cuda.Event()
            arrived.record()
        self._queue.append((step, lr, host, load.shape, arrived))

    def take(self, everything: bool = False) -> Iterator[Report]:
        """The reports that are due, in order; all of them, waiting for the GPU, with ``everything``."""
        while len(self._queue) > (0 if everything else self.lag):
            step, lr, host, shape, arrived = self._queue.popleft()
            if arrived is not None:
                arrived.synchronize()
            loss, stop, norm = host[:3].tolist()
            yield Report(step, lr, loss, stop > 0, norm, host[3:].view(shape))


def imbalance(load: torch.Tensor) -> float:
    """Largest over mean tokens of an expert, in the worst layer, of [layers, experts]; 1 is perfect balance."""
    return (load.amax(1) / load.mean(1)).amax().item() if load.numel() else 1.0


class Metrics:
    """Writes a record for each step, on rank 0.

    Args:
        run: the run's folder.
        first_step: steps done before; records beyond it (of steps that will be repeated) are dropped.
        images: samples in a step.
    """

    SECONDS_BETWEEN_FLUSHES = 1.0

    def __init__(self, run: Path, first_step: int, images: int):
        self.path, self.images = run / "metrics.jsonl", images
        self._keep_until(first_step)
        self._file = open(self.path, "a")
        self._board = SummaryWriter(str(run / "tensorboard"), purge_step=first_step + 1)
        self._load: torch.Tensor | None = None
        self._time = self._flushed = time.perf_counter()

    def add(self, report: Report) -> str:
        """Record a step; returns a note for the progress bar."""
        now = time.perf_counter()
        speed, self._time = self.images / (now - self._time), now
        record: dict[str, Any] = {
            "step": report.step,
            "loss": report.loss,
            "lr": report.lr,
            "grad_norm": report.grad_norm,
            "images_per_second": round(speed, 2),
            "moe_imbalance": round(imbalance(report.load), 4),
        }
        for key, value in record.items():
            if key != "step":
                self._board.add_scalar(f"train/{key}", value, report.step)
        self._load = report.load if self._load is None else self._load + report.load
        if report.step % LOAD_EVERY == 0 and self._load.numel():
            record |= self._expert_load(report.step)
        self._file.write(json.dumps(record) + "\n")
        if now - self._flushed > self.SECONDS_BETWEEN_FLUSHES:
            self.flush()
        return f"loss {report.loss:.4f}  {speed:.0f} images/s  imbalance {record['moe_imbalance']:.2f}"

    def _expert_load(self, step: int) -> dict[str, Any]:
        """Every expert's share since the last such record; a dead expert got no token in all that time."""
        load, self._load = self._load, None
        assert load is not None
        dead = [f"{expert} of MoE layer {layer}" for layer, expert in (load == 0).nonzero().tolist()]
        if dead:
            say(f"step {step}: no token in {LOAD_EVERY} steps for expert {', '.join(dead)}")
        shares = (load / load.sum(1, keepdim=True)).tolist()
        return {"dead_experts": len(dead), "expert_load": [[round(share, 5) for share in layer] for layer in shares]}

    def flush(self) -> None:
        """Let others see the records."""
        self._flushed = time.perf_counter()
        self._file.flush()

    def close(self) -> None:
        self.flush()
        self._file.close()
        self._board.close()

    def _keep_until(self, step: int) -> None:
        """Drop records after ``step``, and a last line that a kill cut short."""
        if not self.path.exists():
            return
        kept = []
        for line in self.path.read_text().splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except ValueError:
                continue
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(kept))
        temporary.replace(self.path)
