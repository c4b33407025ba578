"""The kernels of :mod:`moe_dit.kernels.rows` in Triton.

Sums have a program for each token, which reads its K rows; moves one for each row; SwiGLU one for a stretch of values.
Every row belongs to one token and one place, so each value is written once, by one program.
"""

import torch
import triton
import triton.language as tl

MAX_BLOCK = 1024  # values that a program holds at once


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


@triton.jit
def move_rows_kernel(
    rows, counts, out, width, S: tl.constexpr, E: tl.constexpr, G: tl.constexpr, BACK: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)  # in order of (expert, source)
    # Groups of rows in that order; `sent` is where a group stands in the other, (source, expert). G is S E or more.
    group = tl.arange(0, G)
    sent = (group % S) * E + group // S
    count = tl.load(counts + sent, mask=group < S * E, other=0).to(tl.int64)
    before = tl.cumsum(count, axis=0) <= row
    mine = tl.sum(before.to(tl.int32), axis=0)
    mine = (mine % S) * E + mine // S
    inside_group = row - tl.sum(tl.where(before, count, 0), axis=0)
    other = tl.sum(tl.where(sent < mine, count, 0), axis=0) + inside_group
    source, target = (row, other) if BACK else (other, row)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < width
        tl.store(out + target * width + column, tl.load(rows + source * width + column, mask=inside), mask=inside)


@triton.jit
def swiglu_kernel(gate, up, out, numel, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < numel
    g = tl.load(gate + place, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + place, (g * tl.sigmoid(g) * u).to(out.dtype.element_ty), mask=inside)


@triton.jit
def swiglu_backward_kernel(grad, gate, up, grad_gate, grad_up, numel, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < numel
    given = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gate + place, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + place, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(g)
    to_gate = given * u * sigmoid * (1 + g * (1 - sigmoid))
    tl.store(grad_gate + place, to_gate.to(grad_gate.dtype.element_ty), mask=inside)
    tl.store(grad_up + place, (given * g * sigmoid).to(grad_up.dtype.element_ty), mask=inside)


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


def move_rows(rows_RD: torch.Tensor, counts_SE: torch.Tensor, back: bool) -> torch.Tensor:
    """As :meth:`moe_dit.kernels.rows.Torch.move_rows`; all tensors contiguous."""
    (number, width), (sources, experts) = rows_RD.shape, counts_SE.shape
    out_RD = torch.empty_like(rows_RD)
    if number:
        groups = triton.next_power_of_2(sources * experts)
        move_rows_kernel[(number,)](rows_RD, counts_SE, out_RD, width, sources, experts, groups, back, block(width))
    return out_RD


def swiglu(gate_NF: torch.Tensor, up_NF: torch.Tensor) -> torch.Tensor:
    """As :meth:`moe_dit.kernels.rows.Torch.swiglu`; all tensors contiguous."""
    out_NF = torch.empty_like(gate_NF)
    numel = gate_NF.numel()
    if numel:
        swiglu_kernel[(triton.cdiv(numel, MAX_BLOCK),)](gate_NF, up_NF, out_NF, numel, MAX_BLOCK)
    return out_NF


def swiglu_backward(
    grad_NF: torch.Tensor, gate_NF: torch.Tensor, up_NF: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """As :meth:`moe_dit.kernels.rows.Torch.swiglu_backward`; all tensors contiguous."""
    grad_gate_NF, grad_up_NF = torch.empty_like(gate_NF), torch.empty_like(up_NF)
    numel = gate_NF.numel()
    if numel:
        swiglu_backward_kernel[(triton.cdiv(numel, MAX_BLOCK),)](
            grad_NF, gate_NF, up_NF, grad_gate_NF, grad_up_NF, numel, MAX_BLOCK
        )
    return grad_gate_NF, grad_up_NF
