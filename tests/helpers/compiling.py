"""A network as one rank trains it, and a compiler that notes what it is given."""

import torch
from torch import nn

from moe_dit import build_model
from moe_dit.models.initialization import initialize
from moe_dit.models.moe import Experts, MoE
from moe_dit.parallel.expert_layers import ExpertParallelMoE


def one_rank(recipe) -> nn.Module:
    """The network as one rank trains it, no group of ranks being there to speak with."""
    model = build_model(recipe, device="meta").train()
    for name, layer in [(name, m) for name, m in model.named_modules() if isinstance(m, MoE)]:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, ExpertParallelMoE(name, layer, 1, 0, {}))
    initialize(model, recipe.seed, torch.device("cpu"))
    for experts in (module for module in model.modules() if isinstance(module, Experts)):
        experts.implementation = "loop"  # rows go as they go on GPUs; by themselves CPUs add up tokens
    with torch.no_grad():  # a fresh network predicts zero whatever its blocks do
        for i, weight in enumerate(model.parameters()):
            weight += 0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(i))
    return model


def counting(graphs: list):
    """A backend that notes each graph, and computes it as it is."""

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    return backend


def step(model: nn.Module, recipe) -> tuple[float, dict[str, torch.Tensor]]:
    """A loss and its gradients, of inputs that are always the same."""
    generator = torch.Generator().manual_seed(0)
    side = recipe.model.input_size
    x = torch.randn(6, recipe.model.in_channels, side, side, generator=generator)
    y = torch.arange(6) % recipe.model.num_classes
    losses = [model(x, torch.linspace(0, 1, 6), y).square().mean(), *model.auxiliary_losses().values()]
    model.zero_grad()
    torch.stack(losses).sum().backward()
    gradients = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    return sum(losses).item(), gradients
