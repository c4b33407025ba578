"""Linear layers by oneDNN, the fast form of products of tokens on CPUs.

For float32 torch 2.14 takes MKL, and has no switch. Forward products and inputs' gradients by oneDNN, which torch
brings too, take 3% off a step of DSMoE-S on an AMD EPYC (docs/performance.md). Weights' gradients stay MKL's, which is
as fast. So do experts' products: oneDNN makes code for every number of rows that it meets.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """:func:`torch.nn.functional.linear`: x [..., D], weight [F, D], bias [F] -> [..., F]."""
    if x.dtype != torch.float32 or weight.dtype != torch.float32:
        return F.linear(x, weight, bias)
    return _Linear.apply(x, weight, bias)


def use_onednn(model: nn.Module) -> int:
    """Let a network's linear layers compute by :func:`linear`, where torch has oneDNN; returns how many do."""
    if not torch.backends.mkldnn.is_available():
        return 0
    layers = [layer for layer in model.modules() if type(layer) is nn.Linear]
    for layer in layers:
        layer.forward = partial(_forward, layer)  # type: ignore[method-assign]
    return len(layers)


def _forward(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return linear(x, layer.weight, layer.bias)


def _product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    # What torch.compile makes of linear layers on CPUs; torch has no public name for it.
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad):
        x, weight = ctx.saved_tensors
        grad_x = _product(grad, weight.T, None) if ctx.needs_input_grad[0] else None
        rows = grad.flatten(0, -2)
        grad_weight = rows.T @ x.flatten(0, -2) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight, rows.sum(dim=0) if ctx.needs_input_grad[2] else None
