"""torch.compile of a network's blocks, applied from outside.

A block with experts that ranks share is three graphs, before and after the exchange of tokens, whose shapes the routing
decides, and the shared expert's, which computes while sizes travel; other blocks are one, or up to their experts. All
blocks of a kind share their graphs, and no two kinds do (:mod:`moe_dit.graphs`). Parameter names do not change.
"""

from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from moe_dit.graphs import compiled
from moe_dit.models.layers import Block, ConditionEmbedder, FinalLayer, Modulation
from moe_dit.parallel.expert_layers import ExpertParallelMoE, Routing

Tensor = torch.Tensor


def compile_dense_parts(model: nn.Module) -> int:
    """Compile each block's attention, and its MLP where that is dense; returns how many parts."""

    @cache
    def of(kind: tuple) -> Any:
        return compiled(kind[0].forward)

    parts = [part for block in getattr(model, "blocks", []) for part in (block.attn, block.mlp)]
    parts = [part for part in parts if not hasattr(part, "experts")]
    for part in parts:
        part.forward = partial(of(_kind(part)), part)
    return len(parts)


def compile_blocks(model: nn.Module, whole: bool = True, backend: Any = "inductor") -> int:
    """Compile a network but for the exchange of tokens between its experts; returns how many blocks it has.

    All blocks' modulations become one product, whose weights are put together in every pass: a kernel instead of each
    block's seven, for 6 D^2 values a block more in memory.

    Args:
        whole: what stands before an exchange is one graph, and what stands after it; else a layer with experts stays
            a call of its own, which activation checkpointing can wrap.
        backend: torch.compile's.
    """

    @cache
    def of(kind: tuple) -> SimpleNamespace:
        functions = {"before": _before, "after": _after, "attend": Block.attend, "dense": Block.forward}
        functions |= {name: getattr(ExpertParallelMoE, name) for name in ("route", "beside", "finish")}
        return SimpleNamespace(**{name: compiled(function, backend) for name, function in functions.items()})

    def mixture(graphs: Any, block: Any, x_NTD: Tensor, modulation: Modulation, rope: Tensor | None) -> Tensor:
        x_NTD, h_NTD, routing = graphs.before(block, x_NTD, modulation, rope)
        return graphs.after(block, x_NTD, modulation[5], routing, *block.mlp.exchange(h_NTD, routing))

    blocks: Any = getattr(model, "blocks", [])
    if blocks:
        blocks.modulations = partial(_modulations, blocks)
    for part in model.children():
        if isinstance(part, ConditionEmbedder):  # not its labels: a graph would sum their gradients in any order
            part.embed_time = partial(compiled(ConditionEmbedder.embed_time, backend), part)  # type: ignore[method-assign]
        elif isinstance(part, FinalLayer):
            part.forward = partial(compiled(FinalLayer.forward, backend), part)  # type: ignore[method-assign]
    for block in blocks:
        graphs = of(_kind(block))
        if not hasattr(block.mlp, "experts"):
            block.forward = partial(graphs.dense, block)
            continue
        ours = isinstance(block.mlp, ExpertParallelMoE)
        if whole and ours:
            block.forward = partial(mixture, graphs, block)
            block.mlp.beside = partial(graphs.beside, block.mlp)
        else:
            block.attend = partial(graphs.attend, block)
            for name in ("route", "beside", "finish") if ours else ():
                setattr(block.mlp, name, partial(getattr(graphs, name), block.mlp))
    return len(blocks)


def _kind(module: nn.Module) -> tuple:
    """What modules have in common that can share graphs: their class, and the shapes of their weights."""
    return type(module), *(weight.shape for weight in module.parameters())


def _modulations(blocks: Any, c_ND: Tensor) -> list[Modulation]:
    """As :meth:`moe_dit.models.layers.Blocks.modulations`."""
    maps = [block.adaLN_modulation[1] for block in blocks]
    weight, bias = torch.cat([part.weight for part in maps]), torch.cat([part.bias for part in maps])
    chunks = F.linear(F.silu(c_ND), weight, bias).chunk(6 * len(maps), dim=1)
    return [chunks[6 * i : 6 * i + 6] for i in range(len(maps))]


def _before(block: Any, x_NTD: Tensor, modulation: Modulation, rope: Tensor | None) -> tuple[Tensor, Tensor, Routing]:
    x_NTD, h_NTD = block.attend(x_NTD, modulation, rope)
    return x_NTD, h_NTD, block.mlp.route(h_NTD)


def _after(block: Any, x_NTD: Tensor, gate_ND: Tensor, routing: Routing, out_ND: Tensor, beside_NTD: Tensor) -> Tensor:
    return torch.addcmul(x_NTD, gate_ND[:, None], block.mlp.finish(routing, out_ND, beside_NTD))
