"""Many ranks that make the groups of a training run, and talk over them as a run on GPUs does.

    python tests/many_ranks.py N

Forked, because that takes no time and memory for each. Prints the open TCP connections of every rank, a line a rank.
"""

import os
import sys
import tempfile
import traceback
from pathlib import Path

import psutil
import torch
from deepspeed.utils import groups
from helpers import free_port
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint import save as dcp_save

from moe_dit.checkpoint import Checkpointer, FlatSlice
from moe_dit.engine import start_ranks


def talk(rank: int, size: int, port: int, folder: Path) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    torch.set_num_threads(1)
    start_ranks()
    groups._create_expert_and_data_parallel(2)
    groups._get_data_parallel_group()
    saving = Checkpointer(folder / "run", 1).group
    # Training's own collectives are NCCL's on GPUs. What is left: objects, barriers, and what a save agrees on.
    torch.distributed.all_gather_object([None] * size, rank)
    torch.distributed.broadcast_object_list([rank], src=0)
    piece = {"weight": FlatSlice(torch.ones(4), 4 * rank, 4 * size)}
    dcp_save(piece, storage_writer=FileSystemWriter(folder / "checkpoint"), process_group=saving)
    torch.distributed.broadcast_object_list([rank], src=0, group=saving)
    torch.distributed.barrier()
    connections = psutil.Process().net_connections("tcp")
    (folder / str(rank)).write_text(str(sum(connection.status == "ESTABLISHED" for connection in connections)))
    torch.distributed.barrier()


def main(size: int) -> None:
    port = free_port()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        children = []
        for rank in range(size):
            child = os.fork()
            if not child:
                try:
                    talk(rank, size, port, folder)
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
    main(int(sys.argv[1]))
