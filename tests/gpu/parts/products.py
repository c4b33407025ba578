"""Matrix products of experts, attention, sorting and the optimizer, at the sizes of the recipes."""

from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from moe_dit.kernels import places, swiglu
from moe_dit.recipe_file import load_recipe
from parts.context import Context

SIZES = {"dsmoe_s_e16": 64, "dsmoe_s_e48": 64, "dsmoe_b_e16": 64, "dsmoe_l_e16": 32, "dsmoe_3b_e16": 16}  # images
BACKENDS = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)


def run(context: Context) -> None:
    for name, images in SIZES.items():
        with context.attempt(f"products, {name}"):
            products(context, name, images)
    for heads, width in ((6, 64), (12, 64), (16, 64), (16, 72)):
        for backend in BACKENDS if context.device.type == "cuda" else (SDPBackend.MATH,):
            attention(context, heads, width, backend)
    with context.attempt("sorting"):
        sorting(context)
    with context.attempt("optimizer"):
        optimizer(context)


def products(context: Context, name: str, images: int) -> None:
    """An expert's three products, grouped, beside a dense product of equal work."""
    recipe = load_recipe(name)
    moe = recipe.model.moe
    rows = images * recipe.model.tokens * moe.top_k
    e, d, f = moe.num_experts, recipe.model.hidden_size, moe.expert_width
    if context.dry:
        rows, e, d, f = 64, 4, 32, 16

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=context.device, dtype=torch.bfloat16)

    x, hidden, up, down = draw(rows, d), draw(rows, f), draw(e, f, d), draw(e, d, f)
    share = torch.full((e,), rows // e, device=context.device, dtype=torch.int32)
    share[0] += rows - share.sum()
    uneven = share.clone()
    for i in range(0, e - 1, 2):  # as routers are, before they balance: every second expert has half as many
        uneven[i] += share[i + 1] // 2
        uneven[i + 1] -= share[i + 1] // 2
    dense = draw(f, d)
    flops = 2 * rows * d * f

    def told(what: str, work: Any) -> float:
        rate = flops / context.seconds(work) / 1e12
        context.tell(f"{name}: {what}", rate, "TFLOP/s")
        return rate

    base = told(f"dense product [{rows}, {d}] x [{d}, {f}]", lambda: x @ dense.T)
    ends = share.cumsum(0, dtype=torch.int32)
    best = told("grouped, to hidden", lambda: torch._grouped_mm(x, up.transpose(1, 2), offs=ends))
    told("grouped, from hidden", lambda: torch._grouped_mm(hidden, down.transpose(1, 2), offs=ends))
    told("grouped, input's gradient", lambda: torch._grouped_mm(hidden, up, offs=ends))
    told("grouped, weights' gradients", lambda: torch._grouped_mm(hidden.T, x, offs=ends))
    uneven_ends = uneven.cumsum(0, dtype=torch.int32)
    told("grouped, to hidden, uneven", lambda: torch._grouped_mm(x, up.transpose(1, 2), offs=uneven_ends))
    both = draw(e, 2 * f, d)
    pair = 2 * flops / context.seconds(lambda: torch._grouped_mm(x, both.transpose(1, 2), offs=ends)) / 1e12
    context.tell(f"{name}: grouped, gate and up in one", pair, "TFLOP/s")
    context.tell(f"{name}: grouped over dense", best / base)
    gate, up_rows = draw(rows, f), draw(rows, f)
    spent = context.seconds(lambda: swiglu(gate, up_rows))
    context.tell(f"{name}: SwiGLU of rows", 3 * gate.nbytes / spent / 1e9, "GB/s")


def attention(context: Context, heads: int, width: int, backend: SDPBackend) -> None:
    """Attention of 256 tokens, forward and backward."""
    images = 2 if context.dry else 64
    what = f"attention, {heads} heads of {width}, {backend.name}"
    with context.attempt(what), sdpa_kernel(backend):
        shape = images, heads, 256, width
        q, k, v = (
            torch.randn(shape, device=context.device, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)
        )
        grad = torch.randn(shape, device=context.device, dtype=torch.bfloat16)

        def step() -> None:
            torch.autograd.grad(torch.nn.functional.scaled_dot_product_attention(q, k, v), (q, k, v), grad)

        flops = 14.0 * images * heads * 256 * 256 * width  # forward two products, backward five
        context.tell(what, flops / context.seconds(step) / 1e12, "TFLOP/s")


def sorting(context: Context) -> None:
    """The router's choice and the order of rows."""
    tokens = 256 if context.dry else 64 * 256
    scores = torch.rand(tokens, 16, device=context.device)
    chosen = scores.topk(2, dim=-1, sorted=False).indices
    for what, work in (
        ("top-2 of 16", lambda: scores.topk(2, dim=-1, sorted=False)),
        ("stable sort of int64 experts", lambda: chosen.flatten().argsort(stable=True)),
        ("stable sort of uint8 experts", lambda: chosen.flatten().to(torch.uint8).argsort(stable=True)),
        ("places of rows", lambda: places(chosen)),
    ):
        context.tell(f"{what}, {tokens} tokens", context.seconds(work) * 1e6, "us")


def optimizer(context: Context) -> None:
    """AdamW and the average, over one flat tensor of master weights."""
    n = 1 << 16 if context.dry else 1 << 28
    weight = torch.randn(n, device=context.device, requires_grad=True)
    weight.grad = torch.randn_like(weight)
    adam = torch.optim.AdamW([weight], 1e-4, weight_decay=0.0, fused=True)
    average, low = weight.detach().clone(), torch.empty(n, device=context.device, dtype=torch.bfloat16)
    for what, size, work in (
        ("AdamW", 28, adam.step),
        ("average", 12, lambda: torch._foreach_lerp_([average], [weight.detach()], 1e-4)),
        ("bf16 copy", 6, lambda: low.copy_(weight.detach())),
    ):
        context.tell(f"{what}, {size} bytes a parameter", size * n / context.seconds(work, 5) / 1e9, "GB/s")
