"""Shards to batches: which sample stands at which position of a run, read and made the network's input.

``index`` says where every sample lies, ``order`` which one comes when, ``reader`` reads them, ``loader`` gives a rank
its batches, ``inputs`` makes them training inputs. What a folder of shards is says :mod:`moe_dit.manifest`.
"""

from moe_dit.data.inputs import Latents, check_manifest, training_inputs
from moe_dit.data.loader import Positions, TrainingSamples, batches
from moe_dit.data.order import Order, make_order
from moe_dit.data.reader import ShardReader

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
