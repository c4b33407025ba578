"""Folders of models that hold less, more or other than a network's weights: one line, in every way of loading one."""

import json
import os
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from data_prep.autoencoder import load_vae
from data_prep.digits import build_vae
from helpers.small_jit import MIXTURE, TINY, fill, recipe, save_mixture
from moe_dit import build_model, load_model
from moe_dit.export import load_export, save_export
from moe_dit.initial_weights import check_initial_weights
from moe_dit.runtime.errors import InputError
from moe_dit.upcycle import upcycle_model

NAME = "blocks.0.attn.qkv.weight"
INDEX = "diffusion_pytorch_model.safetensors.index.json"
WHOLE = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A mixture in several files, a dense model in one, and an autoencoder."""
    folder = tmp_path_factory.mktemp("models")
    dense = recipe(*TINY, "model.moe=null")
    save_export(fill(build_model(dense)), dense, folder / "dense")
    build_vae(seed=0).save_pretrained(folder / "vae")
    save_mixture(folder / "mixture")
    return folder


def changed(function):
    """A change of the tensors of the file that holds NAME, or the first one."""

    def damage(folder):
        files = sorted(folder.glob("*.safetensors"))
        file = next((file for file in files if NAME in load_file(file)), files[0])
        tensors = load_file(file)
        function(tensors)
        save_file(tensors, file, {"format": "pt"})

    return damage


def some(tensors):
    """A weight of the file: NAME where it is there."""
    return NAME if NAME in tensors else next(iter(tensors))


def index_says(name):
    def damage(folder):
        index = folder / INDEX
        if not index.exists():
            keys = load_file(folder / WHOLE)
            index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(keys, WHOLE)}))
        found = json.loads(index.read_text())
        place = next(iter(found["weight_map"].values()))
        found["weight_map"] = {key: name if file == place else file for key, file in found["weight_map"].items()}
        index.write_text(json.dumps(found))
        if os.path.dirname(name):  # the file outside the folder is there, and whole
            (folder / place).rename(folder / name)

    return damage


def cut(folder):
    file = min(folder.glob("*.safetensors"))
    os.truncate(file, file.stat().st_size - 4)


def a_pipe(name):
    def damage(folder):
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return damage


def another_network(folder):
    """What torch.save wrote of another model, instead of all."""
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    torch.save({NAME: torch.zeros(2, 2)}, folder / "diffusion_pytorch_model.bin")


def config(change):
    def damage(folder):
        file = folder / "config.json"
        values = json.loads(file.read_text())
        change(values)
        file.write_text(json.dumps(values))

    return damage


DAMAGES = {
    "one missing": changed(lambda tensors: tensors.pop(some(tensors))),
    "one misnamed": changed(lambda tensors: tensors.update({"other": tensors.pop(some(tensors))})),
    "one too many": changed(lambda tensors: tensors.update({"other": torch.zeros(2)})),
    "another shape": changed(lambda t: t.update({some(t): t[some(t)][:-1].contiguous()})),
    "all missing": lambda folder: [save_file({"a": torch.zeros(1)}, file) for file in folder.glob("*.safetensors")],
    "no weights": lambda folder: [file.unlink() for file in folder.glob("*.safetensors")],
    "a shard missing": lambda folder: min(folder.glob("*.safetensors")).unlink(),
    "a shard that is listed alone": index_says("diffusion_pytorch_model-00009-of-00009.safetensors"),
    "a shard elsewhere": index_says("../stolen.safetensors"),
    "cut short": cut,
    "another network's .bin": another_network,
    "a pipe": a_pipe(WHOLE),
    "an index that is a pipe": a_pipe(INDEX),
    "an index of nothing": lambda folder: (folder / INDEX).write_text('{"weight_map": {}}'),
    "an index that nests": lambda folder: (folder / INDEX).write_text("[" * 100_000),
    "an unknown key": config(lambda values: values.update(width=3)),
    "a configuration that is a pipe": a_pipe("config.json"),
}
WAYS = {
    "load_model": ("mixture", load_model),
    "load_export": ("mixture", load_export),
    "initial_weights": (
        "mixture",
        lambda folder: check_initial_weights(replace(recipe(*MIXTURE), initial_weights=str(folder))),
    ),
    "upcycle": ("dense", lambda folder: upcycle_model(folder, recipe(*MIXTURE), folder.parent / "upcycled")),
    "vae": ("vae", lambda folder: load_vae(str(folder))),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_model_that_is_not_whole_is_one_line(models, tmp_path, damage, way):
    name, load = WAYS[way]
    folder = shutil.copytree(models / name, tmp_path / "model")
    if damage == "a pipe" and (folder / INDEX).exists():
        (folder / INDEX).unlink()
    DAMAGES[damage](folder)
    with pytest.raises(InputError) as error:
        load(folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "upcycled").exists()


@pytest.mark.parametrize("key", ["mlp_ratio", "in_context_len", "attn_dropout", "moe.num_groups"])
def test_a_configuration_that_lacks_a_key_is_one_line(models, tmp_path, key):
    """A default would be another function of the same weights."""
    folder = shutil.copytree(models / "mixture", tmp_path / "model")
    *section, last = key.split(".")
    config(lambda values: (values[section[0]] if section else values).pop(last))(folder)
    with pytest.raises(InputError, match=rf"config\.json: {key} is (missing|wrong)"):
        load_model(folder)


def test_what_a_later_version_added_may_be_missing(models, tmp_path):
    folder = shutil.copytree(models / "mixture", tmp_path / "model")
    config(lambda values: [values["moe"].pop(key) for key in ("score", "auxiliary_losses", "dropout")])(folder)
    assert load_model(folder).config["moe"]["score"] == "sigmoid"


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_are_the_file_s_in_float32_whatever_they_are(models, tmp_path, kind):
    """NaN too: what it is is not ours to judge."""
    folder = shutil.copytree(models / "dense", tmp_path / "model")
    tensors = {name: value.to(kind) for name, value in load_file(folder / WHOLE).items()}
    tensors[NAME][0, 0] = float("nan")
    save_file(tensors, folder / WHOLE)
    model = load_model(folder)
    assert not model.training and all(weight.dtype == torch.float32 for weight in model.parameters())
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, tensors[name].float(), rtol=0, atol=0, equal_nan=True)
