"""What several test files need: real digits as latents, and ways to start commands."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from data_prep import digits

ROOT = Path(__file__).parent.parent
ENV = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="session")
def latents(tmp_path_factory) -> Path:
    """All digits as latent shards, through an autoencoder fitted for a few steps."""
    folder = tmp_path_factory.mktemp("latents")
    digits.write_images(folder / "images")
    digits.write_autoencoder(folder / "images", folder / "vae", steps=60, seed=0)
    flags = f"--images {folder}/images --vae {folder}/vae --size 32 --shard-size 512 --out {folder}/shards"
    subprocess.run(
        [sys.executable, "-m", "data_prep.encode_latents", *flags.split()], check=True, cwd=ROOT, env=ENV, timeout=300
    )
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
