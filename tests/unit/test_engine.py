"""The engine's parts in one process: sums of gradients, layers computed twice, the GPU that a rank sees, the clock."""

import os

import pytest
import torch
from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator

from helpers import records
from moe_dit import build_model, load_recipe
from moe_dit.metrics import Metrics, Reports
from moe_dit.models.diffmoe import ExpertChoiceMoE
from moe_dit.models.moe import MoE
from moe_dit.parallel.deepspeed_config import Parallelism, for_deepspeed, sums_in_fp32
from moe_dit.parallel.recompute import apply_activation_checkpointing
from moe_dit.plan import measure_activations
from moe_dit.runtime import ranks

# --- sums of gradients, and layers computed twice ---------------------------------------------------------------------


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
