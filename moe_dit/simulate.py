"""One rank of many, without the others: the real engine, its groups and a step's collectives, counted on a CPU.

The ranks are torch's fake process group (torch.testing's, 2.14): DeepSpeed makes its groups and calls its collectives
as in a run, and nothing is sent. What others would have sent is made up so that the step goes on: counts of tokens
are as if every rank had chosen as this one did, other tensors of an all-to-all are zeros, and all else stays as it is.
Products and attention of many operations are left out, their results zeros. What is sent does not depend on them: sizes
follow from shapes and from the routing, and in a new network every block's gate is zero, so that routers see none.
"""

import os
import resource
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from moe_dit.data import Latents, training_inputs
from moe_dit.parallel.deepspeed_config import Parallelism
from moe_dit.recipe import Recipe
from moe_dit.runtime.errors import InputError

MOST_OPERATIONS = 2e8  # of a product that is computed; larger ones give zeros

# torch's names of the collectives that ZeRO 1 and 2 and expert parallelism call (DeepSpeed 0.19.8).
KINDS = {
    "allreduce_": "all-reduce",
    "alltoall_base_": "all-to-all",
    "_allgather_base_": "all-gather",
    "broadcast_": "broadcast",
}


@dataclass(frozen=True)
class Simulation:
    """What a rank was seen to do.

    Attributes:
        held: bytes of weights, master weights and state, as :meth:`moe_dit.engine.Engine.bytes_held` says.
        made: groups that were made, those of other ranks among them: each is a call on every rank.
        groups: sizes of the groups that this rank is in; a training run adds two of all ranks, for saves and objects.
        beginning: collectives until the engine stands: how many by (kind, ranks in the group), and bytes sent.
        step: those of a training step, likewise.
        memory: most bytes of memory that this process had, Python and its libraries among them.
    """

    held: dict[str, int]
    made: int
    groups: list[int]
    beginning: "Collectives"
    step: "Collectives"
    memory: int


@dataclass
class Collectives:
    """Collectives by (kind, ranks in the group): how many, and the bytes that a rank sends over rings."""

    calls: Counter[tuple[str, int]] = field(default_factory=Counter)
    sent: Counter[tuple[str, int]] = field(default_factory=Counter)

    def sent_by_kind(self) -> dict[str, int]:
        """Bytes by kind, over groups of all sizes."""
        found: Counter[str] = Counter()
        for (kind, _), size in self.sent.items():
            found[kind] += size
        return dict(found)


def simulate(recipe: Recipe, parallelism: Parallelism, rank: int) -> Simulation:
    """Be one rank of ``parallelism.world_size`` for a step of training from the start; once a process.

    It needs the memory of that rank's weights, in float32 while they are drawn, and of a micro-batch's activations.

    Raises:
        InputError: there is no such rank; or what :class:`moe_dit.engine.Engine` raises.
    """
    size = parallelism.world_size
    if not 0 <= rank < size:
        raise InputError(f"--rank {rank}: it should be from 0 to {size - 1}")
    if parallelism.zero_stage == 3:
        raise InputError(
            f"{parallelism.file}: under ZeRO 3 DeepSpeed compares what ranks have, and no other rank is there; "
            f"simulate ZeRO 1 or 2"
        )
    os.environ |= {"DS_ACCELERATOR": "cpu", "RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": str(size)}
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    from moe_dit.engine import Engine, start_ranks

    start_ranks()
    with _Counted() as beginning:
        engine = Engine(recipe, parallelism, torch.device("cpu"))
    batches = [_batch(recipe, parallelism.micro_batch_size) for _ in range(parallelism.accumulation)]
    with _Counted() as step:
        engine.train_step(0, batches)
    world = torch.distributed.distributed_c10d._world
    member = [ranks for ranks in world.pg_group_ranks.values() if rank in ranks]
    return Simulation(
        held=engine.bytes_held(),
        made=world.group_count,
        groups=sorted((len(ranks) for ranks in member), reverse=True),
        beginning=beginning.collectives,
        step=step.collectives,
        memory=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )


def _batch(recipe: Recipe, images: int) -> dict[str, torch.Tensor]:
    """A micro-batch of nothing in particular, as training takes it."""
    model = recipe.model
    shape = images, model.in_channels, model.input_size, model.input_size
    position = torch.arange(images)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    x = x.half() if recipe.data.kind == "latents" else (x.clamp(-2, 2) * 60 + 128).byte()
    batch = {"x": x, "y": position % model.num_classes, "position": position}
    return training_inputs(recipe, batch, Latents(posterior=False))


class _Counted(TorchDispatchMode):
    """Counts collectives, and stands for what other ranks and large products would have given."""

    def __init__(self) -> None:
        super().__init__()
        self.collectives = Collectives()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        count = flop_registry.get(function.overloadpacket)
        if count is not None:
            meta = [arg.to("meta") if isinstance(arg, torch.Tensor) else arg for arg in args]
            result = function(*meta, **kwargs)
            if count(*args, **kwargs, out_val=result) > MOST_OPERATIONS:
                return torch.utils._pytree.tree_map_only(
                    torch.Tensor, lambda tensor: torch.zeros_like(tensor, device="cpu"), result
                )
        if function.namespace == "c10d":
            name = function.overloadpacket.__name__
            self._note(name, args)
            if KINDS[name] == "all-to-all":
                # The fake group refuses to send nothing and receive something, as a rank does that got no tokens.
                nothing = torch.zeros(self._group(args).size())
                args = (nothing, nothing, args[2], [], [], *args[5:])
        return function(*args, **kwargs)

    @staticmethod
    def _group(args: tuple) -> Any:
        """The process group among a collective's arguments."""
        objects = [arg for arg in args if isinstance(arg, torch._C.ScriptObject)]
        return torch.distributed.ProcessGroup.unbox(objects[0])

    def _note(self, name: str, args: tuple) -> None:
        """Count a collective, and give it results."""
        kind = KINDS[name]
        group = self._group(args)
        ranks = group.size()
        if kind == "all-to-all":
            output, sent = args[0], args[1]
            splits = args[4] or [len(sent) // ranks] * ranks
            size = sum(rows for to, rows in enumerate(splits) if to != group.rank()) * sent[:1].nbytes
            if output.dtype.is_floating_point:
                output.zero_()
            else:
                output.view(ranks, -1)[:] = sent.view(ranks, -1)[group.rank()]
        elif kind == "all-reduce":
            size = 2 * _bytes(args[0]) * (ranks - 1) // ranks
        elif kind == "all-gather":
            size = _bytes(args[1]) * (ranks - 1)
        else:
            size = _bytes(args[0])
        self.collectives.calls[kind, ranks] += 1
        self.collectives.sent[kind, ranks] += size


def _bytes(tensors: torch.Tensor | Iterable[Any]) -> int:
    return tensors.nbytes if isinstance(tensors, torch.Tensor) else sum(map(_bytes, tensors))
