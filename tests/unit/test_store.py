"""Shards behind a real HTTP server that fails, refuses, stops, lies and goes away."""

import hashlib
import json
import os
import re
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from data_prep import fetch as fetch_command
from data_prep import verify
from helpers.server import Server, serving
from moe_dit.data import ShardReader
from moe_dit.manifest import read_manifest
from moe_dit.runtime.errors import InputError
from moe_dit.store import RemoteFolder, RemotePath, cache_folder, is_remote


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


def test_a_server_that_is_away_for_a_while(files, tmp_path, monkeypatch):
    folder, listed = files
    server = Server(folder)
    server.down()
    told = []

    def say(line: str) -> None:
        told.append(line)
        if "does not answer" in line:
            threading.Timer(1, server.up).start()

    monkeypatch.setattr("moe_dit.store.say", say)
    remote = RemoteFolder(server.url, tmp_path / "cache", patience=300)
    assert remote.fetch(*listed[0]).read_bytes() == (folder / "0.tar").read_bytes()
    first, second = told
    assert "does not answer" in first and "is back" in second
    server.down()


def test_a_server_that_stays_away_is_one_line(files, tmp_path):
    folder, listed = files
    server = Server(folder)
    remote = RemoteFolder(server.url, tmp_path / "cache", patience=1)
    kept = remote.fetch(*listed[0])
    server.down()
    with pytest.raises(
        InputError, match=r"1\.tar cannot be read, tried for \d+ s: .*; what was fetched is kept"
    ) as error:
        remote.fetch(*listed[1])
    assert "\n" not in str(error.value)
    assert kept.read_bytes() == (folder / "0.tar").read_bytes() and remote.fetch(*listed[0]) == kept
    assert [path.name for path in (tmp_path / "cache").glob("[!.]*")] == ["0.tar"]


@pytest.fixture
def waits(monkeypatch):
    """The waits for servers, in seconds, which take no time here."""
    waited = []
    clock = SimpleNamespace(sleep=waited.append, monotonic=lambda: sum(waited), time=time.time)
    monkeypatch.setattr("moe_dit.store.time", clock)
    return waited


@pytest.fixture
def told(monkeypatch):
    """What is said meanwhile."""
    lines = []
    monkeypatch.setattr("moe_dit.store.say", lines.append)
    return lines


@pytest.mark.parametrize(
    ("status", "headers"),
    [
        (429, {"Retry-After": "7"}),
        (503, {"Retry-After": "7"}),
        # By the server's clock, which is years behind.
        (429, {"Date": "Tue, 15 Nov 2016 08:12:31 GMT", "Retry-After": "Tue, 15 Nov 2016 08:12:38 GMT"}),
    ],
    ids=["429", "503", "a date"],
)
def test_a_server_that_refuses_for_now_is_asked_again_when_it_says(files, tmp_path, waits, told, status, headers):
    folder, listed = files
    with serving(folder) as server:
        server.refusal, server.refusals = (status, headers), 2  # fsspec asks twice for what a file is
        remote = RemoteFolder(server.url, tmp_path / "cache", patience=30)
        assert remote.fetch(*listed[0]).read_bytes() == (folder / "0.tar").read_bytes()
    assert len(waits) == 1 and 7 <= waits[0] <= 9
    phrase = {429: "429 Too Many Requests", 503: "503 Service Unavailable"}[status]
    first = f"{server.url} refuses for now ({phrase}); trying again in 7 s, as it asks, for up to 30 s"
    assert told == [first, f"{server.url} is back"]


@pytest.mark.parametrize("asked", ["31", "9" * 400, "Fri, 31 Dec 9999 23:59:59 GMT"])
def test_a_server_that_asks_for_more_than_the_patience_is_one_line_at_once(files, tmp_path, waits, asked):
    folder, listed = files
    with serving(folder) as server:
        server.refusal, server.refusals = (429, {"Retry-After": asked}), 1000
        with pytest.raises(InputError, match=r"/0\.tar cannot be read") as error:
            RemoteFolder(server.url, tmp_path / "cache", patience=30).fetch(*listed[0])
    told = r"refuses for now \(429 Too Many Requests\) and asks for .* s without requests, .*30 s.*MOE_DIT_PATIENCE"
    assert re.search(told, str(error.value)) and waits == []


@pytest.mark.parametrize("asked", [None, "0", "soon"])
def test_a_refusal_that_lasts_is_told_as_one(files, tmp_path, waits, told, asked):
    """Not as a server that does not answer; and asked again now and then, not all the time."""
    folder, listed = files
    with serving(folder) as server:
        server.refusal, server.refusals = (429, {} if asked is None else {"Retry-After": asked}), 1000
        with pytest.raises(InputError, match=r"0\.tar cannot be read, tried for \d+ s: 429 Too Many Requests"):
            RemoteFolder(server.url, tmp_path / "cache", patience=30).fetch(*listed[0])
    assert len(told) == 1 and "refuses for now (429 Too Many Requests)" in told[0]
    assert 20 < sum(waits) < 38 and len(waits) < 12


def test_a_server_that_fails_is_told_as_one(files, tmp_path, waits, told):
    folder, listed = files
    with serving(folder) as server:
        server.refusal, server.refusals = (500, {}), 1000
        with pytest.raises(InputError, match=r"tried for \d+ s: 500 Internal Server Error"):
            RemoteFolder(server.url, tmp_path / "cache", patience=30).fetch(*listed[0])
    assert len(told) == 1 and " fails (500 Internal Server Error); trying again for up to 30 s" in told[0]


@pytest.mark.parametrize("methods", [("HEAD", "GET"), ("GET",)])
@pytest.mark.parametrize(
    ("status", "said"), [(403, "may not be read: 403 Forbidden"), (404, "is missing on the server")]
)
@pytest.mark.parametrize("parts", [False, True])
def test_what_no_wait_would_cure_is_said_at_once(files, tmp_path, waits, methods, status, said, parts):
    """Of whatever request; and its connection is free again: aiohttp complains on stderr of one that is kept."""
    folder, listed = files
    with serving(folder) as server:
        server.refusal, server.refusals, server.refused = (status, {}), 1000, methods
        remote = RemoteFolder(server.url, tmp_path / "cache", patience=30)
        for _ in range(3):
            with pytest.raises(InputError, match=rf"/0\.tar {said}$"):
                RemotePath(remote, "0.tar").open().read(10) if parts else remote.fetch(*listed[0])
        assert len(server.connections) == 1
    assert waits == []


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
        ahead = time.time() + 24 * 3600  # used before the clock was set back by a day, and not since
        os.utime(cache / "3.tar", (ahead, ahead))
        remote.fetch(*listed[1])
        assert {path.name for path in cache.glob("*.tar")} == {"1.tar", "2.tar"}
        assert (cache / "manifest.json").exists()
        with pytest.raises(InputError, match=r"0\.0005 GB.*--set data\.cache_gb"):
            RemoteFolder(server.url, tmp_path / "small", limit=500_000).fetch(*listed[0])


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
    assert verify.verify(tmp_path / "out")[1] == 1797
