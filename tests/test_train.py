"""Training under the real launcher: held against one plain process, killed, continued elsewhere, and fed rubbish."""

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace

import psutil
import pytest
import torch
from conftest import ENV, ROOT, finish, free_port, kill, start_training

from moe_dit import build_model, load_model, load_recipe
from moe_dit.data import batches, training_inputs
from moe_dit.distributed import World
from moe_dit.flow import Flow
from moe_dit.manifest import read_manifest

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
    finish(start_training(8, "zero2_ep8", latents, run, "--steps", "4"), run)
    assert losses(run) == pytest.approx(plain[0][:4], rel=1e-5)


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


def test_a_broken_checkpoint_is_one_line_from_both_ranks(two_ranks, latents, tmp_path):
    run = shutil.copytree(two_ranks, tmp_path / "run")
    for part in (run / "checkpoints" / "step_00000012").glob("*.distcp"):
        os.truncate(part, 100)
    process = start_training(2, "zero2_ep2", latents, run, "--steps", "20")
    status = process.wait(120)
    kill(process)
    log = (tmp_path / "run.log").read_text()
    assert status == 2, log
    assert log.count("error: ") == 1 and "step_00000012 cannot be read" in log and "Traceback" not in log


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
