"""From images to shards: the centre crop, encoding, verifying, bad input."""

import hashlib
import json
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from data_prep import digits, encode_latents, pack_pixels, verify
from data_prep.autoencoder import load_vae
from data_prep.encode_latents import read_pixels
from data_prep.images import center_crop, list_images
from helpers import ROOT, call, refused
from helpers.few_digits import contents, latent_flags, read_back
from moe_dit.runtime.errors import InputError


@pytest.fixture(scope="module")
def images(few_digits) -> Path:
    """300 of the digits as class folders."""
    return few_digits / "images"


@pytest.fixture(scope="module")
def vae(few_digits) -> Path:
    return few_digits / "vae"


@pytest.fixture(scope="module")
def shards(few_digits) -> Path:
    """Encoded by one rank without a stop."""
    return few_digits / "shards"


def run_here(module, monkeypatch, *flags) -> None:
    """Run a command in this process; raises InputError on bad input."""
    monkeypatch.setattr(sys, "argv", ["command", *map(str, flags)])
    module.main()


# ----------------------------------------------------------------------------------------------------------------------
# Images


def test_center_crop_is_adms():
    golden = np.load(ROOT / "tests/golden/center_crop.npz")
    for k in range(3):
        cropped = center_crop(Image.fromarray(golden[f"image_{k}"]), int(golden[f"size_{k}"]))
        assert np.array_equal(np.asarray(cropped), golden[f"crop_{k}"])


def test_list_images_sorts_classes_and_knows_extensions(tmp_path):
    for name in ("b/2.JPEG", "b/1.png", "a/x/1.Jpg", "b/notes.txt", ".cache/1.png", "b/.hidden.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    paths, labels, classes = list_images(tmp_path)
    assert [os.path.relpath(path, tmp_path) for path in paths] == ["a/x/1.Jpg", "b/1.png", "b/2.JPEG"]
    assert labels == [0, 1, 1] and classes == ["a", "b"]


def test_digits_are_the_data_sets(images):
    from sklearn.datasets import load_digits

    data = load_digits()
    paths, labels, classes = list_images(images)
    assert len(paths) == 300 and classes == [str(n) for n in range(10)]
    for path, label in list(zip(paths, labels, strict=True))[::23]:
        index = int(Path(path).stem)
        image = np.asarray(Image.open(path))
        assert label == data.target[index] and image.shape == (32, 32, 3)
        # Averaging each 4x4 block undoes the enlarging, but for the smoothing.
        small = image[..., 0].reshape(8, 4, 8, 4).mean((1, 3)) * (16 / 255)
        assert np.corrcoef(small.ravel(), data.images[index].ravel())[0, 1] > 0.95


def test_autoencoder_depends_on_the_seed_alone(images, tmp_path):
    for path in images.glob("*/*.png"):
        if int(path.stem) < 20:
            (tmp_path / "images" / path.parent.name).mkdir(parents=True, exist_ok=True)
            shutil.copy(path, tmp_path / "images" / path.parent.name)
    for name, seed in (("first", 0), ("again", 0), ("other", 1)):
        digits.write_autoencoder(tmp_path / "images", tmp_path / name, steps=4, seed=seed)
    weights = [tmp_path / name / "diffusion_pytorch_model.safetensors" for name in ("first", "again", "other")]
    first, again, other = (path.read_bytes() for path in weights)
    assert first == again != other


# ----------------------------------------------------------------------------------------------------------------------
# Encoding


def test_latents_are_the_vaes_posteriors(images, vae, shards):
    from diffusers import AutoencoderKL

    model = AutoencoderKL.from_pretrained(vae).eval()
    paths, labels, classes = list_images(images)
    samples = read_back(shards)
    assert sorted(samples) == [f"{n:08d}" for n in range(300)]
    for index in range(0, 300, 29):
        sample = samples[f"{index:08d}"]
        x = torch.from_numpy(np.asarray(Image.open(paths[index])).copy()).permute(2, 0, 1)[None] / 127.5 - 1
        for name, image in (("latent.npy", x), ("latent_flip.npy", x.flip(3))):
            with torch.no_grad():
                posterior = model.encode(image).latent_dist
            expected = torch.cat([posterior.mean, posterior.logvar], dim=1)[0]
            assert sample[name].dtype == np.float16 and sample[name].shape == (8, 8, 8)
            torch.testing.assert_close(torch.from_numpy(sample[name]).float(), expected, rtol=2e-3, atol=2e-3)
        assert sample["cls"] == labels[index]

    manifest = json.loads((shards / "manifest.json").read_text())
    assert manifest["format"] == "moe-dit-shards-1" and manifest["kind"] == "latents"
    assert manifest["samples"] == 300 and manifest["classes"] == classes and manifest["size"] == 32
    assert manifest["source"] == str(images) and manifest["vae"] == str(vae) and manifest["sample_shape"] == [8, 8, 8]
    assert {shard["name"]: shard["sha256"] for shard in manifest["shards"]} == contents(shards)
    # Unit variance after scaling, drawn afresh from the kept moments.
    mean, logvar = np.split(np.stack([sample["latent.npy"] for sample in samples.values()]).astype(np.float64), 2, 1)
    drawn = mean + np.exp(logvar / 2) * np.random.default_rng(0).normal(size=mean.shape)
    assert manifest["scale"] * drawn.std() == pytest.approx(1, rel=0.02)


def test_shards_mix_classes(shards):
    """The order is shuffled: the first shard of 16 would otherwise hold zeros alone."""
    assert len({sample["cls"] for sample in list(read_back(shards).values())[:16]}) > 4


def test_pixels_are_the_crops(images, tmp_path, monkeypatch):
    run_here(pack_pixels, monkeypatch, "--images", images, "--out", tmp_path / "out", "--size", 24)
    paths, labels, _ = list_images(images)
    samples = read_back(tmp_path / "out")
    assert len(samples) == 300
    for index, (path, label) in enumerate(zip(paths, labels, strict=True)):
        sample = samples[f"{index:08d}"]
        assert sample["cls"] == label
        assert np.array_equal(sample["png"], np.asarray(center_crop(Image.open(path), 24)))
    assert verify.verify(tmp_path / "out") == (1, 300)


def test_complete_folder_is_left_alone(images, vae, shards, monkeypatch, capsys):
    before = {path: path.stat().st_mtime_ns for path in shards.glob("*.*")}
    run_here(encode_latents, monkeypatch, *latent_flags(images, vae, shards))
    assert "complete already" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in shards.glob("*.*")} == before


# ----------------------------------------------------------------------------------------------------------------------
# Verifying


def test_verify(shards, tmp_path):
    assert verify.verify(shards) == (19, 300)
    copy = tmp_path / "copy"
    shutil.copytree(shards, copy)

    with open(copy / "shard-000002.tar", "r+b") as file:
        file.seek(9000)
        byte = file.read(1)[0]
        file.seek(9000)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(InputError, match=r"shard-000002.tar has other content"):
        verify.verify(copy)

    os.truncate(copy / "shard-000004.tar", 10000)
    (copy / "shard-000005.tar").unlink()
    with pytest.raises(InputError, match=r"000002.*; shard-000004.tar has 10000 bytes.*; shard-000005.tar is missing"):
        verify.verify(copy)


def test_verify_looks_into_samples(shards, tmp_path):
    """A shard whose hash is right but which lacks a member, or a sample."""
    out = tmp_path / "out"
    out.mkdir()
    manifest = json.loads((shards / "manifest.json").read_text())
    for samples, problem in ((2, "instead of 3"), (3, r"a sample has no \.latent\.npy: 2")):
        with webdataset.TarWriter(str(out / "shard-000000.tar"), encoder=False) as tar:
            for key in range(samples):
                members = {"cls": b"1", "latent.npy": b"x", "latent_flip.npy": b"x"}
                if key == 2:
                    del members["latent.npy"]
                tar.write({"__key__": str(key), **members})
        content = (out / "shard-000000.tar").read_bytes()
        record = {"name": "shard-000000.tar", "samples": 3, "bytes": len(content)}
        record["sha256"] = hashlib.sha256(content).hexdigest()
        (out / "manifest.json").write_text(json.dumps({**manifest, "samples": 3, "shards": [record]}))
        with pytest.raises(InputError, match=problem):
            verify.verify(out)


# ----------------------------------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--size", "40"], "begun with other settings: --size"),
        (["--shard-size", "8"], "begun with other settings: --shard-size"),
        (["--images", "{fewer}"], "begun with other settings: --images"),
        (["--vae", "{other}"], "begun with other settings: --vae"),
        (["--size", "30"], "not a multiple of 4"),
        (["--size", "0"], "whole number above 0"),
        (["--vae", "{images}"], "not a diffusers AutoencoderKL"),
        (["--vae", "/no/such/vae"], "no such folder"),
        (["--vae", "{weightless}"], "cannot be loaded"),
        (["--images", "/no/such/images"], "no such folder of images"),
        (["--images", "{images}/3"], "no class folders"),
        (["--images", "{empty}"], "holds no images"),
        (["--images", "{unreadable}", "--out", "{out}", "--strict", "--batch", "64"], "cannot read .*broken.png"),
        (["--out", "{file}"], "cannot write into"),
        (["--out", "{foreign}"], "did not begin"),
    ],
)
def test_bad_input_is_one_line(change, message, images, vae, shards, tmp_path, capsys):
    folders = ("fewer", "other", "weightless", "empty", "unreadable", "file", "foreign", "out")
    names = {name: tmp_path / name for name in folders}
    for name in ("0", "1"):
        shutil.copytree(images / name, names["fewer"] / name)
        shutil.copytree(images / name, names["unreadable"] / name)
        (names["empty"] / name).mkdir(parents=True)
    (names["unreadable"] / "1/broken.png").write_bytes(next((images / "1").glob("*.png")).read_bytes()[:200])
    digits.build_vae(seed=7).save_pretrained(names["other"])
    names["weightless"].mkdir()
    shutil.copy(vae / "config.json", names["weightless"])
    names["file"].touch()
    names["foreign"].mkdir()
    (names["foreign"] / "shard-000000.tar").touch()
    before = contents(shards)

    flags = [*latent_flags(images, vae, shards), *(flag.format(images=images, **names) for flag in change)]
    printed = refused(capsys, "data_prep.encode_latents", *flags)
    assert re.search(message, printed), printed
    assert contents(shards) == before and not list(names["out"].glob("*.tar"))


def test_digits_overwrites_nothing(images, vae, monkeypatch):
    with pytest.raises(InputError, match="would be replaced"):
        run_here(digits, monkeypatch, "images", "--out", images)
    with pytest.raises(InputError, match="would be replaced"):
        run_here(digits, monkeypatch, "autoencoder", "--images", images, "--out", vae)


@pytest.mark.parametrize("module", ["encode_latents", "pack_pixels", "verify", "digits"])
def test_help_has_examples(module, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [module, "--help"])
    with pytest.raises(SystemExit) as status:
        {"encode_latents": encode_latents, "pack_pixels": pack_pixels, "verify": verify, "digits": digits}[
            module
        ].main()
    assert not status.value.code and f"python -m data_prep.{module}" in capsys.readouterr().out


def test_vae_and_pixels_load_in_the_documented_form(images, vae):
    model = load_vae(str(vae))
    assert not model.training and model.dtype == torch.float32
    pixels = read_pixels(str(next(images.glob("5/*.png"))), 32)
    assert pixels.dtype == torch.uint8 and pixels.shape == (3, 32, 32)


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--size", "100000"], "--size 100000: it should be at most 8192"),
        (["--size", "9" * 30], "must be a whole number above 0"),
        (["--workers", "-1"], "--workers -1: it should be 0 to 512"),
        (["--workers", "100000"], "--workers 100000: it should be 0 to 512"),
    ],
)
def test_absurd_numbers_are_one_line(tmp_path, capfd, flags, line):
    given = ["--images", tmp_path, "--out", tmp_path / "out", *flags]
    assert line in refused(capfd, "data_prep.pack_pixels", *given, harmless=tmp_path)


def test_shards_leave_other_hidden_files_alone(tmp_path):
    """What a killed run of ours left is removed; a person's own hidden temporary files are not."""
    images = tmp_path / "images/a"
    images.mkdir(parents=True)
    Image.new("RGB", (16, 16)).save(images / "1.png")
    out = tmp_path / "out"
    out.mkdir()
    (out / ".mine.tmp").write_text("keep")
    (out / ".shard-000000.tar.tmp").write_text("half")
    flags = ["--images", tmp_path / "images", "--out", out, "--size", 16, "--workers", 0]
    assert call("data_prep.pack_pixels", *flags) == 0
    assert (out / ".mine.tmp").read_text() == "keep"
    assert not (out / ".shard-000000.tar.tmp").exists()
