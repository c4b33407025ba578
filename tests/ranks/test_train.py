"""Training on ranks: the same run in every topology and precision; two steps worked out by hand; what a run keeps."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from helpers import ENV, ROOT, STEPS, TIMEOUT, ds_file, export, finish, forks, kill, losses, records, start_training
from helpers.few_digits import encode_all
from helpers.older_run import FLAGS, OLD, taken_back
from helpers.small_runs import SHARDS, SMALL, begin, sets, train, train_plainly
from moe_dit import build_model, load_model, load_recipe
from moe_dit.checkpoint import read_state
from moe_dit.data import Latents, batches, training_inputs
from moe_dit.export import export_checkpoint
from moe_dit.manifest import read_manifest
from moe_dit.parallel.deepspeed_config import Parallelism
from moe_dit.plan import make_plan
from moe_dit.runtime.ranks import World

# --- topologies and precisions ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(latents):
    """Five steps of a small network in one plain process."""
    return train_plainly(load_recipe("digits", SMALL), latents, 5)


def run_small(ranks: int, ds: str | Path, shards: Path, run: Path, steps: int, *keys: str) -> str:
    """The command for the small network; gives its output."""
    flags = ["--steps", str(steps), *sets([*SMALL, *keys])]
    return finish(start_training(ranks, ds, shards, run, *flags), run)


def test_expert_parallel_training_is_plain_training(plain, two_ranks, tmp_path):
    history, norms, ema = plain
    assert losses(two_ranks) == pytest.approx(history, rel=1e-5)
    assert losses(two_ranks, "grad_norm") == pytest.approx(norms, rel=1e-4)
    exported = dict(export(two_ranks, tmp_path / "model", "ema").named_parameters())
    assert exported.keys() == ema.keys()
    for name, want in ema.items():
        torch.testing.assert_close(exported[name].detach(), want, rtol=0, atol=1e-5)


def test_eight_ranks_are_the_same_run(small, latents, tmp_path):
    run_small(8, "zero2_ep8", latents, tmp_path / "run", 2)
    assert losses(tmp_path / "run") == pytest.approx(small.losses[:2], rel=1e-5)


def test_labels_that_are_never_trained_are_told_of_once(latents, tmp_path):
    log = run_small(2, "zero2_ep2", latents, tmp_path / "run", 1, "model.num_classes=12")
    assert log.count("has 10 classes, and model.num_classes is 12: labels 10 to 11 are never trained") == 1
    assert log.index("never trained") < log.index("digits on 2 ranks")


def test_the_ema_is_the_average_of_the_weights_of_every_step(latents, tmp_path):
    """From the weights that two ranks saved after each step, averaged here in one plain process."""
    run, steps = tmp_path / "run", 5
    run_small(2, "zero2_ep2", latents, run, steps, "checkpoint.every=1", "checkpoint.keep=9")
    model = build_model(load_recipe("digits", SMALL))
    averages = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    for step in range(1, steps + 1):
        state = {f"weight/{name}": torch.empty(value.numel()) for name, value in averages.items()}
        read_state(state, run / "checkpoints" / f"step_{step:08d}")
        for name, value in averages.items():
            averages[name] = 0.995 * value + 0.005 * state[f"weight/{name}"].view_as(value)
    for name, weight in export(run, tmp_path / "model", "ema").named_parameters():
        torch.testing.assert_close(weight.detach(), averages[name], rtol=1e-6, atol=1e-7)


def test_compiling_the_dense_parts_changes_nothing(small, latents, tmp_path, monkeypatch):
    if shutil.which("g++") is None:
        pytest.skip("torch.compile needs a C++ compiler")
    monkeypatch.setitem(ENV, "TORCHINDUCTOR_COMPILE_THREADS", "1")  # else a process is started to compile in
    run_small(1, "zero1_ep1", latents, tmp_path / "run", 2, "compile=dense")
    assert losses(tmp_path / "run") == pytest.approx(small.losses[:2], rel=1e-5)


def assert_memory_as_planned(run, ranks, ep, zero):
    plan = make_plan(load_recipe("digits"), Parallelism("", zero, ep, ranks, 64 // ranks, 1, {}), bf16=False)
    held = json.loads((run / "memory.json").read_text())
    assert held == [{"weights": plan.weights, "master": plan.master, "state": plan.state}] * ranks


def test_a_rank_holds_what_the_plan_says(two_ranks):
    assert_memory_as_planned(two_ranks, 2, 2, 2)


def test_gradient_accumulation_changes_nothing(small, latents, tmp_path):
    log = run_small(2, "zero2_ep2", latents, tmp_path / "run", 4, "max_micro_batch_size=3")
    assert "batch 16 = 2 x 2 x 4" in log
    assert losses(tmp_path / "run") == pytest.approx(small.losses[:4], rel=1e-5)


@pytest.mark.parametrize(("ranks", "stage"), [(1, 1), (2, 3)])
def test_a_run_continues_in_another_topology(plain, two_ranks, latents, tmp_path, ranks, stage):
    run = shutil.copytree(two_ranks, tmp_path / "run")
    for name in ("step_00000012", "latest"):
        path = run / "checkpoints" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    finish(start_training(ranks, ds_file(tmp_path, stage, ranks), latents, run, "--steps", str(STEPS)), run)
    assert losses(run) == pytest.approx(plain[0], rel=1e-4)
    assert_memory_as_planned(run, ranks, ranks, stage)
    for name, weight in export(run, tmp_path / "model", "ema").named_parameters():
        torch.testing.assert_close(weight.detach(), plain[2][name], rtol=0, atol=1e-4)


def test_bf16_follows_float32_and_keeps_its_state_in_float32(small, latents, tmp_path):
    """As on a GPU: weights that compute in bf16, everything that is kept in float32."""
    run = tmp_path / "run"
    run_small(2, "zero2_ep2", latents, run, 5, "precision=bf16")
    assert losses(run) == pytest.approx(small.losses, rel=2e-2)
    initial, exported = build_model(load_recipe("digits", SMALL)), export(run, tmp_path / "model", "model")
    moved = [(a - b).abs().max() for a, b in zip(exported.parameters(), initial.parameters(), strict=True)]
    assert all(weight.dtype == torch.float32 for weight in exported.parameters())
    # Five steps of 1e-3 change a weight by at most 5e-3; bf16 weights of size 1 could not be told apart below 4e-3.
    assert max(moved) < 5.1e-3
    rounded = [torch.equal(weight, weight.bfloat16().float()) for weight in exported.parameters()]
    assert not any(rounded)


@pytest.mark.parametrize("mode", ["blocks", "experts"])
def test_activation_checkpointing_changes_nothing(small, latents, tmp_path, mode):
    run_small(1, "zero1_ep1", latents, tmp_path / "run", 3, f"activation_checkpointing={mode}")
    assert losses(tmp_path / "run") == pytest.approx(small.losses[:3], rel=1e-5)


def test_balancing_evens_the_load_and_its_absence_leaves_the_biases(latents, tmp_path):
    imbalance = {}
    for rate in ("0.0", "0.03"):
        run = tmp_path / rate
        run_small(1, "zero1_ep1", latents, run, 40, f"balance.rate={rate}")
        imbalance[rate] = sum(losses(run, "moe_imbalance")[30:]) / 10
        for name, buffer in export(run, tmp_path / f"model {rate}", "model").named_buffers():
            if name.endswith("e_score_correction_bias"):
                assert bool(buffer.any()) == (rate != "0.0")
    assert imbalance["0.03"] < 0.8 * imbalance["0.0"]


@pytest.mark.parametrize(
    ("ranks", "ds", "keys", "steps", "share"),
    [
        # A rate that takes the first steps slowly.
        (1, "zero1_ep1", [*SMALL, "global_batch_size=64", "optimizer.lr=5e-4"], 300, 0.5),
        pytest.param(2, "zero2_ep2", [], 120, 0.6, marks=pytest.mark.long),
    ],
    ids=["small", "digits"],
)
def test_the_loss_falls_to_a_share_of_its_first(tmp_path, ranks, ds, keys, steps, share):
    encode_all(tmp_path, steps=60)  # to latents that hold more than noise
    run = tmp_path / "run"
    finish(start_training(ranks, ds, tmp_path / "shards", run, "--steps", str(steps), *sets(keys)), run, timeout=500)
    curve = losses(run)
    assert sum(curve[-50:]) / 50 < share * sum(curve[4:15]) / 11


def test_a_pixel_model_trains_alike_on_one_rank_and_on_two_that_share_its_experts(pixels, tmp_path):
    one, two, exported = tmp_path / "one", tmp_path / "two", {}
    flags = ["--recipe=digits_pixels", "--steps=4", *sets([*SMALL, "model.in_context_start=1"])]
    for run, ranks, ds in ((one, 1, "zero1_ep1"), (two, 2, "zero2_ep2")):
        finish(start_training(ranks, ds, pixels, run, *flags, "--set=optimizer.warmup_steps=2"), run)
    assert losses(one, "lr") == pytest.approx([5e-4, 1e-3, 1e-3, 1e-3])
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)
    for run in ("one", "two"):
        for weights in ("model", "ema", "ema2"):
            export_checkpoint(tmp_path / run, weights, tmp_path / "models" / run / weights)
            exported[run, weights] = load_model(tmp_path / "models" / run / weights).state_dict()
    for weights in ("model", "ema", "ema2"):
        for name, value in exported["one", weights].items():
            torch.testing.assert_close(exported["two", weights][name], value, rtol=1e-3, atol=1e-5)
    name = "blocks.1.mlp.experts.down_bias"
    # Weights start at 0 and move; the slower average lags behind more.
    norms = [exported["one", weights][name].norm() for weights in ("ema", "ema2", "model")]
    assert 0 < norms[0] < norms[1] < norms[2]


# --- steps ------------------------------------------------------------------------------------------------------------

BIASES = [0.0, 9.0, 0.0, 5.0, 0.0, 0.0, 0.0, 0.0]  # outweigh every score: experts 1 and 3 get all tokens
LR, WARMUP, DECAY, BETA1, BETA2, CLIP, RATE = 1e-3, 4, 1.0, 0.9, 0.99, 0.5, 0.25
MIXTURE = [*SMALL, "checkpoint.every=1"]
STEPPED = [*MIXTURE, f"optimizer.lr={LR}", f"optimizer.warmup_steps={WARMUP}", f"optimizer.weight_decay={DECAY}"]
STEPPED += [f"optimizer.betas=[{BETA1}, {BETA2}]", f"optimizer.clip_grad_norm={CLIP}", f"balance.rate={RATE}"]
STEPPED += ["ema.decay=0.9", "ema.second_decay=0.75"]


def stepping(folder: Path) -> list[str]:
    """The flags of a run that begins from a model folder beside it."""

    def biases(model):
        model.blocks[1].mlp.router.e_score_correction_bias.copy_(torch.tensor(BIASES))

    begin(folder / "begin", "digits", STEPPED, 0.2, biases)
    return sets([*STEPPED, f"initial_weights={folder / 'begin'}"])


def states(run: Path, step: int, *kinds: str) -> list[dict[str, torch.Tensor]]:
    """A checkpoint's tensors by name, flattened; one dict a kind ("weight", "exp_avg", "ema", ...)."""
    shapes = {name: weight.numel() for name, weight in load_model(run.parent / "begin").named_parameters()}
    found = {f"{kind}/{name}": torch.empty(numel) for kind in kinds for name, numel in shapes.items()}
    read_state(found, run / f"checkpoints/step_{step:08d}")
    return [{name: found[f"{kind}/{name}"] for name in shapes} for kind in kinds]


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
    done = forks.run(command, cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == 2 and line in done.stderr, done.stderr


# --- what a run keeps, and where it goes on ---------------------------------------------------------------------------


def test_milestones_are_kept_beside_the_newest(tmp_path):
    train(tmp_path / "run", 5, *sets([*MIXTURE, "checkpoint.keep=1", "checkpoint.milestone_every=2"]))
    kept = {path.name for path in (tmp_path / "run/checkpoints").glob("step_*")}
    assert kept == {"step_00000002", "step_00000004", "step_00000005"}


def test_latest_says_where_a_run_goes_on(tmp_path):
    run = taken_back(tmp_path)
    log = train(run, 4, "--recipe", str(run / "config.yaml"))
    assert "continuing" in log and "step_00000003" in log
    assert len(losses(run)) == 4


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
        assert process.wait(TIMEOUT) == 1
    finally:
        kill(process)
    log = Path(f"{run}.log").read_text()
    assert "the gradient is not finite at step 1, positions 0 to 15" in log and "Traceback" not in log
    assert not list((run / "checkpoints").glob("step_*"))


@pytest.mark.parametrize(("ranks", "ds"), [(2, "zero2_ep2"), (1, "zero1_ep1")])
def test_format_1_continues(tmp_path, ranks, ds):
    run = shutil.copytree(OLD / "run", tmp_path / "run")
    flags = [f"--set={flag}" for flag in FLAGS] if ranks == 2 else ["--recipe", str(OLD / "run" / "config.yaml")]
    log = finish(start_training(ranks, ds, OLD / "shards", run, "--steps", "8", *flags), run)
    assert "continuing" in log and "step_00000003" in log
    assert losses(run) == pytest.approx(json.loads((OLD / "losses.json").read_text()), rel=1e-6)
