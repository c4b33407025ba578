"""The one mixture-of-experts layer: token choice, sigmoid scores, group-limited top-k, nothing dropped.

The router is DeepSeek-V3's (arXiv:2412.19437, section 2.1.2) as used by arXiv:2512.01252. Expert weights are stacked on
a leading expert dimension, so that a slice of it is an expert-parallel rank's share; which rank holds what is not this
file's business. Shapes: T tokens, D width, E experts, K = top_k, F expert width.
"""

import torch
import torch.nn.functional as F
from torch import nn


class Router(nn.Module):
    """Chooses K of E experts for each token.

    Logits and scores are float32 whatever the model's precision: the choice is a comparison of close numbers.
    ``e_score_correction_bias`` moves the choice, never the weights, and gets no gradient.
    """

    e_score_correction_bias: torch.Tensor

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        routed_scale: float,
        num_groups: int = 1,
        num_groups_kept: int = 1,
    ):
        super().__init__()
        self.top_k, self.routed_scale = top_k, routed_scale
        self.num_groups, self.num_groups_kept = num_groups, num_groups_kept
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.register_buffer("e_score_correction_bias", torch.zeros(num_experts, device="cpu"))

    def forward(self, x_TD: torch.Tensor, expert_bias: None = None):
        """Route tokens.

        Args:
            x_TD: tokens.
            expert_bias: a second bias that DeepSpeed's AutoEP layer can pass; not used here, always None.

        Returns:
            weights float32 [T, K] (positive, summing to ``routed_scale``), experts int64 [T, K], and the number of
            tokens each expert got, int32 [E].
        """
        scores_TE = torch.sigmoid(F.linear(x_TD.float(), self.weight.float()))
        choice_TE = scores_TE + self.e_score_correction_bias
        if self.num_groups > 1:
            choice_TE = self._keep_best_groups(choice_TE)
        experts_TK = choice_TE.topk(self.top_k, dim=-1, sorted=False).indices
        weights_TK = scores_TE.gather(1, experts_TK)
        weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20) * self.routed_scale
        # scatter_add rather than bincount: bincount waits for the GPU to learn its output's size.
        ones = torch.ones_like(experts_TK, dtype=torch.int32).flatten()
        counts_E = ones.new_zeros(scores_TE.shape[1]).scatter_add_(0, experts_TK.flatten(), ones)
        return weights_TK, experts_TK, counts_E

    def _keep_best_groups(self, choice_TE: torch.Tensor) -> torch.Tensor:
        """Put experts outside a token's best groups out of reach; a group's score is the sum of its two best."""
        choice_TGE = choice_TE.unflatten(1, (self.num_groups, -1))
        group_TG = choice_TGE.topk(2, dim=-1).values.sum(-1)
        kept_TG = group_TG.topk(self.num_groups_kept, dim=-1, sorted=False).indices
        out_TG = torch.ones_like(group_TG, dtype=torch.bool).scatter_(1, kept_TG, False)
        return choice_TGE.masked_fill(out_TG[..., None], float("-inf")).flatten(1)


class Experts(nn.Module):
    """Stacked SwiGLU experts, applied to rows that are sorted by expert.

    Args:
        implementation: "grouped" (one grouped matrix product for all experts; the fast path on GPUs), "loop" (a
            product per expert: CPUs and old GPUs, and the form to check the other against) or "auto" (grouped for
            bf16 on a GPU, else loop: elsewhere torch's grouped product is slower or absent).
    """

    def __init__(self, num_experts: int, hidden_size: int, expert_width: int, implementation: str = "auto"):
        super().__init__()
        self.implementation = implementation
        self.gate_proj = nn.Parameter(torch.empty(num_experts, expert_width, hidden_size))
        self.up_proj = nn.Parameter(torch.empty(num_experts, expert_width, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, expert_width))

    def forward(self, x_ND: torch.Tensor, counts_E: torch.Tensor) -> torch.Tensor:
        """Apply expert e to its counts_E[e] rows; rows past the last expert's (padding) give zeros or rubbish."""
        grouped = x_ND.is_cuda and x_ND.dtype == torch.bfloat16
        if self.implementation == "grouped" or (self.implementation == "auto" and grouped):
            return self._grouped(x_ND, counts_E)
        return self._loop(x_ND, counts_E)

    def _grouped(self, x_ND: torch.Tensor, counts_E: torch.Tensor) -> torch.Tensor:
        ends_E = counts_E.cumsum(0, dtype=torch.int32)
        gate_NF = torch._grouped_mm(x_ND, self.gate_proj.transpose(1, 2), offs=ends_E)
        up_NF = torch._grouped_mm(x_ND, self.up_proj.transpose(1, 2), offs=ends_E)
        return torch._grouped_mm(F.silu(gate_NF) * up_NF, self.down_proj.transpose(1, 2), offs=ends_E)

    def _loop(self, x_ND: torch.Tensor, counts_E: torch.Tensor) -> torch.Tensor:
        counts = counts_E.tolist()
        rows = list(x_ND.split([*counts, len(x_ND) - sum(counts)]))
        for e, x in enumerate(rows[:-1]):
            hidden = F.silu(F.linear(x, self.gate_proj[e])) * F.linear(x, self.up_proj[e])
            rows[e] = F.linear(hidden, self.down_proj[e])
        rows[-1] = torch.zeros_like(rows[-1])
        return torch.cat(rows)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) without biases: the shared expert."""

    def __init__(self, hidden_size: int, width: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, width, bias=False)
        self.up_proj = nn.Linear(hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class MoE(nn.Module):
    """Routed experts plus one shared expert of the same width (or, without it, plus the layer's input)."""

    tokens_per_expert: torch.Tensor

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        expert_width: int,
        routed_scale: float,
        num_groups: int = 1,
        num_groups_kept: int = 1,
        shared_expert: bool = True,
    ):
        super().__init__()
        self.router = Router(hidden_size, num_experts, top_k, routed_scale, num_groups, num_groups_kept)
        self.experts = Experts(num_experts, hidden_size, expert_width)
        self.shared_experts = SwiGLU(hidden_size, expert_width) if shared_expert else None
        # Tokens each expert got since the counts were last reset; whoever trains reads and resets them.
        self.register_buffer("tokens_per_expert", torch.zeros(num_experts, device="cpu"), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., D] -> [..., D]."""
        x_TD = x.flatten(0, -2)
        weights_TK, experts_TK, counts_E = self.router(x_TD)
        with torch.no_grad():
            self.tokens_per_expert += counts_E
        top_k = experts_TK.shape[1]
        order_N = experts_TK.flatten().argsort(stable=True)  # rows sorted by expert; N = T K
        out_ND = self.experts(x_TD[order_N // top_k], counts_E)
        slots_TKD = torch.empty_like(out_ND).index_copy(0, order_N, out_ND).unflatten(0, (-1, top_k))
        routed_TD = (slots_TKD * weights_TK[..., None]).sum(1).to(x.dtype)
        other = x if self.shared_experts is None else self.shared_experts(x)
        return routed_TD.view_as(x) + other
