"""The kernels against float64, forward and backward; by itself it takes Triton's interpreter, on CPU tensors:

TRITON_INTERPRET=1 python tests/kernels.py
"""

import os

import torch

from moe_dit.kernels import combine, dispatch, places, rows

# tokens, choices of a token, experts, width: odd ones, empty experts, several blocks of columns
SIZES = ((1, 1, 1, 1), (7, 1, 3, 5), (13, 2, 40, 33), (33, 5, 16, 130), (3, 2, 4, 1153), (0, 2, 4, 8))
# Sums in float32, rounded once: half a unit in the last of bf16's 8 bits, and a few in float32's last for the sum.
# Triton's interpreter (3.8) cuts bf16's bits off where GPUs round: a whole unit.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
TOLERANCES = {torch.bfloat16: 2**-7 if INTERPRETED else 2**-8, torch.float32: 2**-20}


def check(size: tuple[int, int, int, int], dtype: torch.dtype, device: str) -> None:
    """Hold both functions and their gradients against the sums written out in float64."""
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


def close(got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype) -> None:
    """Every value within a dtype's tolerance of the largest."""
    assert got.shape == want.shape
    if want.numel():
        error = ((got.detach().cpu().double() - want).abs().max() / want.abs().max()).item()
        assert error <= TOLERANCES[dtype], f"off by {error:.2e} of the largest, allowed {TOLERANCES[dtype]:.2e}"


if __name__ == "__main__":
    assert rows._kernels(torch.empty(0)) is rows.triton_rows, "set TRITON_INTERPRET=1"
    for size in SIZES:
        for dtype in TOLERANCES:
            check(size, dtype, "cpu")
    print(f"{len(SIZES) * len(TOLERANCES)} cases hold")
