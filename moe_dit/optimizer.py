"""AdamW that also keeps the exponential moving average of the weights, as one more piece of its state.

DeepSpeed's ZeRO hands an optimizer flat float32 slices of the master weights, so an EMA kept here is sharded, float32
and exact, without a line of code that knows of ZeRO.
"""

from collections.abc import Iterable

import torch


class AdamWithEMA(torch.optim.AdamW):
    """torch's AdamW whose state holds, beside exp_avg and exp_avg_sq, one average of the weights for each decay.

    Args:
        params: parameters or parameter groups.
        ema_decays: state key ("ema", ...) to decay d; after each step average = d * average + (1 - d) * weight.
    """

    def __init__(self, params, *, ema_decays: dict[str, float], **adamw):
        super().__init__(params, **adamw)
        self.ema_decays = ema_decays

    @property
    def state_keys(self) -> tuple[str, ...]:
        """Names of the tensors kept for each weight, all shaped like it."""
        return ("exp_avg", "exp_avg_sq", *self.ema_decays)

    def prepare(self, weights: Iterable[torch.Tensor]) -> None:
        """Create the state of these weights now: zero moments, averages equal to the weights."""
        for weight in weights:
            self.state[weight] = {
                "step": torch.zeros((), device=weight.device if self.defaults["fused"] else "cpu"),
                "exp_avg": torch.zeros_like(weight, requires_grad=False),
                "exp_avg_sq": torch.zeros_like(weight, requires_grad=False),
                **{key: weight.detach().clone() for key in self.ema_decays},
            }

    def set_step(self, step: int) -> None:
        """Set the number of steps taken, which bias correction needs."""
        for state in self.state.values():
            state["step"].fill_(step)

    @torch.no_grad()
    def step(self, closure=None):
        loss = super().step(closure)
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.numel()]
            for key, decay in self.ema_decays.items():
                averages = [self.state[weight][key] for weight in weights]
                if averages:
                    torch._foreach_lerp_(averages, [weight.detach() for weight in weights], 1 - decay)
        return loss
