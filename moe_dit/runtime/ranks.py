"""Which rank this process is, under deepspeed, torchrun, srun or alone."""

import os
import resource
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any

import torch

from moe_dit.runtime.errors import InputError


@dataclass(frozen=True)
class World:
    """This process among its fellows: 0 <= rank < size; local_rank counts on this node."""

    rank: int = 0
    local_rank: int = 0
    size: int = 1

    def share(self, count: int) -> range:
        """The indices in [0, count) that fall to this rank: every size-th one."""
        return range(self.rank, count, self.size)


def world() -> World:
    """Read the launcher's environment: deepspeed and torchrun set RANK, srun sets SLURM_PROCID, otherwise one rank."""
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        return World(int(env["RANK"]), int(env.get("LOCAL_RANK", 0)), int(env["WORLD_SIZE"]))
    # A plain command inside an sbatch script also sees SLURM_NTASKS; only srun's own tasks have a step id.
    if "SLURM_STEP_ID" in env and "SLURM_PROCID" in env:
        return World(int(env["SLURM_PROCID"]), int(env["SLURM_LOCALID"]), int(env["SLURM_STEP_NUM_TASKS"]))
    return World()


def device() -> torch.device:
    """This rank's GPU, or the CPU where there is none."""
    if torch.cuda.is_available():
        torch.cuda.set_device(world().local_rank % torch.cuda.device_count())
        return torch.device("cuda", torch.cuda.current_device())
    if "OMP_NUM_THREADS" not in os.environ:
        # Ranks that each take every core slow each other down several times over.
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // _ranks_on_this_node()))
    return torch.device("cpu")


def _ranks_on_this_node() -> int:
    names = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "SLURM_TASKS_PER_NODE")  # torchrun, deepspeed, srun ("4(x2)")
    given = next((os.environ[name] for name in names if name in os.environ), str(world().size))
    return int(given.split("(")[0].split(",")[0])


def set_rendezvous() -> None:
    """Give torch.distributed and DeepSpeed the environment they read, where the launcher did not set it, or not so."""
    this = world()
    env = os.environ
    if "MASTER_ADDR" not in env:
        if "SLURM_STEP_NODELIST" in env and this.size > 1:
            nodes = ["scontrol", "show", "hostnames", env["SLURM_STEP_NODELIST"]]
            env["MASTER_ADDR"] = subprocess.run(nodes, check=True, capture_output=True, text=True).stdout.split()[0]
            # One port a job, so that two jobs on a node do not meet.
            env.setdefault("MASTER_PORT", str(20000 + int(env["SLURM_JOB_ID"]) % 10000))
        else:
            env["MASTER_ADDR"] = "127.0.0.1"
    if "MASTER_PORT" not in env:
        env["MASTER_PORT"] = "0" if this.size == 1 else "29500"
    # A gloo group connects every rank with every other when it is made. Every group of ours and of DeepSpeed's has gloo
    # for CPU tensors: with some hundred ranks that is more sockets than a process may open. This connects at first use.
    env.setdefault("TORCH_GLOO_LAZY_INIT", "1")
    # Rank 0 still meets all the others twice: as the store that they found each other by, and as a save's coordinator.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    env["RANK"] = str(this.rank)
    # DeepSpeed takes it for the index of the rank's GPU, and SLURM may let each task see one GPU alone.
    gpus = torch.cuda.device_count()
    env["LOCAL_RANK"] = str(this.local_rank % gpus if gpus else this.local_rank)
    env["WORLD_SIZE"] = str(this.size)


def start(timeout: timedelta = timedelta(minutes=30), alone: bool = False) -> World:
    """Join the process group: NCCL for GPU tensors and gloo for CPU ones.

    Args:
        timeout: of a collective.
        alone: make a group of one rank too (DeepSpeed needs one); otherwise one rank does without.
    """
    this = world()
    if (this.size > 1 or alone) and not torch.distributed.is_initialized():
        set_rendezvous()
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        torch.distributed.init_process_group(backend, timeout=timeout)
    return this


def from_rank_0(function: Callable[[], Any]) -> Any:
    """Call ``function`` on rank 0 alone, and give its result, or its InputError, to every rank."""
    outcome: list[Any] = [None]
    if world().rank == 0:
        try:
            outcome = [function()]
        except InputError as error:
            outcome = [error]
    if torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(outcome, src=0)
    if isinstance(outcome[0], InputError):
        raise outcome[0]
    return outcome[0]


@cache
def cpu_group() -> Any:
    """A group of all ranks over gloo, for objects and CPU tensors; made once, by all ranks together."""
    return torch.distributed.new_group(backend="gloo")


def barrier() -> None:
    """Wait for every rank; nothing where there is one."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def stop() -> None:
    """Leave the process group."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
