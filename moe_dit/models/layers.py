"""Parts that the network families share: embedders, position encodings, modulation, the block and the final layer.

Shapes: N samples, T tokens, D width.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import TimestepEmbedding, Timesteps, get_2d_sincos_pos_embed
from timm.layers import AttentionRope, Mlp
from timm.layers import PatchEmbed as TimmPatchEmbed
from torch import nn

from moe_dit.models.dropout import Dropout

layer_norm = partial(nn.LayerNorm, elementwise_affine=False, eps=1e-6)
rms_norm = partial(nn.RMSNorm, eps=1e-6)
NORMS: dict[str, Callable[[int], nn.Module]] = {"layernorm": layer_norm, "rmsnorm": rms_norm}


def modulate(x_NTD: torch.Tensor, shift_ND: torch.Tensor, scale_ND: torch.Tensor) -> torch.Tensor:
    """adaLN's shift and scale of every token of a sample (Peebles & Xie, arXiv:2212.09748)."""
    return torch.addcmul(shift_ND[:, None], x_NTD, 1 + scale_ND[:, None])


def rope_1d(head_dim: int, positions: torch.Tensor, theta: float = 10000.0) -> torch.Tensor:
    """Rotary table [T, head_dim] of angles, each repeated for its pair of channels (RoFormer, arXiv:2104.09864).

    timm's and diffusers' tables differ from the published code's in the last bits (up to 9e-7), so ours is made here.
    """
    frequencies = theta ** (-torch.arange(0, head_dim, 2, device="cpu", dtype=torch.float32) / head_dim)
    return torch.outer(positions.float(), frequencies).repeat_interleave(2, dim=-1)


def rope_2d(head_dim: int, side: int) -> torch.Tensor:
    """Rotary table [side * side, head_dim]: half of the channels turn with the row, half with the column."""
    line = rope_1d(head_dim // 2, torch.arange(side, device="cpu"))
    rows = line[:, None].expand(side, side, -1)
    columns = line[None].expand(side, side, -1)
    return torch.cat([rows, columns], dim=-1).flatten(0, 1)


def sin_cos_table(angles: torch.Tensor) -> torch.Tensor:
    """Angles [T, C] to [T, 2 C], sines then cosines; of a rotary table, the form that timm's attention takes."""
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def sin_cos_2d(width: int, side: int) -> torch.Tensor:
    """Fixed position embedding [side * side, width] to add to tokens (MAE, arXiv:2111.06377; DiT).

    A quarter of the channels each: sines and cosines of the column, sines and cosines of the row.
    """
    return get_2d_sincos_pos_embed(width, side, base_size=side, device=torch.device("cpu"), output_type="pt").float()


class PatchConv2d(nn.Conv2d):
    """A convolution whose stride is its kernel, as the one matrix product that it is.

    On GPUs cuDNN would compute it in TF32 where all else is float32, which is torch's default. Its result [N, D, h, w]
    lies with the channels last, so that tokens made of it are contiguous: every sum in a network keeps the strides of
    its first operand, and each norm would copy its input.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[N, C, h * patch, w * patch] -> [N, D, h, w]."""
        rows, columns = self.kernel_size
        x_NChpwp = input.unflatten(3, (-1, columns)).unflatten(2, (-1, rows))
        patches = x_NChpwp.permute(0, 2, 4, 1, 3, 5).flatten(3)
        return F.linear(patches, self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


class PatchEmbed(TimmPatchEmbed):
    """Patches to tokens by one linear map: [N, C, side, side] -> [N, T, D], contiguous."""

    def __init__(self, side: int, patch_size: int, channels: int, hidden_size: int):
        super().__init__(side, patch_size, channels, hidden_size)
        self.proj = PatchConv2d(channels, hidden_size, patch_size, stride=patch_size)


class ConditionEmbedder(nn.Module):
    """Time and label to one conditioning vector: c = MLP(sinusoid(t)) + table[y].

    The table's last row is the null class that stands for "no label".
    """

    def __init__(self, hidden_size: int, num_classes: int, frequency_size: int = 256):
        super().__init__()
        self.frequencies = Timesteps(frequency_size, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time = TimestepEmbedding(frequency_size, hidden_size)
        self.label = nn.Embedding(num_classes + 1, hidden_size)

    def forward(self, t_N: torch.Tensor, y_N: torch.Tensor) -> torch.Tensor:
        """t_N float in [0, 1], y_N int64 in [0, num_classes] -> [N, D]."""
        return self.embed_time(t_N) + self.label(y_N)

    def embed_time(self, t_N: torch.Tensor) -> torch.Tensor:
        """The time's part, [N, D]."""
        return self.time(self.frequencies(t_N).to(self.label.weight.dtype))


def rotate(x_NTHC: torch.Tensor, table_TS: torch.Tensor) -> torch.Tensor:
    """Turn pairs of channels (2 i, 2 i + 1) by their token's angles.

    Computed in the table's precision and given in that of x. Swapping by ``flip`` and signs by arithmetic, where
    stacking would fill tensors, let compiling make one kernel of it.

    Args:
        x_NTHC: [N, T, heads, C].
        table_TS: sines then cosines [T, 2 C] (:func:`sin_cos_table`).
    """
    sin_T1C, cos_T1C = table_TS[:, None].chunk(2, dim=-1)
    if x_NTHC.device.type == "cpu" and x_NTHC.dtype == torch.float32 and not torch.compiler.is_compiling():
        # The same products and sums as complex numbers, in one pass; torch.compile has no kernels for them.
        turn_T1C = torch.complex(cos_T1C[..., 1::2].contiguous(), sin_T1C[..., 1::2].contiguous())
        return torch.view_as_real(torch.view_as_complex(x_NTHC.unflatten(-1, (-1, 2))) * turn_T1C).flatten(-2)
    swapped = x_NTHC.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    sign_C = torch.arange(x_NTHC.shape[-1], device=x_NTHC.device) % 2 * 2 - 1  # - + - + ...
    return (x_NTHC * cos_T1C + swapped * (sign_C * sin_T1C)).to(x_NTHC.dtype)


class Attention(AttentionRope):
    """timm's attention, whose tokens past ``num_prefix_tokens`` turn by position, with no copy of what does not turn.

    timm 1.0's own forward concatenates a prefix of no tokens, whose gradients are zero-filled copies.
    """

    def forward(  # type: ignore[override]  # without timm's masks
        self, x_NTD: torch.Tensor, rope: torch.Tensor | None = None
    ) -> torch.Tensor:
        """[N, T, D] -> the same."""
        # Heads stay behind tokens until attention, so that the three gradients are one row of the product's again.
        q, k, v = self.qkv(x_NTD).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(2)
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            if self.num_prefix_tokens:  # an angle of 0 leaves a token where it is: sine 0, cosine 1
                still = rope.new_zeros(self.num_prefix_tokens, rope.shape[1])
                still[:, rope.shape[1] // 2 :] = 1
                rope = torch.cat([still, rope])
            q, k = rotate(q, rope).type_as(v), rotate(k, rope).type_as(v)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if self.fused_attn:
            out = F.scaled_dot_product_attention(q, k, v)
        else:
            out = self.attn_drop((q * self.scale @ k.transpose(-2, -1)).softmax(dim=-1)) @ v
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))


# Shift, scale and gate of attention, then those of the MLP: [N, D] each.
Modulation: TypeAlias = tuple[torch.Tensor, ...]


class Block(nn.Module):
    """Transformer block with adaLN-Zero: attention, then ``mlp`` (dense or MoE).

    Args:
        hidden_size: D.
        num_heads: attention heads.
        mlp: maps [N, T, D] to the same.
        norm: makes a norm over D.
        attn_drop: dropout of attention weights.
        proj_drop: dropout of attention's output.
        **attention: further arguments of :class:`Attention`. Its first ``num_prefix_tokens`` are not rotated.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        mlp: nn.Module,
        norm: Callable[[int], nn.Module] = layer_norm,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        **attention: Any,
    ):
        super().__init__()
        self.norm1 = norm(hidden_size)
        self.attn = Attention(hidden_size, num_heads, **{"num_prefix_tokens": 0} | attention)
        # timm's attention with dropout modules of ours; torch's fused kernel would draw what it drops by itself.
        attention_module: Any = self.attn
        attention_module.attn_drop = Dropout(attn_drop)
        attention_module.proj_drop = Dropout(proj_drop)
        if attn_drop:
            attention_module.fused_attn = False
        self.norm2 = norm(hidden_size)
        self.mlp = mlp
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def attend(
        self, x_NTD: torch.Tensor, modulation: Modulation, rope: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """All that comes before ``mlp``: tokens after attention and what ``mlp`` gets, both [N, T, D]."""
        shift1, scale1, gate1, shift2, scale2, _ = modulation
        x_NTD = torch.addcmul(x_NTD, gate1[:, None], self.attn(modulate(self.norm1(x_NTD), shift1, scale1), rope=rope))
        return x_NTD, modulate(self.norm2(x_NTD), shift2, scale2)

    def forward(self, x_NTD: torch.Tensor, modulation: Modulation, rope: torch.Tensor | None) -> torch.Tensor:
        """Tokens [N, T, D] by one of :meth:`Blocks.modulations` and a rotary table, or none."""
        x_NTD, h_NTD = self.attend(x_NTD, modulation, rope)
        return torch.addcmul(x_NTD, modulation[5][:, None], self.mlp(h_NTD))


class Blocks(nn.ModuleList):
    """A network's blocks, called one by one with what :meth:`modulations` gives for each."""

    def modulations(self, c_ND: torch.Tensor) -> Sequence[Modulation]:
        """Each block's, by the conditioning [N, D]."""
        blocks: Any = self
        return [block.adaLN_modulation(c_ND).chunk(6, dim=1) for block in blocks]


class FinalLayer(nn.Module):
    """Modulated norm and a linear map from tokens to patches."""

    def __init__(self, hidden_size: int, patch_values: int, norm: Callable[[int], nn.Module] = layer_norm):
        super().__init__()
        self.norm_final = norm(hidden_size)
        self.linear = nn.Linear(hidden_size, patch_values)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x_NTD: torch.Tensor, c_ND: torch.Tensor) -> torch.Tensor:
        shift, scale = self.adaLN_modulation(c_ND).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x_NTD), shift, scale))


def dense_mlp(hidden_size: int, mlp_ratio: float, activation: Any = nn.SiLU) -> nn.Module:
    """timm's two-layer MLP, hidden width int(hidden_size * mlp_ratio)."""
    return Mlp(hidden_size, int(hidden_size * mlp_ratio), act_layer=activation)


def moe_blocks(depth: int, interleave: bool = True, dense_first: int = 0) -> list[bool]:
    """Which blocks are mixtures of experts: the odd ones, or all, but none of the first ``dense_first``."""
    return [(i % 2 == 1 or not interleave) and i >= dense_first for i in range(depth)]


def unpatchify(x_NTP: torch.Tensor, channels: int) -> torch.Tensor:
    """Patches [N, T, patch * patch * channels] (channel last, row major) back to a square [N, channels, side, side]."""
    tokens, values = x_NTP.shape[1:]
    side = round(tokens**0.5)
    patch = round((values / channels) ** 0.5)
    x = x_NTP.view(-1, side, side, patch, patch, channels).permute(0, 5, 1, 3, 2, 4)
    return x.reshape(-1, channels, side * patch, side * patch)
