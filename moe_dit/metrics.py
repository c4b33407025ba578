"""A run's record: metrics.jsonl, TensorBoard and the line behind the progress bar, without making a GPU wait."""

import json
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter

LOAD_EVERY = 50  # steps between records of every expert's load


def imbalance(load: torch.Tensor) -> torch.Tensor:
    """Largest over mean tokens of an expert, in the worst layer: [layers, experts] -> scalar, 1 is perfect balance."""
    return (load.amax(1) / load.mean(1)).amax()


class Metrics:
    """Writes a record for each step, on rank 0.

    A step's numbers stay on the device until ``flush``, so that reading them never makes the host wait for the GPU in
    the middle of a step.

    Args:
        run: the run's folder.
        first_step: steps done before; records beyond it (of steps that will be repeated) are dropped.
        images: samples in a step.
        every: steps between flushes.
    """

    def __init__(self, run: Path, first_step: int, images: int, every: int):
        self.path, self.images, self.every = run / "metrics.jsonl", images, every
        self._keep_until(first_step)
        self._file = open(self.path, "a")
        self._board = SummaryWriter(str(run / "tensorboard"), purge_step=first_step + 1)
        self._pending: list[tuple[dict, torch.Tensor]] = []
        self._load: torch.Tensor | None = None
        self._time = time.perf_counter()

    def add(self, step: int, loss: torch.Tensor, load: torch.Tensor, lr: float, grad_norm: float) -> str | None:
        """Record step ``step`` (counted from 1); returns a note for the progress bar when records were written."""
        record: dict[str, Any] = {"step": step, "loss": None, "lr": lr, "grad_norm": grad_norm}
        numbers = torch.stack([loss, imbalance(load)])
        self._load = load if self._load is None else self._load + load
        if step % LOAD_EVERY == 0:
            record["expert_load"] = self._load / self._load.sum(1, keepdim=True)
            self._load = None
        self._pending.append((record, numbers))
        return self.flush() if len(self._pending) >= self.every else None

    def flush(self) -> str | None:
        """Write the pending records."""
        if not self._pending:
            return None
        numbers = torch.stack([numbers for _, numbers in self._pending]).tolist()
        now = time.perf_counter()
        speed = self.images * len(self._pending) / (now - self._time)
        self._time = now
        for (record, _), (loss, worst) in zip(self._pending, numbers, strict=True):
            step = record["step"]
            load = record.pop("expert_load", None)
            record |= {"loss": loss, "images_per_second": round(speed, 2), "moe_imbalance": round(worst, 4)}
            for key, value in record.items():
                if key != "step":
                    self._board.add_scalar(f"train/{key}", value, step)
            if load is not None:
                record["expert_load"] = [[round(share, 5) for share in layer] for layer in load.tolist()]
            self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        self._pending.clear()
        return f"loss {loss:.4f}  {speed:.0f} images/s  imbalance {worst:.2f}"

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
