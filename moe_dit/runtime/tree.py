"""A process group over gloo in which no rank meets all the others.

gloo gathers and scatters between a rank and each of its fellows, a connection for each: at 512 ranks, 511 at rank 0.
Here both go along a binomial tree, in which rank 0 has as many children as the number of ranks has bits, 9 of 512. What
else is used of the group is gloo's own: broadcasts along a tree, all-gathers around a ring.
"""

from typing import Any

import torch
from torch.distributed import Backend, ProcessGroup, ProcessGroupGloo, Work

BACKEND = "moe_dit_tree"


class _Done(Work):
    """Work that was finished before its call returned."""

    def wait(self, timeout=None):
        return True


class TreeGroup(ProcessGroup):
    """What torch.distributed's object collectives call, of equal CPU tensors on each rank."""

    def __init__(self, store: Any, rank: int, size: int, timeout: Any):
        super().__init__(rank, size)  # type: ignore[call-arg]  # torch's stub knows another constructor only
        self._gloo = ProcessGroupGloo(store, rank, size, timeout)

    def getBackendName(self):
        return BACKEND

    def allgather(self, outputs, inputs, options=None):
        return self._gloo.allgather(outputs, inputs)

    def broadcast(self, tensors, options):
        return self._gloo.broadcast(tensors, options)

    def gather(self, outputs, inputs, options):
        """Each rank's tensor to the root: a rank adds what its children send, and sends all to its parent."""
        root, size = options.rootRank, self.size()
        place = (self.rank() - root) % size
        parts = [inputs[0]]
        for child, width in self._children(place):
            part = inputs[0].new_empty((width, *inputs[0].shape))
            self._gloo.recv([part], (child + root) % size, 0).wait()
            parts += part.unbind()
        if place:
            self._gloo.send([torch.stack(parts)], (_parent(place) + root) % size, 0).wait()
        else:
            for i, part in enumerate(parts):
                outputs[0][(i + root) % size].copy_(part)
        return _Done()

    def scatter(self, outputs, inputs, options):
        """Each rank its own tensor of the root's: the way back of :meth:`gather`."""
        root, size = options.rootRank, self.size()
        place = (self.rank() - root) % size
        if place:
            whole = outputs[0].new_empty((self._width(place), *outputs[0].shape))
            self._gloo.recv([whole], (_parent(place) + root) % size, 0).wait()
        else:
            whole = torch.stack([inputs[0][(i + root) % size] for i in range(size)])
        for child, width in self._children(place):
            first = child - place
            self._gloo.send([whole[first : first + width]], (child + root) % size, 0).wait()
        outputs[0].copy_(whole[0])
        return _Done()

    def _width(self, place: int) -> int:
        """How many ranks stand at ``place`` and below it: [place, place + width)."""
        return min(place & -place or self.size(), self.size() - place)

    def _children(self, place: int) -> list[tuple[int, int]]:
        """A place's children and their widths, in order: those at distances 1, 2, 4, ... below it."""
        width = self._width(place)
        return [(place + d, self._width(place + d)) for d in (2**i for i in range(width.bit_length())) if d < width]


def _parent(place: int) -> int:
    return place & (place - 1)


def tree_group() -> Any:
    """A group of all ranks for objects (gather_object, scatter_object_list, broadcast_object_list); all make it."""
    if not hasattr(Backend, BACKEND.upper()):
        Backend.register_backend(BACKEND, TreeGroup, devices=["cpu"])
    return torch.distributed.new_group(backend=BACKEND)
