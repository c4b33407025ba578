"""The kernels against float64, forward and backward; by itself it takes Triton's interpreter, on CPU tensors:

TRITON_INTERPRET=1 python tests/kernels.py
"""

import os

import torch

from moe_dit.kernels import combine, dispatch, places, regroup, rows, swiglu, ungroup

# tokens, choices of a token, experts, width: odd ones, empty experts, several blocks of columns
SIZES = ((1, 1, 1, 1), (7, 1, 3, 5), (13, 2, 40, 33), (33, 5, 16, 130), (3, 2, 4, 1153), (0, 2, 4, 8))
# rows of each expert (columns) from each rank (rows): no rows, one, ranks and experts without any, odd numbers
COUNTS = ([[0, 0]], [[1]], [[3, 0, 2], [0, 0, 5]], [[1, 2], [0, 0], [4, 0], [7, 1], [0, 9]], [[2, 0, 3, 1, 0, 1, 2]])
# Sums in float32, rounded once: half a unit in the last of bf16's 8 bits, and a few in float32's last for the sum.
# Triton's interpreter (3.8) cuts bf16's bits off where GPUs round: a whole unit.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
TOLERANCES = {torch.bfloat16: 2**-7 if INTERPRETED else 2**-8, torch.float32: 2**-20}


def check(size: tuple[int, int, int, int], dtype: torch.dtype, device: str) -> None:
    """Hold dispatch and combine, and their gradients, against the sums written out in float64."""
    tokens, top_k, experts, width = size
    generator = torch.Generator().manual_seed(tokens * 100 + width)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    chosen = [torch.randperm(experts, generator=generator)[:top_k].tolist() for _ in range(tokens)]
    chosen_TK = torch.tensor(chosen, dtype=torch.int64).view(tokens, top_k)
    order_N, place_TK = places(chosen_TK.to(device))
    sorted_N = sorted(range(tokens * top_k), key=lambda flat: int(chosen_TK.flatten()[flat]))
    assert order_N.tolist() == sorted_N and place_TK.flatten()[order_N].tolist() == list(range(tokens * top_k))

    x, grad_rows = draw(tokens, width).to(dtype), draw(tokens * top_k, width).to(dtype)
    mine = x.to(device).requires_grad_()
    given = dispatch(mine, order_N, place_TK)
    assert given.dtype == dtype
    for row, flat in enumerate(sorted_N):
        assert torch.equal(given[row].cpu(), x[flat // top_k])
    given.backward(grad_rows.to(device))
    want = torch.zeros(tokens, width, dtype=torch.float64)
    for row, flat in enumerate(sorted_N):
        want[flat // top_k] += grad_rows[row].double()
    close(mine.grad, want, dtype)

    y, weights, grad = draw(tokens * top_k, width).to(dtype), draw(tokens, top_k), draw(tokens, width).to(dtype)
    mine, mine_weights = y.to(device).requires_grad_(), weights.to(device).requires_grad_()
    out = combine(mine, place_TK, mine_weights)
    out.backward(grad.to(device))
    assert out.dtype == mine.grad.dtype == dtype and mine_weights.grad.dtype == torch.float32
    want, want_rows = torch.zeros(tokens, width, dtype=torch.float64), torch.zeros(tokens * top_k, width).double()
    want_weights = torch.zeros(tokens, top_k, dtype=torch.float64)
    for row, flat in enumerate(sorted_N):
        t, k = divmod(flat, top_k)
        want[t] += weights[t, k].double() * y[row].double()
        want_rows[row] = weights[t, k].double() * grad[t].double()
        want_weights[t, k] = y[row].double() @ grad[t].double()
    close(out, want, dtype)
    close(mine.grad, want_rows, dtype)
    close(mine_weights.grad, want_weights, torch.float32)


def check_regroup(counts: list[list[int]], width: int, dtype: torch.dtype, device: str) -> None:
    """Rows go to the places that two loops over ranks and experts say, and back, and so do gradients."""
    names = [(s, e) for s, row in enumerate(counts) for e, n in enumerate(row) for _ in range(n)]
    order = sorted(range(len(names)), key=lambda i: (names[i][1], names[i][0]))
    generator = torch.Generator().manual_seed(width)
    x, grad = (torch.randn(len(names), width, generator=generator).to(dtype) for _ in range(2))
    counts_SE = torch.tensor(counts, dtype=torch.int32, device=device)
    mine = x.to(device).requires_grad_()
    sorted_RD = regroup(mine, counts_SE)
    assert sorted_RD.dtype == dtype and torch.equal(sorted_RD.cpu(), x[order])
    assert torch.equal(ungroup(sorted_RD, counts_SE).cpu(), x)
    (got,) = torch.autograd.grad(sorted_RD, mine, grad.to(device))
    assert torch.equal(got[order].cpu(), grad)
    (got,) = torch.autograd.grad(ungroup(mine, counts_SE), mine, grad.to(device))
    assert torch.equal(got.cpu(), grad[order])


def check_swiglu(shape: tuple[int, int], dtype: torch.dtype, device: str) -> None:
    """Hold SwiGLU and its gradients against autograd in float64."""
    generator = torch.Generator().manual_seed(sum(shape))
    gate, up, grad = (3 * torch.randn(shape, generator=generator).to(dtype) for _ in range(3))
    mine = gate.to(device).requires_grad_(), up.to(device).requires_grad_()
    out = swiglu(*mine)
    exact = gate.double().requires_grad_(), up.double().requires_grad_()
    want = torch.nn.functional.silu(exact[0]) * exact[1]
    assert out.dtype == dtype
    close(out, want.detach(), dtype)
    got = torch.autograd.grad(out, mine, grad.to(device))
    for a, b in zip(got, torch.autograd.grad(want, exact, grad.double()), strict=True):
        assert a.dtype == dtype
        close(a, b, dtype)


def check_all(device: str) -> int:
    """Every case in every precision; how many there were."""
    for dtype in TOLERANCES:
        for size in SIZES:
            check(size, dtype, device)
        for counts in COUNTS:
            check_regroup(counts, 33, dtype, device)
        check_regroup(COUNTS[2], 1153, dtype, device)
        for shape in ((0, 8), (1, 1), (7, 33), (3, 1153)):
            check_swiglu(shape, dtype, device)
    return len(TOLERANCES) * (len(SIZES) + len(COUNTS) + 5)


def close(got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype) -> None:
    """Every value within a dtype's tolerance of the largest."""
    assert got.shape == want.shape
    if want.numel():
        error = ((got.detach().cpu().double() - want).abs().max() / want.abs().max()).item()
        assert error <= TOLERANCES[dtype], f"off by {error:.2e} of the largest, allowed {TOLERANCES[dtype]:.2e}"


if __name__ == "__main__":
    assert rows._kernels(torch.empty(0)) is rows.triton_rows, "set TRITON_INTERPRET=1"
    print(f"{check_all('cpu')} cases hold")
