"""Compiled blocks compute what plain ones do, by the compiler itself."""

import shutil

import pytest
import torch

from helpers.compiling import one_rank, step
from moe_dit import load_recipe
from moe_dit.parallel.compile import compile_blocks
from moe_dit.parallel.recompute import apply_activation_checkpointing

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")


ALL = ["none", "blocks", "experts"]


# A compiler takes a second a kernel: in the ten minutes all is traced alone.
@pytest.mark.parametrize(
    ("name", "backend", "modes"),
    [
        ("digits", "aot_eager", ALL),
        ("digits_pixels", "aot_eager", ALL),
        ("digits_diffmoe", "aot_eager", ALL),
        *(
            pytest.param(name, "inductor", modes, marks=pytest.mark.long)
            for name, modes in (
                ("digits", ["experts"]),
                ("digits_pixels", ["blocks"]),
                ("digits_diffmoe", ["none"]),
            )
        ),
    ],
)
def test_compiled_blocks_give_the_plain_ones_losses_and_gradients(name, backend, modes):
    small = ["model.depth=2", "model.hidden_size=32", "model.num_heads=2"]
    if name == "digits_pixels":
        small.append("model.in_context_start=1")
    recipe = load_recipe(name, small)
    want, gradients = step(one_rank(recipe), recipe)
    for recomputed in modes:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        model = one_rank(recipe)
        compile_blocks(model, whole=recomputed != "experts", backend=backend)
        apply_activation_checkpointing(model, recomputed)
        got, found = step(model, recipe)
        assert got == pytest.approx(want, rel=1e-5)
        assert found.keys() == gradients.keys()
        for key, gradient in gradients.items():
            torch.testing.assert_close(found[key], gradient, rtol=1e-4, atol=1e-6)
        assert not torch._dynamo.utils.counters["graph_break"]
