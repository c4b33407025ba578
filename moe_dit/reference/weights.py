"""The published code's weights, read into ours: same function, other names and layouts.

What differs, besides names. Experts are stacked, where the published code has a module for each. JiT's SwiGLU is one
matrix w12 there, gate and up here. DSMoE's rotary encoding turns channel i with channel i + width/2 (of the head in
1-D, of each half of it in 2-D) there, and neighbouring channels here as in JiT: queries and keys are reordered.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from moe_dit.runtime.errors import InputError


@dataclass(frozen=True)
class Conversion:
    """How one of our tensors comes from published ones.

    Attributes:
        names: the published tensors.
        shape: shape of each of them.
        join: makes ours of them.
    """

    names: list[str]
    shape: torch.Size
    join: Callable[[list[torch.Tensor]], torch.Tensor]

    def convert(self, state: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Our tensor from a published state: float32, in memory of its own or the state's."""
        tensor: torch.Tensor = self.join([state[name] for name in self.names])
        return tensor.to(torch.float32).contiguous()


# Our names to the published ones; all that match apply, in this order.
RENAMES = [
    (r"^c_embedder\.time\.linear_1\.", "t_embedder.mlp.0."),
    (r"^c_embedder\.time\.linear_2\.", "t_embedder.mlp.2."),
    (r"^c_embedder\.label\.", "y_embedder.embedding_table."),
    (r"\.router\.", ".gate."),
]


def conversions(model: nn.Module) -> dict[str, Conversion]:
    """How each tensor of the model's state (weights may be on the meta device) comes from a published state."""
    config = dict(model.config)  # type: ignore[arg-type]
    family = type(model).__name__
    plan = {}
    for name, tensor in model.state_dict().items():
        published = name
        for pattern, replacement in RENAMES:
            published = re.sub(pattern, replacement, published)
        if match := re.fullmatch(r"(.*)\.mlp\.experts\.(gate|up|down)_(proj|bias)", name):
            plan[name] = _stacked(family, config, match[1], match[2], match[3], tensor.shape)
        elif match := re.fullmatch(r"(.*\.mlp(?:\.shared_experts)?)\.(gate|up|down)_proj\.(\w+)", published):
            layer, matrix, kind = match.groups()
            plan[name] = _one(family, layer, matrix, kind, tensor.shape)
        elif family == "DSMoE" and ".attn.qkv." in name and config["positions"] != "sin_cos":
            order = _qkv_order(config)
            plan[name] = Conversion([published], tensor.shape, partial(_reorder, order))
        elif name == "pos_embed":
            plan[name] = Conversion([published], tensor[None].shape, lambda tensors: tensors[0][0])
        else:
            plan[name] = Conversion([published], tensor.shape, lambda tensors: tensors[0])
    if family == "JiT":  # held by a wrapper there
        plan = {k: Conversion([f"net.{n}" for n in c.names], c.shape, c.join) for k, c in plan.items()}
    return plan


def _one(family: str, layer: str, matrix: str, kind: str, shape: torch.Size) -> Conversion:
    """A matrix ("gate", "up", "down") or its bias of one SwiGLU or MLP, from a published layer."""
    if family != "JiT":
        return Conversion([f"{layer}.{matrix}_proj.{kind}"], shape, lambda tensors: tensors[0])
    if matrix == "down":
        return Conversion([f"{layer}.w3.{kind}"], shape, lambda tensors: tensors[0])
    half = slice(shape[0]) if matrix == "gate" else slice(shape[0], None)
    fused = torch.Size([2 * shape[0], *shape[1:]])
    return Conversion([f"{layer}.w12.{kind}"], fused, lambda tensors: tensors[0][half])


def _stacked(family: str, config: dict, block: str, matrix: str, kind: str, shape: torch.Size) -> Conversion:
    """A stacked expert weight, from the published experts' own."""
    kind = "weight" if kind == "proj" else "bias"
    layers = [f"{block}.mlp.experts.{'' if family == 'DiffMoE' else 'blocks.'}{e}" for e in range(shape[0])]
    if family == "DiffMoE" and not config["gated"]:
        names = [f"{layer}.{'fc1' if matrix == 'up' else 'fc2'}.{kind}" for layer in layers]
        return Conversion(names, shape[1:], torch.stack)
    experts = [_one(family, layer, matrix, kind, shape[1:]) for layer in layers]
    names = [name for expert in experts for name in expert.names]
    join = experts[0].join
    return Conversion(names, experts[0].shape, lambda tensors: torch.stack([join([tensor]) for tensor in tensors]))


def _reorder(order: torch.Tensor, tensors: list[torch.Tensor]) -> torch.Tensor:
    return tensors[0][order]


def _qkv_order(config: dict) -> torch.Tensor:
    """Rows of a published qkv in our order: each head's halves of pairs become neighbours, in queries and keys."""
    heads = config["num_heads"]
    width = config["hidden_size"] // config["num_heads"]
    axes = 2 if config["positions"] == "rope_2d" else 1
    pairs = torch.arange(width).view(axes, 2, -1).transpose(1, 2).flatten()
    rows = torch.arange(3 * heads * width).view(3, heads, width).clone()
    rows[:2] = rows[:2, :, pairs]
    return rows.flatten()


def check_state(model: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Raise InputError where a published state does not hold just the tensors that the model needs, in their shapes."""
    needed = {name: conversion.shape for conversion in conversions(model).values() for name in conversion.names}
    missing = [name for name in needed if name not in state]
    surplus = [name for name in state if name not in needed]
    other = [
        f"{name} is {list(state[name].shape)}, not {list(shape)}"
        for name, shape in needed.items()
        if name in state and state[name].shape != shape
    ]
    problems = [
        f"{len(found)} {what} ({', '.join(found[:3])}{', ...' if len(found) > 3 else ''})"
        for what, found in (("of another size", other), ("missing", missing), ("not part of it", surplus))
        if found
    ]
    if problems:
        raise InputError(f"the tensors are not those of this network: {'; '.join(problems)}")
