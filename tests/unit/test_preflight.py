"""The check before the first step: what is broken ends all with one line, what is slow is named, and neither hangs."""

import re
import shutil
import socket
from dataclasses import replace

import pytest
import torch

from helpers import run_scripts
from helpers.server import serving
from moe_dit import preflight
from moe_dit.events import events
from moe_dit.manifest import read_manifest
from moe_dit.preflight import Found, slow, summary
from moe_dit.runtime.errors import InputError
from moe_dit.store import RemoteFolder

HOST = socket.gethostname()

CASES = """
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
import torch
from unittest import mock
from moe_dit import preflight
from moe_dit.manifest import read_manifest
from moe_dit.runtime.progress import say

folder = Path({folder!r})
manifest = read_manifest(folder / f"shards_{{rank}}")
(folder / "run").mkdir(exist_ok=True)
ranks._meeting = replace(ranks._meeting, hosts=["a", "a", "b"])
log = SimpleNamespace(write=lambda text: None)

def case(name, *patches):
    for patch in patches:
        patch.start()
    try:
        preflight.check_shards(manifest)
        preflight.check(folder / "run", torch.device("cpu"), torch.distributed.group.WORLD, log)
    except Stop as error:
        say(f"{{name}}: {{type(error).__name__}} {{error}}")
    for patch in patches:
        patch.stop()

def on(one, owner, name, value):
    return [mock.patch.object(owner, name, value)] if rank == one else []

case("all is well")
wrong = lambda left, right: (left @ right).index_fill(0, torch.tensor([3]), 1.0)
case("wrong product", *on(1, preflight, "multiply", wrong))
def fails(left, right):
    raise RuntimeError("CUDA error: uncorrectable ECC error encountered\\nCompile with TORCH_USE_CUDA_DSA")
case("device", *on(2, preflight, "multiply", fails))
reduce = torch.distributed.all_reduce
case("sums", *on(0, torch.distributed, "all_reduce", lambda x: (reduce(x), x.add_(1))))
exchange = torch.distributed.all_to_all_single
def turned(out, x, group=None):
    exchange(out, x, group=group)
    out.copy_(out.flip(0))
case("rows", *on(1, torch.distributed, "all_to_all_single", turned))
passes = preflight._pass
def spoils(operation, tensor, peer):
    passes(operation, tensor, peer)
    if operation is torch.distributed.irecv:
        tensor[-1] = -1.0
case("numbers", *on(2, preflight, "_pass", spoils))
ahead = SimpleNamespace(perf_counter=time.perf_counter, process_time=time.process_time, time=lambda: time.time() + 5)
case("clock", *on(2, preflight, "time", ahead))
if rank == 2:
    (folder / "shards_2" / manifest.shards[-1]["name"]).unlink()
case("shards")
"""


def test_what_is_broken_is_told_with_ranks_and_hosts(latents, tmp_path):
    """Three ranks, of which one at a time has something wrong; a device, a link and a clock cannot be broken but so."""
    for rank in range(3):
        shutil.copytree(latents, tmp_path / f"shards_{rank}")
    done = run_scripts(CASES.format(folder=str(tmp_path)), 3, tmp_path, LOCAL_RANK="0")
    assert [rank.returncode for rank in done] == [0, 0, 0], [rank.stderr for rank in done]
    assert done[1].stderr == done[2].stderr == ""
    well, *lines = done[0].stderr.splitlines()
    speeds = r"all-reduce \S+ GB/s, all-to-all \S+ GB/s, clocks within (\S+) ms"
    found = re.fullmatch(f"3 ranks on 2 nodes: {speeds}", well)
    assert found is not None and float(found[1]) < 1000
    assert lines[:2] == [
        f"wrong product: Stop rank 1 ({HOST}): device cpu computes wrong products",
        f"device: Stop rank 2 ({HOST}): device cpu fails: CUDA error: uncorrectable ECC error encountered",
    ]
    assert lines[2:5] == [
        f"sums: Stop rank 0 ({HOST}): wrong: an all-reduce's sums",
        f"rows: Stop rank 1 ({HOST}): wrong: an all-to-all's rows",
        f"numbers: Stop rank 2 ({HOST}): wrong: numbers from the rank before",
    ]
    assert re.fullmatch(f"3 ranks on 2 nodes: {speeds}", lines[5]) and "within 5e+03 ms" in lines[5]
    assert lines[6] == "slow: the clock of rank 2 (b) is 5 s ahead of rank 0's"
    gone = f"{tmp_path}/shards_2/shard-"
    assert lines[7].startswith(f"shards: InputError rank 2 ({HOST}): shard {gone}") and "is gone" in lines[7]
    assert len(lines) == 8
    told = list(events(tmp_path / "run"))
    assert [(event["what"], event["message"]) for event in told] == [("slow", lines[6].removeprefix("slow: "))]


WELL = Found("cpu", 0.004, 2e9, 1e9, 3e9, 0.0)


def changed(rank: int, size: int = 4, **values: float) -> list[Found]:
    """What ranks found that differ in one thing of one rank."""
    return [Found(**vars(WELL) | (values if one == rank else {})) for one in range(size)]


@pytest.mark.parametrize(
    ("found", "hosts", "lines"),
    [
        (changed(1), "aabb", []),
        (changed(1, product=0.0119), "aabb", []),
        (changed(1, product=0.0121), "aabb", ["rank 1 (a) takes 12 ms for a product of matrices, others 4"]),
        (changed(1, size=3, product=0.5), "aab", []),
        (changed(2, link=1.1e9), "aaaa", []),
        (changed(2, link=0.9e9), "aaaa", ["the link from rank 1 (a) to rank 2 (a) carries 0.9 GB/s, others 3"]),
        (changed(0, link=0.1e9), "aaaa", ["the link from rank 3 (a) to rank 0 (a) carries 0.1 GB/s, others 3"]),
        # Links between nodes are no measure of those inside, nor are two of them one for each other.
        (changed(2, link=0.1e9), "aabb", []),
        (
            [*changed(4, 8, link=0.1e9)],
            "abcdefgh",
            ["the link from rank 3 (d) to rank 4 (e) carries 0.1 GB/s, others 3"],
        ),
        # On CPUs there are none inside a node.
        ([*changed(0, 6, link=0.0)[:1] * 5, WELL], "aaaaab", []),
        ([replace(WELL, link=0.0)] * 2 + [WELL] * 4, "aaabcd", []),
        (changed(3, clock=-1.5), "aabc", ["the clock of rank 3 (c) is 1.5 s behind rank 0's"]),
        (changed(3, clock=0.9), "aabc", []),
    ],
)
def test_what_is_slow(found, hosts, lines):
    assert slow(found, list(hosts)) == lines


def test_the_summary_is_of_the_slowest():
    found = [WELL, Found("cpu", 0.004, 1.2e9, 0.9e9, 3e9, -0.003)]
    assert (
        summary(found, ["a", "b"]) == "2 ranks on 2 nodes: all-reduce 1.2 GB/s, all-to-all 0.9 GB/s, clocks within 3 ms"
    )
    alone = [Found("cpu", 0.004, 1.2e9, 0.0, 3e9, 0.0)] * 2
    assert summary(alone, ["a", "a"]) == "2 ranks on 1 node: all-reduce 1.2 GB/s, clocks within 0 ms"


class Log:
    def write(self, text: str) -> None:
        self.text = text


def test_one_rank_looks_at_its_device_and_shards(latents, tmp_path, capsys):
    log = Log()
    preflight.check_shards(read_manifest(latents))
    preflight.check(tmp_path, torch.device("cpu"), None, log)
    assert log.text.startswith("check: Found(device='cpu, ") and capsys.readouterr().err == ""
    folder = tmp_path / "shards"
    shutil.copytree(latents, folder)
    manifest = read_manifest(folder)
    (folder / manifest.shards[0]["name"]).unlink()
    with pytest.raises(InputError, match=r"shard-000000.tar is gone"):
        preflight.check_shards(manifest)


def test_shards_behind_a_url_are_looked_at_on_their_server(latents, tmp_path):
    """Their first bytes: fetching whole ones is training's."""
    folder, cache = tmp_path / "shards", tmp_path / "cache"
    shutil.copytree(latents, folder)
    with serving(folder) as server:
        manifest = replace(read_manifest(folder), remote=RemoteFolder(server.url, cache, patience=2))
        preflight.read_some(manifest)
        assert server.requests.total() == 2 and not cache.exists()
        (folder / manifest.shards[-1]["name"]).unlink()
        with pytest.raises(InputError, match=r"shard-\d+.tar is missing on the server"):
            preflight.read_some(manifest)
