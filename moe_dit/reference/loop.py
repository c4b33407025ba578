"""A network as the published code computes it: what ours is timed beside, and held against.

Linear maps, norms and embedders are our network's own; the rest is computed as published: a module for each expert, a
Python loop over them with a gather, an index_add, and gradients of the gathers that fill a whole batch of tokens each;
tokens that are a transposed view from the embedding on; DiffMoE's outputs scattered to [E T, D]; attention with its
rotation as published. Everything is float32. Dropout is torch's. Shapes: N samples, T tokens, D width, E experts,
K = top_k.
"""

import copy
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from moe_dit.models.diffmoe import ExpertChoiceMoE
from moe_dit.models.dropout import Dropout
from moe_dit.models.jit import JiT
from moe_dit.models.layers import Modulation
from moe_dit.models.moe import Experts, MoE


def published_form(network: nn.Module) -> nn.Module:
    """A copy of a network (with weights, not expert-parallel) in the form of the published code, in training mode."""
    form = copy.deepcopy(network)
    blocks: Any = form.blocks
    for module in form.modules():
        if isinstance(module, Dropout):
            module.draws = None
    for block in blocks:
        block.attn = Attention(block.attn, fused=not isinstance(network, JiT))
        if isinstance(block.mlp, MoE):
            block.mlp = TokenChoice(block.mlp, fused=isinstance(network, JiT))
        elif isinstance(block.mlp, ExpertChoiceMoE):
            block.mlp = ExpertChoice(block.mlp)
        block.forward = partial(_block, block)
    embedder: Any = form.x_embedder
    embedder.register_forward_hook(lambda *call: call[-1].transpose(1, 2).contiguous().transpose(1, 2))
    return form.train()


def _block(block: Any, x_NTD: torch.Tensor, modulation: Modulation, rope: torch.Tensor | None) -> torch.Tensor:
    """A block's forward pass; its tokens are the transposed view that patches are embedded to."""
    shift1, scale1, gate1, shift2, scale2, gate2 = modulation
    h_NTD = block.norm1(x_NTD) * (1 + scale1[:, None]) + shift1[:, None]
    x_NTD = x_NTD + gate1[:, None] * block.attn(h_NTD, rope=rope)
    return x_NTD + gate2[:, None] * block.mlp(block.norm2(x_NTD) * (1 + scale2[:, None]) + shift2[:, None])


def stacked_gradients(form: nn.Module) -> dict[str, torch.Tensor]:
    """The gradients of a published form by the names of our network's weights."""
    found = {name: weight.grad for name, weight in form.named_parameters() if weight.grad is not None}
    for prefix, module in form.named_modules():
        if isinstance(module, nn.ModuleList) and prefix.endswith(".experts"):
            lists: dict[str, list[torch.Tensor]] = {}
            for expert in module:
                for name, gradient in expert.gradients().items():  # type: ignore[operator]
                    lists.setdefault(f"{prefix}.{name}", []).append(gradient)
            found |= {name: torch.stack(gradients) for name, gradients in lists.items()}
    return found


def _linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach().clone())
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone())
    return layer


class Expert(nn.Module):
    """One of stacked experts as a module of linear layers: SwiGLU (gate and up in one, where fused) or a plain MLP."""

    def __init__(self, experts: Experts, e: int, fused: bool):
        super().__init__()

        def part(name: str) -> tuple[torch.Tensor, torch.Tensor | None]:
            bias = getattr(experts, f"{name}_bias")
            return getattr(experts, f"{name}_proj")[e], None if bias is None else bias[e]

        self.fused = fused
        self.gated = experts.gate_proj is not None
        if fused:
            (gate, gate_bias), (up, up_bias) = part("gate"), part("up")
            bias = None if gate_bias is None or up_bias is None else torch.cat([gate_bias, up_bias])
            self.gate_up = _linear(torch.cat([gate, up]), bias)
        else:
            if self.gated:
                self.gate = _linear(*part("gate"))
            self.up = _linear(*part("up"))
        self.down = _linear(*part("down"))
        self.dropout = nn.Dropout(experts.dropout.p)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.fused:
            gate, up = self.gate_up(x).chunk(2, dim=-1)
            hidden = F.silu(gate) * up
        elif self.gated:
            hidden = F.silu(self.gate(x)) * self.up(x)
        else:
            hidden = F.gelu(self.up(x), approximate="tanh")
        return self.down(self.dropout(hidden))

    def gradients(self) -> dict[str, torch.Tensor]:
        """Gradients by the names of :class:`Experts`; zeros where the expert got no token."""
        found: dict[str, torch.Tensor] = {}
        for name, layer in self.named_children():
            if isinstance(layer, nn.Linear):
                for kind, weight in (("proj", layer.weight), ("bias", layer.bias)):
                    if weight is not None:
                        gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad
                        halves = zip(("gate", "up"), gradient.chunk(2), strict=True)
                        parts = dict(halves) if name == "gate_up" else {name: gradient}
                        found |= {f"{part}_{kind}": value for part, value in parts.items()}
        return found


class TokenChoice(nn.Module):
    """DSMoE's and JiTMoE's mixture."""

    def __init__(self, moe: MoE, fused: bool):
        super().__init__()
        self.router = moe.router
        self.experts = nn.ModuleList(Expert(moe.experts, e, fused) for e in range(len(moe.experts.up_proj)))
        self.shared_experts = moe.shared_experts

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x_TD = x.flatten(0, -2)
        weights_TK, experts_TK, _ = self.router(x_TD)
        out_TD = torch.zeros_like(x_TD)
        chosen_EKT = F.one_hot(experts_TK, len(self.experts)).permute(2, 1, 0)
        for e in chosen_EKT.sum((1, 2)).nonzero().flatten().tolist():
            choice, token = torch.where(chosen_EKT[e])
            out_TD.index_add_(0, token, self.experts[e](x_TD[token]) * weights_TK[token, choice, None])
        return out_TD.view_as(x) + (x if self.shared_experts is None else self.shared_experts(x))


class ExpertChoice(nn.Module):
    """DiffMoE's mixture in training."""

    def __init__(self, moe: ExpertChoiceMoE):
        super().__init__()
        experts = [Expert(moe.experts, e, fused=False) for e in range(moe.num_experts)]
        self.experts = nn.ModuleList(experts)
        self.shared_experts = moe.shared_experts
        self.capacity = moe.capacity
        self.capacity_loss_weight = moe.capacity_loss_weight
        self.gate_weight = moe.gate_weight
        self.capacity_predictor = moe.capacity_predictor
        self.threshold_E = moe.expert_threshold.clone()
        self.layer_losses: dict[str, torch.Tensor] = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x_TD = x.flatten(0, -2)
        tokens, experts = len(x_TD), len(self.experts)
        take = int(tokens / experts * self.capacity)
        predicted_TE = self.capacity_predictor(x_TD.detach())
        scores_ET = F.linear(x_TD, self.gate_weight).softmax(dim=-1).T
        score_EK, token_EK = scores_ET.topk(take, dim=-1, sorted=False)
        taken_ET = torch.zeros_like(scores_ET).scatter_(1, token_EK, 1.0)
        loss = F.binary_cross_entropy_with_logits(predicted_TE, taken_ET.T)
        self.layer_losses = {"capacity_loss": self.capacity_loss_weight * loss}
        x_EKD = x_TD[token_EK]
        out_EKD = torch.stack([expert(x_KD) for expert, x_KD in zip(self.experts, x_EKD, strict=True)])
        place_EK = token_EK + torch.arange(experts, device=x.device)[:, None] * tokens
        out = torch.zeros(experts * tokens, x.shape[-1], device=x.device)
        rows = (out_EKD * score_EK[..., None]).flatten(0, 1)
        out = out.scatter(0, place_EK.view(-1, 1).expand_as(rows), rows).view(experts, *x_TD.shape).sum(0)
        with torch.no_grad():
            share_TE = predicted_TE.sigmoid()
            for e in range(experts):
                quantile = share_TE[:, e].topk(take).values[-1]
                self.threshold_E[e] = 0.95 * self.threshold_E[e] + 0.05 * quantile
        return out.view_as(x) if self.shared_experts is None else out.view_as(x) + self.shared_experts(x)


class Attention(nn.Module):
    """Attention whose queries and keys turn by two products and a sum; JiT's computes its softmax itself."""

    def __init__(self, attention: Any, fused: bool):
        super().__init__()
        self.heads = attention.num_heads
        self.prefix = attention.num_prefix_tokens
        self.fused = fused
        self.qkv = attention.qkv
        self.q_norm = attention.q_norm
        self.k_norm = attention.k_norm
        self.attn_drop = attention.attn_drop
        self.proj = attention.proj
        self.proj_drop = attention.proj_drop

    def forward(self, x_NTD: torch.Tensor, rope: torch.Tensor | None = None) -> torch.Tensor:
        q, k, v = self.qkv(x_NTD).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            sin_TC, cos_TC = rope.chunk(2, dim=-1)
            sin_TC = F.pad(sin_TC, (0, 0, self.prefix, 0))
            cos_TC = F.pad(cos_TC, (0, 0, self.prefix, 0), value=1.0)
            q, k = (self._turn(z, sin_TC, cos_TC) for z in (q, k))
        if self.fused:
            out = F.scaled_dot_product_attention(q, k, v)
        else:
            weights = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
            out = self.attn_drop(weights.softmax(dim=-1)) @ v
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))

    def _turn(self, x: torch.Tensor, sin_TC: torch.Tensor, cos_TC: torch.Tensor) -> torch.Tensor:
        even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
        return x * cos_TC + torch.stack([-odd, even], dim=-1).flatten(-2) * sin_TC
