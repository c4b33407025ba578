"""Counts of a step without a GPU, and what they show."""

import json
import shutil
import sys

import pytest
import torch

from helpers import ENV, ROOT, TIMEOUT, ds_file, forks
from moe_dit import load_recipe
from moe_dit.data import Latents, training_inputs

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")


def counted(folder, *flags: str) -> dict[str, dict[str, float]]:
    """What jobs/bench.py --count counts by part."""
    file = folder / "counts.json"
    command = [sys.executable, "jobs/bench.py", "--count", "--json", str(file), *flags]
    forks.run(command, check=True, capture_output=True, cwd=ROOT, env=ENV, timeout=600)
    return json.loads(file.read_text())


def test_a_rank_with_all_experts_never_waits(tmp_path):
    small = [flag for change in ("model.depth=2", "compile=none") for flag in ("--set", change)]
    parts = counted(tmp_path, "--recipe", "digits", *small)
    waits = {part: cost["synchronisations"] for part, cost in parts.items() if cost["synchronisations"]}
    assert waits == {}
    assert parts["total"]["launches"] > 400


WHOLE_STEP = """
import sys, torch
from deepspeed.accelerator import get_accelerator
from moe_dit.counting import _Counter
from moe_dit.engine import Engine, start_ranks
from moe_dit.models.moe import Experts
from moe_dit.parallel.deepspeed_config import load_parallelism
from moe_dit.recipe_file import load_recipe
start_ranks()
recipe = load_recipe("digits", ["global_batch_size=4", *sys.argv[2:]])
engine = Engine(recipe, load_parallelism(sys.argv[1], recipe, 1), torch.device("cpu"))
for module in engine.model.modules():
    if isinstance(module, Experts):
        module.implementation = "grouped"  # as on GPUs
batch = {"x": torch.ones(4, 4, 8, 8), "noise": torch.zeros(4, 4, 8, 8), "u": torch.full((4,), 0.5)}
batch |= {"y": torch.arange(4), "position": torch.arange(4)}
for step in range(3):
    engine.train_step(step, [batch])
asked = []
get_accelerator().synchronize = lambda *device: asked.append(device)
with _Counter() as counter:
    engine.train_step(3, [batch])
    norm = engine.gradient_norm()
waits = {name for _, name in counter.operations if name in ("lift_fresh", "_local_scalar_dense")}
counted = sum(cost.synchronisations for cost in counter.costs.values())
print(counted, waits, len(asked), float(norm) > 0, float(norm.isfinite()))
"""


@pytest.mark.parametrize(
    ("stage", "settings"),
    [
        (0, ["precision=fp32"]),
        (1, ["precision=bf16"]),
        (1, ["precision=bf16", "optimizer.clip_grad_norm=0.1"]),
        (2, ["precision=bf16", "gradients=fp32"]),
    ],
)
def test_a_whole_step_never_waits(tmp_path, stage, settings):
    """DeepSpeed's own part too, which is not counted by recipe."""
    command = [sys.executable, "-c", WHOLE_STEP, str(ds_file(tmp_path, stage, 1)), *settings]
    done = forks.run(command, capture_output=True, text=True, cwd=ROOT, env=ENV, timeout=TIMEOUT)
    assert done.stdout.split("\n")[-2] == "0 set() 0 True 1.0", done.stdout + done.stderr


def test_the_host_waits_once_for_each_exchange(tmp_path):
    small = [flag for change in ("model.depth=4", "compile=none") for flag in ("--set", change)]
    parts = counted(tmp_path, "--recipe", "digits", "--ds", "ds_configs/zero2_ep8.json", *small)
    waits = {part: cost["synchronisations"] for part, cost in parts.items() if cost["synchronisations"]}
    assert waits == {"dispatch and combine": 2, "total": 2}


COMPILED = """
import json, sys
from dataclasses import asdict
from moe_dit.counting import _count_small
from moe_dit.recipe_file import load_recipe
costs = _count_small(load_recipe(sys.argv[1], sys.argv[3:]), int(sys.argv[2]), compiled=True, samples=2)
print(json.dumps({part: asdict(cost) for part, cost in costs.items()}))
"""


def test_compiled_too_a_rank_with_all_experts_never_waits():
    """Of two samples; the command compiles once more for four."""
    command = [sys.executable, "-c", COMPILED, "dsmoe_s_e16", "1", "model.depth=2"]
    done = forks.run(command, capture_output=True, text=True, check=True, cwd=ROOT, env=ENV, timeout=600)
    parts = json.loads(done.stdout)
    assert not any(cost["synchronisations"] for cost in parts.values())
    assert parts["network, compiled"]["launches"] > 50


@pytest.mark.long
def test_what_a_step_of_s_costs(tmp_path):
    """Docs name these figures. One host wait for each of five mixtures."""
    parts = counted(tmp_path, "--recipe", "dsmoe_s_e16", "--ds", "ds_configs/zero2_ep8.json")
    assert parts["total"]["launches"] <= 1000
    assert parts["exchange"]["synchronisations"] == 5
    assert parts["total"]["synchronisations"] == 5
    assert parts["total"]["bytes"] <= 18.5e9


@needs_compiler
def test_compiled_draws_are_the_draws():
    from torch._inductor.compile_fx import compile_fx  # takes a second, which no other test here needs

    recipe = load_recipe("dsmoe_s_e16")
    generator = torch.Generator().manual_seed(0)
    batch = {
        "x": torch.randn(3, 8, 32, 32, generator=generator),
        "y": torch.arange(3),
        "position": torch.tensor([5, 2**33, 7]),
    }
    want = training_inputs(recipe, batch, Latents(0.18215, 0.5, True))
    got = training_inputs(recipe, batch, Latents(0.18215, 0.5, True), backend=compile_fx)
    for key in ("y", "u", "position"):
        assert torch.equal(got[key], want[key])
    for key in ("x", "noise"):
        torch.testing.assert_close(got[key], want[key], rtol=1e-6, atol=1e-6)
