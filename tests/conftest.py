"""What several test files need: real digits as latents, and ways to start commands."""

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from data_prep import digits
from moe_dit import build_model, load_model, load_recipe
from moe_dit.data import batches, training_inputs
from moe_dit.flow import Flow
from moe_dit.manifest import read_manifest
from moe_dit.runtime.ranks import World

ROOT = Path(__file__).parent.parent
STEPS = 12  # of the runs that others are held against
ENV = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="session")
def latents(tmp_path_factory) -> Path:
    """All digits as latent shards, through an autoencoder fitted for a few steps; made once for all test processes."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    folder = root / "latents"
    with open(root / "latents.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "shards" / "manifest.json").exists():
            digits.write_images(folder / "images")
            digits.write_autoencoder(folder / "images", folder / "vae", steps=60, seed=0)
            flags = f"--images {folder}/images --vae {folder}/vae --size 32 --shard-size 512 --out {folder}/shards"
            command = [sys.executable, "-m", "data_prep.encode_latents", *flags.split()]
            subprocess.run(command, check=True, cwd=ROOT, env=ENV, timeout=300)
    return folder / "shards"


@pytest.fixture(scope="session")
def pixels(tmp_path_factory) -> Path:
    """All digits as pixel shards."""
    folder = tmp_path_factory.mktemp("pixels")
    digits.write_images(folder / "images")
    flags = f"--images {folder}/images --size 32 --out {folder}/shards"
    subprocess.run([sys.executable, "-m", "data_prep.pack_pixels", *flags.split()], check=True, cwd=ROOT, env=ENV)
    return folder / "shards"


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start_training(ranks: int, ds: str, shards: Path, run: Path, *flags: str) -> subprocess.Popen:
    """The README's command, in a process group of its own; output goes to RUN.log.

    Two ranks and more start under DeepSpeed's launcher, one starts without, which takes half the time.
    """
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "deepspeed.launcher.runner", "--num_gpus", str(ranks), "--master_port", str(free_port())]
    command = ["jobs/train.py", "--ds", f"ds_configs/{ds}.json", "--recipe", "digits", "--data", str(shards)]
    with open(f"{run}.log", "a") as log:
        return subprocess.Popen(
            [*launcher, *command, "--out", str(run), *flags],
            cwd=ROOT,
            env=ENV,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def finish(process: subprocess.Popen, run: Path, timeout: float = 300) -> str:
    """Wait for a training command to end well; gives its output."""
    try:
        status = process.wait(timeout)
    finally:
        kill(process)
    log = Path(f"{run}.log").read_text()
    assert status == 0, log[-5000:]
    return log


def kill(process: subprocess.Popen) -> None:
    """SIGKILL to a launcher and all its ranks."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def losses(run, key="loss") -> list[float]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, len(records) + 1))
    return [record[key] for record in records]


@pytest.fixture(scope="session")
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


@pytest.fixture(scope="session")
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


def wait_for_step(run, step, process, timeout=120):
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline and process.poll() is None:
        if (run / "metrics.jsonl").exists() and len((run / "metrics.jsonl").read_text().splitlines()) >= step:
            return
        time.sleep(0.02)
    raise AssertionError(f"step {step} was not reached in {timeout} s")
