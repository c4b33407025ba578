"""Upcycled models compute what the dense one did, and runs begin from the weights they are given."""

import runpy
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers import ENV, ROOT, finish, losses, start_training
from moe_dit import build_model, load_model, load_recipe
from moe_dit.data import Latents, batches, training_inputs
from moe_dit.export import export_checkpoint, load_export, save_export
from moe_dit.flow import build_flow
from moe_dit.initial_weights import check_initial_weights, open_weights, read_flat
from moe_dit.manifest import read_manifest
from moe_dit.runtime.errors import InputError
from moe_dit.runtime.ranks import World
from moe_dit.upcycle import upcycle, upcycle_model

TINY = ["model.depth=2", "model.hidden_size=32", "model.num_heads=2", "model.bottleneck_dim=16"]
TINY += ["model.in_context_start=1", "global_batch_size=16"]
UNITS = 85  # hidden units of its dense blocks: int(4 * 32 * 2 / 3)
MIXTURE = [*TINY, "model.moe.num_experts=4", "model.moe.expert_width=48"]


def recipe(*changes):
    return load_recipe("digits_pixels", changes)


def fill(model, seed=1):
    """Random weights everywhere: fresh networks have zeros where an error could hide."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0, 0.2, generator=generator)
        for name, buffer in model.named_buffers():
            if name.endswith("correction_bias"):
                buffer.normal_(0, 0.2, generator=generator)
    return model


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A tiny dense JiT's model folder."""
    folder, dense = tmp_path_factory.mktemp("dense") / "model", recipe(*TINY, "model.moe=null")
    save_export(fill(build_model(dense)), dense, folder)
    return folder


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """A tiny JiTMoE's model folder, in several files."""
    folder, mixture = tmp_path_factory.mktemp("mixture") / "model", recipe(*MIXTURE)
    model = fill(build_model(mixture))
    save_export(model, mixture, folder)
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def refused(monkeypatch, capfd, script, *flags) -> str:
    """Run a job in this process: it must exit 2 with one line; gives it."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [f"jobs/{script}.py", *map(str, flags)])
    with pytest.raises(SystemExit) as done:
        runpy.run_path(str(ROOT / f"jobs/{script}.py"), run_name="__main__")
    error = capfd.readouterr().err
    assert done.value.code == 2
    assert error.count("\n") == 1 and error.startswith("error: "), error
    return error


def output(model):
    generator = torch.Generator().manual_seed(2)
    x, t = torch.randn(6, 3, 32, 32, generator=generator), torch.rand(6, generator=generator)
    with torch.no_grad():
        return model(x, t, torch.arange(6) + 5)  # the last one is the null label


def assert_same_function(model, other):
    want = output(other)
    assert want.std() > 0.1
    torch.testing.assert_close(output(model), want, rtol=0, atol=1e-5 * want.abs().max().item())


# --- upcycling --------------------------------------------------------------------------------------------------------


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


def test_the_command(dense, tmp_path):
    command = [
        sys.executable,
        "jobs/upcycle.py",
        str(dense),
        "--recipe",
        "digits_pixels",
        "--out",
        str(tmp_path / "out"),
    ]
    command += [flag for change in MIXTURE for flag in ("--set", change)]
    done = subprocess.run(command, cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "upcycled " in done.stderr.splitlines()[-1], done.stderr
    assert_same_function(load_model(tmp_path / "out"), load_model(dense))


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
def test_what_cannot_be_upcycled_is_one_line_and_writes_nothing(
    dense, tmp_path, monkeypatch, capfd, name, changes, line
):
    flags = ["--recipe", name, "--out", str(tmp_path / "out" / "model")]
    for change in [*(MIXTURE if name == "digits_pixels" else []), *changes]:
        flags += ["--set", change]
    assert line in refused(monkeypatch, capfd, "upcycle", str(dense), *flags)
    assert not list(tmp_path.iterdir())


def test_a_mixture_or_no_model_is_refused(mixture, tmp_path, monkeypatch, capfd):
    flags = ["--recipe", str(mixture / "recipe.yaml"), "--out", str(tmp_path / "model")]
    assert "has experts already" in refused(monkeypatch, capfd, "upcycle", str(mixture), *flags)
    assert "nowhere is not an exported model" in refused(monkeypatch, capfd, "upcycle", "nowhere", *flags)
    assert not list(tmp_path.iterdir())


# --- beginning a run from given weights -------------------------------------------------------------------------------


def flags_from(folder, steps=2):
    values = [*MIXTURE, f"initial_weights={folder}"]
    return ["--recipe", "digits_pixels", "--steps", str(steps), *(f for value in values for f in ("--set", value))]


def test_a_run_begins_from_given_weights_on_any_topology(mixture, pixels, tmp_path):
    folder = shutil.copytree(mixture, tmp_path / "model")
    one, two = tmp_path / "one", tmp_path / "two"
    finish(start_training(2, "zero2_ep2", pixels, two, *flags_from(folder)), two)
    log = finish(start_training(1, "zero1_ep1", pixels, one, *flags_from(folder)), one)
    assert f"from {folder}" in log
    assert len(losses(one)) == 2 and losses(two) == pytest.approx(losses(one), rel=1e-6)

    plain, manifest = recipe(*MIXTURE), read_manifest(pixels)
    flow, model = build_flow(plain), load_model(folder).train()
    inputs = training_inputs(
        plain, next(batches(plain, manifest, plain.global_batch_size, 0, World())), Latents.of(plain, manifest)
    )
    with torch.no_grad():
        loss = flow.loss(model, inputs["x"], inputs["y"], noise=inputs["noise"], t=flow.times(inputs["u"]))["loss"]
    assert losses(one)[0] == pytest.approx(loss.item(), rel=1e-6)

    shutil.rmtree(folder)  # a run that continues has no more need of it
    finish(start_training(1, "zero1_ep1", pixels, one, *flags_from(folder, steps=3)), one)
    assert len(losses(one)) == 3


def test_master_weights_averages_and_biases_are_the_given_ones_to_the_last_bit(mixture, pixels, tmp_path):
    """In bf16, where DeepSpeed rounds what it is given; a step too small to be seen leaves everything in its place."""
    run, still = tmp_path / "run", ["--set", "precision=bf16", "--set", "optimizer.lr=1e-30"]
    finish(start_training(2, "zero2_ep2", pixels, run, *flags_from(mixture, steps=1), *still), run)
    want = load_model(mixture).state_dict()
    for weights in ("model", "ema", "ema2"):
        export_checkpoint(run, weights, tmp_path / weights)
        for name, value in load_model(tmp_path / weights).state_dict().items():
            assert torch.equal(value, want[name]), name


def test_a_slice_of_a_flattened_tensor(tmp_path):
    values = {"cube": torch.randn(5, 3, 4), "line": torch.randn(7)}
    save_file(values, tmp_path / "diffusion_pytorch_model.safetensors")
    with open_weights(tmp_path) as weights:
        for start, numel in ((0, 60), (11, 2), (12, 12), (13, 30), (59, 1), (20, 0)):
            want = values["cube"].flatten()[start : start + numel]
            assert torch.equal(read_flat(weights["cube"], start, numel), want)
        assert torch.equal(read_flat(weights["line"], 2, 3), values["line"][2:5])


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ("model.moe.expert_width=64", "its moe.expert_width is 48, the recipe's model.moe.expert_width 64"),
        ("model.num_heads=4", "its num_heads is 2, the recipe's model.num_heads 4"),
        ("model.moe=null", "its moe is {'num_experts': 4"),
    ],
)
def test_weights_of_another_network_are_refused(mixture, change, line):
    with pytest.raises(InputError) as error:
        check_initial_weights(replace(recipe(*MIXTURE, change), initial_weights=str(mixture)))
    assert line in str(error.value)


NAME = "blocks.1.mlp.experts.up_bias"


def test_what_acts_in_training_alone_may_differ(mixture):
    changes = ["model.proj_dropout=0.1", "model.moe.dropout=0.1", "model.moe.auxiliary_losses.z_loss=0.001"]
    check_initial_weights(replace(recipe(*MIXTURE, *changes), initial_weights=str(mixture)))


def test_damaged_model_folders_are_refused(mixture, tmp_path):
    def problem(damage):
        folder = shutil.copytree(mixture, tmp_path / "model")
        damage(folder)
        with pytest.raises(InputError) as error:
            check_initial_weights(replace(recipe(*MIXTURE), initial_weights=str(folder)))
        shutil.rmtree(folder)
        return str(error.value)

    def change(function):
        def damage(folder):
            file = next(file for file in folder.glob("*.safetensors") if NAME in load_file(file))
            tensors = load_file(file)
            function(tensors)
            save_file(tensors, file)

        return damage

    def first(pattern, content):
        return lambda folder: min(folder.glob(pattern)).write_text(content)

    assert f"has no weights {NAME}" in problem(change(lambda tensors: tensors.pop(NAME)))
    other = problem(change(lambda tensors: tensors.update({NAME: torch.zeros(3, 48)})))
    assert f"has {NAME} of shape [3, 48], but recipe digits_pixels needs [4, 48]" in other
    assert "cannot be read" in problem(lambda folder: min(folder.glob("*.safetensors")).unlink())
    assert "cannot be read" in problem(first("*.safetensors", "x" * 50))
    assert "cannot be read" in problem(first("*.index.json", "[]"))
    assert "it has no config.json" in problem(lambda folder: (folder / "config.json").unlink())
    assert "_class_name is 'UNet'" in problem(first("config.json", '{"_class_name": "UNet"}'))
    assert "input_size is wrong for a jit network" in problem(first("config.json", '{"_class_name": "JiT"}'))


def test_bad_initial_weights_end_a_run_before_it_begins(mixture, pixels, tmp_path, monkeypatch, capfd):
    usual = ["--ds", "ds_configs/zero1_ep1.json", "--data", pixels, "--out", tmp_path / "run"]
    error = refused(monkeypatch, capfd, "train", *usual, *flags_from(tmp_path / "nowhere"))
    assert "nowhere is not an exported model" in error
    error = refused(monkeypatch, capfd, "train", *usual, *flags_from(mixture), "--set", "model.depth=4")
    assert "its depth is 2, the recipe's model.depth 4" in error
    assert not list(tmp_path.iterdir())
