"""Sweeps over guidance and checkpoints of a run: killed and continued, refused, and what their tables say."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

from data_prep.autoencoder import hash_weights, load_vae
from eval import sweep
from eval.generate import Sampling, load_decoder
from helpers import ENV, ROOT, call
from moe_dit.checkpoint_files import read_description
from moe_dit.manifest import read_manifest
from moe_dit.recipe_file import load_recipe, parse_recipe
from moe_dit.runtime.errors import InputError


@pytest.fixture
def command(latents, two_ranks, tmp_path):
    """A sweep of 3 scales and 2 checkpoints of a run of the digits."""
    run, images = two_ranks, latents.parent / "images"
    flags = ["--model", run, "--checkpoints", "4", "8", "--cfg-scale", "1", "2", "3", "--steps", "4", "-n", "200"]
    return [*map(str, flags), "--reference", str(images), "--batch", "50", "--vae", str(latents.parent / "vae")]


def start(*flags):
    return subprocess.Popen([sys.executable, "-m", "eval.sweep", *map(str, flags)], cwd=ROOT, env=ENV | os.environ)


def table(folder):
    lines = (folder / "table.md").read_text().splitlines()
    return [[word.strip() for word in line.strip("|").split("|")] for line in lines if not line.startswith("|---")]


def test_a_killed_sweep_gives_the_table_of_an_uninterrupted_one(command, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start(*command, "--out", whole).wait() == 0
    process = start(*command, "--out", killed)
    deadline = time.monotonic() + 120
    while len(list(killed.glob("cells/*.json"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    there = {path.name: path.stat().st_mtime_ns for path in killed.glob("cells/*.json")}
    assert 2 <= len(there) < 6 and not (killed / "table.md").exists()
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    assert (
        subprocess.run([*torchrun, "-m", "eval.sweep", *command, "--out", str(killed)], cwd=ROOT, env=ENV).returncode
        == 0
    )
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


def made_up(folder, fids):
    """Cells of given FIDs and errors, and their files."""
    (folder / "cells").mkdir(parents=True)
    recipe = load_recipe("digits")
    cells = []
    for (scale, seed), (fid, error) in fids.items():
        cell = sweep.Cell("m", replace(Sampling.of_recipe(recipe, seed), cfg_scale=scale))
        (folder / "cells" / cell.file).write_text(
            json.dumps({"fid": fid, "fid_std_error": error, "precision": fid / 10})
        )
        cells.append(cell)
    return cells


def test_the_best_is_marked_and_what_does_not_differ_from_it(tmp_path):
    cells = made_up(tmp_path, {(1.0, 0): (5.0, 0.1), (1.5, 0): (4.0, 0.3), (2.0, 0): (4.5, 0.2), (3.0, 0): (9.0, 0.4)})
    found = sweep.rows(tmp_path, cells)
    # 4.5 - 4 is within 1.96 sqrt(0.3^2 + 0.2^2) = 0.71, and 5 - 4 is not within 1.96 sqrt(0.3^2 + 0.1^2) = 0.62.
    assert [(row.best, row.near) for row in found] == [(False, False), (True, False), (False, True), (False, False)]


def test_several_seeds_are_a_mean_with_its_spread(tmp_path):
    cells = made_up(
        tmp_path, {(1.0, 0): (5.0, 0.01), (1.0, 1): (6.0, 0.01), (1.0, 2): (7.0, 0.01), (2.0, 0): (8.0, 0.3)}
    )
    one, two = sweep.rows(tmp_path, cells)
    assert (one.fid, one.seeds) == (6.0, 3) and one.error == pytest.approx(1 / 3**0.5)  # stdev 1 over sqrt(3)
    assert one.scores["precision"] == pytest.approx(0.6) and (two.fid, two.error) == (8.0, 0.3)


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
