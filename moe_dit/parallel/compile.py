"""torch.compile of a network's blocks, applied from outside.

A block with experts that ranks share is two graphs, before and after the exchange of tokens, whose shapes the routing
decides; other blocks are one, or up to their experts. Every block of a kind uses the same graphs. Parameter names do
not change.
"""

from functools import partial
from typing import Any

import torch
from torch import nn

from moe_dit.models.layers import Block
from moe_dit.parallel.expert_layers import ExpertParallelMoE, Routing

Tensor = torch.Tensor


def compile_dense_parts(model: nn.Module) -> int:
    """Compile each block's attention, and its MLP where that is dense; returns how many parts."""
    parts = 0
    for block in getattr(model, "blocks", []):
        for part in (block.attn, block.mlp):
            if not hasattr(part, "experts"):
                part.compile(dynamic=False)
                parts += 1
    return parts


def compile_blocks(model: nn.Module, whole: bool = True, backend: Any = "inductor") -> int:
    """Compile all of each block but the exchange of tokens between experts; returns how many blocks.

    Args:
        whole: what stands before an exchange is one graph, and what stands after it; else a layer with experts stays
            a call of its own, which activation checkpointing can wrap.
        backend: torch.compile's.
    """
    compiled = partial(torch.compile, dynamic=False, fullgraph=True, backend=backend)
    before, after, attend, dense = map(compiled, (_before, _after, Block.attend, Block.forward))
    route, finish = map(compiled, (ExpertParallelMoE.route, ExpertParallelMoE.finish))

    def mixture(block: Any, x_NTD: Tensor, c_ND: Tensor, rope: Tensor | None) -> Tensor:
        x_NTD, h_NTD, gate_ND, routing = before(block, x_NTD, c_ND, rope)
        return after(block, x_NTD, h_NTD, gate_ND, routing, block.mlp.exchange(h_NTD, routing))

    blocks = list(getattr(model, "blocks", []))
    for block in blocks:
        if not hasattr(block.mlp, "experts"):
            block.forward = partial(dense, block)
        elif whole and isinstance(block.mlp, ExpertParallelMoE):
            block.forward = partial(mixture, block)
        else:
            block.attend = partial(attend, block)
            if isinstance(block.mlp, ExpertParallelMoE):
                layer: Any = block.mlp
                layer.route = partial(route, layer)
                layer.finish = partial(finish, layer)
    return len(blocks)


def _before(block: Any, x_NTD: Tensor, c_ND: Tensor, rope: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Routing]:
    x_NTD, h_NTD, gate_ND = block.attend(x_NTD, c_ND, rope)
    return x_NTD, h_NTD, gate_ND, block.mlp.route(h_NTD)


def _after(block: Any, x_NTD: Tensor, h_NTD: Tensor, gate_ND: Tensor, routing: Routing, out_ND: Tensor) -> Tensor:
    return torch.addcmul(x_NTD, gate_ND[:, None], block.mlp.finish(h_NTD, routing, out_ND))
