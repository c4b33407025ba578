"""The networks: plain torch modules that know nothing of parallelism, one file a family."""

from moe_dit.models.dsmoe import DSMoE

FAMILIES = {"dsmoe": DSMoE}

__all__ = ["FAMILIES", "DSMoE"]
