"""Activation checkpointing: recompute in the backward pass instead of keeping, applied to a model from outside."""

from contextlib import AbstractContextManager, nullcontext
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from moe_dit.models.recomputing import recomputation


def apply_activation_checkpointing(model: nn.Module, mode: str) -> list[nn.Module]:
    """Let parts of a model recompute their activations; nothing that they compute or note changes.

    Args:
        model: has ``blocks``.
        mode: "none", "blocks" (each block keeps its input alone) or "experts" (so does each layer with experts, whose
            activations are the largest: a copy of a token for each expert that takes it).

    Returns:
        The parts that recompute; deleting their attribute ``forward`` undoes it.
    """
    mixtures = [module for module in model.modules() if hasattr(module, "experts")]
    parts = {"none": [], "blocks": list(getattr(model, "blocks", [])), "experts": mixtures}[mode]
    for part in parts:
        # Dropout is by position, so there is no generator whose state the second pass would need.
        options = {"use_reentrant": False, "preserve_rng_state": False, "context_fn": _contexts}
        part.forward = partial(checkpoint, part.forward, **options)
    return parts


def _contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
    """What the first and the second computation run in."""
    return nullcontext(), recomputation()
