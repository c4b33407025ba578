"""The kernels of :mod:`moe_dit.kernels.rows` in Triton: a program for each token, which reads its K rows.

Every row belongs to one token, so each value is written once, by one program.
"""

import torch
import triton
import triton.language as tl

MAX_BLOCK = 1024  # values of a row that a program holds at once


@triton.jit
def sum_rows_kernel(rows, place, weights, out, width, K: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)  # 64 bits: rows may have more than 2^31 values
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < width
        total = tl.zeros([BLOCK], dtype=tl.float32)
        for k in tl.static_range(K):
            row = tl.load(place + token * K + k).to(tl.int64)
            value = tl.load(rows + row * width + column, mask=inside, other=0.0).to(tl.float32)
            if WEIGHTED:
                value = value * tl.load(weights + token * K + k).to(tl.float32)
            total += value
        tl.store(out + token * width + column, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def sum_rows_backward_kernel(
    grad, rows, place, weights, grad_rows, grad_weights, width, K: tl.constexpr, BLOCK: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    for k in tl.static_range(K):
        row = tl.load(place + token * K + k).to(tl.int64)
        weight = tl.load(weights + token * K + k).to(tl.float32)
        product = tl.zeros([BLOCK], dtype=tl.float32)
        for start in range(0, width, BLOCK):
            column = start + tl.arange(0, BLOCK)
            inside = column < width
            # The token's gradient is read K times, from the cache after the first.
            g = tl.load(grad + token * width + column, mask=inside, other=0.0).to(tl.float32)
            value = tl.load(rows + row * width + column, mask=inside, other=0.0).to(tl.float32)
            product += value * g
            given = (g * weight).to(grad_rows.dtype.element_ty)
            tl.store(grad_rows + row * width + column, given, mask=inside)
        tl.store(grad_weights + token * K + k, tl.sum(product, axis=0))


def block(width: int) -> int:
    """Columns that a program takes at once."""
    return min(triton.next_power_of_2(width), MAX_BLOCK)


def sum_rows(rows_ND: torch.Tensor, place_TK: torch.Tensor, weights_TK: torch.Tensor | None) -> torch.Tensor:
    """As :meth:`moe_dit.kernels.rows.Torch.sum_rows`; all tensors contiguous."""
    (tokens, top_k), width = place_TK.shape, rows_ND.shape[1]
    out_TD = rows_ND.new_empty(tokens, width)
    weighted = weights_TK is not None
    if tokens:
        weights = weights_TK if weighted else rows_ND  # without weights the argument is not read
        sum_rows_kernel[(tokens,)](rows_ND, place_TK, weights, out_TD, width, top_k, weighted, block(width))
    return out_TD


def sum_rows_backward(
    grad_TD: torch.Tensor, rows_ND: torch.Tensor, place_TK: torch.Tensor, weights_TK: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """As :meth:`moe_dit.kernels.rows.Torch.sum_rows_backward`; all tensors contiguous."""
    (tokens, top_k), width = place_TK.shape, rows_ND.shape[1]
    grad_rows_ND = torch.empty_like(rows_ND)
    grad_weights_TK = torch.empty_like(weights_TK, dtype=torch.float32)
    if tokens:
        sum_rows_backward_kernel[(tokens,)](
            grad_TD, rows_ND, place_TK, weights_TK, grad_rows_ND, grad_weights_TK, width, top_k, block(width)
        )
    return grad_rows_ND, grad_weights_TK
