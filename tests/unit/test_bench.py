"""What the bench times, and what it refuses."""

import pytest
import torch
import torch._dynamo.utils

from helpers import refused
from moe_dit import bench, build_model, load_recipe
from moe_dit.models.initialization import initialize
from moe_dit.models.layers import rope_2d, rotate, sin_cos_table

SMALL = ["model.depth=2", "model.hidden_size=32", "model.num_heads=2"]


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


def test_a_product_that_takes_seconds_is_not_tried_again(monkeypatch):
    """As those in bf16 of a CPU that has no instructions for it: minutes for each pair of steps."""
    monkeypatch.setitem(bench.SIDES, "cpu", (2, 4))
    peak = bench.MatrixPeak(torch.device("cpu"), bf16=True)

    class Told(bench.Clock):
        def seconds(self, work):
            work()
            return self.told.pop(0)

    clock = Told(torch.device("cpu"))
    clock.told = [1.0, 0.5, 1.0, 4.0, 1.0, 1.0]
    assert peak.measure(clock) == 2 * 2**3 / 0.5 and clock.told == [1.0, 1.0]
    clock.told = [1.0, 0.5, 1.0, 1.0, 1.0, 1.0]
    assert peak.measure(clock) == 2 * 4**3 / 1.0 and clock.told == []


def test_turning_pairs_as_complex_numbers_is_turning_them():
    """What CPUs compute in float32 beside the form that every other device and precision takes."""
    x = torch.randn(2, 16, 3, 8, requires_grad=True)
    table = sin_cos_table(rope_2d(8, 4))
    by_hand = rotate(x.double(), table.double())
    torch.testing.assert_close(rotate(x, table), by_hand.float(), rtol=1e-6, atol=1e-6)
    weight = torch.randn_like(x)
    got, want = (torch.autograd.grad((out * weight).sum(), x)[0] for out in (rotate(x, table), by_hand))
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--batch", "0"], "--batch 0: it should be at least 1"),
        (["--plot", "x.png"], "--plot x.png: it should end in .svg"),
        (["--device", "cuda"], "--device cuda: torch sees no GPU here"),
        (["--recipe", "dsmoe_s_e61"], "did you mean dsmoe_s_e16?"),
    ],
)
def test_bad_flags_of_the_bench_are_one_line(flags, line, capsys):
    assert line in refused(capsys, "jobs/bench.py", *flags)
