"""Expert parallelism: a model's MoE layers become DeepSpeed AutoEP layers, each rank holding a slice of the experts.

The layers are subclasses of AutoEP's, built here rather than by the engine's pattern matching, for two reasons. Routing
and expert arithmetic stay those of :mod:`moe_dit.models.moe` (DeepSpeed 0.19.8's own router computes logits in the
model's precision, where they must be float32). And each rank gets its experts while the model is still on the meta
device, so that no rank ever holds the whole of a large model.
"""

from typing import Any

import deepspeed
import torch
from deepspeed.module_inject.auto_ep_config import AutoEPConfig, MoELayerSpec
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.utils import groups
from torch import nn

from moe_dit.models.moe import MoE


class ExpertParallelMoE(AutoEPMoELayer):
    """An MoE layer whose experts are spread over ``ep_size`` ranks; same parameter names as the plain layer.

    Only ``experts`` differs: it holds experts [ep_rank * E / ep_size, (ep_rank + 1) * E / ep_size).
    """

    router: nn.Module
    experts: nn.Module
    tokens_per_expert: torch.Tensor

    def __init__(self, name: str, moe: MoE, ep_size: int, ep_rank: int):
        router, experts = moe.router, moe.experts
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
        self.router, self.experts = router, _take_experts(experts, ep_rank, ep_size)
        for parameter in self.router.parameters():
            parameter.__dict__.update(router_marks)
        for parameter in self.experts.parameters():
            parameter.__dict__.update(marks, first_expert=ep_rank * self.num_local_experts)
        self.tokens_per_expert = torch.zeros(num_experts, device="cpu")

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[N, T, D] -> [N, T, D]."""
        output = super().forward(hidden_states)
        # Without a shared expert the plain layer adds its input, which AutoEP has no option for.
        return output if self.shared_experts is not None else output + hidden_states


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
