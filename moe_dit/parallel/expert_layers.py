"""Expert parallelism: a model's MoE layers become DeepSpeed AutoEP layers, each rank holding a slice of the experts.

The layers are subclasses of AutoEP's, built here rather than by the engine's pattern matching, for two reasons. Routing
and expert arithmetic stay those of :mod:`moe_dit.models.moe` (DeepSpeed 0.19.8's own router computes logits in the
model's precision, where they must be float32). And each rank gets its experts while the model is still on the meta
device, so that no rank ever holds the whole of a large model.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import deepspeed
import torch
from deepspeed.module_inject.auto_ep_config import AutoEPConfig, MoELayerSpec
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer, RouterOutput, _AllToAllV, compute_split_plan
from deepspeed.utils import groups
from torch import nn

from moe_dit.kernels import combine, dispatch, places, regroup, ungroup
from moe_dit.models.moe import Choices, MoE, Rows, token_rows
from moe_dit.models.recomputing import recomputing


class Routing(NamedTuple):
    """A micro-batch's choices in one layer, and its tokens as they go: T tokens, K choices of each, N = T K rows.

    weights: float32 [T, K]. experts: int64 [T, K]. counts: int32 [E], rows of each expert. order: int64 [N], which
    choice a row is. place: int64 [T, K], which row a choice is. rows: [N, D], tokens sorted by expert, or where experts
    add up by themselves, the tokens [T, D]. losses: the router's auxiliary losses by name.
    """

    weights: torch.Tensor
    experts: torch.Tensor
    counts: torch.Tensor
    order: torch.Tensor
    place: torch.Tensor
    rows: torch.Tensor
    losses: dict[str, torch.Tensor]


class ExpertParallelMoE(AutoEPMoELayer):
    """An MoE layer whose experts are spread over ``ep_size`` ranks; same parameter names as the plain layer.

    Only ``experts`` differs: it holds experts [ep_rank * E / ep_size, (ep_rank + 1) * E / ep_size).

    The forward pass is four parts: :meth:`route`, :meth:`beside` and :meth:`finish` are pure functions that can be
    compiled; only :meth:`exchange` speaks with other ranks, notes what was seen, and has shapes that the routing
    decides. AutoEP 0.19.8's own forward pass has them in one, with a gather of sorted scores that nothing reads, and
    with padding between experts' rows, which grouped products of bf16 do not need (torchtitan, pull request 2620).
    """

    router: Any
    experts: Any
    tokens_per_expert: torch.Tensor
    mark: Callable[[str], None] | None = None  # is told where a forward pass's exchange begins and ends

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
        config = AutoEPConfig(enabled=True, autoep_size=ep_size, **settings)
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

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[N, T, D] -> [N, T, D]."""
        routing = self.route(hidden_states)
        return self.finish(routing, *self.exchange(hidden_states, routing))

    def route(self, x: torch.Tensor) -> Routing:
        """Choose experts for tokens x [N, T, D], and sort the tokens by them."""
        # The router computes in float32; cast in the shape that x is made in, both come from one kernel.
        weights_TK, experts_TK, counts_E, losses = self.router.route(x.float().flatten(0, -2))
        order_N, place_TK = places(experts_TK)
        x_TD = x.flatten(0, -2)
        rows_ND = x_TD if self._adds_up(x) else dispatch(x_TD, order_N, place_TK)
        return Routing(weights_TK, experts_TK, counts_E, order_N, place_TK, rows_ND, losses)

    def beside(self, x: torch.Tensor) -> torch.Tensor:
        """What is added to the experts' sum, [N, T, D]: the shared expert's output or, without one, the input."""
        return x if self.shared_experts is None else self.shared_experts(x)

    @torch.compiler.disable
    def exchange(self, x: torch.Tensor, routing: Routing) -> tuple[torch.Tensor, torch.Tensor]:
        """The experts' outputs, and what :meth:`beside` gives.

        Outputs are rows [N, D] in the routing's order, or where experts add them up, weighted sums [T, D].
        """
        mark = None if recomputing() or self.ep_size == 1 else self.mark
        if not recomputing():
            self.router.layer_losses = routing.losses
            with torch.no_grad():
                self.tokens_per_expert += routing.counts
        x_ND, counts_E = routing.rows, routing.counts
        tokens, top_k = routing.weights.shape
        names = token_rows(self.experts, tokens)
        if names is not None:
            token_N = routing.order // top_k
            names = Rows(names.position[token_N], names.token[token_N])
        if self._adds_up(x):
            if self.ep_size == 1:
                choices = Choices(routing.order, routing.place, routing.weights)
                return self.experts(x_ND, counts_E, names, choices), self.beside(x)
            if mark is not None:
                mark("exchange")
            out_TD = self._deepep_route(x_ND, RouterOutput(routing.experts, routing.weights, counts_E))
            if mark is not None:
                mark("exchanged")
            return out_TD, self.beside(x)
        if self.ep_size == 1:
            return self.experts(x_ND, counts_E, names), self.beside(x)
        # The sizes that ranks need on the host travel there while the GPU is busy with the shared expert.
        pending = self._start_async_split_plan(counts_E) if self.async_split_plan and x.is_cuda else None
        beside = self.beside(x)
        if mark is not None:
            mark("exchange")
        if pending is None:
            sizes = self.num_experts, self.ep_size, self.num_local_experts, self.ep_group
            plan = compute_split_plan(routing.experts, *sizes, num_tokens_per_expert=counts_E)
        else:
            plan = self._wait_async_split_plan(pending)
        sent_ND = x_ND if names is None else _pack_rows(x_ND, names)
        received_RD = _AllToAllV.apply(self.ep_group, sent_ND, plan.input_splits, plan.output_splits)
        if mark is not None:
            mark("exchanged")
        # A rank's rows come sorted by expert; grouped products want each expert's rows of all ranks together.
        counts_SE = plan.local_counts_by_source
        x_RD = regroup(received_RD, counts_SE)
        if names is not None:
            x_RD, names = _unpack_rows(x_RD)
        out_RD = ungroup(self.experts(x_RD, counts_SE.sum(0), names), counts_SE)
        if mark is not None:
            mark("exchange")
        back_ND = _AllToAllV.apply(self.ep_group, out_RD, plan.output_splits, plan.input_splits)
        if mark is not None:
            mark("exchanged")
        return back_ND, beside

    def finish(self, routing: Routing, out_ND: torch.Tensor, beside_NTD: torch.Tensor) -> torch.Tensor:
        """Weight and add up each token's outputs of :meth:`exchange`, and add what stands beside them."""
        routed_TD = out_ND if self._adds_up(beside_NTD) else combine(out_ND, routing.place, routing.weights)
        return routed_TD.to(beside_NTD.dtype).view_as(beside_NTD) + beside_NTD

    def _adds_up(self, x: torch.Tensor) -> bool:
        """Whether experts take the tokens and give weighted sums: DeepEP, and the form for CPUs without exchange."""
        return self.comm_backend == "deepep" if self.ep_size > 1 else self.experts.implementation_for(x) == "cpu"


# Where dropout is by position, an expert must know which token each of its rows is, on whatever rank it is. AutoEP
# sends rows of numbers and nothing else, so the token's name travels as further channels, a byte each: exact in bf16.
_POSITION_BYTES = 6
_TOKEN_BYTES = 2


def _pack_rows(x_ND: torch.Tensor, rows: Rows) -> torch.Tensor:
    """Append the name of each row's token to its channels: [N, D + 8]."""
    names = [
        (value >> 8 * i) & 0xFF
        for value, count in ((rows.position, _POSITION_BYTES), (rows.token, _TOKEN_BYTES))
        for i in range(count)
    ]
    return torch.cat([x_ND, torch.stack(names, dim=-1).to(x_ND.dtype)], dim=-1)


def _unpack_rows(x_ND: torch.Tensor) -> tuple[torch.Tensor, Rows]:
    """Rows [N, D + 8] as rows [N, D] and what they are."""
    width = x_ND.shape[1] - _POSITION_BYTES - _TOKEN_BYTES
    names = x_ND[:, width:].detach().to(torch.int64).unbind(1)

    def number(values: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.stack([value << 8 * i for i, value in enumerate(values)]).sum(0)

    return x_ND[:, :width].contiguous(), Rows(number(names[:_POSITION_BYTES]), number(names[_POSITION_BYTES:]))


def _take_experts(experts: nn.Module, ep_rank: int, ep_size: int) -> nn.Module:
    """Cut stacked expert weights down to a rank's slice of dimension 0, in place."""
    for key, parameter in list(experts._parameters.items()):
        if parameter is not None:
            experts._parameters[key] = nn.Parameter(parameter.detach().chunk(ep_size)[ep_rank].clone())
    return experts


def expert_group(ep_size: int) -> Any:
    """The process group of ``ep_size`` ranks that this one shares its experts with; made where it is not there yet."""
    name = f"ep_size_{ep_size}"
    if name not in groups._get_expert_parallel_group_dict():
        groups._create_expert_and_data_parallel(ep_size)
    return groups._get_expert_parallel_group(name)


def apply_expert_parallelism(model: nn.Module, ep_size: int, settings: dict[str, Any] | None = None) -> int:
    """Replace every MoE layer of a model by its expert-parallel form; returns how many there were.

    deepspeed.init_distributed must have been called; ``ep_size`` must divide the world size and the expert count.

    Args:
        settings: of AutoEP's: ``async_split_plan`` (acts on GPUs alone), ``comm_backend`` and
            ``comm_max_tokens_per_rank``.
    """
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, MoE)]
    if layers:
        ep_rank = deepspeed.comm.get_rank(group=expert_group(ep_size))
        for name, layer in layers:
            parent, _, child = name.rpartition(".")
            setattr(
                model.get_submodule(parent), child, ExpertParallelMoE(name, layer, ep_size, ep_rank, settings or {})
            )
    return len(layers)


def moe_layers(model: nn.Module) -> list[Any]:
    """The model's MoE layers, plain or expert-parallel, in order; each has ``router`` and ``tokens_per_expert``."""
    return [module for module in model.modules() if isinstance(module, MoE | ExpertParallelMoE)]
