"""The token-choice mixture-of-experts layer: scores, group-limited top-k, nothing dropped.

The router is DeepSeek-V3's (arXiv:2412.19437, section 2.1.2) as used by arXiv:2512.01252; SCORES and AUXILIARY_LOSSES
hold the variants that a recipe can name. Expert weights are stacked on a leading expert dimension, so that a slice of
it is an expert-parallel rank's share; which rank holds what is not this file's business. Shapes: T tokens, D width,
E experts, K = top_k, F expert width.
"""

from collections.abc import Callable, Iterator
from dataclasses import field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from pydantic.dataclasses import dataclass
from torch import nn

from moe_dit.kernels import combine, cpu, dispatch, places, swiglu
from moe_dit.models.dropout import Dropout
from moe_dit.models.recomputing import recomputing
from moe_dit.schema import STRICT, BuiltCount, Count, NonNegative, Positive, Problem, divisors, listed


@dataclass(frozen=True, config=STRICT)
class MoEConfig:
    """A token-choice mixture-of-experts layer (arXiv:2512.01252, section 3; DeepSeek-V3's router)."""

    num_experts: BuiltCount
    top_k: Count  # experts a token is sent to
    expert_width: Count  # hidden width of an expert's SwiGLU, and of the shared expert's
    routed_scale: Positive  # factor on the normalised routing weights
    num_groups: Count = 1  # group-limited routing: experts form this many groups ...
    num_groups_kept: Count = 1  # ... and a token sees only the best of them
    shared_expert: bool = True
    score: str = "sigmoid"  # one of SCORES
    auxiliary_losses: dict[str, NonNegative] = field(default_factory=dict)  # weight by name, of AUXILIARY_LOSSES

    def problems(self) -> Iterator[Problem]:
        """What the keys' types cannot say: see :mod:`moe_dit.schema`."""
        if self.score not in SCORES:
            yield "score", f"is {self.score!r}; choose one of {', '.join(SCORES)}"
        for name in self.auxiliary_losses:
            if name not in AUXILIARY_LOSSES:
                yield f"auxiliary_losses.{name}", f"is unknown; choose of {', '.join(AUXILIARY_LOSSES)}"
        if self.num_experts % self.num_groups:
            yield (
                "num_groups",
                f"is {self.num_groups}; it must divide num_experts {self.num_experts}: "
                f"{listed(divisors(self.num_experts))}",
            )
            return
        if self.num_groups_kept > self.num_groups:
            yield "num_groups_kept", f"is {self.num_groups_kept}, more than num_groups {self.num_groups}"
        if self.num_groups > 1 and self.num_experts // self.num_groups < 2:
            yield (
                "num_groups",
                f"is {self.num_groups}; a group is scored by its two best experts and needs at least two",
            )
        reachable = self.num_experts // self.num_groups * self.num_groups_kept
        if self.top_k > reachable:
            yield "top_k", f"is {self.top_k}; at most the {reachable} experts of the kept groups"


# How a token scores the experts: from logits float32 [T, E] to scores of the same shape, positive.
SCORES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "sigmoid": torch.sigmoid,
    "softmax": lambda logits_TE: logits_TE.softmax(dim=-1),
}


def z_loss(logits_TE: torch.Tensor, scores_TE: torch.Tensor, counts_E: torch.Tensor) -> torch.Tensor:
    """ST-MoE's: keeps logits small, mean over tokens of logsumexp(logits)^2 (arXiv:2202.08906, eq. 5)."""
    return logits_TE.logsumexp(dim=-1).square().mean()


def load_loss(logits_TE: torch.Tensor, scores_TE: torch.Tensor, counts_E: torch.Tensor) -> torch.Tensor:
    """DeepSeek-V3's balance loss, over the tokens of a rank's micro-batch: sum of f_e P_e (arXiv:2412.19437, eq. 17).

    f_e is the share of choices that expert e got, times E; P_e its mean normalised score. Even loads give 1.
    """
    f_E = counts_E / counts_E.sum() * len(counts_E)
    p_E = (scores_TE / scores_TE.sum(dim=-1, keepdim=True)).mean(dim=0)
    return (f_E * p_E).sum()


# Losses of a router beside the objective: a scalar of logits, scores (float32 [T, E]) and tokens by expert (int32 [E]).
AUXILIARY_LOSSES: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "z_loss": z_loss,
    "load_loss": load_loss,
}


class Router(nn.Module):
    """Chooses K of E experts for each token.

    Logits and scores are float32 whatever the model's precision: the choice is a comparison of close numbers.
    ``e_score_correction_bias`` moves the choice, never the weights, and gets no gradient.

    Args:
        score: one of SCORES.
        auxiliary_losses: weights of AUXILIARY_LOSSES by name. After a training forward ``layer_losses`` holds them,
            weighted.
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
        score: str = "sigmoid",
        auxiliary_losses: dict[str, float] | None = None,
    ):
        super().__init__()
        self.score = score
        self.auxiliary_losses = dict(auxiliary_losses or {})
        self.layer_losses: dict[str, torch.Tensor] = {}
        self.top_k = top_k
        self.routed_scale = routed_scale
        self.num_groups = num_groups
        self.num_groups_kept = num_groups_kept
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.register_buffer("e_score_correction_bias", torch.zeros(num_experts, device="cpu"))

    def forward(self, x_TD: torch.Tensor):
        """Route tokens, and leave the auxiliary losses in ``layer_losses``.

        Args:
            x_TD: tokens.

        Returns:
            weights float32 [T, K] (positive, summing to ``routed_scale``; for K = 1 the score times it), experts
            int64 [T, K], and the number of tokens each expert got, int32 [E].
        """
        *routing, losses = self.route(x_TD)
        if not recomputing():
            self.layer_losses = losses
        return tuple(routing)

    def route(self, x_TD: torch.Tensor):
        """What :meth:`forward` returns, and the weighted auxiliary losses by name; nothing is noted."""
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE = F.linear(x_TD.float(), self.weight.float())
            scores_TE = SCORES[self.score](logits_TE)
        choice_TE = scores_TE + self.e_score_correction_bias
        if self.num_groups_kept < self.num_groups:
            choice_TE = self._keep_best_groups(choice_TE)
        experts_TK = choice_TE.topk(self.top_k, dim=-1, sorted=False).indices
        weights_TK = scores_TE.gather(1, experts_TK)
        if self.top_k > 1:  # a single weight divided by itself would be 1, and teach the router nothing
            weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20)
        weights_TK = weights_TK * self.routed_scale
        # Neither bincount, which waits for the GPU to learn its output's size, nor a scatter, whose atomics collide.
        expert_E = torch.arange(scores_TE.shape[1], device=experts_TK.device)
        counts_E = (experts_TK.flatten()[:, None] == expert_E).sum(0, dtype=torch.int32)
        losses = {
            name: weight * AUXILIARY_LOSSES[name](logits_TE, scores_TE, counts_E)
            for name, weight in self.auxiliary_losses.items()
            if self.training
        }
        return weights_TK, experts_TK, counts_E, losses

    def _keep_best_groups(self, choice_TE: torch.Tensor) -> torch.Tensor:
        """Put experts outside a token's best groups out of reach; a group's score is the sum of its two best."""
        choice_TGE = choice_TE.unflatten(1, (self.num_groups, -1))
        group_TG = choice_TGE.topk(2, dim=-1).values.sum(-1)
        kept_TG = group_TG.topk(self.num_groups_kept, dim=-1, sorted=False).indices
        out_TG = torch.ones_like(group_TG, dtype=torch.bool).scatter_(1, kept_TG, False)
        return choice_TGE.masked_fill(out_TG[..., None], float("-inf")).flatten(1)


class Rows(NamedTuple):
    """Which token of which sample each row of sorted tokens is, where experts must know it (dropout by position).

    position: int64 [N], the sample's position in the run. token: int64 [N], which of the sample's tokens.
    """

    position: torch.Tensor
    token: torch.Tensor


class Choices(NamedTuple):
    """Which experts each token was sent to, and what they count.

    order: int64 [N] and place: int64 [T, K], from :func:`moe_dit.kernels.places`. weights: float32 [T, K].
    """

    order: torch.Tensor
    place: torch.Tensor
    weights: torch.Tensor


class Experts(nn.Module):
    """Stacked experts, applied to rows that are sorted by expert, or to tokens and their choices.

    An expert is SwiGLU, down(silu(gate(x)) * up(x)), or where it is not gated a plain MLP, down(gelu_tanh(up(x))).

    Args:
        num_experts: E.
        hidden_size: D.
        expert_width: F.
        bias: whether its linear maps have biases.
        gated: SwiGLU or plain MLP.
        dropout: probability of dropping a hidden value in training.
        implementation: "grouped" (one grouped matrix product for all experts; the fast path on GPUs), "cpu" (a product
            per expert with gradients of its own, :mod:`moe_dit.kernels.cpu`), "loop" (a product per expert in plain
            torch, the form to check the others against) or "auto": grouped for bf16 on a GPU, cpu for float32 on a CPU
            where nothing is dropped, else loop (there torch's grouped product is slower or absent).
    """

    gate_proj: nn.Parameter | None
    gate_bias: nn.Parameter | None
    up_bias: nn.Parameter | None
    down_bias: nn.Parameter | None

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        expert_width: int,
        bias: bool = False,
        gated: bool = True,
        dropout: float = 0.0,
        implementation: str = "auto",
    ):
        super().__init__()
        self.implementation = implementation
        self.dropout = Dropout(dropout)
        # A slice of the experts knows which of all it holds, so that dropout is the same wherever an expert is.
        self.num_experts = num_experts
        self.first_expert = 0

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(num_experts, *shape))

        self.gate_proj = parameter(expert_width, hidden_size) if gated else None
        self.up_proj = parameter(expert_width, hidden_size)
        self.down_proj = parameter(hidden_size, expert_width)
        self.gate_bias = parameter(expert_width) if gated and bias else None
        self.up_bias = parameter(expert_width) if bias else None
        self.down_bias = parameter(hidden_size) if bias else None

    def forward(
        self, x: torch.Tensor, counts_E: torch.Tensor, rows: Rows | None = None, choices: Choices | None = None
    ) -> torch.Tensor:
        """Apply expert e to its counts_E[e] rows.

        Args:
            x: rows [N, D] sorted by expert; those past the last expert's are padding, and what they give means nothing.
                With ``choices`` tokens [T, D].
            counts_E: rows of each expert.
            rows: which tokens they are, for dropout by position; without it dropout is torch's.
            choices: of the tokens.

        Returns:
            What the experts make of each row, [N, D]; with ``choices`` the weighted sum of each token's, [T, D].
        """
        implementation = self.implementation_for(x)
        if implementation == "cpu":
            weights = cpu.Weights(
                self.gate_proj, self.up_proj, self.down_proj, self.gate_bias, self.up_bias, self.down_bias
            )
            if choices is None:
                return cpu.expert_rows(x, counts_E.tolist(), weights)
            token_N = choices.order // choices.place.shape[1]
            weight_N = choices.weights.flatten().index_select(0, choices.order)
            return cpu.expert_tokens(x, token_N, weight_N, counts_E.tolist(), weights)
        x_ND = x if choices is None else dispatch(x, choices.order, choices.place)
        drop = self._dropout_of(counts_E, rows)
        out_ND = (self._grouped if implementation == "grouped" else self._loop)(x_ND, counts_E, drop)
        return out_ND if choices is None else combine(out_ND, choices.place, choices.weights)

    def implementation_for(self, x: torch.Tensor) -> str:
        """Which of the implementations is used on what is like x."""
        if self.implementation != "auto":
            return self.implementation
        if x.is_cuda:
            return "grouped" if x.dtype == torch.bfloat16 else "loop"
        float32 = x.dtype == self.up_proj.dtype == torch.float32 and not torch.is_autocast_enabled(x.device.type)
        return "cpu" if x.device.type == "cpu" and float32 and not self.dropout.active else "loop"

    def _dropout_of(self, counts_E: torch.Tensor, rows: Rows | None) -> Callable[[torch.Tensor, slice], torch.Tensor]:
        """What drops hidden values [n, F] of a slice of the rows."""
        if rows is None or not self.dropout.active:
            return lambda hidden, part: F.dropout(hidden, self.dropout.p, self.training)
        # A token meets an expert at most once, so (token, expert) names a row of its sample.
        number_N = torch.arange(len(rows.token), device=counts_E.device)
        expert_N = torch.searchsorted(counts_E.cumsum(0), number_N, right=True) + self.first_expert
        row_N = rows.token * self.num_experts + expert_N
        return lambda hidden, part: self.dropout.drop_rows(hidden, rows.position[part], row_N[part])

    def _grouped(self, x_ND: torch.Tensor, counts_E: torch.Tensor, drop: Callable) -> torch.Tensor:
        ends_E = counts_E.cumsum(0, dtype=torch.int32)
        masks = None
        if self.down_bias is not None:
            row_N1 = torch.arange(len(x_ND), device=x_ND.device)[:, None]
            expert_NE = ((row_N1 >= ends_E - counts_E) & (row_N1 < ends_E)).to(x_ND.dtype)
            masks = row_N1 < ends_E[-1], expert_NE

        def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
            y = torch._grouped_mm(x, weight.transpose(1, 2), offs=ends_E)
            if bias is None or masks is None:
                return y
            # Padding rows of a grouped product are uninitialised, in its gradient too: one NaN there would reach a
            # bias through the sum over rows. The choice below stops it both ways, without asking the GPU for counts.
            real_N1, expert_NE = masks
            return torch.where(real_N1, y + expert_NE @ bias, 0)

        up_NF = linear(x_ND, self.up_proj, self.up_bias)
        gate_NF = None if self.gate_proj is None else linear(x_ND, self.gate_proj, self.gate_bias)
        hidden_NF = self._hidden(None, up_NF) if gate_NF is None else swiglu(gate_NF, up_NF)
        return linear(drop(hidden_NF, slice(None)), self.down_proj, self.down_bias)

    def _loop(self, x_ND: torch.Tensor, counts_E: torch.Tensor, drop: Callable) -> torch.Tensor:
        counts = counts_E.tolist()
        rows = list(x_ND.split([*counts, len(x_ND) - sum(counts)]))
        stacks = self.gate_proj, self.up_proj, self.down_proj, self.gate_bias, self.up_bias, self.down_bias
        # unbind rather than weight[e], each of which would get a zero-filled gradient of the whole stack.
        experts = zip(*([None] * len(counts) if stack is None else stack.unbind() for stack in stacks), strict=True)
        start = 0
        for e, (gate, up, down, gate_bias, up_bias, down_bias) in enumerate(experts):
            x = rows[e]
            gated = None if gate is None else F.linear(x, gate, gate_bias)
            hidden = drop(self._hidden(gated, F.linear(x, up, up_bias)), slice(start, start + len(x)))
            rows[e] = F.linear(hidden, down, down_bias)
            start += len(x)
        rows[-1] = torch.zeros_like(rows[-1])
        return torch.cat(rows)

    def _hidden(self, gate: torch.Tensor | None, up: torch.Tensor) -> torch.Tensor:
        return F.gelu(up, approximate="tanh") if gate is None else F.silu(gate) * up


class SwiGLU(nn.Module):
    """down(dropout(silu(gate(x)) * up(x))): a dense block's MLP, and the shared expert."""

    def __init__(self, hidden_size: int, width: int, bias: bool = False, dropout: float = 0.0):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, width, bias=bias)
        self.up_proj = nn.Linear(hidden_size, width, bias=bias)
        self.down_proj = nn.Linear(width, hidden_size, bias=bias)
        self.dropout = Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, ..., D] -> [N, ..., D]."""
        return self.down_proj(self.dropout(F.silu(self.gate_proj(x)) * self.up_proj(x)))


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
        score: str = "sigmoid",
        auxiliary_losses: dict[str, float] | None = None,
        bias: bool = False,
        dropout: float = 0.0,
    ):
        super().__init__()
        groups = num_groups, num_groups_kept
        self.router = Router(hidden_size, num_experts, top_k, routed_scale, *groups, score, auxiliary_losses)
        self.experts = Experts(num_experts, hidden_size, expert_width, bias, dropout=dropout)
        self.shared_experts = SwiGLU(hidden_size, expert_width, bias, dropout) if shared_expert else None
        # Tokens each expert got since the counts were last reset; whoever trains reads and resets them.
        self.register_buffer("tokens_per_expert", torch.zeros(num_experts, device="cpu"), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, tokens of a sample, D] -> the same."""
        x_TD = x.flatten(0, -2)
        weights_TK, experts_TK, counts_E = self.router(x_TD)
        if not recomputing():
            with torch.no_grad():
                self.tokens_per_expert += counts_E
        order_N, place_TK = places(experts_TK)  # rows sorted by expert; N = T K
        rows = token_rows(self.experts, len(x_TD))
        if rows is not None:
            token_N = order_N // experts_TK.shape[1]
            rows = Rows(rows.position[token_N], rows.token[token_N])
        routed_TD = self.experts(x_TD, counts_E, rows, Choices(order_N, place_TK, weights_TK)).to(x.dtype)
        other = x if self.shared_experts is None else self.shared_experts(x)
        return routed_TD.view_as(x) + other


def token_rows(experts: Experts, tokens: int) -> Rows | None:
    """Which tokens a layer's T are; None where dropout need not know."""
    draws = experts.dropout.draws
    if draws is None or not experts.dropout.active:
        return None
    samples = len(draws.positions)
    token_T = torch.arange(tokens // samples, device=draws.positions.device).repeat(samples)
    return Rows(draws.positions.repeat_interleave(tokens // samples), token_T)
