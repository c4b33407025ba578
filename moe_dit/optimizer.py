"""The optimizers that a recipe can name.

DeepSpeed's ZeRO hands an optimizer flat float32 slices of the master weights, and a checkpoint keeps its state by
weight, whatever the topology. So an optimizer must work element by element: the update of one element may depend on
that element's gradient and state alone. torch's AdamW, Adamax, SGD with momentum and most others do.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from moe_dit.recipe import OptimizerConfig
from moe_dit.runtime.errors import InputError


@dataclass(frozen=True)
class OptimizerKind:
    """How an optimizer is made, and what of it a checkpoint keeps.

    Attributes:
        build: makes it of parameter groups and the recipe's section.
        state: keys of the tensors that it keeps for each weight, shaped like it; they begin as zeros. What else it
            keeps must follow from the number of steps, in its state's "step".
    """

    build: Callable[[list[dict], OptimizerConfig], torch.optim.Optimizer]
    state: tuple[str, ...]


def _adamw(groups: list[dict], config: OptimizerConfig) -> torch.optim.Optimizer:
    first, second = config.betas
    return torch.optim.AdamW(groups, lr=config.lr, betas=(first, second), weight_decay=config.weight_decay, fused=True)


OPTIMIZERS = {"adamw": OptimizerKind(_adamw, ("exp_avg", "exp_avg_sq"))}

# What people ask for and cannot have here, and why.
REFUSED = {
    # Tried with DeepSpeed 0.19.8's, which gathers matrices inside ZeRO 1 and 2: it trains, but keeps the momentum of a
    # matrix that two ranks share whole on both, so its state is no slice that another number of ranks could load.
    "muon": "Muon works on whole matrices, and a checkpoint here keeps slices that any number of ranks can load",
    "lamb": "LAMB scales by the norm of a whole weight, of which a rank holds a slice",
    "adafactor": "Adafactor factors whole matrices, of which a rank holds a slice",
}


def optimizer_kind(name: str) -> OptimizerKind:
    """Look an optimizer up by its name in a recipe; InputError where there is none."""
    if name in OPTIMIZERS:
        return OPTIMIZERS[name]
    reason = REFUSED.get(name.lower(), "there is no such optimizer here")
    raise InputError(f"optimizer.name is {name!r}: {reason}; choose one of {', '.join(OPTIMIZERS)}")


def prepare_state(optimizer: torch.optim.Optimizer, kind: OptimizerKind, weights: Iterable[torch.Tensor]) -> None:
    """Create the state of these weights now, as it is before the first step, so that a checkpoint can fill it."""
    for weight in weights:
        state: dict[str, Any] = {key: torch.zeros_like(weight, requires_grad=False) for key in kind.state}
        on_device = optimizer.defaults.get("fused") or optimizer.defaults.get("capturable")
        state["step"] = torch.zeros((), device=weight.device if on_device else "cpu")
        optimizer.state[weight] = state


def set_step(optimizer: torch.optim.Optimizer, step: int) -> None:
    """Set the number of steps taken, which bias corrections need."""
    for state in optimizer.state.values():
        state["step"].fill_(step)
