"""Weights that runs begin from: which are taken, and what is read of them."""

import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers import call, refused
from helpers.autoencoders import write_images
from helpers.small_jit import MIXTURE, flags_from, recipe, save_mixture
from moe_dit.initial_weights import check_initial_weights
from moe_dit.runtime.errors import InputError
from moe_dit.weight_files import open_weights, read_flat


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    return save_mixture(tmp_path_factory.mktemp("mixture") / "model")


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


def test_bad_initial_weights_end_a_run_before_it_begins(mixture, tmp_path, capfd):
    pixels, run = tmp_path / "shards", tmp_path / "run"
    write_images(tmp_path / "images", 32, 32)
    assert call("data_prep.pack_pixels", "--images", tmp_path / "images", "--size", 32, "--out", pixels) in (None, 0)
    capfd.readouterr()
    usual = ["--ds", "ds_configs/zero1_ep1.json", "--data", pixels, "--out", run]
    error = refused(capfd, "jobs/train.py", *usual, *flags_from(tmp_path / "nowhere"))
    assert "nowhere is not an exported model" in error
    error = refused(capfd, "jobs/train.py", *usual, *flags_from(mixture), "--set", "model.depth=4")
    assert "its depth is 2, the recipe's model.depth 4" in error
    assert not run.exists()
