"""Looks while training: what they find is what the run's own exports give, and the run does not notice them."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image

from helpers import ENV, ROOT, TIMEOUT, ds_file, export, finish, forks, losses, records, start_training
from helpers.pictures_of_digits import some_digits
from helpers.small_runs import SMALL, sets
from moe_dit.data import Latents, batches, training_inputs
from moe_dit.manifest import read_manifest
from moe_dit.recipe_file import load_recipe
from moe_dit.runtime.ranks import World

COMMON = ["--steps", "4", *sets([*SMALL, "checkpoint.every=2", "sampling.steps=3"])]


@pytest.fixture(scope="module")
def looked(latents, tmp_path_factory):
    """Two expert-parallel ranks that look every second step, and the flags that the looks take."""
    folder = tmp_path_factory.mktemp("looks")
    run, reference = folder / "run", some_digits(folder / "reference", 12)
    looks = {"every": 2, "samples": 10, "held_out": latents, "held_out_samples": 37, "time_buckets": 4}
    looks |= {"score_samples": 24, "reference": reference}
    flags = [f"--set=looks.{key}={value}" for key, value in looks.items()] + [
        f"--set=data.vae={latents.parent / 'vae'}"
    ]
    finish(start_training(2, "zero2_ep2", latents, run, *COMMON, *flags), run)
    return run, flags


@pytest.mark.parametrize("ds", ["zero2_ep2", "zero3_ep2"])
def test_a_run_is_the_same_with_looks_and_without(looked, latents, tmp_path, ds):
    run, flags = looked
    if ds == "zero3_ep2":
        ds, run = ds_file(tmp_path, 3, 2), tmp_path / "with"
        finish(start_training(2, ds, latents, run, *COMMON, *flags, "--set=looks.score_samples=0"), run)
    finish(start_training(2, ds, latents, tmp_path / "without", *COMMON), tmp_path / "without")
    for key in ("loss", "grad_norm", "moe_imbalance"):
        assert losses(run, key) == losses(tmp_path / "without", key)
    # The numbers do not depend on the topology either.
    assert records(run)[1]["held_out_loss"] == pytest.approx(records(looked[0])[1]["held_out_loss"], rel=1e-4)


def test_the_held_out_loss_is_the_exported_average_s(looked, latents, tmp_path):
    run, _ = looked
    found = records(run)
    assert ["held_out_loss" in record for record in found] == [False, True, False, True]
    recipe, manifest = load_recipe("digits", [*SMALL, "flow.label_dropout=0.0"]), read_manifest(latents)
    stored = next(batches(recipe, manifest, 37, 0, World()))  # the first 37 of the set's own order
    inputs = training_inputs(recipe, stored, Latents.of(recipe, manifest))
    t = (torch.arange(37) % 4 + inputs["u"]) / 4
    z = t.view(-1, 1, 1, 1) * inputs["x"] + (1 - t.view(-1, 1, 1, 1)) * inputs["noise"]
    for step in (2, 4):
        model = export(run / "checkpoints" / f"step_{step:08d}", tmp_path / f"{step}", "ema")
        with torch.no_grad():
            velocity = model(z, t, inputs["y"])[:, :4]
        errors = (velocity - (inputs["x"] - inputs["noise"])).square().mean((1, 2, 3))
        record = found[step - 1]
        assert record["held_out_loss"] == pytest.approx(errors.mean().item(), rel=1e-5)
        want = [errors[t * 4 // 1 == bucket].mean().item() for bucket in range(4)]
        assert record["held_out_loss_by_time"] == pytest.approx(want, rel=1e-4)


def test_the_grid_is_what_sampling_the_export_gives(looked, latents, tmp_path):
    run, _ = looked
    export(run, tmp_path / "model", "ema")
    command = ["-m", "eval.sample", "--model", tmp_path / "model", "--num", "10", "--out", tmp_path / "samples"]
    forks.run([sys.executable, *map(str, command)], cwd=ROOT, env=ENV, check=True, timeout=TIMEOUT, capture_output=True)
    want = np.asarray(Image.open(tmp_path / "samples" / "samples.png")).astype(int)
    got = np.asarray(Image.open(run / "looks" / "step_00000004.png")).astype(int)
    assert got.shape == want.shape and abs(got - want).max() <= 2
    assert sorted(path.name for path in (run / "looks").iterdir()) == ["step_00000002.png", "step_00000004.png"]
    last = records(run)[-1]
    assert 0 < last["look_fid"] < 1e4 and 1 <= last["look_inception_score"] <= 10 and 0 <= last["look_precision"] <= 1


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (["looks.held_out=nowhere"], "no folder of shards nowhere"),
        (["data.vae=./nowhere"], "nowhere"),
        (["looks.score_samples=10"], "looks.reference is null"),
        (["looks.score_samples=10", "looks.reference=nowhere"], "no reference nowhere"),
    ],
)
def test_looks_that_cannot_work_are_refused_before_anything_is_written(latents, tmp_path, settings, line):
    flags = ["--ds", "ds_configs/zero1_ep1.json", "--recipe", "digits", "--data", latents, "--out", tmp_path / "run"]
    flags += [f"--set=data.vae={latents.parent / 'vae'}", "--set=looks.every=1", *(f"--set={s}" for s in settings)]
    command = [sys.executable, "jobs/train.py", *map(str, flags)]
    done = forks.run(command, cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == 2 and line in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path / "run").exists()
