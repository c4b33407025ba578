"""Tokens to rows that are sorted by expert, SwiGLU on such rows, and rows back to tokens.

Shapes: T tokens, K experts a token is sent to, N = T K rows, D width. Both ways and both of their backward passes are
sums over the K rows of a token, whose places are known: nothing is added atomically, so results do not change from run
to run, and nothing sorts indices or fills a float32 [T, K, D] tensor, as torch's own index_put and multiplication do.

CUDA tensors take the Triton kernels, and with TRITON_INTERPRET=1 (Triton's interpreter) all tensors do; otherwise, and
where there is no Triton, the functions of :class:`Torch` compute the same. So does a graph that is compiled: inductor
makes one kernel of a token's sum and what stands around it (residual, gate, shared expert), which no kernel here does.

A rule for every autograd.Function that may be compiled, and what it calls: the forward pass does nothing in place to
what it returns, and returns no alias of another tensor. A call that gives back its own argument (``to`` or ``float`` in
the same dtype, ``index_copy_``) is two values to Dynamo but one tensor. Dynamo 2.11 returns every value that the
forward pass made, hidden, beside the result, and autograd then takes the result for the hidden one: gradients are zero,
and nothing says so (pytorch issue 180642).
"""

import os
from types import ModuleType

import torch
import torch.nn.functional as F

try:
    from moe_dit.kernels import triton_rows
except ModuleNotFoundError as error:
    if error.name != "triton":
        raise
    triton_rows = None  # type: ignore[assignment]  # torch's wheels bring Triton to Linux only


def places(experts_TK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How rows are sorted by expert: for each row its flat (token, choice), and for each (token, choice) its row.

    Args:
        experts_TK: the experts of each token, int64 [T, K].

    Returns:
        order_N, int64 [N]: row n is choice order % K of token order // K; rows of an expert are in order of tokens.
        place_TK, int64 [T, K]: the inverse permutation.
    """
    order_N = experts_TK.flatten().argsort(stable=True)
    place_N = torch.empty_like(order_N)
    place_N[order_N] = torch.arange(len(order_N), device=order_N.device)
    return order_N, place_N.view_as(experts_TK)


def dispatch(x_TD: torch.Tensor, order_N: torch.Tensor, place_TK: torch.Tensor) -> torch.Tensor:
    """Copy tokens to the rows of their experts: [T, D] -> [N, D]; order_N and place_TK are from :func:`places`."""
    return _Dispatch.apply(x_TD, order_N, place_TK)


def combine(rows_ND: torch.Tensor, place_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
    """Sum the rows of each token with its weights, in float32: [N, D] -> [T, D], in the rows' precision.

    Args:
        rows_ND: what the experts gave.
        place_TK: from :func:`places`.
        weights_TK: float32 [T, K].
    """
    return _Combine.apply(rows_ND, place_TK, weights_TK)


def regroup(rows_RD: torch.Tensor, counts_SE: torch.Tensor) -> torch.Tensor:
    """Rows [R, D] in order of (source, expert) to order of (expert, source).

    Args:
        rows_RD: what S ranks sent, each its rows sorted by expert.
        counts_SE: how many rows of each expert each of them sent, integers [S, E] that sum to R.
    """
    return _Regroup.apply(rows_RD, counts_SE, False)


def ungroup(rows_RD: torch.Tensor, counts_SE: torch.Tensor) -> torch.Tensor:
    """What :func:`regroup` does, undone."""
    return _Regroup.apply(rows_RD, counts_SE, True)


def swiglu(gate_NF: torch.Tensor, up_NF: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, computed in float32 and rounded once; the backward pass computes it all from gate and up."""
    return _SwiGLU.apply(gate_NF, up_NF)


def _rounded(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x in ``dtype``, and x itself where it is: no second name for it (see above)."""
    return x if x.dtype == dtype else x.to(dtype)


class Torch:
    """The kernels in plain torch; :mod:`moe_dit.kernels.triton_rows` has the same functions."""

    @staticmethod
    def sum_rows(rows_ND: torch.Tensor, place_TK: torch.Tensor, weights_TK: torch.Tensor | None) -> torch.Tensor:
        """[N, D] -> [T, D]: row place[t, k] times weight[t, k], summed over k in float32; no weights are ones."""
        slots_TKD = rows_ND[place_TK].float()
        if weights_TK is not None:
            slots_TKD = slots_TKD * weights_TK[..., None]
        return _rounded(slots_TKD.sum(1), rows_ND.dtype)

    @staticmethod
    def sum_rows_backward(
        grad_TD: torch.Tensor, rows_ND: torch.Tensor, place_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The gradients of sum_rows to rows [N, D], in their precision, and to weights, float32 [T, K]."""
        grad_rows_ND = torch.empty_like(rows_ND)
        grad_rows_ND[place_TK] = (grad_TD.float()[:, None] * weights_TK[..., None]).to(rows_ND.dtype)
        grad_weights_TK = (rows_ND[place_TK].float() * grad_TD.float()[:, None]).sum(-1)
        return grad_rows_ND, grad_weights_TK

    @staticmethod
    def move_rows(rows_RD: torch.Tensor, counts_SE: torch.Tensor, back: bool) -> torch.Tensor:
        """[R, D] -> [R, D]: from order of (source, expert) to order of (expert, source), or back."""
        sources, experts = counts_SE.shape
        expert_G = torch.arange(experts, device=rows_RD.device).repeat(sources)
        expert_R = expert_G.repeat_interleave(counts_SE.flatten(), output_size=len(rows_RD))
        order_R = expert_R.argsort(stable=True)
        return rows_RD.index_copy(0, order_R, rows_RD) if back else rows_RD[order_R]

    @staticmethod
    def swiglu(gate_NF: torch.Tensor, up_NF: torch.Tensor) -> torch.Tensor:
        """silu(gate) * up in float32, in the arguments' precision."""
        return _rounded(F.silu(gate_NF.float()) * up_NF.float(), gate_NF.dtype)

    @staticmethod
    def swiglu_backward(
        grad_NF: torch.Tensor, gate_NF: torch.Tensor, up_NF: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The gradients of swiglu to gate and up."""
        grad, gate, up = grad_NF.float(), gate_NF.float(), up_NF.float()
        sigmoid = gate.sigmoid()
        grad_gate = grad * up * sigmoid * (1 + gate * (1 - sigmoid))
        return grad_gate.to(gate_NF.dtype), (grad * gate * sigmoid).to(up_NF.dtype)


def _kernels(x: torch.Tensor) -> "type[Torch] | ModuleType":
    if torch.compiler.is_compiling():
        return Torch
    if triton_rows is not None and (x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"):
        return triton_rows
    return Torch


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD, order_N, place_TK):
        ctx.save_for_backward(place_TK)
        return x_TD.index_select(0, order_N // place_TK.shape[1])

    @staticmethod
    def backward(ctx, grad_ND):
        (place_TK,) = ctx.saved_tensors
        return _kernels(grad_ND).sum_rows(grad_ND.contiguous(), place_TK, None), None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows_ND, place_TK, weights_TK):
        rows_ND, weights_TK = rows_ND.contiguous(), weights_TK.contiguous()
        ctx.save_for_backward(rows_ND, place_TK, weights_TK)
        return _kernels(rows_ND).sum_rows(rows_ND, place_TK, weights_TK)

    @staticmethod
    def backward(ctx, grad_TD):
        rows_ND, place_TK, weights_TK = ctx.saved_tensors
        grads = _kernels(rows_ND).sum_rows_backward(grad_TD.contiguous(), rows_ND, place_TK, weights_TK)
        return grads[0], None, grads[1].to(weights_TK.dtype)


class _Regroup(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows_RD, counts_SE, back):
        ctx.save_for_backward(counts_SE)
        ctx.back = back
        return _kernels(rows_RD).move_rows(rows_RD.contiguous(), counts_SE.contiguous(), back)

    @staticmethod
    def backward(ctx, grad_RD):
        (counts_SE,) = ctx.saved_tensors
        return _kernels(grad_RD).move_rows(grad_RD.contiguous(), counts_SE.contiguous(), not ctx.back), None, None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_NF, up_NF):
        gate_NF, up_NF = gate_NF.contiguous(), up_NF.contiguous()
        ctx.save_for_backward(gate_NF, up_NF)
        return _kernels(gate_NF).swiglu(gate_NF, up_NF)

    @staticmethod
    def backward(ctx, grad_NF):
        gate_NF, up_NF = ctx.saved_tensors
        return _kernels(gate_NF).swiglu_backward(grad_NF.contiguous(), gate_NF, up_NF)
