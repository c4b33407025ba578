"""A check before the first step: devices that compute, ranks that hear each other, clocks, shards that can be read.

What is broken ends all ranks with one line that names some, instead of a hang or a loss that is wrong; what is merely
slow is named, and training goes on. Its collectives are of those groups that training speaks in too, so that nothing is
connected which would not be.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

from moe_dit.data.reader import ShardReader
from moe_dit.events import record
from moe_dit.manifest import Manifest
from moe_dit.runtime import ranks
from moe_dit.runtime.errors import Stop
from moe_dit.runtime.joining import named
from moe_dit.runtime.progress import say
from moe_dit.runtime.rank_log import RankLog

SHARE = 1 / 3  # of the median: a device or a link with less is slow
ENOUGH = 4  # devices, or links of a kind, to speak of a median
MOST_SKEW = 1.0  # seconds between the clocks of two hosts
REPEATS = 5  # of which the fastest counts
_SIZES = {"cpu": (384, 1 << 18), "cuda": (4096, 1 << 22)}  # rows of a product's square factors; numbers that are sent
_FIRST_BYTES = 512


@dataclass(frozen=True)
class Found:
    """What a rank measured.

    Attributes:
        device: its name, and memory free there.
        product: seconds of a product of matrices; on CPUs of the processor, which others use too.
        reduces: bytes a second of an all-reduce; 0 alone.
        exchanges: of an all-to-all among ranks that share experts; 0 without.
        link: from the rank before this one; 0 inside a node without GPUs, where there is none.
        clock: the clock's reading less rank 0's, in seconds.
    """

    device: str
    product: float
    reduces: float = 0.0
    exchanges: float = 0.0
    link: float = 0.0
    clock: float = 0.0


def check_shards(manifest: Manifest) -> None:
    """Have one rank of each node read of the shards; every rank calls it.

    Raises:
        InputError: some cannot, on every rank. A server is asked as patiently as when it is trained from.
    """
    ranks.agreed(lambda: read_some(manifest) if ranks.world().local_rank == 0 else None)


def check(run: Path, device: torch.device, group: Any, log: RankLog, start: str | None = None) -> None:
    """Look at what training needs of the machines; every rank calls it, holding the run's folder.

    Args:
        run: the run's folder, for what is slow.
        device: where this rank computes.
        group: of the ranks that share experts; None where each has all.
        log: this rank's.
        start: the name of the ranks' start.

    Raises:
        Stop: a device fails or computes wrongly, or what ranks sent did not arrive.
    """
    found = ranks.agreed(lambda: _alone(device))
    size = ranks.world().size
    if size > 1:
        reduces, sums = _all_reduce(device)
        exchanges, rows = _all_to_all(device, group) if group is not None else (0.0, True)
        link, numbers = _neighbours(device)
        if device.type == "cpu" and ranks.hosts()[ranks.world().rank - 1] == ranks.hosts()[ranks.world().rank]:
            link = 0.0
        clock = _clock()
        arrived = {"an all-reduce's sums": sums, "an all-to-all's rows": rows, "numbers from the rank before": numbers}
        ranks.agreed(lambda: _check_arrived(arrived))
        found = Found(found.device, found.product, reduces, exchanges, link, clock)
    log.write(f"check: {found}")
    everyone = ranks.gathered(found)
    if everyone is not None and size > 1:
        hosts = ranks.hosts()
        say(summary(everyone, hosts))
        for line in slow(everyone, hosts):
            say(f"slow: {line}")
            record(run, "slow", line, start=start)


def summary(found: Sequence[Found], hosts: Sequence[str]) -> str:
    """What ranks measured, in a line."""
    nodes = len(set(hosts))
    line = f"{len(found)} ranks on {nodes} node{'s' if nodes > 1 else ''}"
    line += f": all-reduce {min(one.reduces for one in found) / 1e9:.2g} GB/s"
    if found[0].exchanges:
        line += f", all-to-all {min(one.exchanges for one in found) / 1e9:.2g} GB/s"
    return f"{line}, clocks within {1e3 * max(abs(one.clock) for one in found):.2g} ms"


def slow(found: Sequence[Found], hosts: Sequence[str]) -> list[str]:
    """A line for each device and link that is far slower than the others, and each host whose clock is far off."""
    lines = []
    median = statistics.median(one.product for one in found)
    for rank, one in enumerate(found):
        if len(found) >= ENOUGH and median < SHARE * one.product:
            name = named([rank], hosts)
            lines.append(
                f"{name} takes {one.product * 1e3:.2g} ms for a product of matrices, others {median * 1e3:.2g}"
            )
    for inside in (True, False):  # of a node: other wires, which others are no measure of
        links = {i: one.link for i, one in enumerate(found) if one.link and (hosts[i - 1] == hosts[i]) is inside}
        middle = statistics.median(links.values()) if links else 0.0
        for rank, speed in links.items():
            if len(links) >= ENOUGH and speed < SHARE * middle:
                way = f"from {named([(rank - 1) % len(found)], hosts)} to {named([rank], hosts)}"
                lines.append(f"the link {way} carries {speed / 1e9:.2g} GB/s, others {middle / 1e9:.2g}")
    for host in dict.fromkeys(hosts):
        those = [rank for rank in range(len(hosts)) if hosts[rank] == host]
        skew = statistics.median(found[rank].clock for rank in those)
        if abs(skew) > MOST_SKEW:
            way = "ahead of" if skew > 0 else "behind"
            lines.append(f"the clock of {named(those, hosts)} is {abs(skew):.2g} s {way} rank 0's")
    return lines


# --- a rank by itself -------------------------------------------------------------------------------------------------


def _alone(device: torch.device) -> Found:
    """What can be said of its device."""
    try:
        name, product = _device(device)
    except RuntimeError as error:  # CUDA's are all of this kind
        raise Stop(f"device {device} fails: {str(error).strip().splitlines()[0]}") from error
    return Found(name, product)


def _device(device: torch.device) -> tuple[str, float]:
    """The device's name and free memory, and the seconds of a product that must be right."""
    rows, _ = _SIZES[device.type]
    i = torch.arange(rows, device=device)
    # Small whole numbers: float32 products of them are exact, in whatever order and in TF32 too.
    left = ((7 * i[:, None] + 3 * i + i * i) % 7 - 3).float()
    right = ((5 * i[:, None] + 11 * i + i[:, None] ** 2) % 7 - 3).float()
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    seconds, product = _fastest(lambda: multiply(left, right), device, clock)
    weights = i.double()
    if not torch.equal(product.double() @ weights, left.double() @ (right.double() @ weights)):
        raise Stop(f"device {device} computes wrong products")
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, {torch.cuda.mem_get_info(device)[0] / 1e9:.1f} GB free", seconds
    return f"cpu, {psutil.virtual_memory().available / 1e9:.1f} GB free", seconds


def multiply(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """The product that a device is tried with."""
    return left @ right


def read_some(manifest: Manifest) -> None:
    """Read the first bytes of the first and the last shard, from where they come.

    Raises:
        InputError: they cannot be read.
    """
    last = len(manifest.shards) - 1
    if manifest.remote is not None:
        for shard in sorted({0, last}):
            manifest.remote.begins(manifest.shards[shard]["name"])
        return
    reader = ShardReader(manifest)
    for shard in sorted({0, last}):
        reader.bytes_at(shard, 0, min(_FIRST_BYTES, manifest.shards[shard]["bytes"]))
    reader.close()


def _check_arrived(arrived: dict[str, bool]) -> None:
    wrong = [what for what, right in arrived.items() if not right]
    if wrong:
        raise Stop(f"wrong: {', '.join(wrong)}")


# --- ranks together ---------------------------------------------------------------------------------------------------


def _fastest(
    work: Callable[[], Any], device: torch.device, clock: Callable[[], float] = time.perf_counter
) -> tuple[float, Any]:
    """Seconds of the fastest of a few times, after one that makes connections, and what the last gave."""
    best = float("inf")
    result = None
    for repeat in range(1 + REPEATS):
        _settle(device)
        start = clock()
        result = work()
        _settle(device)
        if repeat:
            best = min(best, clock() - start)
    return max(best, 1e-9), result


def _settle(device: torch.device) -> None:
    """Before training a GPU may be waited for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _all_reduce(device: torch.device) -> tuple[float, bool]:
    """Bytes a second, and whether the sums were right."""
    this, count = ranks.world(), _SIZES[device.type][1]

    def reduce() -> torch.Tensor:
        x = torch.full((count,), float(this.rank + 1), device=device)
        dist.all_reduce(x)
        return x

    seconds, x = _fastest(reduce, device)
    return 4 * count / seconds, bool((x == this.size * (this.size + 1) / 2).all())


def _all_to_all(device: torch.device, group: Any) -> tuple[float, bool]:
    """Bytes a second, and whether each row came from whom it should."""
    size, me = dist.get_world_size(group), dist.get_rank(group)
    others = torch.arange(size, dtype=torch.float32, device=device)[:, None]
    sent = (1000.0 * me + others).expand(size, _SIZES[device.type][1] // size).contiguous()
    received = torch.empty_like(sent)
    seconds, _ = _fastest(lambda: dist.all_to_all_single(received, sent, group=group), device)
    return 4 * sent.numel() / seconds, bool((received == 1000.0 * others + me).all())


def _neighbours(device: torch.device) -> tuple[float, bool]:
    """Bytes a second from the rank before this one, round the ring, and whether they were right."""
    this, count = ranks.world(), _SIZES[device.type][1]
    before, after = (this.rank - 1) % this.size, (this.rank + 1) % this.size
    numbers = torch.arange(count, dtype=torch.float32, device=device)
    sent, received = numbers + this.rank, torch.zeros_like(numbers)
    ready = torch.zeros(1, device=device)
    best = float("inf")
    for turn in range(3):
        for _ in range(REPEATS):
            # Each rank does one thing at a time; where they are odd, the last one's own turn is the third.
            if turn == _turn(this.rank, this.size):
                _pass(dist.isend, ready, after)
                _pass(dist.isend, sent, after)
            elif turn == _turn(before, this.size):
                _pass(dist.irecv, ready, before)  # the sender is there: what follows is the link's own time
                _settle(device)
                start = time.perf_counter()
                _pass(dist.irecv, received, before)
                _settle(device)
                best = min(best, time.perf_counter() - start)
    return 4 * count / max(best, 1e-9), torch.equal(received, numbers + before)


def _turn(rank: int, size: int) -> int:
    """When a rank sends to the next one."""
    return 2 if size % 2 and rank == size - 1 else rank % 2


def _pass(operation: Any, tensor: torch.Tensor, peer: int) -> None:
    # One at a time NCCL would make a group of each pair; a batch is sent within the group of all.
    for work in dist.batch_isend_irecv([dist.P2POp(operation, tensor, peer)]):
        work.wait()


def _clock() -> float:
    """This rank's clock less rank 0's, in seconds.

    All ranks give their time and get the others': nobody gets any before all gave. So rank 0 gave before this rank got,
    and this rank gave before rank 0 got, whatever the network's delay; each round narrows what can be between.
    """
    low, high = float("-inf"), float("inf")
    gave = got = zero_gave = 0.0
    for _ in range(1 + REPEATS):
        mine = torch.tensor([time.time(), got], dtype=torch.float64)
        everyone = [torch.zeros(2, dtype=torch.float64) for _ in range(ranks.world().size)]
        dist.all_gather(everyone, mine)
        if got:  # when rank 0 got the others' of a round comes with the next
            high = min(high, got - zero_gave)
            low = max(low, gave - float(everyone[0][1]))
        gave, zero_gave, got = float(mine[0]), float(everyone[0][0]), time.time()
    return (low + high) / 2
