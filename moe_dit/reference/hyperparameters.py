"""The published code's hyper-parameters, read into a recipe's ``model`` section and an objective."""

from dataclasses import dataclass, field
from typing import Any

from moe_dit.flow import Flow
from moe_dit.runtime.errors import InputError


@dataclass
class _Section:
    """A part of meta.json whose every key must be asked for, so that none is ignored unseen."""

    name: str
    values: dict[str, Any]
    asked: set[str] = field(default_factory=set)

    def get(self, key: str, *default: Any) -> Any:
        self.asked.add(key)
        if key not in self.values and not default:
            raise InputError(f"meta: {self.name}.{key} is missing")
        return self.values.get(key, *default)

    def section(self, key: str) -> "_Section":
        values = self.get(key)
        if not isinstance(values, dict):
            raise InputError(f"meta: {self.name}.{key} should be a mapping")
        return _Section(f"{self.name}.{key}".removeprefix("meta."), values)

    def choose(self, key: str, choices: dict[Any, Any], *default: Any) -> Any:
        value = self.get(key, *default)
        if value not in choices:
            known = ", ".join(str(choice) for choice in choices)
            raise InputError(f"meta: {self.name}.{key} is {value!r}; supported: {known}")
        return choices[value]

    def need(self, key: str, value: Any) -> None:
        """Admit one value only: what others would mean is not supported."""
        if self.get(key, value) != value:
            raise InputError(f"meta: {self.name}.{key} is {self.values[key]!r}; supported: {value}")

    def without_effect(self, *keys: str) -> None:
        """Admit keys that say nothing about the function a network with given weights computes."""
        self.asked.update(keys)

    def end(self) -> None:
        for key in self.values:
            if key not in self.asked:
                raise InputError(f"meta: {self.name}.{key} is not known")


def read_meta(meta: dict[str, Any]) -> tuple[dict[str, Any], Flow]:
    """A recipe's ``model`` section, as a dict, and the objective."""
    readers = {"DSMoE": _dsmoe, "DiffMoE": _diffmoe, "JiT": _jit, "JiTMoE": _jit}
    whole = _Section("meta", meta)
    return whole.choose("family", readers)(whole)


def _latent_sizes(params: _Section) -> dict[str, Any]:
    """What DSMoE and DiffMoE have in common."""
    hidden_size = params.get("hidden_size", 1152)
    num_heads = params.get("num_heads", 16)
    if params.get("head_dim", None) not in (None, hidden_size // num_heads):
        raise InputError(f"meta: {params.name}.head_dim is not hidden_size / num_heads, which is not supported")
    if params.get("class_dropout_prob", 0.1) <= 0:
        raise InputError(
            f"meta: {params.name}.class_dropout_prob is 0; a network without a null class is not supported"
        )
    params.need("use_capacity_schedule", None)
    params.without_effect("init_MoeMLP")
    return {
        "input_size": params.get("input_size", 32),
        "in_channels": params.get("in_channels", 4),
        "patch_size": params.get("patch_size", 2),
        "depth": params.get("depth", 28),
        "hidden_size": hidden_size,
        "num_heads": num_heads,
        "mlp_ratio": float(params.get("mlp_ratio", 4.0)),
        "num_classes": params.get("num_classes", 1000),
        "learn_sigma": params.get("learn_sigma", True),
    }


def _token_choice(moe: _Section, hidden_size: int) -> dict[str, Any]:
    """The DeepSeek-style layer of DSMoE and JiTMoE."""
    moe.need("hidden_size", hidden_size)
    return {
        "num_experts": moe.get("num_experts"),
        "top_k": moe.get("num_experts_per_tok"),
        "expert_width": moe.get("moe_intermediate_size"),
        "routed_scale": float(moe.get("routed_scaling_factor")),
        "num_groups": moe.get("n_group"),
        "num_groups_kept": moe.get("topk_group"),
        "shared_expert": moe.get("use_shared_expert"),
    }


def _dsmoe(meta: _Section) -> tuple[dict[str, Any], Flow]:
    params = meta.section("params")
    sizes = _latent_sizes(params)
    model = sizes | {
        "family": "dsmoe",
        "positions": params.choose("rope_type", {"1d": "rope_1d", "2d": "rope_2d", "none": "sin_cos"}, "none"),
        "norm": params.choose("norm_type", {"layernorm": "layernorm", "rmsnorm": "rmsnorm"}, "layernorm"),
    }
    for key in ("use_sinks", "enable_gqa"):
        params.need(key, False)
    params.need("sliding_window", 0)
    # The published DSMoE reads neither: its dense blocks are two-layer MLPs whatever the first says.
    params.without_effect("use_swiglu", "CapacityPred_loss_weight")
    moe = params.section("MoE_config")
    model["moe"] = _token_choice(moe, sizes["hidden_size"])
    model["interleave"] = moe.get("interleave")
    skipped = moe.get("skip_first2", False)  # true, or a number of blocks
    model["dense_first"] = 2 * skipped if isinstance(skipped, bool) else skipped
    moe.need("capacity_schedule", None)
    # The published DSMoE reads none of these but the second, which is about initial weights.
    moe.without_effect("capacity", "init_MoeMLP", "skip_last2")
    moe.end()
    params.end()
    return model, Flow()


def _diffmoe(meta: _Section) -> tuple[dict[str, Any], Flow]:
    params = meta.section("params")
    model = _latent_sizes(params) | {
        "family": "diffmoe",
        "gated": params.get("use_swiglu", False),
        "capacity_loss_weight": float(params.get("CapacityPred_loss_weight", 0.01)),
    }
    moe = params.section("MoE_config")
    model["moe"] = {
        "num_experts": moe.get("num_experts"),
        "capacity": float(moe.get("capacity")),
        "shared_experts": moe.get("n_shared_experts", 0),
    }
    model["interleave"] = moe.get("interleave")
    moe.need("capacity_schedule", None)
    moe.without_effect("init_MoeMLP")
    moe.end()
    params.end()
    return model, Flow()


def _jit(meta: _Section) -> tuple[dict[str, Any], Flow]:
    net = meta.section("net")
    denoiser = meta.section("denoiser")
    model = {
        "family": "jit",
        "input_size": denoiser.get("img_size"),
        "in_channels": net.get("in_channels", 3),
        "patch_size": net.get("patch_size", 16),
        "depth": net.get("depth", 24),
        "hidden_size": net.get("hidden_size", 1024),
        "num_heads": net.get("num_heads", 16),
        "mlp_ratio": float(net.get("mlp_ratio", 4.0)),
        "num_classes": denoiser.get("class_num"),
        "bottleneck_dim": net.get("bottleneck_dim", 128),
        "in_context_len": net.get("in_context_len", 32),
        "in_context_start": net.get("in_context_start", 8),
        "attn_dropout": float(denoiser.get("attn_dropout", 0.0)),
        "proj_dropout": float(denoiser.get("proj_dropout", 0.0)),
        "moe": None,
    }
    if model["in_context_len"] and not model["in_context_start"] < model["depth"]:
        raise InputError(f"meta: net.in_context_start is {model['in_context_start']}; it should be less than net.depth")
    if net.get("moe_config", None) is not None:
        moe = net.section("moe_config")
        layer = _token_choice(moe, model["hidden_size"]) | {"dropout": float(moe.get("proj_drop", 0.0))}
        # Unlike DSMoE, the published JiTMoE without interleaving has no mixture of experts at all.
        model["moe"] = layer if moe.get("interleave") else None
        moe.end()
    net.end()
    flow = Flow(
        prediction="data",
        time="logit_normal",
        time_mean=denoiser.get("P_mean"),
        time_std=denoiser.get("P_std"),
        noise_scale=denoiser.get("noise_scale"),
        min_denominator=denoiser.get("t_eps"),
    )
    # About training and sampling, which are asked for with the settings of each.
    denoiser.without_effect("model", "label_drop_prob", "ema_decay1", "ema_decay2", "sampling_method")
    denoiser.without_effect("num_sampling_steps", "cfg", "interval_min", "interval_max")
    denoiser.end()
    return model, flow
