"""Encoding that is killed, or shared by ranks, and what the shell shows of bad input."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_prep import verify
from helpers import ENV, ROOT, TIMEOUT, call, forks, half_done, run_ranks
from helpers.few_digits import assert_same_shards, contents, latent_flags

PYTHON = [sys.executable, "-m"]


@pytest.fixture(scope="module")
def images(few_digits) -> Path:
    return few_digits / "images"


@pytest.fixture(scope="module")
def vae(few_digits) -> Path:
    return few_digits / "vae"


@pytest.fixture(scope="module")
def shards(few_digits) -> Path:
    return few_digits / "shards"


def test_continues_after_kill_to_the_same_shards(images, vae, shards, tmp_path, capfd):
    out = tmp_path / "out"
    command = half_done("data_prep.encode_latents", "data_prep.shards", "_write_shard", after=4)
    command += latent_flags(images, vae, out)
    process = forks.Popen(command, cwd=ROOT, env=ENV, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + TIMEOUT
        while len(list(out.glob("*.tar"))) < 3 and time.monotonic() < deadline:
            time.sleep(0.002)
        process.send_signal(signal.SIGSTOP)
        # Stopped, it still holds the folder.
        assert call("data_prep.encode_latents", *latent_flags(images, vae, out)) == 2
        assert "another command is writing" in capfd.readouterr().err
    finally:
        process.kill()
        process.wait()
    kept = {path: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert 3 <= len(kept) < 19 and not (out / "manifest.json").exists()
    # One shard as a crash of the machine, not of the process, may leave it.
    broken = sorted(kept)[0]
    os.truncate(broken, 5000)
    (out / ".shard-000018.tar.1.tmp").write_bytes(b"half")

    assert call("data_prep.encode_latents", *latent_flags(images, vae, out)) == 0
    assert_same_shards(out, shards)
    assert len(contents(out)) == 19
    assert all(path.stat().st_mtime_ns == when for path, when in kept.items() if path != broken)
    assert not list(out.glob("*.tmp")) + list(out.glob(".*.tmp"))
    assert verify.verify(out) == (19, 300)


def test_ranks_change_nothing(images, vae, shards, tmp_path):
    command = [*PYTHON, "data_prep.encode_latents", *latent_flags(images, vae, tmp_path / "two")]
    done = run_ranks([command] * 2, [tmp_path] * 2)
    assert [rank.returncode for rank in done] == [0, 0], [rank.stderr for rank in done]
    assert_same_shards(tmp_path / "two", shards)


def test_bad_input_from_the_shell(images, tmp_path):
    """Nothing but the line, from imports and reading processes neither."""
    (tmp_path / "images/a").mkdir(parents=True)
    (tmp_path / "images/a/1.png").write_bytes(b"not an image")
    pack = ("pack_pixels", "--images", str(tmp_path / "images"), "--out", str(tmp_path / "out"))
    for module, *flags in (
        ("verify", str(images)),
        (*pack, "--workers", "1"),
        (*pack, "--workers", "1", "--strict"),
    ):
        command = [*PYTHON, f"data_prep.{module}", *flags]
        result = forks.run(command, cwd=ROOT, env=ENV, capture_output=True, text=True)
        assert result.returncode == 2 and result.stdout == ""
        assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
        assert "Traceback" not in result.stderr
