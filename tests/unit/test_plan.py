"""The plan: exact bytes against closed forms (test_train.py holds them against running jobs), and its command."""

from dataclasses import replace

import pytest

from helpers import call
from moe_dit.parallel.deepspeed_config import Parallelism
from moe_dit.plan import MODES, images_per_second, make_plan, measure_activations, step_seconds
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


def test_gradients_are_all_reduced_and_weights_gathered():
    def sends(ranks, ep, zero):
        return make_plan(load_recipe("digits"), topology(ranks, ep, zero)).sends

    # 7/8 of the 1,626,528 weights that are not experts' travel there and back, in bf16; experts have no second copy.
    assert sends(8, 8, 2) == {"all-to-all": 688_128, "all-reduce": 5_692_848, "all-gather": 2_846_424}
    # ZeRO 3 scatters; nothing is gathered under ZeRO 0.
    assert sends(8, 8, 3)["reduce-scatter"] == 2_846_424
    assert sends(8, 8, 0)["all-gather"] == 0


def test_a_step_cannot_be_faster_than_its_launches():
    eager = make_plan(load_recipe("dsmoe_s_e16", ["compile=none"]), topology(8, 8, 2))
    # the micro-batch that was counted, and its step
    counted = (548 + 570 + 380 + 210 + 280 + 105 + 85 + 75 + 50 + 173) + 144
    assert eager.launches == pytest.approx(counted)
    plan = make_plan(load_recipe("dsmoe_s_e16"), topology(8, 8, 2))
    counted = (10 + 9 + 6 + 498 + 10 + 70 + 65 + 173) + 144
    assert plan.launches == pytest.approx(counted)
    # ZeRO 3 is not compiled.
    assert make_plan(load_recipe("dsmoe_s_e16"), topology(8, 8, 3)).launches == pytest.approx(eager.launches)
    nothing = {"flops": 0.0, "attention": 0.0, "waits": 0, "touched": dict.fromkeys(plan.touched, 0.0)}
    quick = replace(plan, **nothing, sends=dict.fromkeys(plan.sends, 0.0))
    assert images_per_second(quick, "h100-80g", topology(8, 8, 2)) == pytest.approx(64 / (counted * 8e-6))
    # 13.5 GB a step over NVLink's 450 GB/s: gathered weights take their 30 ms beside it, gradients within it if told so
    for kind, overlapped, seconds in (
        ("all-gather", frozenset(), counted * 8e-6 + 0.03),
        ("all-reduce", frozenset(), counted * 8e-6 + 0.03),
        ("all-reduce", frozenset({"all-reduce"}), 0.03),
    ):
        slow = replace(quick, sends=quick.sends | {kind: 13.5e9}, overlapped=overlapped)
        assert images_per_second(slow, "h100-80g", topology(8, 8, 2)) == pytest.approx(64 / seconds)


@pytest.mark.parametrize(
    ("name", "batch", "speed", "products", "pointwise", "attention", "optimizer"),
    [
        ("dsmoe_s_e16", 64, 4600, 6.8, 4.3, 0.5, 2.3),
        ("dsmoe_b_e16", 64, 1680, 20, 8.5, 1, 9),
        ("dsmoe_l_e16", 32, 390, 37, 11.4, 1.5, 32),
        ("dsmoe_3b_e16", 16, 127, 42, 9.6, 2.5, 72),
    ],
)
def test_a_step_on_one_h100_is_that_of_another_reckoning(name, batch, speed, products, pointwise, attention, optimizer):
    """Images a second and ms by part, worked out apart from this code and its rules; not measured either."""
    parallelism = Parallelism("", 1, 1, 1, micro_batch_size=batch, accumulation=1, json={})
    plan = make_plan(load_recipe(name), parallelism)
    assert images_per_second(plan, "h100-80g", parallelism) == pytest.approx(speed, rel=0.15)
    ms = {part: seconds * 1e3 for part, seconds in step_seconds(plan, "h100-80g", parallelism).items()}
    assert ms["products"] + ms["attention"] == pytest.approx(products + attention, rel=0.15)
    assert ms["pointwise"] == pytest.approx(pointwise, rel=0.02)
    assert ms["optimizer"] == pytest.approx(optimizer, rel=0.02)


def test_what_the_optimizer_touches():
    def touched(parallelism, *changes, bf16=True):
        return make_plan(load_recipe("digits", list(changes)), parallelism, bf16).touched["optimizer"]

    parameters = 2_806_176  # of them 1,179,648 the experts'
    assert touched(topology(1, 1, 1)) == 70 * parameters
    second = touched(topology(1, 1, 1), "ema.second_decay=0.5") - touched(topology(1, 1, 1))
    assert second == 12 * parameters  # another average
    clipped = touched(topology(1, 1, 1), "optimizer.clip_grad_norm=1") - touched(topology(1, 1, 1))
    assert clipped == 8 * parameters
    # One float32 rank without ZeRO: norm 4, AdamW 28, average 12.
    assert touched(topology(1, 1, 0), bf16=False) == 44 * parameters
    # Of two ranks each takes all its gradients to a bucket, divides and joins them, and does the rest for a half.
    assert touched(topology(2, 1, 1)) == (12 + 62 / 2) * parameters
    assert touched(topology(2, 2, 1)) == 12 * (parameters - 1_179_648 / 2) + 62 / 2 * parameters
    # Two micro-batches, summed in float32: rounded up and added 10, bucket 24, of its half added 12, each; norm 4,
    # AdamW 28, average 12, to bf16 6, once.
    twice = replace(topology(2, 1, 2), accumulation=2)
    assert touched(twice) == (2 * (10 + 24 + 12 / 2) + 50 / 2) * parameters


def test_the_host_waits_for_each_exchange():
    def waits(ep, accumulation=1):
        parallelism = replace(topology(8, ep, 2), accumulation=accumulation)
        plan = make_plan(load_recipe("dsmoe_s_e16"), parallelism)
        parts = step_seconds(plan, "h100-80g", parallelism)
        assert parts["waits"] == pytest.approx(plan.waits * 30e-6)
        alone = step_seconds(replace(plan, waits=0), "h100-80g", parallelism)
        assert parts["step"] - alone["step"] == pytest.approx(parts["waits"])
        return plan.waits

    # as tests/ranks/test_counting.py counts them
    assert (waits(1), waits(8), waits(8, accumulation=3)) == (0, 5, 15)


def test_what_overlaps_is_what_deepspeed_is_told():
    def overlapped(stage, **keys):
        parallelism = replace(topology(8, 8, stage), json={"zero_optimization": {"stage": stage, **keys}})
        return make_plan(load_recipe("digits"), parallelism).overlapped

    assert overlapped(2) == overlapped(1) == overlapped(2, overlap_comm=False) == set()
    assert overlapped(2, overlap_comm=True) == {"all-reduce", "reduce-scatter"}
    assert overlapped(3) == {"all-reduce", "reduce-scatter", "all-gather"}


def test_accumulating_launches_a_micro_batch_again():
    def launches(accumulation):
        parallelism = replace(topology(8, 8, 2), accumulation=accumulation)
        return make_plan(load_recipe("dsmoe_s_e16"), parallelism).launches

    assert launches(3) - launches(1) == pytest.approx(2 * (10 + 9 + 6 + 498 + 10 + 70 + 65 + 173))


def test_recomputing_keeps_less():
    kept = measure_activations(load_recipe("digits"))
    assert kept["none"] > kept["experts"] > kept["blocks"] > 0
    assert set(kept) == set(MODES)


def test_the_command_prints_and_refuses(capsys):
    assert call("jobs/plan.py", "--recipe", "digits", "--ds", "ds_configs/zero2_ep2.json", "--gpus", 2) == 0
    assert "fits a h100-80g" in capsys.readouterr().out
    for flags, line in (
        (["--gpus", "0"], "--gpus 0"),
        (["--gpus", "3", "--ds", "ds_configs/zero2_ep2.json"], "does not divide the 3 ranks"),
    ):
        assert call("jobs/plan.py", "--ds", "ds_configs/zero1_ep1.json", "--recipe", "digits", *flags) == 2
        out, err = capsys.readouterr()
        assert out == "" and line in err
        assert err.splitlines()[-1].startswith("error: ")
