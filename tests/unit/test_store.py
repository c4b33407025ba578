"""Shards behind a real HTTP server that fails, stops, lies and goes away."""

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from multiprocessing import get_context

import pytest

from data_prep import fetch as fetch_command
from helpers import ENV, ROOT, kill, losses, start_training, wait_for_step
from helpers.server import Server, serving
from moe_dit.data import ShardReader
from moe_dit.manifest import read_manifest
from moe_dit.runtime.errors import InputError
from moe_dit.store import RemoteFolder, cache_folder, is_remote


@pytest.fixture
def files(tmp_path):
    """Five files of 400 kB, and what a manifest would say of them."""
    folder = tmp_path / "served"
    folder.mkdir()
    listed = []
    for k in range(5):
        content = bytes([k]) * 200_000 + os.urandom(200_000)
        (folder / f"{k}.tar").write_bytes(content)
        listed.append((f"{k}.tar", len(content), hashlib.sha256(content).hexdigest()))
    return folder, listed


def test_every_file_comes_whole_from_a_server_that_fails(files, tmp_path):
    folder, listed = files
    with serving(folder) as server:
        server.every = 3
        remote = RemoteFolder(server.url, tmp_path / "cache", patience=20)
        for name, size, sha in listed:
            assert remote.fetch(name, size, sha).read_bytes() == (folder / name).read_bytes()
        before = server.number
        for one in listed:
            remote.fetch(*one)
        assert server.number == before  # all were there
        assert sorted(path.name for path in (tmp_path / "cache").glob("[!.]*")) == [name for name, *_ in listed]
        assert remote.read("0.tar") == (folder / "0.tar").read_bytes()
        with pytest.raises(FileNotFoundError):
            remote.read("none")
        with pytest.raises(InputError, match=r"none\.tar is missing on the server"):
            remote.fetch("none.tar", 3, "")


def test_a_server_that_is_away_for_a_while(files, tmp_path, capsys):
    folder, listed = files
    server = Server(folder)
    server.down()
    threading.Timer(3, server.up).start()
    remote = RemoteFolder(server.url, tmp_path / "cache", patience=30)
    assert remote.fetch(*listed[0]).read_bytes() == (folder / "0.tar").read_bytes()
    told = capsys.readouterr().err
    assert told.count("does not answer") == 1 and told.count("is back") == 1
    server.down()


def test_a_server_that_stays_away_is_one_line(files, tmp_path):
    folder, listed = files
    server = Server(folder)
    remote = RemoteFolder(server.url, tmp_path / "cache", patience=2)
    kept = remote.fetch(*listed[0])
    server.down()
    begin = time.monotonic()
    with pytest.raises(
        InputError, match=r"1\.tar cannot be read, tried for \d s: .*; what was fetched is kept"
    ) as error:
        remote.fetch(*listed[1])
    assert time.monotonic() - begin < 10 and "\n" not in str(error.value)
    assert kept.read_bytes() == (folder / "0.tar").read_bytes() and remote.fetch(*listed[0]) == kept
    assert [path.name for path in (tmp_path / "cache").glob("[!.]*")] == ["0.tar"]


def test_a_server_that_lies_is_one_line(files, tmp_path):
    folder, listed = files
    with serving(folder) as server:
        server.lie = True
        remote = RemoteFolder(server.url, tmp_path / "cache", patience=2)
        with pytest.raises(InputError, match=r"0\.tar is not what the manifest says: its SHA-256 differs"):
            remote.fetch(*listed[0])
        assert server.requests["0.tar"] == 3 and not list((tmp_path / "cache").glob("[!.]*"))
        with pytest.raises(InputError, match="400000 bytes instead of 7"):
            remote.fetch("0.tar", 7, "")


def _fetch(url, folder, one, results):
    results.put(RemoteFolder(url, folder).fetch(*one).stat().st_size)


def test_many_processes_cause_one_download(files, tmp_path):
    folder, listed = files
    with serving(folder) as server:
        server.slow = 0.3
        context = get_context("spawn")
        results = context.Queue()
        asking = [
            context.Process(target=_fetch, args=(server.url, tmp_path / "cache", listed[0], results)) for _ in range(4)
        ]
        for process in asking:
            process.start()
        assert [results.get(timeout=60) for _ in asking] == [400_000] * 4
        for process in asking:
            process.join()
        assert server.requests["0.tar"] == 1


def test_the_cache_keeps_to_its_size(files, tmp_path):
    folder, listed = files
    cache = tmp_path / "cache"
    with serving(folder) as server:
        remote = RemoteFolder(server.url, cache, limit=900_000)
        (cache).mkdir()
        (cache / "manifest.json").write_bytes(b"x" * 500_000)  # not of what goes
        for k in (0, 1, 2):
            remote.fetch(*listed[k])
            os.utime(cache / f"{k}.tar", (k, k))
        assert {path.name for path in cache.glob("*.tar")} == {"1.tar", "2.tar"}
        with open(cache / "1.tar", "rb") as held:
            remote.fetch(*listed[3])
            assert {path.name for path in cache.glob("*.tar")} == {"2.tar", "3.tar"}
            assert held.read() == (folder / "1.tar").read_bytes()
        assert (cache / "manifest.json").exists()
        with pytest.raises(InputError, match=r"0\.0005 GB.*--set data\.cache_gb"):
            RemoteFolder(server.url, tmp_path / "small", limit=500_000).fetch(*listed[0])


def test_a_download_that_was_killed_is_no_harm(files, tmp_path):
    folder, listed = files
    cache = tmp_path / "cache"
    with serving(folder) as server:
        server.slow = 0.5
        context = get_context("spawn")
        results = context.Queue()
        process = context.Process(target=_fetch, args=(server.url, cache, listed[0], results))
        process.start()
        deadline = time.monotonic() + 30
        while not list(cache.glob(".0.tar.*.tmp")) and time.monotonic() < deadline:
            time.sleep(0.01)
        process.kill()
        process.join()
        assert list(cache.glob(".0.tar.*.tmp")) and not (cache / "0.tar").exists()
        server.slow = 0
        assert RemoteFolder(server.url, cache).fetch(*listed[0]).read_bytes() == (folder / "0.tar").read_bytes()
        assert not list(cache.glob(".0.tar.*.tmp"))


def test_what_is_a_url_and_what_it_needs(tmp_path, files):
    folder, listed = files
    assert is_remote("s3://x") and is_remote("file:///x") and not is_remote("/x/y") and not is_remote("a:b")
    assert cache_folder("http://x/y/") == cache_folder("http://x/y") != cache_folder("http://x/z")
    remote = RemoteFolder(f"file://{folder}", tmp_path / "cache")
    assert remote.fetch(*listed[2]).read_bytes() == (folder / "2.tar").read_bytes()
    with pytest.raises(InputError, match="pip install s3fs"):
        RemoteFolder("s3://bucket/x", tmp_path / "cache").read("manifest.json")
    with pytest.raises(InputError, match="nonsense"):
        RemoteFolder("nonsense://x", tmp_path / "cache").read("manifest.json")


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def straight(latents, tmp_path_factory):
    """Losses of a run on the local folder, in the order that remote ones are read in."""
    run = tmp_path_factory.mktemp("straight") / "run"
    assert start_training(1, "zero1_ep1", latents, run, "--steps", "20", *WINDOWS).wait(200) == 0
    return losses(run)


WINDOWS = ("--set", "data.window_gb=0.001", "--set", "checkpoint.every=100", "--set", "data.workers=1")


def test_training_from_a_server_that_fails(latents, straight, tmp_path, monkeypatch):
    monkeypatch.setitem(ENV, "MOE_DIT_CACHE", str(tmp_path / "cache"))
    run = tmp_path / "run"
    with serving(latents) as server:
        server.every = 5
        process = start_training(
            1, "zero1_ep1", server.url, run, "--steps", "20", *WINDOWS, "--set", "data.cache_gb=0.02"
        )
        try:
            wait_for_step(run, 2, process)
            server.down()
            time.sleep(3)
            server.up()
            assert process.wait(200) == 0, (tmp_path / "run.log").read_text()
        finally:
            kill(process)
        assert losses(run) == pytest.approx(straight, rel=1e-6)
        assert f"path: {server.url}" in (run / "config.yaml").read_text()


def test_training_from_a_server_that_stays_away(latents, tmp_path, monkeypatch):
    monkeypatch.setitem(ENV, "MOE_DIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(ENV, "MOE_DIT_PATIENCE", "2")
    server = Server(latents)
    process = start_training(1, "zero1_ep1", server.url, tmp_path / "run", "--steps", "2000", *WINDOWS)
    try:
        wait_for_step(tmp_path / "run", 1, process)
        for path in (tmp_path / "cache").rglob("*.tar"):  # as if another run had needed the room
            path.unlink()
        server.down()
        assert process.wait(120) == 2
    finally:
        kill(process)
    errors = [line for line in (tmp_path / "run.log").read_text().splitlines() if line.startswith("error")]
    assert len(errors) == 1 and "cannot be read, tried for" in errors[0]
    assert "Traceback" not in (tmp_path / "run.log").read_text()


def test_fetching_a_folder(latents, tmp_path, monkeypatch):
    monkeypatch.setenv("MOE_DIT_CACHE", str(tmp_path / "cache"))
    with serving(latents) as server:
        server.every = 4
        monkeypatch.setattr(sys, "argv", ["fetch", server.url, "--out", str(tmp_path / "out")])
        fetch_command.main()
        assert len(ShardReader(read_manifest(server.url))) == 1797
    manifest = json.loads((latents / "manifest.json").read_text())
    for shard in manifest["shards"]:
        assert (tmp_path / "out" / shard["name"]).read_bytes() == (latents / shard["name"]).read_bytes()
    assert json.loads((tmp_path / "out" / "manifest.json").read_text()) == manifest
    verified = subprocess.run(
        [sys.executable, "-m", "data_prep.verify", str(tmp_path / "out")], cwd=ROOT, env=ENV, capture_output=True
    )
    assert verified.returncode == 0, verified.stderr
