"""Which rank this process is, under deepspeed, torchrun, srun or alone."""

import os
import resource
import socket
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from typing import Any

import torch

from moe_dit.runtime.errors import InputError, NotJoined, Stop, of_a_place
from moe_dit.runtime.joining import Meeting, address, hostnames, join, named
from moe_dit.runtime.silence import Silence, silence_seconds
from moe_dit.runtime.tree import tree_group
from moe_dit.runtime.world import World, world


def device() -> torch.device:
    """This rank's GPU, or the CPU where there is none."""
    if torch.cuda.is_available():
        torch.cuda.set_device(world().local_rank % torch.cuda.device_count())
        return torch.device("cuda", torch.cuda.current_device())
    if "OMP_NUM_THREADS" not in os.environ:
        # Ranks that each take every core slow each other down several times over.
        torch.set_num_threads(cores())
    return torch.device("cpu")


def cores() -> int:
    """CPU cores that fall to this rank, at least one."""
    return max(1, len(os.sched_getaffinity(0)) // _ranks_on_this_node())


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
            env["MASTER_ADDR"] = address(hostnames(env["SLURM_STEP_NODELIST"])[0])
            # A port of the step's own: two jobs on a node, or steps of one, do not meet. It is the next one where srun
            # is called again, for a port may be another program's.
            number = int(env["SLURM_JOB_ID"]) + int(env.get("SLURM_STEP_ID", 0))
            env.setdefault("MASTER_PORT", str(20000 + number % 10000))
        else:
            env["MASTER_ADDR"] = "127.0.0.1"
    if "MASTER_PORT" not in env:
        env["MASTER_PORT"] = "0" if this.size == 1 else "29500"
    # A gloo group connects every rank with every other when it is made. Every group of ours and of DeepSpeed's has gloo
    # for CPU tensors: with some hundred ranks that is more sockets than a process may open. This connects at first use.
    env.setdefault("TORCH_GLOO_LAZY_INIT", "1")
    # Rank 0 still meets all the others once where no launcher keeps the store that they find each other by.
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

    Raises:
        NotJoined: some ranks did not come (:func:`moe_dit.runtime.joining.join`).
        InputError: the environment has no number of seconds where one is meant.
    """
    global _meeting, _silence
    this = world()
    if (this.size > 1 or alone) and not torch.distributed.is_initialized():
        set_rendezvous()
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        # One rank meets nobody, and needs no port, which another program may have.
        met: dict[str, Any] = {"store": torch.distributed.HashStore(), "rank": 0, "world_size": 1}
        if this.size > 1:
            seconds = _silence_seconds(this)
            _meeting = join(this.rank, this.local_rank, this.size)
            _silence = Silence(_meeting, seconds)
            _silence.start()
            _meeting.store.set_timeout(timeout)
            met = {"store": _meeting.store, "rank": this.rank, "world_size": this.size}
        torch.distributed.init_process_group(backend, timeout=timeout, **met)
    return this


def _silence_seconds(this: World) -> float:
    try:
        return silence_seconds()
    except InputError as error:  # perhaps of this node alone, and nobody can agree yet on who says so
        told = NotJoined(str(error), everywhere=this.rank != 0 and this.local_rank != 0)
        told.status = InputError.status
        raise told from None


_meeting: Meeting | None = None


def meeting() -> Meeting | None:
    """How the ranks met; None where there is one, or none has joined."""
    return _meeting


_silence: Silence | None = None


def silence() -> Silence | None:
    """What watches for ranks that are gone; None where there is one rank, or none has joined."""
    return _silence


def hosts() -> list[str]:
    """The host of each rank that has joined."""
    return [socket.gethostname()] if _meeting is None else _meeting.hosts


def on_rank_0(function: Callable[[], Any]) -> Any:
    """Call ``function`` on rank 0 alone, and give its result there, None elsewhere, or end all with what went wrong.

    Raises:
        Stop, Exception: as :func:`from_rank_0`.
    """
    kept: list[Any] = []
    from_rank_0(lambda: kept.append(function()))
    return kept[0] if kept else None


def from_rank_0(function: Callable[[], Any], group: Any = None) -> Any:
    """Call ``function`` on rank 0 alone, and give its result to every rank, or end all with what went wrong.

    Args:
        function: gives something that can be pickled.
        group: all ranks, in a process group of its own; None for the usual one.

    Raises:
        Stop: rank 0's own, on every rank.
        Exception: any other of rank 0's, there; a Stop that names it on the others.
    """
    outcome = _outcome(function) if world().rank == 0 else None
    if torch.distributed.is_initialized():
        box = [_error(outcome) or outcome]
        torch.distributed.broadcast_object_list(box, src=0, group=group)
        outcome = outcome if world().rank == 0 else box[0]
    if isinstance(outcome, Stop):
        raise type(outcome)(str(outcome), everywhere=True)
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def agreed(function: Callable[[], Any]) -> Any:
    """Call ``function`` on every rank, and give each its result; where it fails on some, all end, and rank 0 says why.

    ``function`` must not speak with other ranks. What one rank alone meets (a node without its data) would otherwise
    leave the others waiting for it.

    Raises:
        Stop: on every rank, with what went wrong on which ranks and hosts.
        Exception: any other, on the rank that raised it.
    """
    outcome = _outcome(function)
    error = _error(outcome)
    if torch.distributed.is_initialized():
        found: list[Any] = [None] * world().size
        torch.distributed.all_gather_object(found, (error, socket.gethostname()))
        if any(theirs for theirs, _ in found) and error in (None, outcome):
            raise _together([theirs for theirs, _ in found], [host for _, host in found])
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def first_on_rank_0(function: Callable[[], Any]) -> Any:
    """As :func:`agreed`, with rank 0's call before the others': what must be fetched is fetched once."""
    first = on_rank_0(function)
    return agreed(lambda: first if world().rank == 0 else function())


def _outcome(function: Callable[[], Any]) -> Any:
    """What a call gave, or the exception that it raised."""
    try:
        return function()
    except Exception as error:
        return of_a_place(error)


def _error(outcome: Any) -> Stop | None:
    """An outcome's error as other ranks can be told of it: a Stop, whatever it was."""
    if not isinstance(outcome, Exception) or isinstance(outcome, Stop):
        return outcome if isinstance(outcome, Stop) else None
    return Stop(f"{type(outcome).__name__}: {outcome}")


def _together(errors: list[Stop | None], hosts: list[str]) -> Stop:
    """One error that tells of those of some ranks: plain where all met the same, else with the ranks and hosts."""
    ranks_by_text: dict[str, list[int]] = {}
    for rank, error in enumerate(errors):
        if error is not None:
            ranks_by_text.setdefault(str(error), []).append(rank)
    kind = next(type(error) for error in errors if error is not None)
    if len(ranks_by_text) == 1 and None not in errors:
        return kind(next(iter(ranks_by_text)), everywhere=True)
    told = [f"{named(ranks, hosts)}: {text}" for text, ranks in ranks_by_text.items()]
    return kind("; and ".join(told), everywhere=True)


def gathered(mine: Any) -> list[Any] | None:
    """Every rank's object, in order of ranks, on rank 0; None elsewhere."""
    if not torch.distributed.is_initialized():
        return [mine]
    parts: list[Any] | None = [None] * world().size if world().rank == 0 else None
    torch.distributed.gather_object(mine, parts, dst=0, group=cpu_group())
    return parts


@cache
def cpu_group() -> Any:
    """A group of all ranks for objects (:mod:`moe_dit.runtime.tree`); made once, by all ranks together."""
    return tree_group()


def barrier() -> None:
    """Wait for every rank; nothing where there is one."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def stop() -> None:
    """Leave the process group, if one was joined. :mod:`moe_dit.runtime.command` does so at every command's end.

    A Python that ends as a member aborts now and then (torch 2.14: "terminate called without an active exception",
    from gloo's threads), with status -6 instead of the command's.
    """
    global _meeting, _silence
    if torch.distributed.is_initialized():
        if _silence is not None:
            _silence.close()
        _meeting = _silence = None
        torch.distributed.destroy_process_group()
        cpu_group.cache_clear()
