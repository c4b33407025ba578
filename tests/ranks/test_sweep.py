"""Sweeps over guidance and checkpoints of a run: killed and continued by more ranks, and refused."""

import signal
import sys
import time
from dataclasses import replace

import pytest
import torch

from data_prep.autoencoder import hash_weights, load_vae
from eval.generate import Sampling, load_decoder
from helpers import ENV, ROOT, call, forks, half_done, run_ranks
from moe_dit.checkpoint_files import read_description
from moe_dit.manifest import read_manifest
from moe_dit.recipe_file import parse_recipe
from moe_dit.runtime.errors import InputError


@pytest.fixture(scope="module")
def images(latents, tmp_path_factory):
    """Five of each of the digits, to which a classifier is fitted in half a second."""
    folder = tmp_path_factory.mktemp("images")
    for kind in sorted((latents.parent / "images").iterdir()):
        (folder / kind.name).mkdir()
        for image in sorted(kind.iterdir())[:5]:
            (folder / kind.name / image.name).symlink_to(image)
    return folder


@pytest.fixture
def command(latents, two_ranks, images):
    """A sweep of 3 scales and 2 checkpoints of a run of the digits."""
    flags = ["--model", two_ranks, "--checkpoints", "4", "8", "--cfg-scale", "1", "2", "3", "--steps", "2", "-n", "20"]
    flags += ["--reference", images, "--batch", "5", "--vae", latents.parent / "vae"]
    return list(map(str, flags))


def table(folder):
    lines = (folder / "table.md").read_text().splitlines()
    return [[word.strip() for word in line.strip("|").split("|")] for line in lines if not line.startswith("|---")]


def test_a_killed_sweep_gives_the_table_of_an_uninterrupted_one(command, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert call("eval.sweep", *command, "--out", whole) == 0
    line = [sys.executable, "-m", "eval.sweep", *command, "--out", str(killed)]
    half = half_done("eval.sweep", "eval.score", "compute", after=3)
    process = forks.Popen([*half, *line[3:]], cwd=ROOT, env=ENV)
    while process.poll() is None and len(list(killed.glob("cells/*.json"))) < 2:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    there = {path.name: path.stat().st_mtime_ns for path in killed.glob("cells/*.json")}
    assert 2 <= len(there) < 6 and not (killed / "table.md").exists()
    for done in run_ranks([line] * 2, [ROOT] * 2):
        assert done.returncode == 0, done.stderr
    assert all((killed / "cells" / name).stat().st_mtime_ns == stamp for name, stamp in there.items())
    ours, theirs = table(killed), table(whole)
    assert ours == theirs and len(theirs) == 7
    assert [row[:2] for row in theirs[1:]] == [
        [f"step_{step:08d}_ema", scale] for step in (4, 8) for scale in ("1", "2", "3")
    ]
    fids = [float(row[6].split()[0]) for row in theirs[1:]]
    best = [row for row in theirs[1:] if "(best)" in row[6]]
    assert len(best) == 1 and float(best[0][6].split()[0]) == min(fids)
    assert "svg" in (whole / "fid.svg").read_text()[:200]


def test_what_cannot_be_swept_is_one_line(command, tmp_path, capfd):
    out = tmp_path / "out"
    flags = command[: command.index("--cfg-scale")]
    more = [*command[command.index("--reference") :], "--out", out, "--steps", "1"]
    small = ["eval.sweep", *flags, *more, "--cfg-scale", "1", "-n", "20"]
    assert call(*small) == 0
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "a").touch()
    for changed, says in (
        (["-n", "21"], "num was 20"),
        (["--labels", "random"], "labels was balanced"),
        (["--checkpoints", "5"], "has those of steps"),
        (["--weights", "ema2"], "second_decay"),
        (["-n", "3"], "--num is 3"),
        (["--out", tmp_path / "taken"], "taken"),
        (["--reference", tmp_path / "none"], "no reference"),
        (["--cfg-interval", "0.9", "0.1"], "0 <= LO <= HI <= 1"),
        (["--model", tmp_path / "none"], "none"),
    ):
        capfd.readouterr()
        before = sorted(tmp_path.rglob("*"))
        assert call(*small, *changed) == 2, changed
        told = [line for line in capfd.readouterr().err.splitlines() if "error" in line]
        assert len(told) == 1 and says in told[0], told
        assert [path for path in sorted(tmp_path.rglob("*")) if path.name != ".lock"] == [
            path for path in before if path.name != ".lock"
        ]


def test_another_vae_is_noticed(latents, two_ranks, tmp_path):
    """Its hash goes from the shards through the recipe to the checkpoint, and the export."""
    folder = latents.parent / "vae"
    vae = load_vae(str(folder))
    digest = hash_weights(vae)
    assert read_manifest(latents).vae_sha256 == digest
    checkpoint = two_ranks / "checkpoints" / "step_00000008"
    recipe = parse_recipe(read_description(checkpoint)["recipe"], "x")
    assert recipe.data.vae_sha256 == digest
    sampling = Sampling.of_recipe(recipe, 0)
    assert load_decoder(replace(sampling, vae=str(folder)), recipe) is not None
    with torch.no_grad():
        next(vae.parameters()).mul_(1.001)
    vae.save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match="another one than that which encoded"):
        load_decoder(replace(sampling, vae=str(tmp_path / "other")), recipe)
