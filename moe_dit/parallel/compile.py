"""torch.compile of a network's dense parts, applied from outside."""

from torch import nn


def compile_dense_parts(model: nn.Module) -> int:
    """Compile each block's attention, and its MLP where that is dense; returns how many parts.

    MoE layers stay as they are: their shapes change with every routing, and the grouped products are kernels already.
    Parameter names do not change.
    """
    parts = 0
    for block in getattr(model, "blocks", []):
        for part in (block.attn, block.mlp):
            if not hasattr(part, "experts"):
                part.compile(dynamic=False)
                parts += 1
    return parts
