"""What is computed on the GPU against recordings of published code, float64, and plain forms of the same."""

import contextlib
import json
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from eval import metrics
from eval.captured import captured
from eval.features import Extractor, Network
from kernels import check_all
from moe_dit.bench import moved
from moe_dit.build import build_model, to_compute
from moe_dit.data import Latents, training_inputs
from moe_dit.flow import build_flow
from moe_dit.models.moe import Experts
from moe_dit.parallel.compile import compile_blocks
from moe_dit.randomness import Stream, normal, uniform
from moe_dit.reference import from_reference
from moe_dit.runtime import ranks
from parts.context import Context, relative, worst

# Of outputs and of the gradient's norm. In bf16 close choices of experts fall otherwise too: 0.054 in CPUs' bf16.
GOLDEN = {torch.float32: (2e-5, 2e-4), torch.bfloat16: (0.1, 0.1)}


def run(context: Context) -> None:
    goldens(context)
    with context.attempt("kernels against float64"):
        context.check_least("kernels against float64, cases that hold", check_all(context.device.type), 32)
    draws(context)
    for bias in (False, True):
        with context.attempt(f"grouped products, biases {bias}"):
            grouped(context, bias)
    scores(context)
    if context.device.type == "cuda":
        captures(context)
    with context.attempt("waits of a step"):
        waits(context)
    for name, dtype, seconds in (
        ("dsmoe_s_e16", torch.bfloat16, 18),
        ("dsmoe_s_e16", torch.float32, 12),  # the one in which torch 2.11 lost gradients
        ("diffmoe_s_e16", torch.bfloat16, 15),
        ("jitmoe_b_16_e16", torch.bfloat16, 24),
        ("jitmoe_b_16_e16", torch.float32, 20),
        ("diffmoe_s_e16", torch.float32, 15),
    ):
        what = f"compiled blocks, {name}, {str(dtype)[6:]}"
        if context.time_for(what, seconds):
            with context.attempt(what):
                compiled(context, what, name, dtype)
    own_devices(context)


def goldens(context: Context) -> None:
    """Recordings of the published code: outputs, and the gradient's norm."""
    for folder in sorted(file.parent for file in (context.tests / "golden").glob("*/meta.json")):
        for dtype, (most, most_gradient) in GOLDEN.items():
            what = f"golden {folder.name}, {str(dtype)[6:]}"
            with context.attempt(what):
                meta = json.loads((folder / "meta.json").read_text())
                io = load_file(folder / "io.safetensors", device=str(context.device))
                model, flow = from_reference(meta, load_file(folder / "reference_state.safetensors"))
                model.to(context.device).eval()
                for weight in model.parameters():
                    weight.data = weight.data.to(dtype)
                with torch.no_grad():
                    got = model(io["x"], io["t"], io["y"])
                error = relative(got.float(), io.get("output", io.get("output_eval")))
                context.check(f"{what}: output", error, most)
                jit = meta.get("denoiser")
                model.train(meta["family"] == "DiffMoE")
                noise = io["noise"] / (jit["noise_scale"] if jit else 1.0)
                y, t = io.get("y_dropped", io["y"]), io["t_loss"] if jit else io["t"]
                flow.loss(model, io["x"], y, noise=noise, t=t)["loss"].backward()
                norms = torch.stack([p.grad.float().norm() for p in model.parameters() if p.grad is not None])
                want = torch.tensor(list(meta["grad_norms"].values())).norm()
                context.check(f"{what}: gradient norm", relative(norms.norm().cpu(), want), most_gradient)


def draws(context: Context) -> None:
    """Draws are the CPU's: uniform ones to the bit, normal ones to their last digits; compiled too."""
    device = context.device
    position = torch.tensor([0, 1, 7, 2**31, 2**40 + 5])
    with context.attempt("draws"):
        here, there = (uniform(3, Stream.TIME, position.to(where), (50,)).cpu() for where in ("cpu", device))
        context.check("uniform draws beside the CPU's, that differ", float((here != there).sum()), 0)
        here, there = (normal(3, Stream.NOISE, position.to(where), (50,)).cpu() for where in ("cpu", device))
        context.check("normal draws beside the CPU's, largest difference", (here - there).abs().max().item(), 2e-6)
    with context.attempt("inputs"):
        recipe = context.recipe("dsmoe_s_e16", batch=8)
        model = recipe.model
        shape = 5, 2 * model.in_channels, model.input_size, model.input_size
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).half()
        batch = {"x": x, "y": torch.arange(5), "position": position}
        backend = {"backend": "aot_eager"} if context.dry else {}
        there = training_inputs(recipe, {k: v.to(device) for k, v in batch.items()}, Latents(0.18, 0.0), **backend)
        here = training_inputs(recipe, batch, Latents(0.18, 0.0))
        for key, most in (("x", 2e-6), ("noise", 4e-6), ("u", 0), ("y", 0)):
            difference = (here[key].double() - there[key].cpu().double()).abs().max().item()
            context.check(f"a batch's {key} beside the CPU's, largest difference", difference, most)


def poison(device: torch.device) -> None:
    """Leave NaN in the memory that the next tensors get: what reads memory that nobody wrote is seen."""
    kept = [
        torch.full((n,), float("nan"), device=device) for n in (1 << 26, 1 << 24, 1 << 22, 1 << 20) for _ in range(2)
    ]
    del kept


def grouped(context: Context, bias: bool) -> None:
    """Grouped products are a product an expert, in outputs and all gradients, with an expert that has no rows."""
    sizes = (4, 32, 64, 200) if context.dry else (16, 384, 768, 8192)
    e, d, f, n = sizes
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, std: float = 1.0) -> torch.Tensor:
        return (std * torch.randn(*shape, generator=generator)).to(context.device, torch.bfloat16)

    with torch.device(context.device):
        experts = Experts(e, d, f, bias=bias).to(torch.bfloat16)
    for weight in experts.parameters():
        weight.data = draw(*weight.shape, std=0.05)
    counts = torch.full((e,), n // e, dtype=torch.int32)
    counts[1] += counts[2]
    counts[2] = 0
    counts = counts.to(context.device)
    x, grad = draw(int(counts.sum()), d), draw(int(counts.sum()), d)
    found = []
    for experts.implementation in ("loop", "grouped"):
        mine = x.clone().requires_grad_()
        poison(context.device)
        out = experts(mine, counts)
        poison(context.device)
        found.append((out, *torch.autograd.grad(out, [mine, *experts.parameters()], grad)))
    names = ["output", "input's gradient", *(f"gradient of {name}" for name, _ in experts.named_parameters())]
    for name, want, got in zip(names, *found, strict=True):
        context.check(f"grouped products, biases {bias}: {name}", relative(got, want), 1e-2)


def scores(context: Context) -> None:
    """Features without TF32, the distance, its error and neighbours are the CPU's."""

    class Layers(Network):
        title = identity = "layers"

        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Conv2d(3, 64, 5, 2), nn.SiLU(), nn.Conv2d(64, 64, 5, 2), nn.Flatten())

        def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"features": self.layers(images.float() / 255)[:, :200]}

    with context.attempt("features and scores"):
        torch.manual_seed(0)
        network = Layers()
        images = torch.randint(256, (600, 3, 32, 32), dtype=torch.uint8)
        places = [torch.device("cpu"), context.device]
        found = [Extractor([network], device)(images)["features"] for device in places]
        context.check("features beside the CPU's", relative(found[1], found[0]), 1e-5)
        told = []
        for device in places:
            x, y = (part.to(device) for part in found[0].split(300))
            frechet = metrics.Frechet(metrics.moments(y))
            told.append([*frechet.with_errors(metrics.moments(x), x, y), *metrics.neighbour_scores(x, y).values()])
        want, got = (torch.tensor([float(value) for value in row], dtype=torch.float64) for row in told)
        context.check(
            "scores beside the CPU's, largest relative difference", ((got - want) / want).abs().max().item(), 1e-4
        )


def captures(context: Context) -> None:
    """A captured network gives a plain one's samples, to the bit."""
    with context.attempt("captured sampling"):
        recipe = context.recipe("dsmoe_s_e16", "model.depth=4")
        plain = to_compute(moved(build_model(recipe, context.device)), recipe, context.device)
        graph = captured(plain, recipe, context.device)
        settings: Any = {"steps": 4, "method": "heun", "cfg_scale": 1.5, "cfg_interval": (0.3, 0.9)}
        y = torch.arange(6, device=context.device)
        for seed in (0, 1):
            torch.manual_seed(seed)
            z = torch.randn(6, recipe.model.in_channels, *[recipe.model.input_size] * 2, device=context.device)
            eager, replayed = (build_flow(recipe).sample(network, z, y, **settings) for network in (plain, graph))
            context.check(f"captured samples {seed}, values that differ", float((eager != replayed).sum()), 0)
        context.check("graphs captured, with both halves of guidance and without", len(graph.graphs), 2)


@contextlib.contextmanager
def noted_waits(found: Counter) -> Iterator[None]:
    """Count, by where in the code, each time that the host waits for the GPU in the block."""

    def note(message: Any, *_: Any, **__: Any) -> None:
        if "synchroniz" in str(message):
            frames = [
                f
                for f in traceback.extract_stack()[:-1]
                if "/torch/" not in f.filename and "warnings" not in f.filename
            ]
            places = [f"{'/'.join(f.filename.split('/')[-2:])}:{f.lineno} {f.name}" for f in frames[-4:]]
            found[" < ".join(reversed(places))] += 1

    kept = warnings.showwarning
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = note
            yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
        warnings.showwarning = kept


def waits(context: Context) -> None:
    """A whole step of the engine at EP 1: where the host waits for the GPU."""
    recipe = context.recipe("dsmoe_s_e16", "model.depth=4", "compile=none", "precision=bf16", batch=8)
    inputs = context.inputs(recipe, 8)
    found: Counter = Counter()
    with context.engine(recipe) as engine:

        def step(number: int) -> None:
            engine.train_step(number, [inputs])
            engine.gradient_norm()

        for number in range(3):  # what is set up once may wait
            step(number)
        with noted_waits(found) if context.device.type == "cuda" else contextlib.nullcontext():
            step(3)
    for place, count in found.most_common(8):
        context.tell("the host waits at", count, "times a step", place)
    context.check("waits of a step, EP 1, ZeRO 1, bf16", sum(found.values()), 0, measured=True)


def compiled(context: Context, what: str, name: str, dtype: torch.dtype) -> None:
    """Compiled blocks beside plain ones: the loss, and each weight's gradient.

    In float32 they are equal to rounding. In bf16 each is held against float32: compiling may not take it further away.
    """
    more = ["model.in_context_start=1"] if name.startswith("jit") else []
    recipe = context.recipe(name, "model.depth=2", *more, batch=6)
    results = {}
    for form, precision in (("exact", torch.float32), ("plain", dtype), ("compiled", dtype)):
        if form == "exact" and dtype == torch.float32:
            continue
        torch.manual_seed(0)
        model = context.one_rank(recipe, precision)
        for experts in (module for module in model.modules() if isinstance(module, Experts)):
            experts.implementation = "grouped" if precision == torch.bfloat16 else "loop"  # as GPUs compute
        if form == "compiled":
            torch._dynamo.reset()
            compile_blocks(model, backend="aot_eager" if context.dry else "inductor")
        inputs = context.inputs(recipe, 6)
        flow = build_flow(recipe)
        t = flow.times(inputs["u"])
        losses = flow.loss(model, inputs["x"], inputs["y"], noise=inputs["noise"], t=t)
        losses["loss"].backward()
        gradients = {key: weight.grad for key, weight in model.named_parameters() if weight.grad is not None}
        results[form] = losses["loss"].detach(), gradients
    loss, gradients = results["compiled"]
    want_loss, want = results["plain"]
    context.check(f"{what}: gradients that only one form has", len(gradients.keys() ^ want.keys()), 0)
    context.check(f"{what}: loss beside plain", relative(loss, want_loss), 1e-5 if dtype == torch.float32 else 1e-2)
    whole = [torch.cat([g[key].float().flatten() for key in want]) for g in (gradients, want)]
    if dtype == torch.float32:
        errors = {key: relative(gradients[key], want[key]) for key in want}
        key, error = worst(errors)
        context.check(f"{what}: worst weight's gradient", error, 1e-3, note=key)
        return
    exact = results["exact"][1]
    truth = torch.cat([exact[key].flatten() for key in want])
    plain, mine = relative(whole[1], truth), relative(whole[0], truth)
    context.check(f"{what}: gradient's error over the plain form's", mine / plain, 1.5, note=f"{mine:.3g}, {plain:.3g}")
    ratios = {
        key: relative(gradients[key], exact[key]) / max(1e-3, relative(want[key], exact[key]))
        for key in want
        if exact[key].norm() > 0
    }
    key, ratio = worst(ratios)
    context.check(f"{what}: the same, of the worst weight", ratio, 3, note=key)


def own_devices(context: Context) -> None:
    """Each rank's memory is on its own GPU."""
    count = torch.cuda.device_count() if context.device.type == "cuda" else 0
    if count < 2:
        context.tell("memory on each rank's own GPU", "skipped", note="needs two GPUs")
        return
    with context.attempt("memory on each rank's own GPU"):
        kept, wrong = ranks.world, 0
        try:
            for rank in range(count):
                ranks.world = lambda rank=rank: ranks.World(rank, rank, count)
                wrong += ranks.device() != torch.device("cuda", rank) or torch.cuda.current_device() != rank
        finally:
            ranks.world = kept
            torch.cuda.set_device(0)
        context.check("ranks with memory on another's GPU", wrong, 0)
