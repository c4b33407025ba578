"""JiT and JiTMoE: transformers on the pixels of large patches (arXiv:2511.13720, arXiv:2512.01252).

They predict the image itself (see :mod:`moe_dit.flow`). Shapes: N samples, C channels, T tokens, D width.
"""

import math
from collections.abc import Iterator
from typing import Any, Literal

import torch
from diffusers.configuration_utils import register_to_config
from pydantic.dataclasses import dataclass
from torch import nn

from moe_dit.models.layers import (
    Block,
    Blocks,
    ConditionEmbedder,
    FinalLayer,
    PatchConv2d,
    moe_blocks,
    rms_norm,
    rope_2d,
    sin_cos_2d,
    sin_cos_table,
    unpatchify,
)
from moe_dit.models.moe import MoE, MoEConfig, SwiGLU
from moe_dit.models.network import Network, NetworkConfig
from moe_dit.schema import STRICT, Count, Fraction, Natural, Problem


@dataclass(frozen=True, config=STRICT)
class PixelMoEConfig(MoEConfig):
    """JiTMoE's: the same layer, whose experts have biases, with dropout of their hidden values."""

    dropout: Fraction = 0.0


@dataclass(frozen=True, config=STRICT, kw_only=True)
class JiTConfig(NetworkConfig):
    """The ``model`` section of a recipe: JiTMoE with ``moe`` (odd blocks are MoE), JiT without."""

    family: Literal["jit"]
    bottleneck_dim: Count  # width between pixels and tokens
    in_context_len: Natural  # class tokens ...
    in_context_start: Natural  # ... that join before this block
    moe: PixelMoEConfig | None = None
    attn_dropout: Fraction = 0.0  # dropout, this and all other, acts in the middle half of the depth
    proj_dropout: Fraction = 0.0

    @property
    def tokens(self) -> int:
        """Tokens of a sample in most of the depth: patches and class tokens."""
        return super().tokens + self.in_context_len

    def problems(self) -> Iterator[Problem]:
        """What the keys' types cannot say: see :mod:`moe_dit.schema`."""
        yield from super().problems()
        if self.in_context_len and self.in_context_start >= self.depth:
            yield "in_context_start", f"is {self.in_context_start}; it should be less than model.depth {self.depth}"


class BottleneckPatchEmbed(nn.Module):
    """Patches to tokens through a narrow linear layer: [N, C, side, side] -> [N, T, D], contiguous."""

    def __init__(self, in_channels: int, patch_size: int, bottleneck_dim: int, hidden_size: int):
        super().__init__()
        self.proj1 = PatchConv2d(in_channels, bottleneck_dim, patch_size, stride=patch_size, bias=False)
        self.proj2 = PatchConv2d(bottleneck_dim, hidden_size, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj2(self.proj1(x)).flatten(2).transpose(1, 2)


class JiT(Network):
    """The network; arguments are the keys of :class:`JiTConfig`."""

    # The published code draws a SwiGLU's gate and up as one matrix [2 F, D]: each gets the spread of that larger one.
    weight_rules = [  # noqa: RUF012  # a constant
        (r"(gate|up)_proj(\.weight)?$", "uniform", lambda shape: math.sqrt(6 / (2 * shape[-2] + shape[-1]))),
    ]

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
        bottleneck_dim: int,
        in_context_len: int,
        in_context_start: int,
        moe: dict[str, Any] | None = None,
        attn_dropout: float = 0.0,
        proj_dropout: float = 0.0,
    ):
        super().__init__()
        self.num_classes = num_classes
        self.in_channels = in_channels
        self.out_channels = in_channels
        self.in_context_len = in_context_len
        self.in_context_start = in_context_start
        side = input_size // patch_size
        self.x_embedder = BottleneckPatchEmbed(in_channels, patch_size, bottleneck_dim, hidden_size)
        self.c_embedder = ConditionEmbedder(hidden_size, num_classes)
        self.in_context_posemb = None
        if in_context_len:
            self.in_context_posemb = nn.Parameter(torch.empty(1, in_context_len, hidden_size))

        def block(i: int, is_moe: bool) -> Block:
            # Dropout acts in the middle half of the depth only.
            dropping = depth // 4 <= i < depth // 4 * 3
            mlp: nn.Module
            if moe is not None and is_moe:
                mlp = MoE(hidden_size, **moe | {"bias": True, "dropout": moe.get("dropout", 0.0) if dropping else 0.0})
            else:
                width = int(int(hidden_size * mlp_ratio) * 2 / 3)  # as many weights as a two-layer MLP
                mlp = SwiGLU(hidden_size, width, bias=True, dropout=proj_dropout if dropping else 0.0)
            return Block(
                hidden_size,
                num_heads,
                mlp,
                rms_norm,
                norm_layer=rms_norm,
                qk_norm=True,
                num_prefix_tokens=in_context_len if i >= in_context_start else 0,
                attn_drop=attn_dropout if dropping else 0.0,
                proj_drop=proj_dropout if dropping else 0.0,
            )

        self.blocks = Blocks(block(i, is_moe) for i, is_moe in enumerate(moe_blocks(depth)))
        self.final_layer = FinalLayer(hidden_size, patch_size**2 * in_channels, rms_norm)
        self.register_buffer("rope", sin_cos_table(rope_2d(hidden_size // num_heads, side)), persistent=False)
        self.register_buffer("pos_embed", sin_cos_2d(hidden_size, side))

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Predict the image from a noisy one.

        Args:
            x: [N, C, side, side].
            t: [N] in [0, 1], 0 is noise and 1 is data.
            y: int64 [N] in [0, num_classes]; num_classes is the null label. Labels are never dropped here.

        Returns:
            [N, C, side, side].
        """
        h_NTD = self.x_embedder(x.to(self.final_layer.linear.weight.dtype))
        h_NTD = h_NTD + self.pos_embed.to(h_NTD.dtype)
        c_ND = self.c_embedder(t, y)
        for i, (block, modulation) in enumerate(zip(self.blocks, self.blocks.modulations(c_ND), strict=True)):
            if i == self.in_context_start and self.in_context_posemb is not None:
                # Tokens that carry the label and no position: attention leaves them unrotated.
                class_tokens = self.c_embedder.label(y)[:, None] + self.in_context_posemb
                h_NTD = torch.cat([class_tokens, h_NTD], dim=1)
            h_NTD = block(h_NTD, modulation, self.rope)
        return unpatchify(self.final_layer(h_NTD[:, self.in_context_len :], c_ND), self.out_channels)
