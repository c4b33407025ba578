"""Expert parallelism: a model's MoE layers become DeepSpeed AutoEP layers, each rank holding a slice of the experts.

The layers are subclasses of AutoEP's, built here rather than by the engine's pattern matching, for two reasons. Routing
and expert arithmetic stay those of :mod:`moe_dit.models.moe` (DeepSpeed 0.19.8's own router computes logits in the
model's precision, where they must be float32). And each rank gets its experts while the model is still on the meta
device, so that no rank ever holds the whole of a large model.
"""

from collections.abc import Sequence
from typing import Any

import deepspeed
import torch
import torch.nn.functional as F
from deepspeed.module_inject.auto_ep_config import AutoEPConfig, MoELayerSpec
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.utils import groups
from torch import nn

from moe_dit.models.moe import MoE, Rows, token_rows
from moe_dit.models.recomputing import recomputing


class ExpertParallelMoE(AutoEPMoELayer):
    """An MoE layer whose experts are spread over ``ep_size`` ranks; same parameter names as the plain layer.

    Only ``experts`` differs: it holds experts [ep_rank * E / ep_size, (ep_rank + 1) * E / ep_size).
    """

    router: nn.Module
    experts: Any
    tokens_per_expert: torch.Tensor

    def __init__(self, name: str, moe: MoE, ep_size: int, ep_rank: int):
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
        config = AutoEPConfig(enabled=True, autoep_size=ep_size)
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
        if self.experts.dropout.p > 0:
            self.router.register_forward_pre_hook(lambda _, inputs: (inputs[0][:, :hidden_size], *inputs[1:]))
            self.experts.register_forward_pre_hook(_unpack_rows)
            self.experts.register_forward_hook(_widen)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[N, T, D] -> [N, T, D]."""
        rows = token_rows(self.experts, hidden_states)
        counted = self.tokens_per_expert.clone() if recomputing() else None
        try:
            return super().forward(hidden_states if rows is None else _pack_rows(hidden_states, rows))
        finally:  # torch ends a second computation by an exception, as soon as it has what it needs
            if counted is not None:
                self.tokens_per_expert.copy_(counted)

    def _finalize_output(
        self, output: torch.Tensor, x: torch.Tensor, hidden_states: torch.Tensor, hdim: int
    ) -> torch.Tensor:
        """AutoEP's last step; it has no option for adding the input where there is no shared expert."""
        hidden_states = hidden_states[..., : self.width]
        other = hidden_states if self.shared_experts is None else self.shared_experts(hidden_states)
        return output[..., : self.width] + other


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


def apply_expert_parallelism(model: nn.Module, ep_size: int) -> int:
    """Replace every MoE layer of a model by its expert-parallel form; returns how many there were.

    deepspeed.init_distributed must have been called; ``ep_size`` must divide the world size and the expert count.
    """
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, MoE)]
    if layers:
        group = f"ep_size_{ep_size}"
        if group not in groups._get_expert_parallel_group_dict():
            groups._create_expert_and_data_parallel(ep_size)
        ep_rank = deepspeed.comm.get_rank(group=groups._get_expert_parallel_group(group))
        for name, layer in layers:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, ExpertParallelMoE(name, layer, ep_size, ep_rank))
    return len(layers)


def moe_layers(model: nn.Module) -> list[Any]:
    """The model's MoE layers, plain or expert-parallel, in order; each has ``router`` and ``tokens_per_expert``."""
    return [module for module in model.modules() if isinstance(module, MoE | ExpertParallelMoE)]
