"""Every compiled block of a kind shares its graphs, and no number of shapes is too many; nothing is compiled here."""

import pytest
import torch

from helpers.compiling import counting, one_rank, step
from moe_dit import load_recipe
from moe_dit.data import Latents, training_inputs
from moe_dit.flow import build_flow
from moe_dit.models.dropout import dropouts, set_dropout_draws
from moe_dit.models.layers import rope_2d, rotate, sin_cos_table
from moe_dit.parallel.compile import compile_blocks, compile_dense_parts


@pytest.fixture
def two_graphs():
    """torch gives a code object two graphs, and nothing is compiled yet."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=2):
        yield


def test_graphs_serve_all_blocks_of_a_kind():
    recipe = load_recipe("digits", ["model.depth=8", "model.hidden_size=32", "model.num_heads=2"])
    graphs, model = [], one_rank(recipe)
    torch._dynamo.reset()
    compile_blocks(model, backend=counting(graphs))
    step(model, recipe)
    step(model, recipe)
    # Dense blocks; those with experts before and after the exchange; shared experts; time embedding and final layer.
    assert len(graphs) == 6


@pytest.mark.parametrize(
    ("name", "flags", "trains", "looks"),
    [
        # Graphs of the training step and of each evaluation shape: of dense blocks; before and after an exchange; of
        # shared experts; of time and final layer; of the objective's two parts, in evaluation its first. Class tokens
        # make each of a block's four two, and dropout those that drop.
        ("digits", [], 8, 7),
        ("digits_pixels", ["in_context_start=3", "moe=null", "depth=8", "proj_dropout=0.2"], 8, 7),
        ("digits_diffmoe", [], 6, 5),
        # Experts that drop: as long as all others together.
        pytest.param("digits_pixels", ["in_context_start=1"], 9, 8, marks=pytest.mark.long),
        pytest.param("digits_pixels", ["in_context_start=3", "moe=null", "depth=8"], 6, 5, marks=pytest.mark.long),
        pytest.param(
            *("digits_pixels", ["in_context_start=3", "depth=8", "proj_dropout=0.2", "moe.dropout=0.2"], 16, 15),
            marks=pytest.mark.long,
        ),
    ],
)
def test_no_number_of_shapes_is_too_many(two_graphs, name, flags, trains, looks):
    """torch's limit, 8 graphs of a code object and lowered to 2 here, is never met: what varies has its own."""
    small = ["model.depth=4", "model.hidden_size=32", "model.num_heads=2", *(f"model.{flag}" for flag in flags)]
    recipe, found = load_recipe(name, small), []
    model, flow = one_rank(recipe), build_flow(recipe)
    compile_blocks(model, backend=counting(found))
    flow.compile(counting(found))

    def inputs(samples: int) -> tuple:
        x = torch.randn(samples, recipe.model.in_channels, *[recipe.model.input_size] * 2)
        set_dropout_draws(dropouts(model), recipe.seed, torch.arange(samples))
        return model, x, torch.arange(samples) % 10, torch.randn_like(x), torch.rand(samples)

    for _ in range(2):
        flow.loss(*inputs(6))["loss"].backward()
        assert len(found) == trains
    model.eval()
    for samples in (6, 3):
        found.clear()
        with torch.no_grad():
            flow.errors(*inputs(samples))
            assert len(found) == looks
            flow.errors(*inputs(samples))
            assert len(found) == looks
    found.clear()
    model.train()
    flow.loss(*inputs(6))["loss"].backward()
    assert not found


def test_dense_parts_take_every_shape_too(two_graphs, monkeypatch):
    found = []
    model = one_rank(load_recipe("digits", ["model.depth=4", "model.hidden_size=32", "model.num_heads=2"]))
    monkeypatch.setattr("moe_dit.graphs.compiled.__defaults__", (counting(found),))
    assert compile_dense_parts(model) == 6
    for i, samples in enumerate((2, 3, 4), start=1):
        model(torch.randn(samples, 4, 8, 8), torch.rand(samples), torch.arange(samples))
        assert len(found) == 2 * i  # attention, and the dense blocks' MLP


def test_draws_take_every_shape_and_recipe(two_graphs):
    found = []
    backend = counting(found)
    for seed, samples in ((0, 2), (0, 3), (1, 3), (0, 2)):
        x, zeros = torch.zeros(samples, 3, 4, 4, dtype=torch.uint8), torch.zeros(samples, dtype=torch.int64)
        recipe = load_recipe("digits_pixels", [f"seed={seed}"])
        training_inputs(recipe, {"x": x, "y": zeros, "position": zeros}, Latents(), backend=backend)
    assert len(found) == 3


def test_rotation_is_multiplication_by_a_complex_number():
    x = torch.randn(2, 16, 3, 8)
    angles = rope_2d(8, 4)
    turned = torch.view_as_complex(x.unflatten(-1, (4, 2))) * torch.polar(torch.ones(16, 1, 4), angles[:, None, ::2])
    got = rotate(x, sin_cos_table(angles))
    torch.testing.assert_close(got, torch.view_as_real(turned).flatten(-2), rtol=1e-6, atol=1e-6)
    assert rotate(x.bfloat16(), sin_cos_table(angles)).dtype == torch.bfloat16
