"""The bench times two forms of one function: they agree, and what it reports adds up."""

import json
import subprocess
import sys

import pytest
import torch
import torch._dynamo.utils
from torch import nn

from helpers import ENV, ROOT
from moe_dit import bench, build_model, load_recipe
from moe_dit.models.initialization import initialize
from moe_dit.models.layers import rope_2d, rotate, sin_cos_table
from moe_dit.reference.loop import TokenChoice, published_form, stacked_gradients

SMALL = ["model.depth=2", "model.hidden_size=32", "model.num_heads=2"]


def network(recipe) -> nn.Module:
    model = build_model(recipe, device="meta").train()
    initialize(model, 0, torch.device("cpu"))
    with torch.no_grad():  # a fresh network predicts zero whatever its blocks do
        for i, weight in enumerate(model.parameters()):
            weight += 0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(i))
    return model


@pytest.mark.parametrize(
    ("name", "more"), [("digits", []), ("digits_pixels", ["model.in_context_start=1"]), ("digits_diffmoe", [])]
)
def test_the_published_form_has_our_outputs_and_gradients(name, more):
    recipe = load_recipe(name, [*SMALL, *more])
    ours = network(recipe)
    theirs = published_form(ours)
    side = recipe.model.input_size
    x = torch.randn(6, recipe.model.in_channels, side, side, generator=torch.Generator().manual_seed(0))
    y = torch.arange(6) % recipe.model.num_classes
    losses = []
    for model in (ours, theirs):
        terms = [model(x, torch.linspace(0, 1, 6), y).square().mean()]
        terms += [loss for module in model.modules() for loss in getattr(module, "layer_losses", {}).values()]
        losses.append(torch.stack(terms).sum())
        losses[-1].backward()
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-6)
    found = stacked_gradients(theirs)
    assert not any(isinstance(module, TokenChoice) for module in ours.modules())
    for key, weight in ours.named_parameters():
        if weight.grad is not None:
            torch.testing.assert_close(found[key], weight.grad, rtol=1e-4, atol=1e-6, msg=key)


def test_moved_weights_give_every_expert_a_gradient():
    recipe = load_recipe("digits", SMALL)
    model = initialize(build_model(recipe, device="meta").train(), 0, torch.device("cpu"))
    for name, weight in model.named_parameters():
        part = weight.detach().clone().flatten()
        bench.move(name, 0, weight)
        cut = len(part) // 3
        bench.move(name, 0, part[:cut])
        bench.move(name, cut, part[cut:])
        assert torch.equal(part, weight.detach().flatten())
    x = torch.randn(6, recipe.model.in_channels, *[recipe.model.input_size] * 2)
    model(x, torch.linspace(0, 1, 6), torch.arange(6)).square().mean().backward()
    experts = [weight.grad for name, weight in model.named_parameters() if ".experts." in name or "router" in name]
    assert len(experts) == 4 and all(gradient.flatten(1).norm(dim=1).min() > 0 for gradient in experts)


def test_sampling_is_timed_by_the_plain_network_that_eval_runs():
    """No engine, whose blocks may be compiled; 25 Euler steps of the recipe with both halves of guidance."""
    torch._dynamo.utils.counters.clear()
    recipe = load_recipe("digits", [*SMALL, "compile=blocks"])
    told = bench._sampling(recipe, bench.Clock(torch.device("cpu")), batch=2)
    assert told["sampling_evaluations"] == 50 and told["sampling_images_per_second"] > 0
    assert not torch._dynamo.utils.counters["stats"]  # nothing was compiled


def test_turning_pairs_as_complex_numbers_is_turning_them():
    """What CPUs compute in float32 beside the form that every other device and precision takes."""
    x = torch.randn(2, 16, 3, 8, requires_grad=True)
    table = sin_cos_table(rope_2d(8, 4))
    by_hand = rotate(x.double(), table.double())
    torch.testing.assert_close(rotate(x, table), by_hand.float(), rtol=1e-6, atol=1e-6)
    weight = torch.randn_like(x)
    got, want = (torch.autograd.grad((out * weight).sum(), x)[0] for out in (rotate(x, table), by_hand))
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def run_bench(*flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "jobs/bench.py", *flags]
    return subprocess.run(command, cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(  # the second's learning rate warms up
    ("name", "more"), [("digits", []), ("digits_pixels", ["model.in_context_start=1"])]
)
def test_what_the_bench_reports_adds_up(name, more, tmp_path):
    table, plot = tmp_path / "digits.json", tmp_path / "digits.svg"
    small = [flag for change in [*SMALL, *more] for flag in ("--set", change)]
    done = run_bench(
        "--recipe", name, "--batch", "4", "--pairs", "3", *small, "--json", str(table), "--plot", str(plot)
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(table.read_text())
    assert result["recipe"] == name and result["batch"] == 4 and len(result["pairs"]) == 3
    mine, theirs = ([pair[i] for pair in result["pairs"]] for i in (0, 1))
    assert result["ours"]["seconds"]["median"] == sorted(mine)[1]
    assert result["published"]["seconds"]["median"] == sorted(theirs)[1]
    assert result["images_per_second"] == pytest.approx(4 / sorted(mine)[1])
    assert result["speedup"] == pytest.approx(sorted(b / a for a, b in zip(mine, theirs, strict=True))[1])
    for form in ("ours", "published"):
        parts = result[form]["parts"]
        assert set(parts) == {"data and draws", "forward", "backward", "optimizer", "averages", "other"}
        assert sum(parts.values()) == pytest.approx(result[form]["seconds"]["median"], rel=0.5)
    # Both took the same first steps, from the same weights: moved ones. Initial ones, whose gates and last layer are
    # zero and give experts no gradient, would begin with 1.96524.
    if name == "digits":
        assert result["agreement"]["loss"][0] == pytest.approx(1.99771, rel=1e-4)
    assert result["agreement"]["loss"][0] == pytest.approx(result["agreement"]["loss"][1], rel=1e-4)
    assert "<svg" in plot.read_text()[:1000]
    assert "times as fast as the published form" in done.stdout


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--batch", "0"], "--batch 0: it should be at least 1"),
        (["--plot", "x.png"], "--plot x.png: it should end in .svg"),
        (["--device", "cuda"], "--device cuda: torch sees no GPU here"),
        (["--recipe", "dsmoe_s_e61"], "did you mean dsmoe_s_e16?"),
    ],
)
def test_bad_flags_of_the_bench_are_one_line(flags, line):
    done = run_bench(*flags)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and line in done.stderr
    assert done.stderr.count("\n") == 1
