"""Many ranks that make the groups of a training run, and talk over them as a run on GPUs does.

    python tests/tools/many_ranks.py N [EP]

Forked, because that takes no time and memory for each. Prints a JSON object a rank, in order: "before" the first step
and "after" a save and a load, each with open TCP "sockets" and "files" (all descriptors, sockets among them); of
rank 0's sockets, those that the store has ("store"); how often each operation of the store was called; and the seconds
from the fork to the first step.
"""

import gc
import json
import os
import sys
import tempfile
import time
import traceback
from collections import Counter
from datetime import timedelta
from pathlib import Path

import psutil
import torch
import torch.distributed.checkpoint as dcp
from deepspeed.utils import groups
from torch.distributed import Store, TCPStore

from moe_dit.checkpoint import Checkpointer, FlatSlice
from moe_dit.engine import start_ranks

sys.path.insert(0, str(Path(__file__).parents[1]))
from helpers import free_port
from moe_dit.runtime import ranks


class CountedStore(Store):
    """A store that counts what is asked of it, by Python and by gloo."""

    def __init__(self, store: Store):
        super().__init__()
        self.store = store
        self.calls: Counter[str] = Counter()

    def set(self, key, value):
        self.calls["set"] += 1
        self.store.set(key, value)

    def get(self, key):
        self.calls["get"] += 1
        return self.store.get(key)

    def add(self, key, amount):
        self.calls["add"] += 1
        return self.store.add(key, amount)

    def check(self, keys):
        self.calls["check"] += 1
        return self.store.check(keys)

    def wait(self, keys, timeout=None):
        self.calls["wait"] += 1
        self.store.wait(keys, *[timeout] if timeout else [])

    def set_timeout(self, timeout):
        self.store.set_timeout(timeout)


def open_now(port: int) -> dict[str, int]:
    """What this process has open: TCP sockets that are connected, those of them at the store, and descriptors."""
    process = psutil.Process()
    connected = [c for c in process.net_connections("tcp") if c.status == "ESTABLISHED"]
    store = sum(port in (c.laddr.port, c.raddr.port) for c in connected)
    return {"sockets": len(connected), "store": store, "files": process.num_fds()}


def talk(rank: int, size: int, ep_size: int, port: int, folder: Path) -> None:
    begin = time.monotonic()
    gc.disable()
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    torch.set_num_threads(1)
    ranks.set_rendezvous()
    counted = CountedStore(TCPStore("127.0.0.1", port, size, rank == 0, timeout=timedelta(minutes=10)))
    torch.distributed.init_process_group("gloo", store=counted, rank=rank, world_size=size)
    start_ranks()
    found: dict = {}
    # What a training run says before its first step, in its order. Training's own collectives are NCCL's on GPUs.
    ranks.agreed(lambda: None)
    ranks.from_rank_0(lambda: None)
    groups._create_expert_and_data_parallel(ep_size)
    groups._get_data_parallel_group()
    found["groups"] = torch.distributed.distributed_c10d._world.group_count
    checkpointer = Checkpointer(folder / "run", 1)
    torch.distributed.all_gather_object([None] * size, rank)
    found["before"] = open_now(port)
    found["calls"] = dict(counted.calls)
    found["seconds"] = time.monotonic() - begin
    # A save and a load, and what a run says as it ends.
    saving = checkpointer.group
    ranks.from_rank_0(lambda: None, saving)
    piece = {"weight": FlatSlice(torch.full((4,), float(rank)), 4 * rank, 4 * size)}
    dcp.save(piece, storage_writer=dcp.FileSystemWriter(folder / "checkpoint"), process_group=saving)
    ranks.from_rank_0(lambda: None, saving)
    read = {"weight": FlatSlice(torch.zeros(4), 4 * (size - 1 - rank), 4 * size)}
    dcp.load(read, storage_reader=dcp.FileSystemReader(folder / "checkpoint"), process_group=saving)
    assert read["weight"].data_1d.tolist() == [float(size - 1 - rank)] * 4
    ranks.barrier()
    found["after"] = open_now(port)
    found["own_memory"] = psutil.Process().memory_full_info().uss
    (folder / str(rank)).write_text(json.dumps(found))
    ranks.barrier()


def main(size: int, ep_size: int = 2) -> None:
    port = free_port()
    gc.freeze()  # a collection would write to every object, and a page that is written is no more shared
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        children = []
        for rank in range(size):
            child = os.fork()
            if not child:
                try:
                    talk(rank, size, ep_size, port, folder)
                    os._exit(0)
                except BaseException:
                    traceback.print_exc()
                    os._exit(1)
            children.append(child)
        failed = [child for child in children if os.waitpid(child, 0)[1]]
        if failed:
            sys.exit(1)
        for rank in range(size):
            print((folder / str(rank)).read_text())


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
