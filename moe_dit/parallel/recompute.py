"""Activation checkpointing: recompute in the backward pass instead of keeping, applied to a model from outside."""

from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from moe_dit.parallel.expert_layers import moe_layers


def apply_activation_checkpointing(model: nn.Module, mode: str) -> list[nn.Module]:
    """Let parts of a model recompute their activations.

    Token counts of MoE layers are taken in both passes then; all experts alike, so loads and their balance stay.

    Args:
        model: has ``blocks``.
        mode: "none", "blocks" (each block keeps its input alone) or "experts" (so does each MoE layer, whose
            activations are the largest: top-k copies of every token).

    Returns:
        The parts that recompute; deleting their attribute ``forward`` undoes it.
    """
    parts = {"none": [], "blocks": list(getattr(model, "blocks", [])), "experts": moe_layers(model)}[mode]
    for part in parts:
        # Dropout is by position, so there is no generator whose state the second pass would need.
        part.forward = partial(checkpoint, part.forward, use_reentrant=False, preserve_rng_state=False)
    return parts
