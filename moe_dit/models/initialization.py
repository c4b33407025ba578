"""Initial weights: a pure function of the seed and a weight's logical name.

The rules are DiT's (arXiv:2212.09748): Xavier-uniform matrices, small normal embeddings, zero biases, zero modulation
and output, so that a fresh network is the identity; routers are Kaiming-normal, DiffMoE's are small normal. A rank
that holds some of a layer's experts draws just those, and gets the values that one process holding all would draw.
"""

import math
import re

import torch
from torch import nn

from moe_dit.models.network import Network
from moe_dit.randomness import fill_weight

# First match wins: pattern of the name, kind of draw, and its scale for a tensor of a given shape.
RULES = [
    (r"adaLN_modulation|final_layer\.linear", "constant", lambda shape: 0.0),
    (r"c_embedder\.(time\..*\.weight|label\.weight)$", "normal", lambda shape: 0.02),
    (r"in_context_posemb$", "normal", lambda shape: 0.02),
    (r"router\.weight$", "normal", lambda shape: math.sqrt(2 / shape[1])),
    (r"gate_weight$", "normal", lambda shape: 0.006),
    (r"bias$", "constant", lambda shape: 0.0),
    (r"norm\w*\.weight$", "constant", lambda shape: 1.0),
    (r"experts\.(gate|up|down)_proj$", "uniform", lambda shape: math.sqrt(6 / (shape[1] + shape[2]))),
    (r"weight$", "uniform", lambda shape: math.sqrt(6 / (shape[0] + math.prod(shape[1:])))),
]


def initialize(model: Network, seed: int, device: torch.device | str = "cpu") -> Network:
    """Give a model that was built on the meta device its memory and initial weights, in float32.

    Args:
        model: parameters on the meta device or not; their values are replaced. A parameter with an attribute
            ``first_expert`` is the slice of a stacked expert weight that starts at that expert.
        seed: the recipe's.
        device: where the weights should live.
    """
    rules = model.weight_rules + RULES
    for prefix, module in model.named_modules():
        for key, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            name = f"{prefix}.{key}" if prefix else key
            if parameter.is_meta:
                parameter = _replace(module, key, parameter, torch.empty(parameter.shape, device=device))
            _fill(parameter, rules, seed, name)
        for key, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[key] = buffer.to(device)
    return model.to(device)  # type: ignore[arg-type]  # diffusers wraps nn.Module.to untyped


def _replace(module: nn.Module, key: str, old: nn.Parameter, values: torch.Tensor) -> nn.Parameter:
    """Swap in a parameter with memory, keeping the marks (of expert parallelism) that the old one carries."""
    new = nn.Parameter(values, requires_grad=old.requires_grad)
    new.__dict__.update(old.__dict__)
    module._parameters[key] = new
    return new


def _fill(parameter: nn.Parameter, rules: list, seed: int, name: str) -> None:
    kind, scale = next((kind, scale) for pattern, kind, scale in rules if re.search(pattern, name))
    value = scale(parameter.shape)
    if kind == "constant":
        nn.init.constant_(parameter, value)
    else:
        start = getattr(parameter, "first_expert", 0) * math.prod(parameter.shape[1:])
        fill_weight(parameter, seed, name, start, kind, value)
