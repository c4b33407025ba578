"""DiffMoE: a latent diffusion transformer whose experts choose tokens among a whole batch (arXiv:2503.14487).

Shapes: N samples, C channels, T tokens (of all samples in the MoE layer), D width, E experts, K tokens an expert takes,
R rows (chosen token and expert pairs).
"""

from collections.abc import Iterator
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from pydantic.dataclasses import dataclass
from timm.layers import Mlp
from torch import nn

from moe_dit.models.layers import (
    Block,
    Blocks,
    ConditionEmbedder,
    FinalLayer,
    PatchEmbed,
    dense_mlp,
    moe_blocks,
    sin_cos_2d,
    unpatchify,
)
from moe_dit.models.moe import Experts, SwiGLU
from moe_dit.models.network import Network, NetworkConfig
from moe_dit.models.recomputing import recomputing
from moe_dit.schema import STRICT, BuiltCount, Natural, NonNegative, Positive, Problem

gelu_tanh: Any = partial(nn.GELU, approximate="tanh")


@dataclass(frozen=True, config=STRICT)
class ExpertChoiceConfig:
    """DiffMoE's layer: experts choose tokens among a rank's whole batch."""

    num_experts: BuiltCount
    capacity: Positive  # experts a token gets on average in training
    shared_experts: Natural = 0  # 0, or any number for one dense MLP of twice the usual width, as published

    def problems(self) -> Iterator[Problem]:
        """What the keys' types cannot say: see :mod:`moe_dit.schema`."""
        if self.capacity > self.num_experts:
            yield "capacity", f"is {self.capacity}; a token has only the {self.num_experts} experts of num_experts"


@dataclass(frozen=True, config=STRICT, kw_only=True)
class DiffMoEConfig(NetworkConfig):
    """The ``model`` section of a DiffMoE recipe."""

    family: Literal["diffmoe"]
    moe: ExpertChoiceConfig
    capacity_loss_weight: NonNegative  # of the capacity predictors' loss
    learn_sigma: bool = True
    gated: bool = False  # SwiGLU without biases for every MLP
    interleave: bool = True


class ExpertChoiceMoE(nn.Module):
    """Each expert takes the tokens of the batch that score highest for it.

    In training it takes ``capacity * T / E`` of them. A small predictor, which sends no gradient into the network,
    learns from the tokens' values alone which were taken; ``expert_threshold`` follows, as an exponential mean that
    each training forward moves, the prediction that just as many tokens exceed. In evaluation an expert takes as many
    tokens as exceed its threshold.

    Args:
        hidden_size: D.
        expert_width: hidden width of an expert.
        num_experts: E.
        capacity: experts that a token gets on average in training.
        capacity_loss_weight: of the predictor's loss.
        shared_experts: 0, or any number for one dense MLP of twice the usual width, as published.
        gated: SwiGLU experts without biases instead of GELU MLPs with them.
    """

    expert_threshold: torch.Tensor
    ema_decay: torch.Tensor

    def __init__(
        self,
        hidden_size: int,
        expert_width: int,
        num_experts: int,
        capacity: float,
        capacity_loss_weight: float,
        shared_experts: int = 0,
        gated: bool = False,
    ):
        super().__init__()
        self.num_experts = num_experts
        self.capacity = capacity
        self.capacity_loss_weight = capacity_loss_weight
        self.gate_weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.experts = Experts(num_experts, hidden_size, expert_width, bias=not gated, gated=gated)
        self.capacity_predictor = nn.Sequential(
            nn.Linear(hidden_size, hidden_size), nn.SiLU(), nn.Linear(hidden_size, num_experts)
        )
        self.shared_experts = Mlp(hidden_size, 8 * hidden_size, act_layer=gelu_tanh) if shared_experts else None
        self.register_buffer("expert_threshold", torch.zeros(num_experts, device="cpu"))
        self.register_buffer("ema_decay", torch.full((1,), 0.95, device="cpu"))
        # The predictor's weighted cross-entropy in the last training forward; nothing after one in evaluation.
        self.layer_losses: dict[str, torch.Tensor] = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, tokens of a sample, D] -> the same."""
        x_TD = x.flatten(0, -2)
        token_R, score_R, count_E = self.choose(x_TD)
        out_RD = self.experts(x_TD.index_select(0, token_R), count_E) * score_R[:, None]
        routed_TD = out_RD.new_zeros(x_TD.shape).index_add(0, token_R, out_RD).to(x.dtype)
        routed = routed_TD.view_as(x)
        return routed if self.shared_experts is None else routed + self.shared_experts(x)

    def choose(self, x_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The experts' tokens, int64 [R] sorted by expert; their scores, float32 [R]; tokens an expert, int32 [E]."""
        capacity_TE = self.capacity_predictor(x_TD.detach()).float()
        with torch.autocast(x_TD.device.type, enabled=False):
            scores_ET = F.linear(x_TD.float(), self.gate_weight.float()).softmax(dim=-1).T
        if self.training:
            return self._choose_by_capacity(scores_ET, capacity_TE)
        self.layer_losses = {}
        return self._choose_by_threshold(scores_ET, capacity_TE)

    def _choose_by_capacity(self, scores_ET: torch.Tensor, capacity_TE: torch.Tensor):
        take = int(scores_ET.shape[1] / self.num_experts * self.capacity)
        score_EK, token_EK = scores_ET.topk(take, dim=-1, sorted=False)
        taken_ET = torch.zeros_like(scores_ET).scatter_(1, token_EK, 1.0)
        loss = F.binary_cross_entropy_with_logits(capacity_TE, taken_ET.T)
        if not recomputing():
            self.layer_losses = {"capacity_loss": self.capacity_loss_weight * loss}
            with torch.no_grad():
                quantile_E = capacity_TE.sigmoid().topk(take, dim=0).values[-1]
                self.expert_threshold.lerp_(quantile_E, 1 - self.ema_decay)
        count_E = torch.full_like(token_EK[:, 0], take, dtype=torch.int32)
        return token_EK.flatten(), score_EK.flatten(), count_E

    def _choose_by_threshold(self, scores_ET: torch.Tensor, capacity_TE: torch.Tensor):
        count_E = (capacity_TE.sigmoid() > self.expert_threshold).sum(0, dtype=torch.int32)
        score_ET, token_ET = scores_ET.sort(dim=-1, descending=True)
        taken_ET = torch.arange(scores_ET.shape[1], device=count_E.device) < count_E[:, None]
        return token_ET[taken_ET], score_ET[taken_ET], count_E


class DiffMoE(Network):
    """The network; arguments are the keys of :class:`DiffMoEConfig`.

    As published, the samples of a batch compete for the experts, in evaluation too: what is computed for one depends on
    the others.
    """

    couples_samples = True

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
        capacity_loss_weight: float,
        learn_sigma: bool = True,
        gated: bool = False,
        interleave: bool = True,
    ):
        super().__init__()
        self.num_classes = num_classes
        self.in_channels = in_channels
        self.out_channels = in_channels * 2 if learn_sigma else in_channels
        width = int(hidden_size * mlp_ratio)

        def dense() -> nn.Module:
            return SwiGLU(hidden_size, width) if gated else dense_mlp(hidden_size, mlp_ratio, gelu_tanh)

        def mixture() -> nn.Module:
            return ExpertChoiceMoE(hidden_size, width, capacity_loss_weight=capacity_loss_weight, gated=gated, **moe)

        self.x_embedder = PatchEmbed(input_size, patch_size, in_channels, hidden_size)
        self.c_embedder = ConditionEmbedder(hidden_size, num_classes)
        self.blocks = Blocks(
            Block(
                hidden_size,
                num_heads,
                mixture() if is_moe else dense(),
            )
            for is_moe in moe_blocks(depth, interleave)
        )
        self.final_layer = FinalLayer(hidden_size, patch_size**2 * self.out_channels)
        self.register_buffer("pos_embed", sin_cos_2d(hidden_size, input_size // patch_size))

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
        h_NTD = h_NTD + self.pos_embed.to(h_NTD.dtype)
        c_ND = self.c_embedder(t, y)
        for block, modulation in zip(self.blocks, self.blocks.modulations(c_ND), strict=True):
            h_NTD = block(h_NTD, modulation, None)
        return unpatchify(self.final_layer(h_NTD, c_ND), self.out_channels)
