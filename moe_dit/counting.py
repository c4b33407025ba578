"""Counts of a training step without a GPU: kernel launches, host synchronisations and bytes touched, by part.

What is counted, and how near it is to a GPU:

- One real step of :class:`moe_dit.engine.Engine` runs on a CPU as rank 0 of ``ep_size`` ranks that do not exist (torch's
  "fake" process group), with bf16 weights, grouped experts' products and few samples. A rank keeps what it would send,
  as if every other rank sent it just as much.
- Launches are the aten operations that reach the dispatcher below autograd, in the forward and backward pass and the
  step; views and other operations on shapes, and allocations, are left out. On a GPU most are one kernel each; a sort,
  an accumulating index_put and a large foreach are a few, so sums are somewhat low. A collective is one launch.
- A compiled graph counts the nodes that inductor's scheduler keeps after fusion: fused loops and calls of libraries.
  They are those of a CPU, whose fusions differ from a GPU's here and there.
- AutoEP's Triton kernels are counted as what they launch on a GPU: their calls are replaced by torch twins here.
- Synchronisations are reads of a tensor's value by the host (``_local_scalar_dense``), DeepSpeed's calls that
  wait for the device, and the one of an exchange between expert-parallel ranks (split sizes).
- Bytes are those of every launch's tensor arguments and results, but of matrix products, convolutions and attention
  (``products`` in :data:`PRODUCTS`). They are counted at one and two samples and continued linearly to ``samples``.
"""

import os
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from moe_dit.recipe import Recipe

PRODUCTS = ("mm", "bmm", "addmm", "baddbmm", "_grouped_mm", "convolution", "convolution_backward", "scaled_dot_product")
FREE = {"detach", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "alias",
        "lift_fresh", "set_", "resize_", "_reshape_alias", "is_same_size"}  # fmt: skip
SMALL = (2, 4)  # samples that are run; costs are linear in them


@dataclass
class Cost:
    """What a part costs in a step.

    Attributes:
        launches: of kernels.
        synchronisations: of the host with the device.
        bytes: read and written outside products and attention.
    """

    launches: float = 0
    synchronisations: float = 0
    bytes: float = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            self.launches + other.launches,
            self.synchronisations + other.synchronisations,
            self.bytes + other.bytes,
        )


def count(recipe: Recipe, ep_size: int, zero_stage: int, compiled: bool = True, samples: int = 64) -> dict[str, Cost]:
    """Count one training step of one micro-batch on one of ``ep_size`` ranks.

    Must be called in a process that has joined no others, and of its own: DeepSpeed's groups are made once a process.

    Args:
        recipe: what is trained; its micro-batch is taken to be ``samples``.
        ep_size: expert-parallel ranks, which are all ranks there are.
        zero_stage: DeepSpeed's.
        compiled: as GPUs compute it by default, else every operation by itself (needs no C++ compiler).
        samples: of a rank's micro-batch.

    Returns:
        What each part costs, and "total".
    """
    small, large = (_count_small(recipe, ep_size, zero_stage, compiled, n) for n in SMALL)
    table = {}
    for part in large:
        one, two = small.get(part, Cost()), large[part]
        slope = (two.bytes - one.bytes) / (SMALL[1] - SMALL[0])
        table[part] = Cost(two.launches, two.synchronisations, one.bytes + slope * (samples - SMALL[0]))
    table["total"] = sum(table.values(), Cost())
    return table


class _Counter(TorchDispatchMode):
    """Counts what is dispatched; ``part`` says for what."""

    def __init__(self) -> None:
        super().__init__()
        self.costs: dict[str, Cost] = defaultdict(Cost)
        self.operations: dict[tuple[str, str], int] = defaultdict(int)
        self.stack = ["draws and inputs"]
        self.spans: list[tuple[int, int, str]] = []  # of autograd's sequence numbers, made in the forward pass
        self.hidden = 0

    @property
    def part(self) -> str:
        node = torch._C._current_autograd_node()
        if node is None:
            return self.stack[-1]
        number = node._sequence_nr()
        inside = [span for span in self.spans if span[0] <= number < span[1]]
        if node.name().startswith("torch::autograd::AccumulateGrad") or not inside:
            return "gradient hooks" if "AccumulateGrad" in node.name() else "objective"
        return min(inside, key=lambda span: span[1] - span[0])[2]

    def add(self, launches: float = 0, synchronisations: float = 0, size: float = 0, name: str = "") -> None:
        part = self.part
        self.costs[part] = self.costs[part] + Cost(launches, synchronisations, size)
        self.operations[part, name] += 1

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        self.hidden += 1
        try:
            yield
        finally:
            self.hidden -= 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if self.hidden or func.is_view or name in FREE or func.namespace in ("prim", "c10d"):
            return out
        if name == "_local_scalar_dense":
            self.add(synchronisations=1, name=name)
            return out
        product = any(name.startswith(p) or name.startswith("_" + p) for p in PRODUCTS)
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
        unique = {id(t): t for t in tensors}.values()
        self.add(1, 0, 0 if product else sum(t.numel() * t.element_size() for t in unique), name)
        return out
