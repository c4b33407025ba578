"""The check before the first step, by ranks: what is broken ends all with one line."""

import re
import shutil
import socket

from helpers import run_scripts
from moe_dit.events import events

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
    found = re.fullmatch(f"3 ranks on 2 nodes: {speeds}", lines[5])
    assert found is not None and 4000 < float(found[1]) < 6000
    assert re.fullmatch(r"slow: the clock of rank 2 \(b\) is [456](\.\d+)? s ahead of rank 0's", lines[6])
    gone = f"{tmp_path}/shards_2/shard-"
    assert lines[7].startswith(f"shards: InputError rank 2 ({HOST}): shard {gone}") and "is gone" in lines[7]
    assert len(lines) == 8
    told = list(events(tmp_path / "run"))
    assert [(event["what"], event["message"]) for event in told] == [("slow", lines[6].removeprefix("slow: "))]
