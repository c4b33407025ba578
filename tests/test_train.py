"""Training under the real launcher: held against one plain process, killed, continued elsewhere, and fed rubbish."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import psutil
import pytest
import torch
from conftest import ENV, ROOT, finish, free_port, kill, start_training

from moe_dit import build_model, load_model, load_recipe
from moe_dit.checkpoint import read_state
from moe_dit.data import ShardReader, batches, training_inputs
from moe_dit.deepspeed_config import Parallelism
from moe_dit.distributed import World
from moe_dit.flow import Flow
from moe_dit.manifest import read_manifest
from moe_dit.plan import make_plan
from moe_dit.randomness import permutation

STEPS = 12


def losses(run, key="loss") -> list[float]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, len(records) + 1))
    return [record[key] for record in records]


@pytest.fixture(scope="module")
def plain(latents):
    """The same steps in one plain torch process: losses, gradient norms and EMA."""
    recipe = replace(load_recipe("digits"), steps=STEPS)
    manifest, model = read_manifest(latents), build_model(recipe)
    adam = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.999), weight_decay=0.0)
    ema = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    history, norms = [], []
    for batch in batches(recipe, manifest, recipe.global_batch_size, 0, World()):
        inputs = training_inputs(recipe, batch, manifest.scale)
        loss = Flow().loss(model, inputs["x"], inputs["y"], noise=inputs["noise"], t=inputs["u"])["loss"]
        adam.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.get_total_norm([weight.grad for weight in model.parameters()]).item())
        adam.step()
        for name, weight in model.named_parameters():
            ema[name] = 0.995 * ema[name] + 0.005 * weight.detach()
        history.append(loss.item())
    return history, norms, ema


@pytest.fixture(scope="module")
def two_ranks(latents, tmp_path_factory):
    """An uninterrupted run on 2 expert-parallel ranks."""
    run = tmp_path_factory.mktemp("train") / "two"
    flags = ["--steps", str(STEPS), "--set", "checkpoint.every=4"]
    finish(start_training(2, "zero2_ep2", latents, run, *flags), run)
    return run


def export(run, out, weights):
    subprocess.run(
        [sys.executable, "jobs/export.py", str(run), "--weights", weights, "--out", str(out)],
        check=True,
        cwd=ROOT,
        env=ENV,
    )
    return load_model(out)


def test_expert_parallel_training_is_plain_training(plain, two_ranks, tmp_path):
    history, norms, ema = plain
    assert losses(two_ranks) == pytest.approx(history, rel=1e-5)
    assert losses(two_ranks, "grad_norm") == pytest.approx(norms, rel=1e-4)
    exported = dict(export(two_ranks, tmp_path / "model", "ema").named_parameters())
    assert exported.keys() == ema.keys()
    for name, want in ema.items():
        torch.testing.assert_close(exported[name].detach(), want, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_eight_ranks_are_the_same_run(plain, latents, tmp_path):
    run = tmp_path / "run"
    finish(start_training(8, "zero2_ep8", latents, run, "--steps", "2"), run)
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


@pytest.mark.slow
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


def test_a_killed_run_goes_on_from_its_newest_checkpoint(two_ranks, latents, tmp_path):
    run = tmp_path / "run"
    flags = ["--steps", str(STEPS), "--set", "checkpoint.every=4"]
    process = start_training(2, "zero2_ep2", latents, run, *flags)
    wait_for_step(run, 6, process)
    kill(process)
    done = len((run / "metrics.jsonl").read_text().splitlines())
    assert 6 <= done < STEPS
    # what a kill in the middle of a save leaves behind, and a half-written line of metrics
    (run / "checkpoints" / ".step_00000008.tmp").mkdir(exist_ok=True)
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "lo')
    log = finish(start_training(2, "zero2_ep2", latents, run, *flags), run)
    assert "continuing" in log
    assert losses(run) == pytest.approx(losses(two_ranks), rel=1e-6)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        "latest",
        "step_00000004",
        "step_00000008",
        "step_00000012",
    ]
    assert (run / "checkpoints" / "latest").read_text().strip() == "step_00000012"


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


def wait_for_step(run, step, process, timeout=120):
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline and process.poll() is None:
        if (run / "metrics.jsonl").exists() and len((run / "metrics.jsonl").read_text().splitlines()) >= step:
            return
        time.sleep(0.02)
    raise AssertionError(f"step {step} was not reached in {timeout} s")


def test_ranks_end_with_a_launcher_that_was_killed(latents, tmp_path):
    run = tmp_path / "run"
    launcher = start_training(2, "zero2_ep2", latents, run, "--steps", "2000")
    try:
        wait_for_step(run, 1, launcher)
        ranks = [p for p in psutil.Process(launcher.pid).children(recursive=True) if "jobs/train.py" in p.cmdline()]
        assert len(ranks) >= 2
        launcher.kill()  # not its process group
        _, left = psutil.wait_procs(ranks, timeout=20)
        assert not left
    finally:
        kill(launcher)


def test_two_runs_into_one_folder_are_refused(latents, tmp_path):
    run = tmp_path / "run"
    first = start_training(1, "zero1_ep1", latents, run, "--steps", "1000")
    try:
        wait_for_step(run, 1, first)
        before = (run / "config.yaml").read_bytes()
        error = refused("--data", latents, "--out", run, "--ds", "ds_configs/zero1_ep1.json")
        assert "another training run is writing" in error
        assert (run / "config.yaml").read_bytes() == before
    finally:
        kill(first)


def refused(*flags) -> str:
    """Start one rank without a launcher: must exit 2 with one line; gives it."""
    command = [sys.executable, "jobs/train.py", "--recipe", "digits", *map(str, flags)]
    done = subprocess.run(command, cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: "), done.stderr
    return done.stderr


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--data", "nowhere"], "no folder of shards nowhere"),
        (["--recipe", "digitz"], "did you mean digits?"),
        (["--ds", "ds_configs/zero9.json"], "no DeepSpeed configuration ds_configs/zero9.json; there are"),
        (["--ds", "ds_configs/zero2_ep8.json"], "start a multiple of 8 (deepspeed --num_gpus 8 ...)"),
        (["--ds", "ds_configs/zero2_ep16.json"], "does not divide the 8 experts of recipe digits"),
        (["--set", "model.moe.num_experts=6", "--ds", "ds_configs/zero2_ep8.json"], "choose one of 1, 2, 3, 6"),
        (["--steps", "0"], "--steps 0"),
        (["--resume", "nowhere"], "no checkpoint there"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
        (["--set", "model.num_classes=3"], "has 10 classes"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(latents, tmp_path, flags, line):
    error = refused("--ds", "ds_configs/zero1_ep1.json", "--data", latents, "--out", tmp_path / "run", *flags)
    assert line in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("{", "is not JSON"),
        ('{"train_batch_size": 8}', "train_batch_size is decided by the recipe"),
        ('{"zero_optimization": {"stage": 4}}', "stage should be 0, 1, 2 or 3"),
        ('{"expert_parallel": {"enabled": true, "autoep_size": 0}}', "it should be a positive integer"),
        ('{"expert_parallel": {"enabled": true, "top_k": 2}}', "takes enabled and autoep_size, not top_k"),
    ],
)
def test_a_wrong_deepspeed_file(latents, tmp_path, content, line):
    (tmp_path / "ds.json").write_text(content)
    assert line in refused("--ds", tmp_path / "ds.json", "--data", latents, "--out", tmp_path / "run")


def test_a_truncated_shard(latents, tmp_path):
    shards = shutil.copytree(latents, tmp_path / "shards")
    os.truncate(shards / "shard-000000.tar", 5000)
    error = refused("--ds", "ds_configs/zero1_ep1.json", "--data", shards, "--out", tmp_path / "run")
    assert "shard-000000.tar has 5000 bytes instead of" in error


def test_another_experiment_cannot_continue_a_run(two_ranks, latents):
    before = sorted(path.stat().st_mtime_ns for path in two_ranks.rglob("*"))
    flags = ["--ds", "ds_configs/zero1_ep1.json", "--data", latents, "--out", two_ranks]
    assert "model.depth 6, not 4" in refused(*flags, "--set", "model.depth=4")
    assert "give another --out, or --resume auto" in refused(*flags, "--resume", "never")
    assert "more than the 3 asked for" in refused(*flags, "--steps", "3")
    assert sorted(path.stat().st_mtime_ns for path in two_ranks.rglob("*")) == before


def damage(checkpoint):
    for part in checkpoint.glob("*.distcp"):
        os.truncate(part, 100)


def test_an_unreadable_checkpoint_gives_way_to_the_one_before(two_ranks, latents, tmp_path):
    run = shutil.copytree(two_ranks, tmp_path / "run")
    damage(run / "checkpoints" / "step_00000012")
    log = finish(start_training(2, "zero2_ep2", latents, run, "--steps", str(STEPS)), run)
    assert "step_00000012 cannot be read" in log and "Traceback" not in log
    assert "continuing" in log and "step_00000008" in log
    assert losses(run) == pytest.approx(losses(two_ranks), rel=1e-6)


def test_no_readable_checkpoint_is_one_line(two_ranks, latents, tmp_path):
    run = shutil.copytree(two_ranks, tmp_path / "run")
    for checkpoint in (run / "checkpoints").glob("step_*"):
        damage(checkpoint)
    flags = ["--ds", "ds_configs/zero1_ep1.json", "--data", latents]
    command = [sys.executable, "jobs/train.py", "--recipe", "digits", *map(str, flags), "--out", str(run)]
    done = subprocess.run(command, cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: no checkpoint in")
    named = run / "checkpoints" / "step_00000008"
    assert "step_00000008 cannot be read" in refused(*flags, "--out", tmp_path / "other", "--resume", named)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_told_to_stop_it_saves_and_exits_75(plain, latents, tmp_path, number):
    run = tmp_path / "run"
    command = [sys.executable, "jobs/train.py", "--ds", "ds_configs/zero1_ep1.json", "--recipe", "digits"]
    command += ["--data", str(latents), "--out", str(run), "--steps", "1000", "--set", "checkpoint.every=500"]
    process = subprocess.Popen(command, cwd=ROOT, env=ENV, stderr=subprocess.PIPE, text=True)
    try:
        wait_for_step(run, 2, process)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 75, err
    last = err.splitlines()[-1]
    assert last.startswith("stopped as asked after step ") and "Traceback" not in err
    step = len(losses(run))
    assert (run / "checkpoints" / "latest").read_text().strip() == f"step_{step:08d}"
    assert losses(run)[:STEPS] == pytest.approx(plain[0][:step], rel=1e-5)
    finish(start_training(1, "zero1_ep1", latents, run, "--steps", str(step + 2)), run)
    assert len(losses(run)) == step + 2


def test_a_loss_that_is_not_finite_stops_the_run_and_is_never_saved(latents, tmp_path):
    shards, run = shutil.copytree(latents, tmp_path / "shards"), tmp_path / "run"
    reader = ShardReader(read_manifest(latents))
    # The sample at position 5 * 64 + 7 of the run gets moments that are not numbers.
    members = reader.members(int(permutation(0, 0, len(reader))[5 * 64 + 7]))
    offset, size = members.place("latent.npy")
    with open(shards / members.path.name, "r+b") as file:
        file.seek(offset + size - 100)
        file.write(b"\xff\x7f" * 50)
    start = start_training(2, "zero2_ep2", shards, run, "--steps", "12", "--set", "checkpoint.every=2")
    assert start.wait(120) == 1
    kill(start)
    log = (tmp_path / "run.log").read_text()
    assert "Traceback" not in log
    line = next(line for line in log.splitlines() if line.startswith("error: "))
    assert "the loss is nan at step 6, positions 320 to 383" in line and "step_00000004" in line
    assert (run / "checkpoints" / "latest").read_text().strip() == "step_00000004"
    assert not (run / "checkpoints" / "step_00000006").exists()


def test_a_rank_that_dies_takes_the_others_down(latents, tmp_path):
    run = tmp_path / "run"
    launcher = start_training(2, "zero2_ep2", latents, run, "--steps", "2000")
    try:
        wait_for_step(run, 1, launcher)
        ranks = [p for p in psutil.Process(launcher.pid).children(recursive=True) if "jobs/train.py" in p.cmdline()]
        next(rank for rank in ranks if "--local_rank=1" in rank.cmdline()).kill()
        assert launcher.wait(60) != 0
        _, left = psutil.wait_procs(ranks, timeout=10)
        assert not left
    finally:
        kill(launcher)


def test_a_full_disk_is_one_line_and_the_checkpoint_before_stays(latents, tmp_path):
    run = tmp_path / "run"
    command = [sys.executable, "jobs/train.py", "--ds", "ds_configs/zero1_ep1.json", "--recipe", "digits"]
    command += ["--data", str(latents), "--out", str(run), "--set", "checkpoint.every=2"]
    subprocess.run([*command, "--steps", "2"], cwd=ROOT, env=ENV, check=True, timeout=120, capture_output=True)
    # A limit on a file's size makes the kernel refuse to write on, as a full disk does.
    limited = ["bash", "-c", 'trap "" XFSZ; ulimit -f 2000; exec "$@"', "bash", *command, "--steps", "50"]
    done = subprocess.run(limited, cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: checkpoint ") and "MB free on that disk" in last and "step_00000002" in last
    assert (run / "checkpoints" / "latest").read_text().strip() == "step_00000002"
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["latest", "step_00000002"]
    subprocess.run([*command, "--steps", "4"], cwd=ROOT, env=ENV, check=True, timeout=120, capture_output=True)
    assert (run / "checkpoints" / "latest").read_text().strip() == "step_00000004"


def test_a_kill_at_any_moment_of_a_save_leaves_a_checkpoint_that_loads(latents, tmp_path):
    """The whole of this, twenty moments on two ranks, is in tests/matrix.py."""
    run = tmp_path / "run"
    process = start_training(1, "zero1_ep1", latents, run, "--steps", "2000", "--set", "checkpoint.every=1")
    try:
        wait_for_step(run, 8, process)
    finally:
        kill(process)
    named = run / "checkpoints" / (run / "checkpoints" / "latest").read_text().strip()
    assert all(torch.isfinite(weight).all() for weight in export(named, tmp_path / "model", "ema").parameters())


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
    flags = ["--steps", "60", "--set", "balance.rate=0.02"]
    finish(start_training(1, "zero1_ep1", latents, run, *flags), run)
    before, after = losses(two_ranks, "moe_imbalance"), losses(run, "moe_imbalance")
    assert sum(after[50:]) / 10 < 0.8 * sum(before[-5:]) / 5
    for folder, moved in ((run, True), (two_ranks, False)):
        for name, buffer in export(folder, tmp_path / str(moved), "model").named_buffers():
            if name.endswith("e_score_correction_bias"):
                assert bool(buffer.any()) == moved


@pytest.mark.slow
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
