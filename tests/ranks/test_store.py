"""Shards behind a real HTTP server, fetched by many processes, by one that is killed, and by training."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import ENV, ROOT, TIMEOUT, forks, kill, losses, start_training, wait_for
from helpers.server import Server, serving
from moe_dit.store import RemoteFolder

FETCH = """
import sys
from pathlib import Path
from moe_dit.store import RemoteFolder
url, folder, name, size, sha = sys.argv[1:]
print(RemoteFolder(url, Path(folder)).fetch(name, int(size), sha).stat().st_size)
"""
SMALL = ["model.depth=2", "model.hidden_size=32", "model.num_heads=2", "model.moe.expert_width=16"]
WINDOWS = ["data.window_gb=0.001", "checkpoint.every=100000"]
FLAGS = [word for change in SMALL + WINDOWS for word in ("--set", change)]


@pytest.fixture
def file(tmp_path) -> Path:
    """A file of 400 kB in a folder of its own."""
    path = tmp_path / "served" / "0.tar"
    path.parent.mkdir()
    path.write_bytes(bytes(200_000) + os.urandom(200_000))
    return path


def start_fetching(server: Server, cache: Path, file: Path) -> subprocess.Popen:
    """A process that fetches the file, and prints its size."""
    what = [server.url, str(cache), file.name, str(file.stat().st_size), hashlib.sha256(file.read_bytes()).hexdigest()]
    return forks.Popen([sys.executable, "-c", FETCH, *what], cwd=ROOT, env=ENV, stdout=subprocess.PIPE, text=True)


def test_many_processes_cause_one_download(file, tmp_path):
    with serving(file.parent) as server:
        server.slow = 0.3
        asking = [start_fetching(server, tmp_path / "cache", file) for _ in range(4)]
        assert [process.communicate(timeout=TIMEOUT)[0] for process in asking] == ["400000\n"] * 4
        assert server.requests["0.tar"] == 1


def test_a_download_that_was_killed_is_no_harm(file, tmp_path):
    cache = tmp_path / "cache"
    with serving(file.parent) as server:
        server.slow = 20
        process = start_fetching(server, cache, file)
        wait_for(lambda: list(cache.glob(".0.tar.*.tmp")), "a download", None)
        kill(process)
        assert list(cache.glob(".0.tar.*.tmp")) and not (cache / "0.tar").exists()
        server.slow = 0
        sha = hashlib.sha256(file.read_bytes()).hexdigest()
        assert RemoteFolder(server.url, cache).fetch("0.tar", 400_000, sha).read_bytes() == file.read_bytes()
        assert not list(cache.glob(".0.tar.*.tmp"))


def test_training_from_a_server_that_fails(latents, tmp_path, monkeypatch):
    """Each fifth answer fails, and for a while there is none; a process beside the rank reads."""
    monkeypatch.setitem(ENV, "MOE_DIT_CACHE", str(tmp_path / "cache"))
    run, local = tmp_path / "run", tmp_path / "local"
    with serving(latents) as server:
        server.every, server.slow = 5, 0.1
        flags = ["--steps", "20", *FLAGS, "--set", "data.cache_gb=0.02", "--set", "data.workers=1"]
        process = start_training(1, "zero1_ep1", server.url, run, *flags)
        log = Path(f"{run}.log")
        try:
            cache = tmp_path / "cache"
            wait_for(lambda: [*cache.rglob("*.tar")] and [*cache.rglob(".*.tmp")], "a second shard", log)
            server.down()
            wait_for(lambda: "does not answer" in log.read_text(), "a complaint", log)
            server.slow = 0
            server.up()
            assert process.wait(TIMEOUT) == 0, log.read_text()
        finally:
            kill(process)
        assert f"path: {server.url}" in (run / "config.yaml").read_text()
    assert start_training(1, "zero1_ep1", latents, local, "--steps", "20", *FLAGS).wait(TIMEOUT) == 0
    assert losses(run) == pytest.approx(losses(local), rel=1e-6)


def test_training_from_a_server_that_stays_away(latents, tmp_path, monkeypatch):
    monkeypatch.setitem(ENV, "MOE_DIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(ENV, "MOE_DIT_PATIENCE", "1")
    server, cache = Server(latents), tmp_path / "cache"
    server.slow = 0.2
    process = start_training(1, "zero1_ep1", server.url, tmp_path / "run", "--steps", "100000", *FLAGS)
    try:
        # A shard that was opened stays readable, whatever becomes of its name: one must still be missing.
        log = tmp_path / "run.log"
        wait_for(lambda: [*cache.rglob("*.tar")] and [*cache.rglob(".*.tmp")], "a second shard", log)
        server.down()
        for path in cache.rglob("*.tar"):  # as if another run had needed the room
            path.unlink()
        assert process.wait(TIMEOUT) == 2
    finally:
        kill(process)
    errors = [line for line in (tmp_path / "run.log").read_text().splitlines() if line.startswith("error")]
    assert len(errors) == 1 and "cannot be read, tried for" in errors[0]
    assert "Traceback" not in (tmp_path / "run.log").read_text()
