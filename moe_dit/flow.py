"""The objective: rectified flow between noise (t = 0) and data (t = 1), apart from the network.

z_t = t x + (1 - t) noise; the network regresses the velocity x - noise (arXiv:2209.03003).
"""

from typing import Any

import torch

from moe_dit import sampler
from moe_dit.recipe import Recipe


class Flow:
    """Rectified flow: the loss of a network, and sampling from it."""

    def velocity(self, model: Any, z: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """The network's velocity, float32, shaped as z (a learned sigma's channels are left out)."""
        return model(z, t, y)[:, : z.shape[1]].float()

    def loss(
        self, model: Any, x: torch.Tensor, y: torch.Tensor, noise: torch.Tensor, t: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Mean squared error of the velocity over a batch.

        Args:
            model: the network (or DeepSpeed's engine around it), called with (z, t, y).
            x: data, float32 [N, C, side, side].
            y: labels after dropout, int64 [N].
            noise: unit normal, as x.
            t: times, float32 [N] in [0, 1).

        Returns:
            "loss", a float32 scalar.
        """
        t_ = t.view(-1, *[1] * (x.dim() - 1))
        z = t_ * x + (1 - t_) * noise
        return {"loss": (self.velocity(model, z, t, y) - (x - noise)).square().mean()}

    def times(self, uniform: torch.Tensor) -> torch.Tensor:
        """Training times from uniform draws in [0, 1): the same draws."""
        return uniform

    def sample(
        self,
        model: Any,
        z: torch.Tensor,
        y: torch.Tensor,
        *,
        steps: int,
        method: str = "euler",
        cfg_scale: float | None = None,
        cfg_interval: tuple[float, float] = (0.0, 1.0),
    ) -> torch.Tensor:
        """Turn unit normal z [N, C, side, side] into samples of the labels y (int64 [N]), float32.

        Args:
            steps: number of steps.
            method: "euler" or "heun".
            cfg_scale: classifier-free guidance; None for none.
            cfg_interval: guidance acts on t inside it.
        """

        def velocity(z, t, y):
            return self.velocity(model, z, t, y)

        field = sampler.guided(velocity, y, model.num_classes, cfg_scale, cfg_interval)
        return sampler.integrate(field, z.float(), steps, method)


def build_flow(recipe: Recipe) -> Flow:
    """The recipe's objective."""
    return Flow()
