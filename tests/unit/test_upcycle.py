"""Upcycled models compute what the dense one did."""

import shutil

import pytest
import torch

from helpers import call, refused
from helpers.small_jit import MIXTURE, TINY, UNITS, fill, recipe, save_mixture
from moe_dit import build_model, load_model
from moe_dit.classes import model_classes
from moe_dit.export import load_export, save_export
from moe_dit.upcycle import upcycle, upcycle_model


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A tiny dense JiT's model folder."""
    folder, dense = tmp_path_factory.mktemp("dense") / "model", recipe(*TINY, "model.moe=null")
    save_export(fill(build_model(dense)), dense, folder)
    return folder


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    return save_mixture(tmp_path_factory.mktemp("mixture") / "model")


def output(model):
    generator = torch.Generator().manual_seed(2)
    x, t = torch.randn(6, 3, 32, 32, generator=generator), torch.rand(6, generator=generator)
    with torch.no_grad():
        return model(x, t, torch.arange(6) + 5)  # the last one is the null label


def assert_same_function(model, other):
    want = output(other)
    assert want.std() > 0.1
    torch.testing.assert_close(output(model), want, rtol=0, atol=1e-5 * want.abs().max().item())


@pytest.mark.parametrize("width", [128, 48, 43])  # UNITS <= width; width < UNITS <= 2 width; as narrow as can be
def test_an_upcycled_mixture_computes_the_dense_function(dense, tmp_path, width):
    wanted = recipe(*MIXTURE, f"model.moe.expert_width={width}", "model.proj_dropout=0.1", "model.moe.dropout=0.1")
    upcycle_model(dense, wanted, tmp_path / "model")
    model, written = load_export(tmp_path / "model")
    assert written == wanted
    assert all(weight.dtype == torch.float32 for weight in model.parameters())
    assert_same_function(model, load_model(dense))
    drawn, ours = build_model(wanted).blocks[1].mlp, model.blocks[1].mlp
    assert torch.equal(ours.router.weight, drawn.router.weight)
    # What an expert has beyond its half is new: in it as drawn, apart from expert to expert, and out of it nothing.
    for stack, new, one in (
        (ours.experts.gate_proj, drawn.experts.gate_proj, ours.experts.gate_proj[0]),
        (ours.experts.up_proj, drawn.experts.up_proj, ours.experts.up_proj[0]),
    ):
        assert torch.equal(stack[:, UNITS // 2 :], new[:, UNITS // 2 :])
        assert torch.equal(stack[3, : UNITS // 2], one[: UNITS // 2])
        assert (stack[3, UNITS // 2 :] != one[UNITS // 2 :]).all()
    assert not ours.experts.down_proj[:, :, UNITS // 2 :].any()


def test_the_command(dense, tmp_path, capfd):
    flags = [flag for change in MIXTURE for flag in ("--set", change)]
    assert call("jobs/upcycle.py", dense, "--recipe", "digits_pixels", "--out", tmp_path / "out", *flags) in (None, 0)
    assert "upcycled " in capfd.readouterr().err.splitlines()[-1]
    assert_same_function(load_model(tmp_path / "out"), load_model(dense))


def test_an_upcycled_mixture_has_the_dense_model_s_names(dense, tmp_path):
    named = shutil.copytree(dense, tmp_path / "named")
    (named / "classes.json").write_text('["a", "b"]')
    for source, names in ((dense, None), (named, ["a", "b"])):
        upcycle_model(source, recipe(*MIXTURE), tmp_path / "out")
        assert model_classes(tmp_path / "out") == names


def test_alike_experts_part_in_training(dense):
    """While they are alike no choice of theirs matters; after a step it does, and their new units take part."""
    torch.manual_seed(0)
    model = upcycle(load_model(dense), recipe(*MIXTURE))
    layer, gradients = model.blocks[1].mlp, []
    for _ in range(2):
        model.zero_grad()
        model(torch.randn(64, 3, 32, 32), torch.rand(64), torch.randint(10, (64,))).square().mean().backward()
        gradients.append((layer.router.weight.grad.norm(), layer.experts.gate_proj.grad[:, UNITS // 2 :].norm()))
        with torch.no_grad():
            for weight in model.parameters():
                weight -= weight.grad
    assert gradients[0][1] == 0 and gradients[1][1] > 1e-5
    assert gradients[0][0] < 1e-8 and gradients[1][0] > 1e-4


@pytest.mark.parametrize(
    ("name", "changes", "line"),
    [
        ("digits_pixels", ["model.moe.expert_width=42"], "must hold the 85 hidden units of a dense block between them"),
        ("digits_pixels", ["model.moe.top_k=1"], "model.moe.top_k is 1"),
        ("digits_pixels", ["model.moe.shared_expert=false"], "model.moe.shared_expert is false"),
        ("digits_pixels", ["model.depth=4"], "its depth is 2, the recipe's model.depth 4; they should be equal"),
        ("digits_pixels", ["model.num_heads=4"], "its num_heads is 2, the recipe's model.num_heads 4"),
        ("digits_pixels", ["model.moe=null"], "has no experts that tokens choose"),
        ("digits", [], "the dense blocks of DSMoE are two-layer MLPs with biases, which its experts (SwiGLU without"),
        ("digits", ["model.interleave=false"], "the dense blocks of DSMoE are two-layer MLPs"),
        ("digits_diffmoe", [], "has no experts that tokens choose"),
    ],
)
def test_what_cannot_be_upcycled_is_one_line_and_writes_nothing(dense, tmp_path, capfd, name, changes, line):
    flags = ["--recipe", name, "--out", str(tmp_path / "out" / "model")]
    for change in [*(MIXTURE if name == "digits_pixels" else []), *changes]:
        flags += ["--set", change]
    assert line in refused(capfd, "jobs/upcycle.py", str(dense), *flags)
    assert not list(tmp_path.iterdir())


def test_a_mixture_or_no_model_is_refused(mixture, tmp_path, capfd):
    flags = ["--recipe", str(mixture / "recipe.yaml"), "--out", str(tmp_path / "model")]
    assert "has experts already" in refused(capfd, "jobs/upcycle.py", str(mixture), *flags)
    assert "nowhere is not an exported model" in refused(capfd, "jobs/upcycle.py", "nowhere", *flags)
    assert not list(tmp_path.iterdir())
