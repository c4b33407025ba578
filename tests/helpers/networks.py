"""Networks that compute something."""

import torch
from torch import nn

from moe_dit import build_model
from moe_dit.recipe import Recipe


def network(recipe: Recipe) -> nn.Module:
    """A network that is not the identity, as a fresh one is."""
    model, generator = build_model(recipe), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.05 * torch.randn(weight.shape, generator=generator))
    return model
