"""DSMoE: a latent diffusion transformer whose odd blocks are DeepSeek-style mixtures of experts (arXiv:2512.01252).

Shapes: N samples, C channels, T tokens, D width.
"""

from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from timm.layers import PatchEmbed
from torch import nn

from moe_dit.models.layers import Block, ConditionEmbedder, FinalLayer, dense_mlp, rope_2d, sin_cos_table, unpatchify
from moe_dit.models.moe import MoE


class DSMoE(ModelMixin, ConfigMixin):  # type: ignore[misc]  # diffusers' own pair
    """The network; arguments are a recipe's ``model`` section.

    Weights are uninitialised until :func:`moe_dit.initialization.initialize` or a load.
    """

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
    ):
        super().__init__()
        self.num_classes, self.in_channels = num_classes, in_channels
        self.out_channels = in_channels * 2 if learn_sigma else in_channels
        self.x_embedder = PatchEmbed(input_size, patch_size, in_channels, hidden_size)
        self.c_embedder = ConditionEmbedder(hidden_size, num_classes)
        self.blocks = nn.ModuleList(
            Block(hidden_size, num_heads, MoE(hidden_size, **moe) if i % 2 else dense_mlp(hidden_size, mlp_ratio))
            for i in range(depth)
        )
        self.final_layer = FinalLayer(hidden_size, patch_size**2 * self.out_channels)
        rope = sin_cos_table(rope_2d(hidden_size // num_heads, input_size // patch_size))
        self.register_buffer("rope", rope, persistent=False)

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
        c_ND = self.c_embedder(t, y)
        for block in self.blocks:
            h_NTD = block(h_NTD, c_ND, self.rope)
        return unpatchify(self.final_layer(h_NTD, c_ND), self.out_channels)
