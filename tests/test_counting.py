"""Counts of a step without a GPU, and what they show."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from helpers import ENV, ROOT

from moe_dit import load_recipe
from moe_dit.counting import _Counter
from moe_dit.data import Latents, training_inputs
from moe_dit.parallel.deepspeed_config import load_parallelism
from moe_dit.runtime.errors import InputError

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")


def counted(folder, *flags: str) -> dict[str, dict[str, float]]:
    """What jobs/bench.py --count counts by part."""
    file = folder / "counts.json"
    command = [sys.executable, "jobs/bench.py", "--count", "--json", str(file), *flags]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT, env=ENV, timeout=600)
    return json.loads(file.read_text())


def test_what_is_a_launch():
    x = torch.ones(4, 8)
    with _Counter() as counter:
        y = (x.t()[2:] * 2).sum()  # a view twice, a product and a sum
        float(y)
        x @ x.t()
    cost = counter.costs["draws and inputs"]
    # bytes: 6 x 4 floats read and written; read, and one written; the matrix product's are left out
    assert (cost.launches, cost.synchronisations, cost.bytes) == (3, 1, 4 * (24 + 24 + 24 + 1))


@pytest.mark.slow
def test_a_rank_with_all_experts_never_waits(tmp_path):
    small = [flag for change in ("model.depth=2", "compile=none") for flag in ("--set", change)]
    parts = counted(tmp_path, "--recipe", "digits", *small)
    waits = {part: cost["synchronisations"] for part, cost in parts.items() if cost["synchronisations"]}
    assert waits == {"DeepSpeed's hooks and step": 1, "total": 1}
    assert parts["total"]["launches"] > 400


@pytest.mark.slow
def test_what_a_step_of_s_costs(tmp_path):
    """Docs name these figures. One host wait for each of five mixtures, and one for the gradient's norm."""
    parts = counted(tmp_path, "--recipe", "dsmoe_s_e16", "--ds", "ds_configs/zero2_ep8.json")
    assert parts["total"]["launches"] <= 1000
    assert parts["exchange"]["synchronisations"] == 5
    assert parts["total"]["synchronisations"] == 6
    assert parts["total"]["bytes"] <= 18.5e9


@pytest.mark.slow
def test_compiled_too_a_rank_with_all_experts_never_waits(tmp_path):
    parts = counted(tmp_path, "--recipe", "dsmoe_s_e16", "--set", "model.depth=2")
    waits = {part: cost["synchronisations"] for part, cost in parts.items() if cost["synchronisations"]}
    assert waits == {"DeepSpeed's hooks and step": 1, "total": 1}
    assert parts["network, compiled"]["launches"] > 50


@pytest.mark.slow
@needs_compiler
def test_compiled_draws_are_the_draws():
    recipe = load_recipe("dsmoe_s_e16")
    generator = torch.Generator().manual_seed(0)
    batch = {
        "x": torch.randn(3, 8, 32, 32, generator=generator),
        "y": torch.arange(3),
        "position": torch.tensor([5, 2**33, 7]),
    }
    want = training_inputs(recipe, batch, Latents(0.18215, 0.5, True))
    got = training_inputs(recipe, batch, Latents(0.18215, 0.5, True), backend=torch._inductor.compile_fx.compile_fx)
    for key in ("y", "u", "position"):
        assert torch.equal(got[key], want[key])
    for key in ("x", "noise"):
        torch.testing.assert_close(got[key], want[key], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ('"comm_backend": "nccl"', "expert_parallel.comm_backend is 'nccl'; it should be comm or deepep"),
        ('"async_split_plan": 1', "expert_parallel.async_split_plan is 1; it should be true or false"),
        ('"combine_impl": "bmm"', "expert_parallel takes .*, not combine_impl"),
        ('"comm_backend": "deepep"', "deepep needs the package deep_ep, which is not installed"),
    ],
)
def test_how_tokens_are_exchanged_is_checked(tmp_path, section, message):
    file = tmp_path / "ds.json"
    file.write_text(f'{{"expert_parallel": {{"enabled": true, "autoep_size": 2, {section}}}}}')
    recipe = load_recipe("digits")
    with pytest.raises(InputError, match=message):
        load_parallelism(str(file), recipe, 2).exchange(recipe, bf16=True)
