"""The objective: rectified flow between noise (t = 0) and data (t = 1), apart from the network.

z_t = t x + (1 - t) noise, whose velocity is x - noise (arXiv:2209.03003). The network predicts the velocity, or the
data x, which then stands for the velocity (x - z_t) / (1 - t) (JiT, arXiv:2511.13720); the loss is on the velocity.
"""

from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from moe_dit import sampler
from moe_dit.graphs import compiled
from moe_dit.recipe import Recipe


class Flow:
    """Rectified flow: the loss of a network, and sampling from it.

    Args:
        prediction: what the network gives, "velocity" or "data".
        time: distribution of training times: "uniform" on [0, 1), or "logit_normal".
        time_mean, time_std: of logit(t), where it is normal.
        noise_scale: standard deviation of the noise.
        min_denominator: 1 - t is taken for at least this where it divides (data prediction).
    """

    def __init__(
        self,
        prediction: str = "velocity",
        time: str = "uniform",
        time_mean: float = 0.0,
        time_std: float = 1.0,
        noise_scale: float = 1.0,
        min_denominator: float = 0.05,
    ):
        self.prediction = prediction
        self.time = time
        self.time_mean = time_mean
        self.time_std = time_std
        self.noise_scale = noise_scale
        self.min_denominator = min_denominator

    def velocity(self, model: Any, z: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """The network's velocity, float32, shaped as z (a learned sigma's channels are left out)."""
        return self._as_velocity(model(z, t, y), z, t)

    def _as_velocity(self, output: torch.Tensor, z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        output = output[:, : z.shape[1]].float()
        return output if self.prediction == "velocity" else self._towards(output, z, t)

    def _towards(self, x: torch.Tensor, z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """The velocity that leads from z at time t to x at time 1."""
        return (x - z) / _per_sample(1 - t, z).clamp_min(self.min_denominator)

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
            "loss", a float32 scalar; where the network in training adds losses of its own (DiffMoE's "capacity_loss"),
            also its parts: "mse" and theirs by name.
        """
        z, target = self._path(x, noise, t)
        mse = self._mean_square(model(z, t, y), z, t, target)
        auxiliary: dict[str, torch.Tensor] = getattr(model, "auxiliary_losses", dict)()
        if not auxiliary:
            return {"loss": mse}
        return {"loss": mse + torch.stack(list(auxiliary.values())).sum(), "mse": mse, **auxiliary}

    def errors(
        self, model: Any, x: torch.Tensor, y: torch.Tensor, noise: torch.Tensor, t: torch.Tensor
    ) -> torch.Tensor:
        """Each sample's mean squared error of the velocity, float32 [N]; arguments as :meth:`loss`'s."""
        z, target = self._path(x, noise, t)
        return (self.velocity(model, z, t, y) - target).square().flatten(1).mean(1)

    def compile(self, backend: Any = "inductor") -> None:
        """Make one kernel of what comes before the network in :meth:`loss`, and one of what comes after it."""
        for name in ("_path", "_mean_square"):
            setattr(self, name, partial(compiled(getattr(Flow, name), backend), self))

    def _path(self, x: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """z_t and the velocity there, shaped as x."""
        noise = noise * self.noise_scale
        z = _per_sample(t, x) * x + _per_sample(1 - t, x) * noise
        # With data prediction the target takes the clamped denominator too, so that a perfect network has loss 0.
        target = x - noise if self.prediction == "velocity" else self._towards(x, z, t)
        return z, target

    def _mean_square(
        self, output: torch.Tensor, z: torch.Tensor, t: torch.Tensor, target: torch.Tensor
    ) -> torch.Tensor:
        return (self._as_velocity(output, z, t) - target).square().mean()

    def times(self, uniform: torch.Tensor) -> torch.Tensor:
        """Training times, float32 [N], from uniform draws in [0, 1)."""
        if self.time == "uniform":
            return uniform
        # The normal's inverse distribution function; a draw of 0 gives t = 0.
        normal = torch.special.ndtri(uniform.double())
        return torch.sigmoid(self.time_mean + self.time_std * normal).float()

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
            method: one of :data:`moe_dit.sampler.METHODS`.
            cfg_scale: classifier-free guidance; None for none.
            cfg_interval: guidance acts on t inside it.
        """

        def velocity(z, t, y):
            return self.velocity(model, z, t, y)

        together = not getattr(model, "couples_samples", False)
        field = sampler.guided(velocity, y, model.num_classes, cfg_scale, cfg_interval, together)
        # A predicted image says little about the velocity at t = 1, where 1 - t divides: JiT ends with Euler's step.
        end_with_euler = self.prediction == "data"
        return sampler.integrate(field, z.float() * self.noise_scale, steps, method, end_with_euler)


def _per_sample(t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """[N] shaped to multiply x [N, ...]."""
    return t.view(-1, *[1] * (x.dim() - 1))


def build_flow(recipe: Recipe) -> Flow:
    """The recipe's objective."""
    settings = asdict(recipe.flow)
    del settings["label_dropout"]  # labels are dropped where batches are made (moe_dit.data)
    return Flow(**settings)
