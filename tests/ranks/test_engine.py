"""The engine on ranks, under ZeRO 0 to 3: clipping, sums of gradients and what they cost."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from helpers import ENV, ROOT, ds_file, finish, forks, free_port, losses, start_training, state_of
from helpers.small_runs import SMALL, sets, train_plainly
from moe_dit import load_recipe

# --- ZeRO 0, and clipping ---------------------------------------------------------------------------------------------


def test_zero_0_is_plain_training(latents, tmp_path):
    run, plain = tmp_path / "run", train_plainly(load_recipe("digits", SMALL), latents, 4)
    finish(start_training(2, ds_file(tmp_path, 0, 2), latents, run, "--steps", "4", *sets(SMALL)), run)
    assert losses(run) == pytest.approx(plain.losses, rel=1e-5)
    assert losses(run, "grad_norm") == pytest.approx(plain.norms, rel=1e-4)


LIMIT = 0.1  # the first gradients have norms of 0.2 to 0.4


@pytest.fixture(scope="module")
def clipped(latents):
    """Three steps with clipping in one plain torch process."""
    plain = train_plainly(load_recipe("digits", SMALL), latents, 3, LIMIT)
    assert min(plain.norms) > 2 * LIMIT
    return plain


@pytest.mark.parametrize(("world", "stage", "ep"), [(2, 0, 2), (1, 1, 1), (2, 1, 2), (2, 2, 2), (2, 3, 2)])
def test_clipping_is_torch_s(clipped, latents, tmp_path, world, stage, ep):
    """Adam's steps hardly know the size of a gradient; its moments do."""
    run = tmp_path / "run"
    flags = ["--steps", "3", *sets([*SMALL, f"optimizer.clip_grad_norm={LIMIT}"])]
    finish(start_training(world, ds_file(tmp_path, stage, ep), latents, run, *flags), run)
    assert losses(run, "grad_norm") == pytest.approx(clipped.norms, rel=1e-4)
    for kind in ("exp_avg", "exp_avg_sq"):
        want = clipped.moments(kind)
        for name, value in state_of(run, 3, kind, load_recipe("digits", SMALL)).items():
            error = (value - want[name]).norm() / want[name].norm().clamp_min(1e-12)
            assert error < 1e-3, (kind, name, error)


# --- sums of gradients ------------------------------------------------------------------------------------------------

BF16 = "precision=bf16,max_micro_batch_size=2"  # four micro-batches a rank
CASES = {
    "ZeRO 1, bf16": f"1,1,{BF16},gradients=bf16",
    "ZeRO 1, fp32": f"1,1,{BF16},gradients=fp32",
    "ZeRO 1, EP 2, fp32": f"1,2,{BF16},activation_checkpointing=blocks",
    "ZeRO 2, bf16": f"2,1,{BF16},gradients=bf16",
    "ZeRO 2, fp32": f"2,1,{BF16},gradients=fp32",
    "ZeRO 2, EP 2, fp32": f"2,2,{BF16},activation_checkpointing=experts",
    "ZeRO 2, EP 2, all in float32": "2,2,max_micro_batch_size=2",
    "ZeRO 3, EP 2, fp32": f"3,2,{BF16}",  # the ZeRO 3 engine before another stays in memory, so this one is first
    "ZeRO 3, bf16": f"3,1,{BF16},gradients=bf16",
}


@pytest.fixture(scope="module")
def probed(tmp_path_factory):
    """What two ranks found in each case, rank by rank (tests/helpers/probe.py)."""
    out = tmp_path_factory.mktemp("probe") / "out"
    tasks = ["tests/helpers/tasks.py", "2", str(free_port()), "tests/helpers/probe.py"]
    command = [sys.executable, *tasks, str(out), *CASES.values()]
    done = forks.run(command, cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(Path(f"{out}.{rank}").read_text()) for rank in range(2)]
    return {case: [found[rank][i] for rank in range(2)] for i, case in enumerate(CASES)}


@pytest.mark.parametrize("case", CASES)
def test_gradients_in_float32_are_the_sum_of_what_autograd_gave(probed, case):
    """Against float64 sums of each micro-batch's gradients; bf16 loses three digits on the way."""
    for found in probed[case]:
        assert found["accumulation"] == 4
        if case.endswith("bf16"):
            assert found["error"] > 1e-3
        else:
            assert found["error"] < 1e-6


@pytest.mark.parametrize("case", [case for case in CASES if case not in ("ZeRO 1, bf16", "ZeRO 3, bf16")])
def test_gradients_take_the_memory_that_the_plan_says(probed, case):
    planned = {found["planned"] for found in probed[case]}
    assert planned == {max(found["held"] for found in probed[case])}


def test_what_a_closed_engine_held_is_freed(probed):
    """But for ZeRO 3's, which DeepSpeed keeps."""
    freed = {case: {found["freed"] for found in ranks} for case, ranks in probed.items()}
    assert freed == {case: {not case.startswith("ZeRO 3")} for case in CASES}


def test_tokens_are_counted_once_where_layers_are_computed_twice(probed):
    for found in (rank for case in probed.values() for rank in case):
        assert found["load"] == 16 * 16 * 2 * 3  # samples, tokens, top-k, layers


def test_a_run_with_float32_sums_continues(latents, tmp_path):
    """Under ZeRO 1 DeepSpeed has another optimizer for it; its state is saved and loaded as any, on other ranks too."""
    flags = [*SMALL, "precision=bf16", "gradients=fp32", "max_micro_batch_size=4", "checkpoint.every=2"]
    flags, recipe = ["--steps", "4", *sets(flags)], load_recipe("digits", SMALL)
    whole = tmp_path / "whole"
    log = finish(start_training(2, ds_file(tmp_path, 1, 2), latents, whole, *flags), whole)
    assert "MA 0" not in log and "bf16_optimizer" not in log  # what DeepSpeed would print unasked
    for world, stage, near in ((2, 1, 1e-6), (1, 2, 2e-2)):
        run = tmp_path / f"{world} {stage}"
        shutil.copytree(whole, run)
        shutil.rmtree(run / "checkpoints/step_00000004")
        (run / "checkpoints/latest").write_text("step_00000002\n")
        finish(start_training(world, ds_file(tmp_path, stage, world), latents, run, *flags), run)
        assert losses(run) == pytest.approx(losses(whole), rel=near)
        for kind in ("weight", "exp_avg", "ema"):
            want = state_of(whole, 4, kind, recipe)
            for name, value in state_of(run, 4, kind, recipe).items():
                error = (value - want[name]).norm() / want[name].norm().clamp_min(1e-6)
                assert error < (1e-6 if near == 1e-6 else 0.2), (kind, name, error)
