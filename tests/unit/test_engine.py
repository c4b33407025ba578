"""The engine under ZeRO 0 to 3: clipping, sums of gradients and what they cost, recomputing, groups, the clock."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator

from helpers import ENV, ROOT, ds_file, finish, free_port, losses, records, start_training, state_of
from moe_dit import build_model, load_recipe
from moe_dit.data import Latents, batches, training_inputs
from moe_dit.flow import Flow
from moe_dit.manifest import read_manifest
from moe_dit.metrics import Metrics, Reports
from moe_dit.models.diffmoe import ExpertChoiceMoE
from moe_dit.models.moe import MoE
from moe_dit.parallel.deepspeed_config import Parallelism, for_deepspeed, sums_in_fp32
from moe_dit.parallel.recompute import apply_activation_checkpointing
from moe_dit.plan import measure_activations
from moe_dit.runtime import ranks
from moe_dit.runtime.ranks import World

# --- ZeRO 0, and clipping ---------------------------------------------------------------------------------------------


def test_zero_0_is_plain_training(plain, latents, tmp_path):
    run = tmp_path / "run"
    finish(start_training(2, ds_file(tmp_path, 0, 2), latents, run, "--steps", "4"), run)
    assert losses(run) == pytest.approx(plain[0][:4], rel=1e-5)
    assert losses(run, "grad_norm") == pytest.approx(plain[1][:4], rel=1e-4)


LIMIT = 0.1  # the first gradients have norms of 0.2 to 0.4


@pytest.fixture(scope="module")
def clipped(latents):
    """Three steps with clipping in one plain torch process: norms before it, and both moments after."""
    recipe = load_recipe("digits", ["global_batch_size=32"])
    manifest, model = read_manifest(latents), build_model(recipe)
    adam = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.999), weight_decay=0.0)
    norms = []
    for batch in batches(replace(recipe, steps=3), manifest, 32, 0, World()):
        inputs = training_inputs(recipe, batch, Latents.of(recipe, manifest))
        adam.zero_grad()
        Flow().loss(model, inputs["x"], inputs["y"], noise=inputs["noise"], t=inputs["u"])["loss"].backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), LIMIT).item())
        adam.step()
        if len(norms) == 3:
            break
    assert min(norms) > 2 * LIMIT
    moments = {
        kind: {name: adam.state[weight][kind].flatten() for name, weight in model.named_parameters()}
        for kind in ("exp_avg", "exp_avg_sq")
    }
    return norms, moments


@pytest.mark.parametrize(("world", "stage", "ep"), [(2, 0, 2), (1, 1, 1), (2, 1, 2), (2, 2, 2), (2, 3, 2)])
def test_clipping_is_torch_s(clipped, latents, tmp_path, world, stage, ep):
    """Adam's steps hardly know the size of a gradient; its moments do."""
    norms, moments = clipped
    run = tmp_path / "run"
    flags = ["--steps", "3", "--set", "global_batch_size=32", "--set", f"optimizer.clip_grad_norm={LIMIT}"]
    finish(start_training(world, ds_file(tmp_path, stage, ep), latents, run, *flags), run)
    assert losses(run, "grad_norm") == pytest.approx(norms, rel=1e-4)
    for kind, want in moments.items():
        for name, value in state_of(run, 3, kind).items():
            error = (value - want[name]).norm() / want[name].norm().clamp_min(1e-12)
            assert error < 1e-3, (kind, name, error)


# --- sums of gradients, and layers computed twice ---------------------------------------------------------------------

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
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port())]
    command = [sys.executable, *launcher, "tests/helpers/probe.py", str(out), *CASES.values()]
    done = subprocess.run(command, cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=400)
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
    bucket = 200_000 * 4 if case.startswith("ZeRO 3") else 0  # DeepSpeed's buffer, which is there all the time
    planned = {found["planned"] for found in probed[case]}
    assert planned == {max(found["held"] for found in probed[case]) - bucket}


def test_what_a_closed_engine_held_is_freed(probed):
    """But for ZeRO 3's, which DeepSpeed keeps."""
    freed = {case: {found["freed"] for found in ranks} for case, ranks in probed.items()}
    assert freed == {case: {not case.startswith("ZeRO 3")} for case in CASES}


def test_tokens_are_counted_once_where_layers_are_computed_twice(probed):
    for found in (rank for case in probed.values() for rank in case):
        assert found["load"] == 16 * 16 * 2 * 3  # samples, tokens, top-k, layers


@pytest.mark.parametrize(
    ("gradients", "bf16", "accumulation", "world", "fp32"),
    [
        ("auto", True, 1, 1, False),
        ("auto", True, 1, 8, False),
        ("auto", True, 1, 9, True),
        ("auto", True, 2, 1, True),
        ("bf16", True, 2, 64, False),
        ("fp32", True, 1, 1, True),
        ("auto", False, 1, 1, True),
        ("bf16", False, 4, 64, True),
    ],
)
def test_what_gradients_are_summed_in(gradients, bf16, accumulation, world, fp32):
    recipe = load_recipe("digits", [f"gradients={gradients}"])
    parallelism = Parallelism("", 2, 1, world, 8, accumulation, {})
    assert sums_in_fp32(recipe, parallelism, bf16) == fp32
    # In float32 all is as it was: DeepSpeed is told nothing.
    assert ("data_types" in for_deepspeed(parallelism, recipe, bf16)) == (bf16 and fp32)


def test_a_run_with_float32_sums_continues(latents, tmp_path):
    """Under ZeRO 1 DeepSpeed has another optimizer for it; its state is saved and loaded as any, on other ranks too."""
    flags = ["precision=bf16", "gradients=fp32", "global_batch_size=16", "max_micro_batch_size=4", "checkpoint.every=2"]
    flags = ["--steps", "4", *(f"--set={flag}" for flag in flags)]
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
            want = state_of(whole, 4, kind)
            for name, value in state_of(run, 4, kind).items():
                error = (value - want[name]).norm() / want[name].norm().clamp_min(1e-6)
                assert error < (1e-6 if near == 1e-6 else 0.2), (kind, name, error)


@pytest.mark.parametrize("mode", ["blocks", "experts"])
@pytest.mark.parametrize("recipe", ["digits", "digits_diffmoe"])
def test_layers_that_are_computed_twice_note_what_they_saw_once(recipe, mode):
    torch.manual_seed(0)
    settings = ["model.moe.auxiliary_losses={z_loss: 0.1}"] if recipe == "digits" else []
    model = build_model(load_recipe(recipe, settings)).train()
    with torch.no_grad():
        for weight in model.parameters():  # a fresh network is the identity
            weight.add_(0.1 * torch.randn_like(weight))
    mixtures = [module for module in model.modules() if isinstance(module, MoE | ExpertChoiceMoE)]
    noting = [module for module in model.modules() if hasattr(module, "layer_losses")]
    assert len(mixtures) == len(noting) == 3
    x, t, y = torch.randn(4, 4, 8, 8), torch.rand(4), torch.tensor([0, 1, 2, 10])

    def notes() -> dict[str, torch.Tensor]:
        return {name: value.clone() for name, value in model.named_buffers()}

    def step():
        model.zero_grad()
        calls = []
        hooks = [layer.experts.register_forward_hook(lambda *_: calls.append(1)) for layer in mixtures]
        loss = model(x, t, y).square().mean() + sum(model.auxiliary_losses().values())
        noted, left = notes(), [layer.layer_losses for layer in noting]
        loss.backward()
        for hook in hooks:
            hook.remove()
        for name, value in notes().items():
            assert torch.equal(value, noted[name]), name
        assert all(layer.layer_losses is losses for layer, losses in zip(noting, left, strict=True))
        return len(calls), loss.item(), noted, {name: weight.grad for name, weight in model.named_parameters()}

    before = notes()
    calls, loss, noted, gradients = step()
    assert calls == 3
    for name, value in before.items():
        model.get_buffer(name).copy_(value)
    apply_activation_checkpointing(model, mode)
    again = step()
    assert again[0] == 6  # three layers, twice
    assert again[1] == loss
    for name, value in noted.items():
        assert torch.equal(again[2][name], value), name
    for name, gradient in gradients.items():
        torch.testing.assert_close(again[3][name], gradient)
    if recipe == "digits":
        assert sum(layer.tokens_per_expert.sum() for layer in mixtures) == 3 * 4 * 16 * 2


def test_recomputing_the_experts_of_diffmoe_keeps_less():
    kept = measure_activations(load_recipe("digits_diffmoe"))
    assert kept["none"] > kept["experts"] > kept["blocks"] > 0


# --- the GPU that a rank sees -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gpus", "index"),
    [(0, "3"), (1, "0"), (8, "3"), (2, "1")],
    ids=["none", "one a task", "all of the node", "fewer than ranks"],
)
def test_deepspeed_gets_the_index_of_a_gpu_that_the_rank_sees(monkeypatch, gpus, index):
    """DeepSpeed makes a device of LOCAL_RANK; under srun --gpus-per-task=1 each rank sees one GPU, with index 0."""
    slurm = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "11", "SLURM_LOCALID": "3", "SLURM_STEP_NUM_TASKS": "16"}
    monkeypatch.setattr(os, "environ", slurm | {"MASTER_ADDR": "127.0.0.1"})
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    ranks.set_rendezvous()
    assert (os.environ["RANK"], os.environ["WORLD_SIZE"]) == ("11", "16")
    assert CUDA_Accelerator().device_name(os.environ["LOCAL_RANK"]) == f"cuda:{index}"


# --- the clock --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lag", [0, 2])
def test_images_per_second_are_a_step_s_own(monkeypatch, tmp_path, lag):
    """Not those of a save between steps; and a report that is read late has the time that its step took."""
    now = 0.0
    monkeypatch.setattr("time.perf_counter", lambda: now)
    reports, recipe = Reports(torch.device("cpu")), load_recipe("digits", ["metrics.sinks=[]"])
    reports.lag = lag
    metrics = Metrics(tmp_path, 0, recipe, 0)
    result = {"terms": torch.ones(1), "stop": torch.zeros(()), "load": torch.ones(3, 8)}
    for step, seconds in enumerate((0.5, 0.25, 0.5, 0.25, 1.0, 0.5), start=1):
        now += seconds
        reports.push(step, 1e-3, ["loss"], result, 1.0)
        save = step in (3, 4)
        for report in reports.take(everything=save or step == 6):
            metrics.add(report)
        if save:  # as the training loop does
            now += 1000.0
            reports.restart_clock()
    metrics.close()
    speeds = {record["step"]: record["images_per_second"] for record in records(tmp_path)}
    assert speeds == {1: 128.0, 2: 256.0, 3: 128.0, 4: 256.0, 5: 64.0, 6: 128.0}
