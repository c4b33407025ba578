"""Looks in one process: they ask for few shapes, and what fills these up is in no result."""

import shutil
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.utils import make_grid

from data_prep import digits as prepare
from eval.generate import generate
from helpers import call
from helpers.compiling import counting, one_rank
from helpers.pictures_of_digits import some_digits
from moe_dit.flow import build_flow
from moe_dit.looks import Looks
from moe_dit.manifest import read_manifest
from moe_dit.parallel.compile import compile_blocks
from moe_dit.recipe_file import load_recipe
from moe_dit.runtime import ranks
from moe_dit.runtime.errors import InputError


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A few digits as images, as pixels and as latents of an autoencoder that was hardly fitted; and 1 and 2 alone."""
    folder = tmp_path_factory.mktemp("digits")
    images = some_digits(folder / "images", 6)
    prepare.write_autoencoder(images, folder / "vae", steps=15, seed=0)
    size = ["--images", images, "--size", 32]
    assert call("data_prep.pack_pixels", *size, "--out", folder / "pixels") in (None, 0)
    for name in ("1", "2"):
        shutil.copytree(images / name, folder / "some" / name)
    (folder / "names.txt").write_text("1\n2\n")
    flags = ["--images", folder / "some", "--classes", folder / "names.txt", "--size", 32, "--out", folder / "held"]
    assert call("data_prep.pack_pixels", *flags) in (None, 0)
    assert call("data_prep.encode_latents", *size, "--vae", folder / "vae", "--out", folder / "latents") in (None, 0)
    return folder


@pytest.fixture
def alone():
    """This process as the only rank."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()
    ranks.cpu_group.cache_clear()


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        # Micro-batches, and those that guidance doubles. Of 37, 10 and 11 samples the last ones are filled up ...
        ("digits", {8, 16}),
        ("digits_pixels", {8, 16}),
        # ... but where samples compete with those of their batch: 37 = 4 * 8 + 5, 10 = 8 + 2, 11 = 8 + 3.
        ("digits_diffmoe", {8, 5, 2, 3}),
    ],
)
def test_a_look_asks_for_few_shapes(alone, digits, tmp_path, name, sizes):
    data = digits / ("pixels" if name == "digits_pixels" else "latents")
    settings = ["model.depth=2", "model.hidden_size=32", "model.num_heads=2", "sampling.steps=3", "looks.samples=10"]
    settings += [f"looks.held_out={data}", "looks.held_out_samples=37", "looks.time_buckets=4"]
    settings += ["looks.score_samples=11", f"looks.reference={digits / 'images'}"]
    if name == "digits_pixels":
        settings += ["model.in_context_start=1"]
    else:
        settings += [f"data.vae={digits / 'vae'}", f"data.latent_scale={read_manifest(data).scale}"]
    recipe = load_recipe(name, settings)
    looks = Looks(recipe, tmp_path, torch.device("cpu"), 8, read_manifest(data).classes)
    found, seen = [], []
    plain, model, flow = one_rank(recipe).eval(), one_rank(recipe).eval(), build_flow(recipe)
    compile_blocks(model, backend=counting(found))
    model.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    engine = SimpleNamespace(flow=flow, averaged_weights=lambda: nullcontext(model))
    numbers, pictures = looks.look(engine, 1)
    assert set(seen) == sizes
    graphs = len(found)
    assert looks.look(engine, 2)[0] == numbers and len(found) == graphs

    # What was filled up is in no result: all at once or, where samples compete, in micro-batches.
    micro = 8 if name == "digits_diffmoe" else 100
    stored = [inputs for inputs, _ in looks._held_out]
    given = [torch.cat([inputs[key] for inputs in stored]).split(micro) for key in ("x", "y", "noise", "u", "position")]
    errors = []
    with torch.no_grad():
        for x, y, noise, u, position in zip(*given, strict=True):
            errors.append(flow.errors(plain, x, y, noise, (position % 4 + u) / 4))
    assert sum(map(len, errors)) == 37
    assert numbers["held_out_loss"] == pytest.approx(torch.cat(errors).mean().item(), rel=1e-5)
    images = [generate(plain, recipe, looks.sampling, looks.vae, part) for part in torch.arange(10).split(micro)]
    got = pictures["samples"].astype(int)
    grid = make_grid(list(torch.cat(images)), nrow=got.shape[1] // 34, padding=2, pad_value=255)
    assert got.std() > 20 and abs(got - grid.permute(1, 2, 0).numpy()).max() <= 1


TRAINED = ["9", "8", "7", "6", "5", "4", "3", "2", "1", "0"]  # names of the training data: label l is digit 9 - l


def test_held_out_samples_have_the_labels_of_their_names(alone, digits, tmp_path, capfd):
    """Shards of the digits 1 and 2, whose labels are 0 and 1 there, and 8 and 7 where a model is trained on all."""
    settings = [f"looks.held_out={digits / 'held'}", "looks.held_out_samples=12", "looks.samples=0"]
    recipe = load_recipe("digits_pixels", settings)
    capfd.readouterr()
    looks = Looks(recipe, tmp_path, torch.device("cpu"), 8, TRAINED)
    said = f"the classes of looks.held_out {digits / 'held'} are numbered otherwise than those of the training data"
    assert said in capfd.readouterr().err
    labels = torch.cat([inputs["y"] for inputs, _ in looks._held_out])
    straight = Looks(recipe, tmp_path, torch.device("cpu"), 8, ["1", "2"])
    theirs = torch.cat([inputs["y"] for inputs, _ in straight._held_out])
    assert sorted(theirs.tolist()) == [0] * 6 + [1] * 6
    assert labels.tolist() == [{0: 8, 1: 7}[label] for label in theirs.tolist()]
    with pytest.raises(InputError, match=r"has 1 of 2 classes that the training data has not \('2'\); "):
        Looks(recipe, tmp_path, torch.device("cpu"), 8, ["0", "1"])


def test_a_look_s_labels_are_those_of_the_reference_s_names(alone, digits, tmp_path, monkeypatch):
    """A network that draws the digit of its label, to a classifier of folders in another order."""
    settings = ["looks.samples=0", "looks.score_samples=20", f"looks.reference={digits / 'images'}"]
    recipe = load_recipe("digits_pixels", settings)
    looks = Looks(recipe, tmp_path, torch.device("cpu"), 8, TRAINED)
    files = {name: sorted((digits / "images" / name).iterdir())[0] for name in TRAINED}
    drawn = {name: torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1) for name, file in files.items()}

    def draw(network, recipe, sampling, vae, indices):
        return torch.stack([drawn[TRAINED[i % 10]] for i in indices.tolist()])

    monkeypatch.setattr("moe_dit.looks.generate", draw)
    assert looks.sampling.labels == "balanced"
    assert looks._scores(None)["look_label_agreement"] > 0.8
    with pytest.raises(InputError, match=r"has 1 of 2 classes that the reference .* has not \('zebra'\); "):
        Looks(recipe, tmp_path, torch.device("cpu"), 8, ["0", "zebra"])
