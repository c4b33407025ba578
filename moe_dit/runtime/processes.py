"""How helper processes start."""

from multiprocessing import get_context
from typing import Any


def forkserver() -> Any:
    """Processes forked from one that has only imported what they need, a multiprocessing context.

    They must not inherit a CUDA context or gloo's threads, and each would take seconds to import torch.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload(["moe_dit.data"])
    return context
