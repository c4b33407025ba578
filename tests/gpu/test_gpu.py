"""What only a GPU shows; tests/gpu.sh runs it. Skipped where there is none."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

TESTS = Path(__file__).parents[1]
GOLDEN = sorted(path.parent for path in (TESTS / "golden").glob("*/meta.json"))
sys.path.insert(0, str(TESTS))  # the kernels' check
# Float32 without TF32 as on CPUs. In bf16 close choices of experts fall otherwise too: up to 0.054 in CPUs' bf16.
OUTPUT_TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 0.1}


def small(changes=()):
    """A little network of real sizes and random weights on the GPU, in bf16, with its recipe and inputs."""
    from moe_dit import build_model, load_recipe
    from moe_dit.build import to_compute

    recipe = load_recipe("dsmoe_s_e16", ["model.depth=4", *changes])
    torch.manual_seed(0)
    model = build_model(recipe)
    with torch.no_grad():
        for weight in model.parameters():  # the last layer starts as zeros
            weight.add_(0.02 * torch.randn_like(weight))
    model = to_compute(model, recipe, torch.device("cuda"))
    settings = recipe.model
    x = torch.randn(6, settings.in_channels, settings.input_size, settings.input_size, device="cuda")
    return model, recipe, (x, torch.rand(6, device="cuda"), torch.arange(6, device="cuda"))


def relative(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


@pytest.mark.parametrize("dtype", OUTPUT_TOLERANCE, ids=str)
@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case.name)
def test_golden_outputs(case, dtype):
    from moe_dit.reference import from_reference

    meta, io = json.loads((case / "meta.json").read_text()), load_file(case / "io.safetensors", device="cuda")
    model, _ = from_reference(meta, load_file(case / "reference_state.safetensors"))
    model.cuda().eval()
    for weight in model.parameters():
        weight.data = weight.data.to(dtype)
    with torch.no_grad():
        got = model(io["x"], io["t"], io["y"])
    assert relative(got.float(), io.get("output", io.get("output_eval"))) <= OUTPUT_TOLERANCE[dtype]


def test_kernels_against_float64():
    from kernels import check_all

    check_all("cuda")


def test_grouped_products_are_the_loops():
    from moe_dit.models.moe import Experts

    model, _, inputs = small()
    outputs = []
    for implementation in ("grouped", "loop"):
        for module in model.modules():
            if isinstance(module, Experts):
                module.implementation = implementation
        with torch.no_grad():
            outputs.append(model(*inputs))
    assert relative(*outputs) <= 1e-2


def test_compiled_parts_are_eager_ones():
    from moe_dit.parallel.compile import compile_dense_parts

    model, _, inputs = small()
    with torch.no_grad():
        eager = model(*inputs)
        assert compile_dense_parts(model) > 0
        assert relative(model(*inputs), eager) <= 2e-2


def test_captured_sampling_gives_the_same_samples():
    from eval.captured import captured
    from moe_dit.flow import build_flow

    model, recipe, (z, _, y) = small()
    graph = captured(model, recipe, torch.device("cuda"))
    settings = {"steps": 4, "method": "heun", "cfg_scale": 1.5, "cfg_interval": (0.3, 0.9)}
    for noise in (z, torch.randn_like(z)):
        eager, replayed = (build_flow(recipe).sample(network, noise, y, **settings) for network in (model, graph))
        assert torch.equal(eager, replayed)
    assert len(graph.graphs) == 2  # with both halves of guidance, and without


def test_a_pass_never_waits_for_the_gpu():
    from moe_dit.flow import build_flow

    model, recipe, (x, t, y) = small()
    model.train()
    noise, flow = torch.randn_like(x), build_flow(recipe)
    flow.loss(model, x, y, noise=noise, t=t)["loss"].backward()  # what is set up once may wait
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        flow.loss(model, x, y, noise=noise, t=t)["loss"].backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_memory_is_on_the_ranks_own_device(monkeypatch):
    from moe_dit.runtime import ranks

    count = torch.cuda.device_count()
    if count < 2:
        pytest.skip("needs two GPUs")
    for rank in range(count):
        monkeypatch.setattr(ranks, "world", lambda rank=rank: ranks.World(rank, rank, count))
        assert ranks.device() == torch.device("cuda", rank) and torch.cuda.current_device() == rank


def test_features_and_scores_are_the_cpu_s():
    """Without TF32, in which convolutions would be off by 1e-3; and the distance, its error and the neighbours."""
    from torch import nn

    from eval import metrics
    from eval.features import Extractor, Network

    class Layers(Network):
        title = identity = "layers"

        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(nn.Conv2d(3, 64, 5, 2), nn.SiLU(), nn.Conv2d(64, 64, 5, 2), nn.Flatten())

        def forward(self, images):
            return {"features": self.layers(images.float() / 255)[:, :200]}

    torch.manual_seed(0)
    network = Layers()
    images = torch.randint(256, (600, 3, 32, 32), dtype=torch.uint8)
    found = [Extractor([network], torch.device(device))(images)["features"] for device in ("cpu", "cuda")]
    assert relative(found[1], found[0]) < 1e-5
    told = []
    for device in ("cpu", "cuda"):
        x, y = (part.to(device) for part in found[0].split(300))
        frechet = metrics.Frechet(metrics.moments(y))
        told.append([*frechet.with_errors(metrics.moments(x), x, y), *metrics.neighbour_scores(x, y).values()])
    assert told[1] == pytest.approx(told[0], rel=1e-4)
