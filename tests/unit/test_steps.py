"""Two steps of the real command, worked out by hand: rates, clipping, Adam, averages, biases; and what a run keeps.

The networks are tiny and begin from weights and buffers that the tests choose.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from helpers import ENV, ROOT, finish, kill, losses, records, start_training
from moe_dit import build_model, load_model, load_recipe
from moe_dit.checkpoint import read_state
from moe_dit.data import Latents, batches, training_inputs
from moe_dit.export import export_checkpoint, load_export, save_export
from moe_dit.manifest import read_manifest
from moe_dit.runtime.ranks import World

OLD = ROOT / "tests/golden/run_format_1"
SHARDS = OLD / "shards"  # 96 of the digits
TINY = ["model.depth=2", "model.hidden_size=32", "model.num_heads=2", "global_batch_size=16", "checkpoint.every=1"]
MIXTURE = [*TINY, "model.moe.expert_width=16"]


def sets(keys: list[str]) -> list[str]:
    return [f"--set={key}" for key in keys]


def begin(folder: Path, name: str, keys: list[str], spread: float, change=None) -> Path:
    """A model folder of random weights, to begin from; a fresh network's gradients are zero in most places."""
    recipe = load_recipe(name, keys)
    model, generator = build_model(recipe), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(spread * torch.randn(weight.shape, generator=generator))
        if change is not None:
            change(model)
    save_export(model, recipe, folder)
    return folder


def train(run: Path, steps: int, *flags: str, ranks: int = 1, zero: int = 1) -> str:
    """The command, with experts shared by all ranks; gives its output."""
    ds = Path(f"{run}.json")
    config = {"zero_optimization": {"stage": zero}, "expert_parallel": {"enabled": True, "autoep_size": ranks}}
    ds.write_text(json.dumps(config))
    return finish(start_training(ranks, ds, SHARDS, run, "--steps", str(steps), *flags), run)


def states(run: Path, step: int, *kinds: str) -> list[dict[str, torch.Tensor]]:
    """A checkpoint's tensors by name, flattened; one dict a kind ("weight", "exp_avg", "ema", ...)."""
    shapes = {name: weight.numel() for name, weight in load_model(run.parent / "begin").named_parameters()}
    found = {f"{kind}/{name}": torch.empty(numel) for kind in kinds for name, numel in shapes.items()}
    read_state(found, run / f"checkpoints/step_{step:08d}")
    return [{name: found[f"{kind}/{name}"] for name in shapes} for kind in kinds]


# --- steps ------------------------------------------------------------------------------------------------------------

BIASES = [0.0, 9.0, 0.0, 5.0, 0.0, 0.0, 0.0, 0.0]  # outweigh every score: experts 1 and 3 get all tokens
LR, WARMUP, DECAY, BETA1, BETA2, CLIP, RATE = 1e-3, 4, 1.0, 0.9, 0.99, 0.5, 0.25
STEPPED = [*MIXTURE, f"optimizer.lr={LR}", f"optimizer.warmup_steps={WARMUP}", f"optimizer.weight_decay={DECAY}"]
STEPPED += [f"optimizer.betas=[{BETA1}, {BETA2}]", f"optimizer.clip_grad_norm={CLIP}", f"balance.rate={RATE}"]
STEPPED += ["ema.decay=0.9", "ema.second_decay=0.75"]


def stepping(folder: Path) -> list[str]:
    """The flags of a run that begins from a model folder beside it."""

    def biases(model):
        model.blocks[1].mlp.router.e_score_correction_bias.copy_(torch.tensor(BIASES))

    begin(folder / "begin", "digits", STEPPED, 0.2, biases)
    return sets([*STEPPED, f"initial_weights={folder / 'begin'}"])


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A run after its first step on one rank, and its flags."""
    folder = tmp_path_factory.mktemp("steps")
    flags = stepping(folder)
    train(folder / "run", 1, *flags)
    return folder / "run", flags


def adamw(weight, first, second, step, lr):
    """AdamW (arXiv:1711.05101, algorithm 2) from the moments of a step, counted from 1."""
    step_size = first / (1 - BETA1**step) / ((second / (1 - BETA2**step)).sqrt() + 1e-8)
    return weight - lr * step_size - lr * DECAY * weight


def assert_near(got: dict, want: dict, atol: float):
    assert got.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


def assert_first_step(run: Path) -> None:
    recipe, manifest = load_recipe("digits", STEPPED), read_manifest(SHARDS)
    inputs = training_inputs(recipe, next(batches(recipe, manifest, 16, 0, World())), Latents.of(recipe, manifest))
    model, x, noise, t = load_model(run.parent / "begin").train(), inputs["x"], inputs["noise"], inputs["u"]
    share = t[:, None, None, None]
    velocity = model(share * x + (1 - share) * noise, t, inputs["y"])[:, :4]
    loss = (velocity - (x - noise)).square().mean()
    loss.backward()
    before = {name: weight.detach().flatten() for name, weight in model.named_parameters()}
    gradient = {name: weight.grad.flatten() for name, weight in model.named_parameters()}
    norm = torch.cat(list(gradient.values())).norm()
    assert norm > 2 * CLIP

    record = records(run)[0]
    assert record["lr"] == LR / WARMUP
    assert record["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert record["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)  # before clipping
    assert record["moe_imbalance"] == 4.0  # two of eight experts

    after, first, second, ema, ema2 = states(run, 1, "weight", "exp_avg", "exp_avg_sq", "ema", "ema2")
    clipped = {name: value * CLIP / norm for name, value in gradient.items()}
    assert_near(first, {name: (1 - BETA1) * value for name, value in clipped.items()}, 1e-6)
    assert_near(second, {name: (1 - BETA2) * value.square() for name, value in clipped.items()}, 1e-6)
    assert torch.cat(list(first.values())).norm().item() == pytest.approx((1 - BETA1) * CLIP, rel=1e-4)
    assert_near(after, {n: adamw(w, first[n], second[n], 1, LR / WARMUP) for n, w in before.items()}, 1e-7)
    assert_near(ema, {name: 0.9 * value + 0.1 * after[name] for name, value in before.items()}, 1e-7)
    assert_near(ema2, {name: 0.75 * value + 0.25 * after[name] for name, value in before.items()}, 1e-7)
    # Adam's first step is the rate, whatever the gradient: neither the averages nor the decay could hide another one.
    moved = max((after[name] - value).abs().max().item() for name, value in before.items())
    assert LR / WARMUP <= moved < 2 * LR / WARMUP


def test_the_first_step_of_one_rank(begun):
    assert_first_step(begun[0])


def test_the_first_step_without_zero(tmp_path):
    train(tmp_path / "run", 1, *stepping(tmp_path), zero=0)
    assert_first_step(tmp_path / "run")


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_the_first_step_of_two_ranks_that_share_the_experts(tmp_path, zero):
    train(tmp_path / "run", 1, *stepping(tmp_path), ranks=2, zero=zero)
    assert_first_step(tmp_path / "run")


def biases_of(run: Path, folder: Path) -> list[float]:
    export_checkpoint(run, "model", folder)
    return load_model(folder).state_dict()["blocks.1.mlp.router.e_score_correction_bias"].tolist()


def test_a_run_that_continues_takes_the_second_step(begun, tmp_path):
    """Moments, their number of steps, averages and biases are those that the first step left."""
    shutil.copytree(begun[0].parent / "begin", tmp_path / "begin")
    run = shutil.copytree(begun[0], tmp_path / "run")
    assert biases_of(run, tmp_path / "one") == [0.25, 8.75, 0.25, 4.75, 0.25, 0.25, 0.25, 0.25]
    train(run, 2, *begun[1])
    assert [record["lr"] for record in records(run)] == [0.00025, 0.0005]
    assert [record["moe_imbalance"] for record in records(run)] == [4.0, 4.0]
    assert biases_of(run, tmp_path / "two") == [0.5, 8.5, 0.5, 4.5, 0.5, 0.5, 0.5, 0.5]
    kinds = ("weight", "exp_avg", "exp_avg_sq", "ema", "ema2")
    one, two = (dict(zip(kinds, states(run, step, *kinds), strict=True)) for step in (1, 2))
    gradient = {n: (two["exp_avg"][n] - BETA1 * first) / (1 - BETA1) for n, first in one["exp_avg"].items()}
    assert torch.cat(list(gradient.values())).norm().item() == pytest.approx(CLIP, rel=1e-4)
    assert_near(
        two["exp_avg_sq"],
        {n: BETA2 * second + (1 - BETA2) * gradient[n].square() for n, second in one["exp_avg_sq"].items()},
        1e-7,
    )
    moments = two["exp_avg"], two["exp_avg_sq"]
    want = {n: adamw(w, moments[0][n], moments[1][n], 2, LR * 2 / WARMUP) for n, w in one["weight"].items()}
    assert_near(two["weight"], want, 1e-7)
    for name, decay in (("ema", 0.9), ("ema2", 0.75)):
        assert_near(two[name], {n: decay * a + (1 - decay) * two["weight"][n] for n, a in one[name].items()}, 1e-7)


def test_each_kind_of_weights_is_exported_as_itself(begun, tmp_path):
    for kind, weights in zip(("weight", "ema", "ema2"), states(begun[0], 1, "weight", "ema", "ema2"), strict=True):
        export_checkpoint(begun[0], {"weight": "model"}.get(kind, kind), tmp_path / kind)
        exported = {name: weight.flatten() for name, weight in load_model(tmp_path / kind).named_parameters()}
        assert_near({name: weight.detach() for name, weight in exported.items()}, weights, 0)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ("seed=1", "was trained with seed 0, not 1"),
        ("flow.label_dropout=0.5", "was trained with flow.label_dropout 0.1, not 0.5"),
        ("ema.decay=0.5", "was trained with ema.decay 0.9, not 0.5"),
        ("global_batch_size=8", "was trained with global_batch_size 16, not 8"),
    ],
    ids=["seed", "flow", "ema", "batch"],
)
def test_a_run_does_not_continue_as_another_experiment(begun, change, line):
    command = [sys.executable, "jobs/train.py", "--ds", "ds_configs/zero1_ep1.json", "--recipe", "digits", "--steps=2"]
    command += ["--data", str(SHARDS), "--out", str(begun[0]), *begun[1], f"--set={change}"]
    done = subprocess.run(command, cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and line in done.stderr, done.stderr


def test_thresholds_of_expert_choice_continue(tmp_path):
    """Predictors that say 3/4 or 1/2 for every token: a threshold goes a twentieth of the way there a step."""
    keys = [*TINY, "optimizer.lr=1e-30"]

    def predictions(model):
        layer = model.blocks[1].mlp
        layer.capacity_predictor[2].weight.zero_()
        layer.capacity_predictor[2].bias.copy_(torch.tensor([3.0] + 7 * [1.0]).log())
        layer.expert_threshold.fill_(0.9)

    begin(tmp_path / "begin", "digits_diffmoe", keys, 0.2, predictions)
    flags = ["--recipe=digits_diffmoe", *sets([*keys, f"initial_weights={tmp_path / 'begin'}"])]
    for steps in (1, 2):
        train(tmp_path / "run", steps, *flags)
        export_checkpoint(tmp_path / "run", "model", tmp_path / str(steps))
        got = load_model(tmp_path / str(steps)).state_dict()["blocks.1.mlp.expert_threshold"]
        kept = 0.95**steps
        want = [0.9 * kept + 0.75 * (1 - kept)] + 7 * [0.9 * kept + 0.5 * (1 - kept)]
        assert got.tolist() == pytest.approx(want, abs=1e-6)


# --- what a run keeps, and where it goes on ---------------------------------------------------------------------------


def test_milestones_are_kept_beside_the_newest(tmp_path):
    train(tmp_path / "run", 5, *sets([*MIXTURE, "checkpoint.keep=1", "checkpoint.milestone_every=2"]))
    kept = {path.name for path in (tmp_path / "run/checkpoints").glob("step_*")}
    assert kept == {"step_00000002", "step_00000004", "step_00000005"}


@pytest.fixture
def taken_back(tmp_path):
    """The recorded run at step 3, which `latest` names, with a checkpoint of step 9 left over from before."""
    run = shutil.copytree(OLD / "run", tmp_path / "run")
    left = shutil.copytree(run / "checkpoints/step_00000003", run / "checkpoints/step_00000009")
    description = json.loads((left / "state.json").read_text())
    description |= {"step": 9, "recipe": description["recipe"] | {"name": "left"}}
    (left / "state.json").write_text(json.dumps(description))
    assert (run / "checkpoints/latest").read_text() == "step_00000003\n"
    return run


def test_latest_says_which_checkpoint_is_exported(taken_back, tmp_path):
    export_checkpoint(taken_back, "ema", tmp_path / "model")
    assert load_export(tmp_path / "model")[1].name == "digits"
    (taken_back / "checkpoints/latest").write_text("step_00000009\n")
    export_checkpoint(taken_back, "ema", tmp_path / "model")
    assert load_export(tmp_path / "model")[1].name == "left"


def test_latest_says_where_a_run_goes_on(taken_back):
    log = train(taken_back, 4, "--recipe", str(taken_back / "config.yaml"))
    assert "continuing" in log and "step_00000003" in log
    assert len(losses(taken_back)) == 4


def test_a_gradient_that_is_not_finite_stops_the_run_and_is_never_saved(tmp_path):
    """The loss is finite, but labels' vectors are so large that the gradient of what they are multiplied by is not."""

    def overflow(model):
        model.c_embedder.label.weight.fill_(1e30)
        model.final_layer.linear.weight.mul_(1e8)
        for module in (*model.blocks, model.final_layer):
            module.adaLN_modulation[1].weight.zero_()

    begin(tmp_path / "begin", "digits", MIXTURE, 0.2, overflow)
    run = tmp_path / "run"
    flags = sets([*MIXTURE, f"initial_weights={tmp_path / 'begin'}"])
    process = start_training(1, "zero1_ep1", SHARDS, run, "--steps=2", *flags)
    try:
        assert process.wait(120) == 1
    finally:
        kill(process)
    log = Path(f"{run}.log").read_text()
    assert "the gradient is not finite at step 1, positions 0 to 15" in log and "Traceback" not in log
    assert not list((run / "checkpoints").glob("step_*"))
