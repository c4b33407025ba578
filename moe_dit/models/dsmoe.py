"""DSMoE: a latent diffusion transformer whose odd blocks are DeepSeek-style mixtures of experts (arXiv:2512.01252).

Shapes: N samples, C channels, T tokens, D width.
"""

from typing import Any, Literal

import torch
from diffusers.configuration_utils import register_to_config
from pydantic.dataclasses import dataclass

from moe_dit.models.layers import (
    NORMS,
    Block,
    Blocks,
    ConditionEmbedder,
    FinalLayer,
    PatchEmbed,
    dense_mlp,
    moe_blocks,
    rope_1d,
    rope_2d,
    sin_cos_2d,
    sin_cos_table,
    unpatchify,
)
from moe_dit.models.moe import MoE, MoEConfig
from moe_dit.models.network import Network, NetworkConfig
from moe_dit.schema import STRICT, Natural


@dataclass(frozen=True, config=STRICT, kw_only=True)
class DSMoEConfig(NetworkConfig):
    """The ``model`` section of a DSMoE recipe."""

    family: Literal["dsmoe"]
    moe: MoEConfig
    learn_sigma: bool = True  # twice the output channels; the second half is not used (as published)
    positions: Literal["rope_2d", "rope_1d", "sin_cos"] = "rope_2d"
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    interleave: bool = True  # MoE in the odd blocks; false: in all
    dense_first: Natural = 0  # first blocks that are dense in any case


class DSMoE(Network):
    """The network; arguments are the keys of :class:`DSMoEConfig`."""

    pos_embed: torch.Tensor | None
    rope: torch.Tensor | None

    @register_to_config
    def __init__(
        self,
        input_size: int,
        in_channels: int,
        patch_size: int,
        depth: int,
        hidden_size: int,
        num_heads: int,
        mlp_ratio: float,
        num_classes: int,
        moe: dict[str, Any],
        learn_sigma: bool = True,
        positions: str = "rope_2d",
        norm: str = "layernorm",
        interleave: bool = True,
        dense_first: int = 0,
    ):
        super().__init__()
        self.num_classes = num_classes
        self.in_channels = in_channels
        self.out_channels = in_channels * 2 if learn_sigma else in_channels
        side = input_size // patch_size
        head_dim = hidden_size // num_heads
        self.x_embedder = PatchEmbed(input_size, patch_size, in_channels, hidden_size)
        self.c_embedder = ConditionEmbedder(hidden_size, num_classes)
        self.blocks = Blocks(
            Block(
                hidden_size,
                num_heads,
                MoE(hidden_size, **moe) if is_moe else dense_mlp(hidden_size, mlp_ratio),
                NORMS[norm],
            )
            for is_moe in moe_blocks(depth, interleave, dense_first)
        )
        self.final_layer = FinalLayer(hidden_size, patch_size**2 * self.out_channels)
        rope = None
        if positions == "rope_1d":
            rope = sin_cos_table(rope_1d(head_dim, torch.arange(side * side, device="cpu")))
        elif positions == "rope_2d":
            rope = sin_cos_table(rope_2d(head_dim, side))
        self.register_buffer("rope", rope, persistent=False)
        self.register_buffer("pos_embed", sin_cos_2d(hidden_size, side) if positions == "sin_cos" else None)

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Predict from a noisy latent.

        Args:
            x: [N, C, side, side].
            t: [N] in [0, 1], 0 is noise and 1 is data.
            y: int64 [N] in [0, num_classes]; num_classes is the null label. Labels are never dropped here.

        Returns:
            [N, out_channels, side, side]: the velocity, and with ``learn_sigma`` as many channels that are not used.
        """
        h_NTD = self.x_embedder(x.to(self.final_layer.linear.weight.dtype))
        if self.pos_embed is not None:
            h_NTD = h_NTD + self.pos_embed.to(h_NTD.dtype)
        c_ND = self.c_embedder(t, y)
        for block, modulation in zip(self.blocks, self.blocks.modulations(c_ND), strict=True):
            h_NTD = block(h_NTD, modulation, self.rope)
        return unpatchify(self.final_layer(h_NTD, c_ND), self.out_channels)
