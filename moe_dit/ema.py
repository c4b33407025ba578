"""Exponential moving averages of the weights, apart from the optimizer.

Each rank averages the float32 master weights that it owns (flat slices, under ZeRO), so the averages are sharded as the
optimizer's state is, exact, and take one pass over the slices a step.
"""

from collections.abc import Sequence

import torch


class EMA:
    """Averages of a list of tensors: after each step average = decay * average + (1 - decay) * weight.

    Args:
        weights: float32 tensors that someone else changes in place; averages begin equal to them.
        decays: decay by the average's name ("ema", ...).

    Attributes:
        averages: name -> a tensor for each weight, of its shape.
    """

    def __init__(self, weights: Sequence[torch.Tensor], decays: dict[str, float]):
        self.weights = list(weights)
        self.decays = decays
        self.averages = {name: [weight.detach().clone() for weight in self.weights] for name in decays}

    @torch.no_grad()
    def update(self) -> None:
        """Take one step of every average."""
        weights = [weight.detach() for weight in self.weights]
        for name, decay in self.decays.items():
            if weights:
                torch._foreach_lerp_(self.averages[name], weights, 1 - decay)
