"""Expert parallelism: a model's MoE layers become DeepSpeed AutoEP layers, each rank holding a slice of the experts.

The layers are subclasses of AutoEP's, built here rather than by the engine's pattern matching, for two reasons. Routing
and expert arithmetic stay those of :mod:`moe_dit.models.moe` (DeepSpeed 0.19.8's own router computes logits in the
model's precision, where they must be float32). And each rank gets its experts while the model is still on the meta
device, so that no rank ever holds the whole of a large model.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import deepspeed
import torch
import torch.nn.functional as F
from deepspeed.module_inject.auto_ep_config import AutoEPConfig, MoELayerSpec
from deepspeed.module_inject.auto_ep_layer import (
    AutoEPMoELayer,
    RouterOutput,
    _AllToAllV,
    compute_split_plan,
    permute_by_local_expert,
    unpermute_by_local_expert,
)
from deepspeed.ops.triton_ops.autoep_fused_token_ops import fused_weighted_restore
from deepspeed.utils import groups
from torch import nn

from moe_dit.models.moe import Choices, MoE, Rows, token_rows
from moe_dit.models.recomputing import recomputing


class Routing(NamedTuple):
    """A micro-batch's choices in one layer: T tokens, K choices of each, N = T K rows sorted by expert.

    weights: float32 [T, K]. experts: int64 [T, K]. counts: int32 [E], rows of each expert. order: int64 [N], which
    choice a row is. place: int64 [N], which row a choice is. losses: the router's auxiliary losses by name.
    """

    weights: torch.Tensor
    experts: torch.Tensor
    counts: torch.Tensor
    order: torch.Tensor
    place: torch.Tensor
    losses: dict[str, torch.Tensor]


class _Take(torch.autograd.Function):
    """Rows of tokens, one a choice, sorted by expert; the gradient is a gather too, where indexing would sort."""

    @staticmethod
    def forward(ctx: Any, x_TD: torch.Tensor, order_N: torch.Tensor, place_N: torch.Tensor, top_k: int):
        ctx.save_for_backward(place_N)
        ctx.top_k = top_k
        return x_TD[order_N // top_k]

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor):
        (place_N,) = ctx.saved_tensors
        return gradients[0][place_N].unflatten(0, (-1, ctx.top_k)).sum(1), None, None, None


class _Reorder(torch.autograd.Function):
    """Rows in another order; the gradient goes back by the inverse of it."""

    @staticmethod
    def forward(ctx: Any, x_ND: torch.Tensor, order_N: torch.Tensor, inverse_N: torch.Tensor):
        ctx.save_for_backward(inverse_N)
        return x_ND[order_N]

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor):
        (inverse_N,) = ctx.saved_tensors
        return gradients[0][inverse_N], None, None


class ExpertParallelMoE(AutoEPMoELayer):
    """An MoE layer whose experts are spread over ``ep_size`` ranks; same parameter names as the plain layer.

    Only ``experts`` differs: it holds experts [ep_rank * E / ep_size, (ep_rank + 1) * E / ep_size).

    The forward pass is three parts, of which the first and the last are pure functions that can be compiled; only
    :meth:`exchange` speaks with other ranks, notes what was seen, and has shapes that the routing decides. AutoEP
    0.19.8's own forward pass has the same parts in one, with a gather of sorted scores that nothing reads.
    """

    router: Any
    experts: Any
    tokens_per_expert: torch.Tensor

    def __init__(self, name: str, moe: MoE, ep_size: int, ep_rank: int, settings: dict[str, Any]):
        router = moe.router
        experts = moe.experts
        num_experts, expert_width, hidden_size = experts.up_proj.shape
        spec = MoELayerSpec(
            moe_module_name=name,
            model_family="moe_dit",
            router_name="router",
            experts_name="experts",
            expert_storage="fused_3d",
            expert_w1_name="gate_proj",
            expert_w2_name="down_proj",
            expert_w3_name="up_proj",
            num_experts=num_experts,
            top_k=router.top_k,
            hidden_size=hidden_size,
            ffn_hidden_size=expert_width,
            score_func="sigmoid",
            score_apply="post",
            route_norm=True,
            gate_bias=False,
            return_router_logits=False,
            router_logits_capture_target="none",
            router_logits_capture_index=None,
            router_logits_capture_layer_name=None,
            has_shared_experts=moe.shared_experts is not None,
            shared_experts_name="shared_experts",
            route_scale=router.routed_scale,
        )
        config = AutoEPConfig(enabled=True, autoep_size=ep_size, **{"combine_impl": "fused_weighted_sum"} | settings)
        # The Triton choice asks the accelerator and warns; the experts that use it are replaced just below.
        config.disable_triton_grouped_mm = True
        with torch.device("meta"):
            super().__init__(spec, moe, ep_size, ep_rank, config)
        marks = {
            key: value
            for key, value in self.experts.w1.__dict__.items()
            if key.startswith(("allreduce", "group_", "ds_zero"))
        }
        router_marks = dict(self.router.get_submodule("gate").weight.__dict__)
        self.router = router
        self.experts = _take_experts(experts, ep_rank, ep_size)
        for parameter in self.router.parameters():
            parameter.__dict__.update(router_marks)
        for parameter in self.experts.parameters():
            parameter.__dict__.update(marks, first_expert=ep_rank * self.num_local_experts)
        self.experts.first_expert = ep_rank * self.num_local_experts
        self.tokens_per_expert = torch.zeros(num_experts, device="cpu")
        self.width = hidden_size
        if self.experts.dropout.p > 0 and ep_size > 1:
            self.experts.register_forward_pre_hook(_unpack_rows)
            self.experts.register_forward_hook(_widen)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[N, T, D] -> [N, T, D]."""
        routing = self.route(hidden_states)
        return self.finish(hidden_states, routing, self.exchange(hidden_states, routing))

    def route(self, x: torch.Tensor) -> Routing:
        """Choose experts for tokens x [N, T, D]."""
        weights_TK, experts_TK, counts_E, losses = self.router.route(x.flatten(0, -2))
        order_N = experts_TK.flatten().argsort(stable=True)
        place_N = torch.empty_like(order_N).scatter_(0, order_N, torch.arange(len(order_N), device=x.device))
        return Routing(weights_TK, experts_TK, counts_E, order_N, place_N, losses)

    @torch.compiler.disable
    def exchange(self, x: torch.Tensor, routing: Routing) -> torch.Tensor:
        """The experts' outputs for x [N, T, D]: rows [N K, D] in the routing's order.

        With DeepEP, and on CPUs where nothing is exchanged, weighted sums [T, D].
        """
        if not recomputing():
            self.router.layer_losses = routing.losses
            with torch.no_grad():
                self.tokens_per_expert += routing.counts
        rows = token_rows(self.experts, x)
        top_k = routing.weights.shape[1]
        if self.ep_size == 1:
            if rows is not None:
                token_N = routing.order // top_k
                rows = Rows(rows.position[token_N], rows.token[token_N])
            x_TD = x.flatten(0, -2)
            if not x.is_cuda:  # summed while an expert's rows are in the cache
                place_TK = routing.place.view_as(routing.experts)
                return self.experts(x_TD, routing.counts, rows, Choices(routing.order, place_TK, routing.weights))
            x_ND = _Take.apply(x_TD, routing.order, routing.place, top_k)
            return self.experts(x_ND, routing.counts, rows)
        if self.comm_backend == "deepep":
            return self._deepep_route(x.flatten(0, -2), RouterOutput(routing.experts, routing.weights, routing.counts))
        # The sizes that ranks need on the host travel there while rows are sorted.
        pending = self._start_async_split_plan(routing.counts) if self.async_split_plan and x.is_cuda else None
        x_TD = (x if rows is None else _pack_rows(x, rows)).flatten(0, -2)
        x_ND = _Take.apply(x_TD, routing.order, routing.place, top_k)
        sizes = self.num_experts, self.ep_size, self.num_local_experts, self.ep_group
        if pending is None:
            plan = compute_split_plan(routing.experts, *sizes, num_tokens_per_expert=routing.counts)
        else:
            plan = self._wait_async_split_plan(pending)
        received = _AllToAllV.apply(self.ep_group, x_ND, plan.input_splits, plan.output_splits)
        padded, indices, counts, n = permute_by_local_expert(received, plan.local_counts_by_source)
        out = unpermute_by_local_expert(self.experts(padded, counts), indices, n)
        return _AllToAllV.apply(self.ep_group, out, plan.output_splits, plan.input_splits)[:, : self.width]

    def finish(self, x: torch.Tensor, routing: Routing, out_ND: torch.Tensor) -> torch.Tensor:
        """Weight and add up each token's outputs, and add the shared expert's (or, without one, the input)."""
        if (self.ep_size > 1 and self.comm_backend == "deepep") or (self.ep_size == 1 and not x.is_cuda):
            routed_TD = out_ND.to(x.dtype)
        elif self.combine_impl == "fused_weighted_sum" and x.is_cuda and not torch.compiler.is_compiling():
            routed_TD = fused_weighted_restore(
                out_ND, routing.weights, routing.order, routing.weights.shape[1], (1, *x.flatten(0, -2).shape)
            )
        else:
            slots_TKD = _Reorder.apply(out_ND, routing.place, routing.order).unflatten(0, routing.weights.shape)
            routed_TD = (slots_TKD * routing.weights[..., None]).sum(1).to(x.dtype)
        return routed_TD.view_as(x) + (x if self.shared_experts is None else self.shared_experts(x))


# Where dropout is by position, an expert must know which token each of its rows is, on whatever rank it is. AutoEP
# sends rows of numbers and nothing else, so the token's name travels as further channels, a byte each: exact in bf16.
_POSITION_BYTES = 6
_TOKEN_BYTES = 2


def _pack_rows(x_NTD: torch.Tensor, rows: Rows) -> torch.Tensor:
    """Append the name of each token to its channels: [N, T, D + 8]."""
    names = [
        (value >> 8 * i) & 0xFF
        for value, count in ((rows.position, _POSITION_BYTES), (rows.token, _TOKEN_BYTES))
        for i in range(count)
    ]
    return torch.cat([x_NTD, torch.stack(names, dim=-1).to(x_NTD.dtype).view(*x_NTD.shape[:2], -1)], dim=-1)


def _unpack_rows(experts: Any, inputs: tuple) -> tuple:
    """Before the experts: rows [R, D + 8] to rows [R, D] and what they are."""
    x_RD, counts_E = inputs
    width = experts.up_proj.shape[-1]
    if x_RD.shape[1] == width:
        return inputs
    names = x_RD[:, width:].detach().to(torch.int64).unbind(1)

    def number(values: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.stack([value << 8 * i for i, value in enumerate(values)]).sum(0)

    rows = Rows(number(names[:_POSITION_BYTES]), number(names[_POSITION_BYTES:]))
    return x_RD[:, :width], counts_E, rows


def _widen(experts: Any, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
    """After the experts: AutoEP wants rows as wide as it gave them."""
    return F.pad(output, (0, _POSITION_BYTES + _TOKEN_BYTES)) if len(inputs) == 3 else output


def _take_experts(experts: nn.Module, ep_rank: int, ep_size: int) -> nn.Module:
    """Cut stacked expert weights down to a rank's slice of dimension 0, in place."""
    for key, parameter in list(experts._parameters.items()):
        if parameter is not None:
            experts._parameters[key] = nn.Parameter(parameter.detach().chunk(ep_size)[ep_rank].clone())
    return experts


def apply_expert_parallelism(model: nn.Module, ep_size: int, settings: dict[str, Any] | None = None) -> int:
    """Replace every MoE layer of a model by its expert-parallel form; returns how many there were.

    deepspeed.init_distributed must have been called; ``ep_size`` must divide the world size and the expert count.

    Args:
        settings: of AutoEP's: ``combine_impl``, ``async_split_plan`` (both act on GPUs alone), ``comm_backend`` and
            ``comm_max_tokens_per_rank``.
    """
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, MoE)]
    if layers:
        group = f"ep_size_{ep_size}"
        if group not in groups._get_expert_parallel_group_dict():
            groups._create_expert_and_data_parallel(ep_size)
        ep_rank = deepspeed.comm.get_rank(group=groups._get_expert_parallel_group(group))
        for name, layer in layers:
            parent, _, child = name.rpartition(".")
            setattr(
                model.get_submodule(parent), child, ExpertParallelMoE(name, layer, ep_size, ep_rank, settings or {})
            )
    return len(layers)


def moe_layers(model: nn.Module) -> list[Any]:
    """The model's MoE layers, plain or expert-parallel, in order; each has ``router`` and ``tokens_per_expert``."""
    return [module for module in model.modules() if isinstance(module, MoE | ExpertParallelMoE)]
