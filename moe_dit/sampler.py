"""The one sampler: integrates dz/dt = velocity(z, t) from noise at t = 0 to data at t = 1."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch

METHODS = ("euler", "heun", "unipc")


@torch.no_grad()
def integrate(
    velocity: Callable[[torch.Tensor, float], torch.Tensor],
    z: torch.Tensor,
    steps: int,
    method: str,
    end_with_euler: bool = False,
) -> torch.Tensor:
    """Integrate with a fixed step.

    Args:
        velocity: called with z and t in [0, 1]; times are numbers, so that nothing waits for a GPU.
        z: start, unit normal.
        steps: number of equal steps.
        method: "euler"; "heun" (second order, two evaluations a step); "unipc" (second order, one evaluation a step,
            of images [N, C, H, W]; arXiv:2302.04867, diffusers' own).
        end_with_euler: make the last step Euler's, so that the velocity is never asked for at t = 1.
    """
    if method == "unipc":
        return _unipc(velocity, z, steps)
    times = [i / steps for i in range(steps + 1)]
    for i, (t, t_next) in enumerate(pairwise(times)):
        v = velocity(z, t)
        z_next = z + (t_next - t) * v
        if method == "heun" and not (end_with_euler and i == steps - 1):
            z_next = z + (t_next - t) * (v + velocity(z_next, t_next)) / 2
        z = z_next
    return z


def _unipc(velocity: Callable[[torch.Tensor, float], torch.Tensor], z: torch.Tensor, steps: int) -> torch.Tensor:
    """Diffusers' sigma is 1 - t, and its velocity goes from data to noise; it never asks for the one at t = 1."""
    from diffusers import UniPCMultistepScheduler  # brings in scipy.stats: over a second, which training need not wait

    flow: Any = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 1.0}
    scheduler: Any = UniPCMultistepScheduler(**flow)
    scheduler.set_timesteps(steps)
    for sigma, timestep in zip(scheduler.sigmas.tolist(), scheduler.timesteps, strict=False):  # the last sigma is 0
        z = scheduler.step(-velocity(z, 1 - sigma), timestep, z).prev_sample
    return z


def guided(
    velocity: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
    y: torch.Tensor,
    null_label: int,
    cfg_scale: float | None,
    cfg_interval: tuple[float, float] = (0.0, 1.0),
    together: bool = True,
) -> Callable[[torch.Tensor, float], torch.Tensor]:
    """Classifier-free guidance: v = v_null + scale (v_label - v_null) for t inside the interval, else v_label.

    Args:
        velocity: called with z [N, ...], t [N], y [N].
        y: labels, int64 [N].
        cfg_scale: None or 1 for none (one network call a step instead of two).
        cfg_interval: (low, high), open; 0 and 1 stand for no bound (arXiv:2404.07724).
        together: ask for both velocities at once; not where a network's samples depend on the others of their batch.
    """
    low, high = cfg_interval
    labels = torch.cat([y, torch.full_like(y, null_label)])

    def field(z: torch.Tensor, t: float) -> torch.Tensor:
        inside = (low == 0 or t > low) and (high == 1 or t < high)
        if cfg_scale is None or cfg_scale == 1 or not inside:
            return velocity(z, torch.full_like(y, t, dtype=torch.float32), y)
        times = torch.full_like(labels, t, dtype=torch.float32)
        if together:
            v_label, v_null = velocity(torch.cat([z, z]), times, labels).chunk(2)
        else:
            v_label, v_null = (velocity(z, *half) for half in zip(times.chunk(2), labels.chunk(2), strict=True))
        return v_null + cfg_scale * (v_label - v_null)

    return field
