"""Training under the real launcher, held against one plain process, in every topology and precision."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

from helpers import ENV, ROOT, STEPS, export, finish, free_port, losses, start_training
from moe_dit import build_model, load_recipe
from moe_dit.checkpoint_files import read_state
from moe_dit.parallel.deepspeed_config import Parallelism
from moe_dit.plan import make_plan


def test_expert_parallel_training_is_plain_training(plain, two_ranks, tmp_path):
    history, norms, ema = plain
    assert losses(two_ranks) == pytest.approx(history, rel=1e-5)
    assert losses(two_ranks, "grad_norm") == pytest.approx(norms, rel=1e-4)
    exported = dict(export(two_ranks, tmp_path / "model", "ema").named_parameters())
    assert exported.keys() == ema.keys()
    for name, want in ema.items():
        torch.testing.assert_close(exported[name].detach(), want, rtol=0, atol=1e-5)


def test_eight_ranks_are_the_same_run(plain, latents, tmp_path):
    run = tmp_path / "run"
    finish(start_training(8, "zero2_ep8", latents, run, "--steps", "2", launcher="deepspeed"), run)
    assert losses(run) == pytest.approx(plain[0][:2], rel=1e-5)


def test_the_ema_is_the_average_of_the_weights_of_every_step(latents, tmp_path):
    """From the weights that two ranks saved after each step, averaged here in one plain process."""
    run, steps = tmp_path / "run", 5
    flags = ["--steps", str(steps), "--set", "checkpoint.every=1", "--set", "checkpoint.keep=9"]
    finish(start_training(2, "zero2_ep2", latents, run, *flags), run)
    averages = {name: weight.detach().clone() for name, weight in build_model("digits").named_parameters()}
    for step in range(1, steps + 1):
        state = {f"weight/{name}": torch.empty(value.numel()) for name, value in averages.items()}
        read_state(state, run / "checkpoints" / f"step_{step:08d}")
        for name, value in averages.items():
            averages[name] = 0.995 * value + 0.005 * state[f"weight/{name}"].view_as(value)
    for name, weight in export(run, tmp_path / "model", "ema").named_parameters():
        torch.testing.assert_close(weight.detach(), averages[name], rtol=1e-6, atol=1e-7)


def test_compiling_the_dense_parts_changes_nothing(latents, tmp_path):
    if shutil.which("g++") is None:
        pytest.skip("torch.compile needs a C++ compiler")
    small = ["--steps", "2", "--set", "model.depth=2", "--set", "global_batch_size=8"]
    for mode in ("none", "dense"):
        finish(
            start_training(1, "zero1_ep1", latents, tmp_path / mode, *small, "--set", f"compile={mode}"),
            tmp_path / mode,
        )
    assert losses(tmp_path / "dense") == pytest.approx(losses(tmp_path / "none"), rel=1e-5)


def assert_memory_as_planned(run, ranks, ep, zero):
    plan = make_plan(load_recipe("digits"), Parallelism("", zero, ep, ranks, 64 // ranks, 1, {}), bf16=False)
    held = json.loads((run / "memory.json").read_text())
    assert held == [{"weights": plan.weights, "master": plan.master, "state": plan.state}] * ranks


def test_a_rank_holds_what_the_plan_says(two_ranks):
    assert_memory_as_planned(two_ranks, 2, 2, 2)


def test_gradient_accumulation_changes_nothing(plain, latents, tmp_path):
    run = tmp_path / "run"
    flags = ["--steps", "4", "--set", "max_micro_batch_size=10"]
    log = finish(start_training(2, "zero2_ep2", latents, run, *flags), run)
    assert "batch 64 = 2 x 8 x 4" in log
    assert losses(run) == pytest.approx(plain[0][:4], rel=1e-5)


@pytest.mark.parametrize(("ranks", "ds"), [(1, "zero1_ep1"), (2, "zero3_ep2")])
def test_a_run_continues_in_another_topology(plain, two_ranks, latents, tmp_path, ranks, ds):
    run = shutil.copytree(two_ranks, tmp_path / "run")
    for name in ("step_00000012", "latest"):
        path = run / "checkpoints" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    if ds == "zero3_ep2":
        ds = "../" + str(zero3_ep2(tmp_path))
    finish(start_training(ranks, ds, latents, run, "--steps", str(STEPS)), run)
    assert losses(run) == pytest.approx(plain[0], rel=1e-4)
    assert_memory_as_planned(run, ranks, ranks, 3 if ranks == 2 else 1)
    for name, weight in export(run, tmp_path / "model", "ema").named_parameters():
        torch.testing.assert_close(weight.detach(), plain[2][name], rtol=0, atol=1e-4)


def zero3_ep2(folder):
    config = json.loads((ROOT / "ds_configs/zero3_ep8.json").read_text())
    config["expert_parallel"]["autoep_size"] = 2
    (folder / "zero3_ep2.json").write_text(json.dumps(config))
    return os.path.relpath(folder / "zero3_ep2", ROOT)


def test_bf16_follows_float32_and_keeps_its_state_in_float32(plain, latents, tmp_path):
    """As on a GPU: weights that compute in bf16, everything that is kept in float32."""
    run = tmp_path / "run"
    finish(start_training(2, "zero2_ep2", latents, run, "--steps", "5", "--set", "precision=bf16"), run)
    assert losses(run) == pytest.approx(plain[0][:5], rel=2e-2)
    initial, exported = build_model("digits"), export(run, tmp_path / "model", "model")
    moved = [(a - b).abs().max() for a, b in zip(exported.parameters(), initial.parameters(), strict=True)]
    assert all(weight.dtype == torch.float32 for weight in exported.parameters())
    # Five steps of 1e-3 change a weight by at most 5e-3; bf16 weights of size 1 could not be told apart below 4e-3.
    assert max(moved) < 5.1e-3
    rounded = [torch.equal(weight, weight.bfloat16().float()) for weight in exported.parameters()]
    assert not any(rounded)


@pytest.mark.parametrize("mode", ["blocks", "experts"])
def test_activation_checkpointing_changes_nothing(plain, latents, tmp_path, mode):
    run = tmp_path / "run"
    flags = ["--steps", "3", "--set", f"activation_checkpointing={mode}"]
    finish(start_training(1, "zero1_ep1", latents, run, *flags), run)
    assert losses(run) == pytest.approx(plain[0][:3], rel=1e-5)


def test_balancing_evens_the_load_and_its_absence_leaves_the_biases(latents, two_ranks, tmp_path):
    run = tmp_path / "run"
    flags = ["--steps", "40", "--set", "balance.rate=0.03"]
    finish(start_training(1, "zero1_ep1", latents, run, *flags), run)
    before, after = losses(two_ranks, "moe_imbalance"), losses(run, "moe_imbalance")
    assert sum(after[30:]) / 10 < 0.8 * sum(before[-5:]) / 5
    for folder, moved in ((run, True), (two_ranks, False)):
        for name, buffer in export(folder, tmp_path / str(moved), "model").named_buffers():
            if name.endswith("e_score_correction_bias"):
                assert bool(buffer.any()) == moved


def test_the_loss_falls_by_half_in_300_steps(latents, tmp_path):
    run = tmp_path / "run"
    finish(start_training(2, "zero2_ep2", latents, run, "--steps", "300"), run, timeout=500)
    curve = losses(run)
    assert sum(curve[250:]) / 50 < 0.5 * sum(curve[4:15]) / 11


def test_torchrun_starts_it_too(latents, tmp_path):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--master_port",
        str(free_port()),
    ]
    command += ["jobs/train.py", "--ds", "ds_configs/zero2_ep2.json", "--recipe", "digits", "--steps", "2"]
    command += ["--data", str(latents), "--out", str(tmp_path / "run")]
    subprocess.run(command, check=True, cwd=ROOT, env=ENV, timeout=200, capture_output=True)
    assert len(losses(tmp_path / "run")) == 2
