"""Shards are the same bytes whoever reads the images and however often the command is killed."""

import hashlib
import json
import signal
import subprocess
import sys
import time

import pytest

from helpers import ENV, ROOT, TIMEOUT, forks, free_port
from helpers.server import serving
from helpers.sources import (
    as_arrow,
    as_class_tars,
    as_parquet,
    as_tar_of_tars,
    as_webdataset,
    break_images,
    pack,
    samples,
    write_images,
)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources") / "images"
    write_images(folder)
    return folder


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """The images with broken ones among them: 22 files, 4 of which cannot be read."""
    folder = tmp_path_factory.mktemp("damaged") / "images"
    write_images(folder)
    break_images(folder)
    return folder


@pytest.fixture(scope="module")
def left_out(damaged, tmp_path_factory):
    return pack(damaged, tmp_path_factory.mktemp("left") / "out", "--shard-size", 3)


def command(damaged, out):
    flags = ["--images", str(damaged), "--out", str(out), "--size", "8", "--shard-size", "3"]
    return ["-m", "data_prep.pack_pixels", *flags]


@pytest.mark.parametrize("make", [as_class_tars, as_tar_of_tars, as_webdataset, as_parquet, as_arrow])
def test_reading_processes_give_the_same_bytes(images, tmp_path, make):
    source = make(images, tmp_path / "source")
    alone = pack(source, tmp_path / "alone", "--shard-size", 6)
    shared = pack(source, tmp_path / "shared", "--shard-size", 6, "--workers", 2)
    assert everything(shared) == everything(alone)


@pytest.mark.parametrize("make", [None, as_class_tars, as_tar_of_tars, as_webdataset, as_parquet])
def test_a_source_behind_a_server_that_fails_is_the_same(images, tmp_path, make):
    source = make(images, tmp_path / "source") if make else images
    here = pack(source, tmp_path / "here", "--shard-size", 6)
    with serving(source if source.is_dir() else source.parent) as server:
        server.every = 5
        url = server.url if source.is_dir() else f"{server.url}/{source.name}"
        there = pack(url, tmp_path / "there", "--shard-size", 6, "--workers", 2)
    for path in here.glob("[!.]*"):
        if path.name != "manifest.json":
            assert path.read_bytes() == (there / path.name).read_bytes(), path.name
    of = [json.loads((folder / "manifest.json").read_text()) for folder in (here, there)]
    assert of[1].pop("source") == url and of[0].pop("source") == str(source) and of[0] == of[1]


@pytest.mark.parametrize(
    "how", [["-C", "images", "."], ["images"], ["--format=posix", "--sort=name", "-C", "images", "a", "b b", "ç"]]
)
def test_what_gnu_tar_makes_of_class_folders(images, tmp_path, how):
    subprocess.run(["tar", "-cf", tmp_path / "x.tar", *how], cwd=images.parent, check=True)
    assert samples(pack(tmp_path / "x.tar", tmp_path / "out")) == samples(pack(images, tmp_path / "folders"))


def everything(folder):
    names = [
        path for path in folder.iterdir() if path.suffix in (".tar", ".jsonl", ".npy") or path.name == "manifest.json"
    ]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in names}


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_give_the_same_bytes(damaged, left_out, tmp_path, ranks):
    launcher = ["tests/helpers/tasks.py", str(ranks), str(free_port())]
    done = forks.run([sys.executable, *launcher, *command(damaged, tmp_path / "out")], cwd=ROOT, env=ENV)
    assert done.returncode == 0 and everything(tmp_path / "out") == everything(left_out)


def test_kills_give_the_same_bytes(damaged, left_out, tmp_path):
    out = tmp_path / "out"
    line = [sys.executable, *command(damaged, out)]
    for k in range(10):
        process = forks.Popen(line, cwd=ROOT, env=ENV, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + TIMEOUT
        while len(list(out.glob("*.tar"))) <= k // 2 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.002 * (k % 3))
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert forks.run(line, cwd=ROOT, env=ENV).returncode == 0
    assert everything(out) == everything(left_out)
