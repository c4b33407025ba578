"""The plan: exact bytes against closed forms (tests/test_train.py holds them against running jobs), and its command."""

import subprocess
import sys

import pytest
from helpers import ENV, ROOT

from moe_dit.parallel.deepspeed_config import Parallelism
from moe_dit.plan import MODES, make_plan, measure_activations
from moe_dit.recipe_file import load_recipe


def topology(ranks, ep, zero):
    return Parallelism("", zero, ep, ranks, micro_batch_size=64 // ranks, accumulation=1, json={})


def test_without_sharding_a_rank_holds_four_bytes_a_parameter_of_everything():
    plan = make_plan(load_recipe("digits"), topology(1, 1, 0), bf16=False)
    parameters = 2_806_176
    assert (plan.weights, plan.gradients, plan.master) == (4 * parameters, 4 * parameters, 0)
    assert plan.state == 3 * 4 * parameters
    assert not any(plan.sends.values())


def test_the_3b_model_needs_16_bytes_a_parameter_less_what_is_sharded():
    plan = make_plan(load_recipe("dsmoe_3b_e16"), topology(8, 8, 2))
    total, experts = 3_101_669_024, 15 * 16 * 3 * 1152 * 2880
    local = total - experts + experts // 8
    assert plan.weights == 2 * local
    assert plan.state == pytest.approx(12 * ((total - experts) / 8 + experts / 8), rel=1e-6)


def test_tokens_travel_in_proportion_to_the_experts_elsewhere():
    def sent(ep):
        return make_plan(load_recipe("digits"), topology(8, ep, 2)).sends["all-to-all"]

    # 8 images of 16 tokens to 2 experts in 3 layers, 128 bf16 values each, out and back, forward and backward
    assert sent(8) == 4 * 3 * (8 * 16 * 2) * 128 * 2 * 7 / 8
    assert sent(2) == sent(8) / (7 / 8) / 2
    assert sent(1) == 0


def test_recomputing_keeps_less():
    kept = measure_activations(load_recipe("digits"))
    assert kept["none"] > kept["experts"] > kept["blocks"] > 0
    assert set(kept) == set(MODES)


def run(*flags):
    command = [sys.executable, "jobs/plan.py", *flags]
    return subprocess.run(command, cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=120)


def test_the_command_prints_and_refuses():
    done = run("--recipe", "digits", "--ds", "ds_configs/zero2_ep2.json", "--gpus", "2")
    assert done.returncode == 0 and "fits a h100-80g" in done.stdout
    for flags, line in (
        (["--gpus", "0"], "--gpus 0"),
        (["--gpus", "3", "--ds", "ds_configs/zero2_ep2.json"], "does not divide the 3 ranks"),
    ):
        done = run("--ds", "ds_configs/zero1_ep1.json", "--recipe", "digits", *flags)
        assert done.returncode == 2 and line in done.stderr
        assert done.stderr.splitlines()[-1].startswith("error: ")
