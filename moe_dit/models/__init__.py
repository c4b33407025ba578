"""The networks: plain torch modules that know nothing of parallelism, one file a family."""

from moe_dit.models.diffmoe import DiffMoE
from moe_dit.models.dsmoe import DSMoE
from moe_dit.models.jit import JiT

FAMILIES = {"dsmoe": DSMoE, "diffmoe": DiffMoE, "jit": JiT}

__all__ = ["FAMILIES", "DSMoE", "DiffMoE", "JiT"]
