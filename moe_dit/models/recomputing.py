"""Whether a layer is being computed a second time, for the backward pass.

Activation checkpointing (:mod:`moe_dit.parallel.recompute`) calls a layer again with the inputs it had. The layer must
do the same arithmetic then, but what it notes by the way (tokens counted, losses left, thresholds moved) it has noted
before.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_again: ContextVar[bool] = ContextVar("recomputing", default=False)


def recomputing() -> bool:
    """Whether this is such a second time."""
    return _again.get()


@contextmanager
def recomputation() -> Iterator[None]:
    """Inside the block layers are computed a second time."""
    token = _again.set(True)
    try:
        yield
    finally:
        _again.reset(token)
