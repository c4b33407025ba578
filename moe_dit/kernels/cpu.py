"""Experts' products one expert after another: the fast form on CPUs, for every number and width of experts.

In autograd a loop over ``weight[e]`` makes a zero-filled gradient of the whole stack for every expert, and one over
``x[rows of e]`` a zero-filled gradient of all tokens. Here each expert's rows are gathered when they are needed, each
weight's gradient is written once in its place, and routing weights multiply hidden values, which are narrower than
outputs. Shapes: T tokens, D width, N rows sorted by expert, E experts, F expert width.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable


class Weights(NamedTuple):
    """Stacked experts: gate and up [E, F, D], down [E, D, F], their biases [E, F] and [E, D]; no gate: a plain MLP."""

    gate: torch.Tensor | None
    up: torch.Tensor
    down: torch.Tensor
    gate_bias: torch.Tensor | None = None
    up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None


# Never part of a graph: it works in place (see the rule in kernels/rows.py), and its counts are numbers on the host.
@torch.compiler.disable
def expert_rows(x_ND: torch.Tensor, counts: Sequence[int], weights: Weights) -> torch.Tensor:
    """Apply expert e to its counts[e] rows, of rows that are sorted by expert: [N, D] -> [N, D].

    Rows past the last expert's are padding, and give zeros.
    """
    return _Loop.apply(x_ND, None, None, tuple(counts), *weights)


@torch.compiler.disable
def expert_tokens(
    x_TD: torch.Tensor, token_N: torch.Tensor, weight_N: torch.Tensor, counts: Sequence[int], weights: Weights
) -> torch.Tensor:
    """Apply experts to tokens, and add up what each token gets, weighted: [T, D] -> [T, D].

    Args:
        x_TD: tokens.
        token_N: int64, which token each row of expert after expert is; a token is an expert's at most once.
        weight_N: what each row counts.
        counts: rows of each expert, N in all.
        weights: the experts.
    """
    return _Loop.apply(x_TD, token_N, weight_N, tuple(counts), *weights)


def _ends(counts: tuple[int, ...]) -> list[tuple[int, int, int]]:
    """(expert, first row, last row) of the experts that have rows."""
    ends = torch.tensor(counts).cumsum(0).tolist()
    return [(e, end - n, end) for e, (n, end) in enumerate(zip(counts, ends, strict=True)) if n]


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, e: int) -> torch.Tensor:
    return x @ weight[e].T if bias is None else torch.addmm(bias[e], x, weight[e].T)


class _Loop(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, token_N, weight_N, counts, *stacked):
        weights = Weights(*stacked)
        keep = any(ctx.needs_input_grad)
        out = torch.zeros_like(x)
        hidden = []
        for e, start, end in _ends(counts):
            rows = x[start:end] if token_N is None else x.index_select(0, token_N[start:end])
            up = _linear(rows, weights.up, weights.up_bias, e)
            gate = None if weights.gate is None else _linear(rows, weights.gate, weights.gate_bias, e)
            if keep:
                hidden += [up] if gate is None else [up, gate]
            h = F.gelu(up, approximate="tanh") if gate is None else F.silu(gate).mul_(up)
            if token_N is None:
                y = out[start:end]
                if weights.down_bias is None:
                    torch.mm(h, weights.down[e].T, out=y)
                else:
                    torch.addmm(weights.down_bias[e], h, weights.down[e].T, out=y)
            else:
                weight_n1 = weight_N[start:end, None]
                y = h.mul_(weight_n1) @ weights.down[e].T
                if weights.down_bias is not None:
                    y.addcmul_(weight_n1, weights.down_bias[e])
                out.index_add_(0, token_N[start:end], y)
        ctx.counts = counts
        ctx.save_for_backward(x, token_N, weight_N, *stacked, *hidden)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad):
        x, token_N, weight_N, *rest = ctx.saved_tensors
        stacked, hidden = rest[:6], iter(rest[6:])
        weights = Weights(*stacked)
        grad = grad.contiguous()
        grad_x = torch.zeros_like(x)
        grad_weight_N = None if weight_N is None else torch.empty_like(weight_N)
        room: list[Any] = [None if weight is None else _gradient_like(weight, ctx.counts) for weight in stacked]
        grads = Weights(*room)
        for e, start, end in _ends(ctx.counts):
            rows, grad_y = (
                of[start:end] if token_N is None else of.index_select(0, token_N[start:end]) for of in (x, grad)
            )
            up, gate = next(hidden), None if weights.gate is None else next(hidden)
            h = F.gelu(up, approximate="tanh") if gate is None else (silu := F.silu(gate)) * up
            grad_h = grad_y @ weights.down[e]
            weighted = h
            if weight_N is not None and grad_weight_N is not None:
                weight_n1 = weight_N[start:end, None]
                torch.sum(grad_h * h, dim=1, out=grad_weight_N[start:end])
                if weights.down_bias is not None:
                    grad_weight_N[start:end] += grad_y @ weights.down_bias[e]
                weighted = h.mul_(weight_n1)
                grad_h.mul_(weight_n1)
            torch.mm(grad_y.T, weighted, out=grads.down[e])
            if grads.down_bias is not None:
                ones = grad_y.new_ones(end - start) if weight_N is None else weight_N[start:end]
                torch.mv(grad_y.T, ones, out=grads.down_bias[e])
            grad_rows = grad_x[start:end] if token_N is None else torch.empty_like(rows)
            if gate is None or weights.gate is None or grads.gate is None:
                grad_up = torch.ops.aten.gelu_backward(grad_h, up, approximate="tanh")
                torch.mm(grad_up, weights.up[e], out=grad_rows)
            else:
                grad_up = silu.mul_(grad_h)
                grad_gate = torch.ops.aten.silu_backward(grad_h.mul_(up), gate)
                torch.mm(grad_up, weights.up[e], out=grad_rows)
                grad_rows.addmm_(grad_gate, weights.gate[e])
                torch.mm(grad_gate.T, rows, out=grads.gate[e])
                if grads.gate_bias is not None:
                    torch.sum(grad_gate, dim=0, out=grads.gate_bias[e])
            torch.mm(grad_up.T, rows, out=grads.up[e])
            if grads.up_bias is not None:
                torch.sum(grad_up, dim=0, out=grads.up_bias[e])
            if token_N is not None:
                grad_x.index_add_(0, token_N[start:end], grad_rows)
        return grad_x, None, grad_weight_N, None, *grads


def _gradient_like(weight: torch.Tensor, counts: tuple[int, ...]) -> torch.Tensor:
    """Room for a stack's gradient: an expert without rows has zeros."""
    gradient = torch.empty_like(weight)
    for e, n in enumerate(counts):
        if not n:
            gradient[e].zero_()
    return gradient
