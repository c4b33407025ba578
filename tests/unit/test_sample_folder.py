"""Damaged and foreign files among samples, statistics and results: one line, before the work, and nothing is harmed."""

import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image

from eval.sample_folder import open_folder
from helpers import call
from moe_dit import build_model, load_recipe
from moe_dit.export import save_export
from moe_dit.runtime.errors import InputError


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """An untrained pixel model, exported."""
    folder = tmp_path_factory.mktemp("models") / "pixels"
    recipe = load_recipe("digits_pixels", ["model.depth=4"])
    save_export(build_model(recipe), recipe, folder)
    return folder


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """Real images of two classes, in class folders."""
    folder = tmp_path_factory.mktemp("real")
    generator = np.random.default_rng(0)
    for label in range(2):
        (folder / f"class{label}").mkdir()
        for i in range(12):
            pixels = generator.integers(0, 128, (32, 32, 3)) + 127 * label
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"class{label}" / f"{i}.png")
    return folder


def sample(model, out, *flags):
    return call("eval.sample", "--model", model, "--out", out, "--steps", "1", *flags)


def one_line(capfd) -> str:
    error = capfd.readouterr().err.splitlines()
    told = [line for line in error if line.startswith("error: ")]
    assert len(told) == 1 and "Traceback" not in "\n".join(error), error
    return told[0]


@pytest.fixture(scope="module")
def kept(model, real, tmp_path_factory):
    """Features of 24 samples; not to be changed."""
    out = tmp_path_factory.mktemp("kept") / "samples"
    assert not sample(model, out, "--num", "24", "--batch", "12", "--save", "features", "--reference", real)
    return out


@pytest.fixture
def features(kept, tmp_path):
    """A copy of them."""
    return shutil.copytree(kept, tmp_path / "samples")


def shorten(file):
    os.truncate(file, file.stat().st_size // 2)


def empty(file):
    os.truncate(file, 0)


def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("damage", [shorten, empty, flip])
def test_a_damaged_batch_of_features_is_told_of_and_sampled_again(model, real, features, capfd, damage):
    batch = features / "features" / "batch_000012.npz"
    whole = batch.read_bytes()
    with np.load(batch) as arrays:
        before = {name: arrays[name] for name in arrays.files}
    damage(batch)
    capfd.readouterr()
    assert call("eval.score", features, "--reference", real) == 2
    assert "batch_000012.npz" in one_line(capfd)
    assert not sample(model, features, "--num", "24", "--batch", "12", "--save", "features", "--reference", real)
    assert "batch_000012.npz" in capfd.readouterr().err
    assert len(batch.read_bytes()) == len(whole)
    with np.load(batch) as arrays:
        for name, value in before.items():
            np.testing.assert_array_equal(arrays[name], value)


def test_a_mixture_of_image_sizes_is_refused(model, real, tmp_path, capfd):
    out = tmp_path / "samples"
    assert not sample(model, out, "--num", "20")
    image = sorted((out / "images").iterdir())[7]
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(image)
    capfd.readouterr()
    assert call("eval.score", out, "--reference", real) == 2
    assert image.name in one_line(capfd)


def test_an_image_cut_short_is_refused(model, real, tmp_path, capfd):
    out = tmp_path / "samples"
    assert not sample(model, out, "--num", "20")
    shorten(sorted((out / "images").iterdir())[7])
    capfd.readouterr()
    assert call("eval.score", out, "--reference", real) == 2
    one_line(capfd)


@pytest.mark.parametrize(
    "break_it",
    [
        lambda mu, sigma: (mu * np.nan, sigma),
        lambda mu, sigma: (mu, np.where(np.eye(2048) > 0, np.inf, sigma)),
        lambda mu, sigma: (mu[:64], sigma[:64, :64]),
        lambda mu, sigma: (mu, sigma + np.triu(np.ones((2048, 2048)))),
    ],
    ids=["NaN", "infinite", "shape", "not symmetric"],
)
def test_statistics_that_are_none_are_refused_before_sampling(model, tmp_path, capfd, break_it):
    mu, sigma = break_it(np.zeros(2048), np.eye(2048))
    np.savez(tmp_path / "statistics.npz", mu=mu, sigma=sigma)
    flags = ["--reference", tmp_path / "statistics.npz", "--inception", tmp_path / "none.pth", "--num", "20"]
    assert call("eval.run", "--model", model, *flags, "--samples", tmp_path / "samples") == 2
    assert "statistics.npz" in one_line(capfd)
    assert not (tmp_path / "samples").exists()


@pytest.mark.parametrize("there", ["folder", "file of somebody's", "link", "nowhere"])
def test_scores_go_only_where_nothing_else_is(model, real, features, tmp_path, capfd, there):
    out = tmp_path / "out.json"
    if there == "folder":
        out.mkdir()
    elif there == "nowhere":
        out = tmp_path / "missing" / "out.json"
    else:
        (tmp_path / "mine").write_text("mine")
        out.symlink_to(tmp_path / "mine") if there == "link" else out.write_text("mine")
    capfd.readouterr()
    assert call("eval.score", features, "--reference", real, "--out", out) == 2
    assert str(out) in one_line(capfd)
    if there != "nowhere":
        assert out.is_dir() or out.read_text() == "mine"


def test_samples_of_experts_that_choose_keep_to_one_batch(tmp_path):
    """DiffMoE's samples depend on the others of their batch: another --batch would mix two kinds in one folder."""
    made = {"model_sha256": "0" * 64, "num": 8, "save": "images", "image_size": 32, "batch": 4}
    open_folder(tmp_path / "samples", made)
    (tmp_path / "samples" / "images" / "000000_0.png").write_bytes(b"")
    with pytest.raises(InputError, match="batch was 4 and is now 8"):
        open_folder(tmp_path / "samples", made | {"batch": 8})
    assert json.loads((tmp_path / "samples" / "settings.json").read_text())["batch"] == 4


def test_an_export_never_takes_a_users_files_along(model, tmp_path, capfd):
    recipe = load_recipe("digits_pixels", ["model.depth=4"])
    for name in ("notes.txt", "my_lora.safetensors", ".hidden", "samples"):
        out = tmp_path / name.strip(".") / "model"
        save_export(build_model(recipe), recipe, out)
        (out / name).mkdir() if name == "samples" else (out / name).write_text("mine")
        with pytest.raises(InputError, match="would be replaced"):
            save_export(build_model(recipe), recipe, out)
        assert (out / name).exists() and (out / "config.json").exists()
        (out / name).rmdir() if name == "samples" else (out / name).unlink()
        save_export(build_model(recipe), recipe, out)  # an earlier export alone may be replaced
