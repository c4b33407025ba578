"""Sampling in bf16: the function that training computes, by the fast product, near float32's samples."""

import pytest
import torch

from eval.generate import Sampling, generate
from helpers.networks import network
from moe_dit import build_model, load_recipe
from moe_dit.build import to_compute
from moe_dit.models.moe import Experts

CPU = torch.device("cpu")


def sample(name: str, precision: str, implementation: str = "loop") -> torch.Tensor:
    """Eight samples, in grey levels."""
    recipe = load_recipe(name, [f"precision={precision}", "sampling.steps=8"])
    model = to_compute(network(recipe), recipe, CPU)
    for module in model.modules():
        if isinstance(module, Experts):
            module.implementation = implementation  # by itself it is the loop on CPUs, grouped for bf16 on GPUs
    return generate(model, recipe, Sampling.of_recipe(recipe, 0), None, torch.arange(8)).float()


@pytest.mark.parametrize("name", ["digits", "digits_diffmoe", "digits_pixels"])
def test_sampling_in_bf16_takes_the_grouped_product(monkeypatch, name):
    product, seen = torch._grouped_mm, []

    def spy(rows, weights, **options):
        seen.append((rows.dtype, weights.dtype))
        return product(rows, weights, **options)

    monkeypatch.setattr(torch, "_grouped_mm", spy)
    grouped = sample(name, "bf16", "grouped")
    # In each of 8 steps, in each of 3 layers, 2 or 3 products.
    assert len(seen) >= 8 * 3 * 2 and set(seen) == {(torch.bfloat16, torch.bfloat16)}
    exact = sample(name, "fp32")
    assert exact.std() > 50  # grey levels: a grey square would say nothing
    assert 0 < (grouped - exact).abs().mean() < 2


@pytest.mark.parametrize(
    ("precision", "device", "bf16"),
    [("auto", "cuda", True), ("auto", "cpu", False), ("bf16", "cpu", True), ("fp32", "cuda", False)],
)
def test_what_a_network_computes_in(precision, device, bf16):
    assert load_recipe("digits", [f"precision={precision}"]).in_bf16(device) == bf16


def test_weights_become_bf16_and_buffers_stay():
    recipe = load_recipe("digits", ["precision=bf16"])
    model = to_compute(build_model(recipe).train(), recipe, CPU)
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert {buffer.dtype for buffer in model.buffers()} == {torch.float32}
    assert not model.training
