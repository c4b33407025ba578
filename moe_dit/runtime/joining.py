"""How ranks find each other: all check in with rank 0 before there is a process group, so that who is missing is named.

torch's own way has every rank wait for every other, for 30 minutes, and then says that something timed out. Here rank 0
keeps a list, through the same store, and ends all with one line when some have not come in time.
"""

import json
import os
import re
import socket
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch

from moe_dit.runtime.errors import InputError, NotJoined


@dataclass(frozen=True)
class Meeting:
    """Ranks that have met.

    Attributes:
        store: of the process group.
        hosts: of each rank.
        name: what this meeting's keys in the store begin with.
    """

    store: Any
    hosts: list[str]
    name: str

    def connect(self, seconds: float) -> Any:
        """A connection of its own to the same store, for a thread; nothing in it takes longer than ``seconds``.

        Raises:
            ConnectionRefusedError: nobody listens there any more.
            OSError: nobody answers there.
        """
        _reach(seconds)
        store = torch.distributed.TCPStore(*_place(), timeout=timedelta(seconds=seconds), wait_for_workers=False)
        return torch.distributed.PrefixStore(self.name, store)


BEATS = "beat/{}"  # keys of a meeting's store by which ranks say that they are there (moe_dit/runtime/silence.py)
LIMIT = "MOE_DIT_JOIN_SECONDS"  # environment variable: how long ranks wait for each other
LIMIT_SECONDS = 300.0
ANSWER_SECONDS = 15.0  # that rank 0 may take longer than its own limit, to a rank that waits for its answer
PORTS = "MASTER_PORT, or the launcher's --master_port"
READ_SECONDS = 5.0  # for those that came, to read rank 0's answer
POLLS = (0.01, 0.25)  # seconds between looks, the first and the longest
NAMED_HOSTS = 4  # of those that came, where the missing ones' are not known


def join(rank: int, local_rank: int, size: int) -> Meeting:
    """Meet all ranks at MASTER_ADDR:MASTER_PORT.

    Raises:
        NotJoined: some ranks did not come in time, or rank 0 was not to be found.
    """
    limit = seconds_from(LIMIT, LIMIT_SECONDS)
    place = "{}:{}".format(*_place())
    # Without rank 0 nobody can agree on who says so: one rank of each node does.
    silent = local_rank != 0 and rank != 1
    # torch 2.14's store would write pages of C++ frames about a server that is not there.
    if rank and not _until(_answers, limit):
        raise NotJoined(f"rank 0 is not to be found at {place}, tried for {limit:g} s", everywhere=silent)
    made: list[Any] = []

    def make() -> None:
        try:
            # In a world of one its store waits for nobody, and so does not itself complain of those that stay away.
            made.append(next(torch.distributed.rendezvous("env://", rank, 1, timeout=timedelta(seconds=limit)))[0])
        except Exception as error:
            made.append(error)

    # torch 2.14 waits for ever for a word of another program that has the port.
    maker = threading.Thread(target=make, name="joining", daemon=True)
    maker.start()
    maker.join(limit + ANSWER_SECONDS)
    other = f"; where another program has that port, give another ({PORTS})"
    if not made:
        raise NotJoined(f"what listens at {place} is not rank 0, asked for {limit:g} s{other}", everywhere=silent)
    store = made[0]
    if isinstance(store, torch.distributed.DistError | OSError):
        what = f"rank {rank} cannot make a store at {place}: {str(store).strip().splitlines()[0]}{other}"
        raise NotJoined(what, everywhere=silent and rank != 0)
    if isinstance(store, Exception):
        raise store
    if rank == 0:
        attempt, hosts = _gather(store, size, limit)
    else:
        found = _check_in(store, rank, limit)
        if found is None:
            raise NotJoined(f"rank 0 did not join within {limit:g} s at {place}", everywhere=silent)
        attempt, hosts = found
    return Meeting(torch.distributed.PrefixStore(_name(attempt), store), hosts, _name(attempt))


def _name(attempt: int) -> str:
    return f"meeting_{attempt}"


def _gather(store: Any, size: int, limit: float) -> tuple[int, list[str]]:
    """Rank 0: wait for all, and tell those that came of each other, or that some did not."""
    # torchrun's store outlives the ranks that it restarts: each time they meet, they do so under another number.
    attempt = store.add("joining/attempts", 1)
    _set(store, f"joining/{attempt}/0", {"token": "", "host": socket.gethostname()})
    store.set("joining/attempt", str(attempt))
    keys = [f"joining/{attempt}/{rank}" for rank in range(size)]
    _until(lambda: store.check(keys), limit)
    came = {rank: _get(store, key) for rank, key in enumerate(keys) if store.check([key])}
    hosts = {rank: found["host"] for rank, found in came.items()}
    problem = "" if len(came) == size else missing(hosts, size, limit)
    for rank in range(size):
        store.set(f"{_name(attempt)}/{BEATS.format(rank)}", "0")
    answer = {"tokens": [found["token"] for found in came.values()], "problem": problem}
    _set(store, f"joining/{attempt}/answer", answer | {"hosts": list(hosts.values())})
    # The store ends with this process, which may have no more to do, so the others read first.
    read = [f"joining/{attempt}/{rank}/read" for rank in came if rank]
    _until(lambda: not read or store.check(read), READ_SECONDS)
    if problem:
        raise NotJoined(problem, everywhere=True)
    return attempt, list(hosts.values())


def _check_in(store: Any, rank: int, limit: float) -> tuple[int, list[str]] | None:
    """Another rank: tell rank 0 of this one, and wait for its answer; None where none came."""
    mine = {"token": uuid.uuid4().hex, "host": socket.gethostname()}
    told = 0
    found: dict[str, Any] = {}

    def answered() -> bool:
        nonlocal told, found
        if not store.check(["joining/attempt"]):
            return False
        attempt = int(store.get("joining/attempt"))
        if attempt != told:
            _set(store, f"joining/{attempt}/{rank}", mine)
            told = attempt
        if store.check([f"joining/{told}/answer"]):
            found = _get(store, f"joining/{told}/answer")
        # One that does not know this rank was given to the ranks before a restart, or this one came late.
        return mine["token"] in found.get("tokens", ())

    try:
        if not _until(answered, limit + ANSWER_SECONDS):
            return None
        store.set(f"joining/{told}/{rank}/read", "")
    except torch.distributed.DistError:  # rank 0 had a store, and has ended
        return None
    if found["problem"]:
        raise NotJoined(found["problem"], everywhere=True)
    return told, found["hosts"]


def missing(hosts: dict[int, str], size: int, limit: float) -> str:
    """One line that says who did not come.

    Args:
        hosts: of the ranks that came.
        size: how many should have.
        limit: seconds that were waited.
    """
    absent = [rank for rank in range(size) if rank not in hosts]
    line = f"{numbered(absent)} did not join within {limit:g} s"
    nodes = _slurm_nodes(size)
    # SLURM says only how many tasks a node has; that they are in order is held against those that came.
    if nodes is not None and all(nodes[rank].split(".")[0] == host.split(".")[0] for rank, host in hosts.items()):
        names = list(dict.fromkeys(nodes[rank] for rank in absent))
        return f"{line} (node{'s' if len(names) > 1 else ''} {', '.join(names)})"
    by_host: dict[str, list[int]] = {}
    for rank, host in hosts.items():
        by_host.setdefault(host, []).append(rank)
    told = [named(ranks, dict.fromkeys(ranks, host)) for host, ranks in by_host.items()]
    return f"{line}; there came {', '.join(told[:NAMED_HOSTS])}{', ...' if len(told) > NAMED_HOSTS else ''}"


def _slurm_nodes(size: int) -> list[str] | None:
    """The node of each task of this SLURM step, where tasks are placed in blocks; None outside of SLURM."""
    nodes, counts = (os.environ.get(f"SLURM_STEP_{name}") for name in ("NODELIST", "TASKS_PER_NODE"))
    if nodes is None or counts is None:
        return None
    try:
        names = hostnames(nodes)
    except (OSError, subprocess.SubprocessError):
        return None
    found = re.findall(r"(\d+)(?:\(x(\d+)\))?", counts)  # "4(x2),3": 4, 4 and 3
    tasks = [int(count) for count, times in found for _ in range(int(times or 1))]
    placed = [name for name, count in zip(names, tasks, strict=False) for _ in range(count)]
    return placed if len(placed) == size else None


def hostnames(nodes: str) -> list[str]:
    """The names in a list of nodes as SLURM writes it ("n[1-4]")."""
    command = ["scontrol", "show", "hostnames", nodes]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout.split()


def address(node: str) -> str:
    """How a node of SLURM's is reached: by its name, or where no host has it, by the address that SLURM knows."""
    try:
        socket.getaddrinfo(node, None)
        return node
    except OSError:
        command = ["scontrol", "show", "node", node, "--oneliner"]
        said = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout
        found = re.search(r"\bNodeAddr=(\S+)", said)
        return found[1] if found else node


def numbered(ranks: Sequence[int]) -> str:
    """Ranks in order for people: "rank 3", "ranks 0, 8 to 15"."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    texts = [f"{run[0]} to {run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs]
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(texts)}"


def named(ranks: Sequence[int], hosts: Sequence[str] | dict[int, str]) -> str:
    """Ranks and their hosts for people: "ranks 8 to 15 (node2)"; ``hosts`` by rank."""
    return f"{numbered(ranks)} ({', '.join(dict.fromkeys(hosts[rank] for rank in ranks))})"


def seconds_from(name: str, default: float) -> float:
    """A number of seconds from an environment variable; InputError where it is none."""
    text = os.environ.get(name)
    if text is None:
        return default
    if not re.fullmatch(r"\d+(\.\d+)?", text) or not float(text):
        raise InputError(f"{name} is {text!r}; it should be a number of seconds")
    return float(text)


def _until(true: Callable[[], bool], seconds: float) -> bool:
    """Whether something becomes true in some seconds, looked at now and then: no signal ends a wait in the store."""
    deadline = time.monotonic() + seconds
    pause, longest = POLLS
    while not true():
        if time.monotonic() > deadline:
            return False
        time.sleep(pause)
        pause = min(longest, 1.5 * pause)
    return True


def _answers() -> bool:
    """Whether somebody listens where ranks meet."""
    try:
        _reach(5.0)
        return True
    except OSError:
        return False


def _reach(seconds: float) -> None:
    """Raise OSError where nobody listens where ranks meet, or none answers in some seconds."""
    socket.create_connection(_place(), timeout=seconds).close()


def _place() -> tuple[str, int]:
    return os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])


def _set(store: Any, key: str, value: Any) -> None:
    store.set(key, json.dumps(value))


def _get(store: Any, key: str) -> Any:
    return json.loads(store.get(key))
