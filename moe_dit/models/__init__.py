"""The networks: plain torch modules that know nothing of parallelism, one file a family.

A family is its settings (a recipe's ``model`` section) and its network; :mod:`moe_dit.models.network` says what it must
offer, and FAMILIES is where it is registered.
"""

from typing import NamedTuple

from moe_dit.models.diffmoe import DiffMoE, DiffMoEConfig
from moe_dit.models.dsmoe import DSMoE, DSMoEConfig
from moe_dit.models.jit import JiT, JiTConfig
from moe_dit.models.network import Network, NetworkConfig


class Family(NamedTuple):
    """A network family: what a recipe says of it, and the module."""

    config: type[NetworkConfig]
    network: type[Network]


FAMILIES = {
    "dsmoe": Family(DSMoEConfig, DSMoE),
    "diffmoe": Family(DiffMoEConfig, DiffMoE),
    "jit": Family(JiTConfig, JiT),
}

__all__ = ["FAMILIES", "DSMoE", "DiffMoE", "Family", "JiT", "Network", "NetworkConfig"]
