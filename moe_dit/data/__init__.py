"""Shards to batches: which sample stands at which position of a run, read and made the network's input.

``index`` says where every sample lies, ``order`` which one comes when, ``reader`` reads them, ``loader`` gives a rank
its batches, ``inputs`` makes them training inputs; ``tar`` looks into tar files, and ``pixels`` reads images. What a
folder of shards is says :mod:`moe_dit.manifest`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_dit.data.inputs import Latents, check_manifest, training_inputs
    from moe_dit.data.loader import Positions, TrainingSamples, batches
    from moe_dit.data.order import Order, make_order
    from moe_dit.data.reader import ShardReader

_HOMES = {
    **dict.fromkeys(("Latents", "check_manifest", "training_inputs"), "inputs"),
    **dict.fromkeys(("Positions", "TrainingSamples", "batches"), "loader"),
    **dict.fromkeys(("Order", "make_order"), "order"),
    "ShardReader": "reader",
}

__all__ = [
    "Latents",
    "Order",
    "Positions",
    "ShardReader",
    "TrainingSamples",
    "batches",
    "check_manifest",
    "make_order",
    "training_inputs",
]


def __getattr__(name: str) -> Any:
    # Imported when asked for: packing pixels needs no networks, which bring in diffusers and timm, and 200 MB.
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
