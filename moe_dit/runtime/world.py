"""Which rank this process is, from the environment alone: what needs no torch should not wait for it."""

import os
import sys
from dataclasses import dataclass


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


def joined() -> bool:
    """Whether this process is a member of a process group: one that never imported torch is none."""
    torch = sys.modules.get("torch")
    return torch is not None and torch.distributed.is_initialized()
