"""Dropout by position: what is dropped belongs to a sample and a place in the network, not to a rank or a moment.

With draws given (:func:`set_dropout_draws`), a value is kept or dropped by a function of (seed, layer, the sample's
position in the run, token, channel), so a run computes the same whatever ranks share its work, and a recomputed
activation is the same one. Without, the module is torch's own dropout, for whoever trains the plain network.
"""

import zlib
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from moe_dit.randomness import keep_mask


@dataclass(frozen=True)
class DropoutDraws:
    """What a micro-batch's dropped values follow from.

    Attributes:
        seed: the run's.
        layer: a number of the module that drops, int64 []; a tensor, so that layers of a kind can share a graph.
        positions: int64 [N], each sample's position in the run.
    """

    seed: int
    layer: torch.Tensor
    positions: torch.Tensor


class Dropout(nn.Module):
    """Drops values with probability p in training, and scales the others by 1 / (1 - p).

    Attributes:
        draws: set for each micro-batch, or None.
    """

    def __init__(self, p: float):
        super().__init__()
        self.p = p
        self.draws: DropoutDraws | None = None

    def extra_repr(self) -> str:
        return f"p={self.p}"

    @property
    def active(self) -> bool:
        """Whether anything is dropped now."""
        return self.training and self.p > 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Drop values of [N, ..., C]; dimension 0 is the samples that the draws' positions belong to."""
        if not self.active or self.draws is None:
            return F.dropout(x, self.p, self.training)
        rows = x[0].numel() // x.shape[-1]
        row_R = torch.arange(rows, device=x.device).repeat(len(x))
        return self._apply_to(x.reshape(-1, x.shape[-1]), self.draws.positions.repeat_interleave(rows), row_R).view_as(
            x
        )

    def drop_rows(self, x_RC: torch.Tensor, position_R: torch.Tensor, row_R: torch.Tensor) -> torch.Tensor:
        """Drop values of rows in any order: row r belongs to a sample at position_R[r], and is its row_R[r]-th."""
        return self._apply_to(x_RC, position_R, row_R) if self.active else x_RC

    def _apply_to(self, x_RC: torch.Tensor, position_R: torch.Tensor, row_R: torch.Tensor) -> torch.Tensor:
        assert self.draws is not None
        keep_RC = keep_mask(self.draws.seed, self.draws.layer, position_R, row_R, x_RC.shape[1], self.p)
        return x_RC * keep_RC.to(x_RC.dtype) / (1 - self.p)


def dropouts(model: nn.Module) -> dict[str, Dropout]:
    """The modules of a network that drop anything, by name."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, Dropout)}
    return {name: module for name, module in found.items() if module.p > 0}


def set_dropout_draws(modules: dict[str, Dropout], seed: int, positions: torch.Tensor) -> None:
    """Say what the next forward pass drops by: the seed, and each sample's position in the run (int64 [N])."""
    for name, module in modules.items():
        layer = positions.new_full((), zlib.crc32(name.encode()))  # made where it is used: no GPU waits for a copy
        module.draws = DropoutDraws(seed, layer, positions)
