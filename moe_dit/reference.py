"""The published code's networks, read into ours: same function, other names and layouts.

What differs, besides names. Experts are stacked, where the published code has a module for each. JiT's SwiGLU is one
matrix w12 there, gate and up here. DSMoE's rotary encoding turns channel i with channel i + width/2 (of the head in
1-D, of each half of it in 2-D) there, and neighbouring channels here as in JiT: queries and keys are reordered.
"""

import argparse
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import nn

from moe_dit.build import build_model
from moe_dit.errors import InputError
from moe_dit.export import new_model_folder
from moe_dit.flow import Flow
from moe_dit.models import FAMILIES
from moe_dit.progress import task
from moe_dit.recipe import Recipe

WEIGHTS = ("ema", "model", "model_ema1", "model_ema2")  # state dicts of published files
SHARD = 500 * 2**20  # bytes of weights that an import holds at once beside the file


def from_reference(meta: dict[str, Any], state: Mapping[str, torch.Tensor]) -> tuple[nn.Module, Flow]:
    """A published network and its objective.

    Args:
        meta: "family" (DSMoE, DiffMoE, JiT or JiTMoE) and the published code's hyper-parameters: "params" for the
            first two, "net" and "denoiser" for the others.
        state: its state dict.

    Returns:
        the network (float32, CPU, training mode as a new module is) and its objective.

    Raises:
        InputError: a hyper-parameter that is unknown or not supported, or tensors that do not fit the others.
    """
    section, flow = _read_meta(meta)
    with torch.device("meta"):
        model = FAMILIES[section.pop("family")](**section)
    check_state(model, state)
    model.load_state_dict({name: c.convert(state) for name, c in conversions(model).items()}, assign=True)
    return model, flow


def model_section(meta: dict[str, Any]) -> dict[str, Any]:
    """A recipe's ``model`` section, as in its YAML, from published hyper-parameters (see :func:`from_reference`)."""
    return _read_meta(meta)[0]


# --- files ------------------------------------------------------------------------------------------------------------


def import_checkpoint(file: Path, recipe: Recipe, weights: str, folder: Path, shard: int = SHARD) -> None:
    """Turn a checkpoint of the published code into a model folder.

    The file is read by mapping it into memory, and its tensors are converted and written in shards, so that memory
    holds no second copy of the network.

    Args:
        file: what torch.save wrote: a dict with the state dicts "model" and "ema", or "model_ema1" and "model_ema2".
        recipe: of the same network.
        weights: which of them.
        folder: where to write.
        shard: largest file of weights, in bytes.

    Raises:
        InputError: the file is damaged, holds other than tensors and plain values, or is of another network.
    """
    state = _read_checkpoint(file, weights)
    model: Any = build_model(recipe, device="meta")
    try:
        check_state(model, state)
    except InputError as error:
        raise InputError(f"{file} does not fit recipe {recipe.name}: {error}") from None
    plan = conversions(model)
    split = split_torch_state_dict_into_shards(
        model.state_dict(), filename_pattern="diffusion_pytorch_model{suffix}.safetensors", max_shard_size=shard
    )
    with new_model_folder(folder, recipe) as new, task("importing", len(plan)) as progress:
        model.save_config(new)
        for name, keys in split.filename_to_tensors.items():
            save_file({key: plan[key].convert(state) for key in keys}, new / name, metadata={"format": "pt"})
            progress.advance(len(keys))
        if split.is_sharded:
            index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
            (new / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def _read_checkpoint(file: Path, weights: str) -> dict[str, torch.Tensor]:
    """The state dict ``weights`` of a checkpoint file, its tensors mapped from the file."""
    try:
        # The published DSMoE puts its command line's arguments beside the weights; no other class may be in the file.
        with torch.serialization.safe_globals([argparse.Namespace]):
            checkpoint = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise InputError(f"no file {file}") from None
    except Exception as error:  # torch raises many kinds for what is no file of its own
        foreign = re.search(r"GLOBAL ([\w.]+)", str(error))
        if foreign:
            raise InputError(f"{file} holds objects of {foreign[1]}, and is not loaded: they could run code") from None
        reason = str(error).splitlines()[0].split(". ")[0]
        raise InputError(f"{file} is damaged or not from torch.save: {reason}") from None
    if not isinstance(checkpoint, dict):
        raise InputError(f"{file} should hold a dict with the weights by name, not a {type(checkpoint).__name__}")
    state = checkpoint.get(weights)
    if not isinstance(state, dict):
        held = [key for key in WEIGHTS if key in checkpoint]
        raise InputError(f"{file} has no weights named {weights}; it has {', '.join(held) or 'none that are known'}")
    for name, value in state.items():
        if not isinstance(value, torch.Tensor):
            raise InputError(f"{file}: {weights} holds {name}, which is not a tensor")
    return state


# --- weights ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Conversion:
    """How one of our tensors comes from published ones.

    Attributes:
        names: the published tensors.
        shape: shape of each of them.
        join: makes ours of them.
    """

    names: list[str]
    shape: torch.Size
    join: Callable[[list[torch.Tensor]], torch.Tensor]

    def convert(self, state: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Our tensor from a published state: float32, in memory of its own or the state's."""
        tensor: torch.Tensor = self.join([state[name] for name in self.names])
        return tensor.to(torch.float32).contiguous()


# Our names to the published ones; all that match apply, in this order.
RENAMES = [
    (r"^c_embedder\.time\.linear_1\.", "t_embedder.mlp.0."),
    (r"^c_embedder\.time\.linear_2\.", "t_embedder.mlp.2."),
    (r"^c_embedder\.label\.", "y_embedder.embedding_table."),
    (r"\.router\.", ".gate."),
]


def conversions(model: nn.Module) -> dict[str, Conversion]:
    """How each tensor of the model's state (weights may be on the meta device) comes from a published state."""
    config = dict(model.config)  # type: ignore[arg-type]
    family = type(model).__name__
    plan = {}
    for name, tensor in model.state_dict().items():
        published = name
        for pattern, replacement in RENAMES:
            published = re.sub(pattern, replacement, published)
        if match := re.fullmatch(r"(.*)\.mlp\.experts\.(gate|up|down)_(proj|bias)", name):
            plan[name] = _stacked(family, config, match[1], match[2], match[3], tensor.shape)
        elif match := re.fullmatch(r"(.*\.mlp(?:\.shared_experts)?)\.(gate|up|down)_proj\.(\w+)", published):
            layer, matrix, kind = match.groups()
            plan[name] = _one(family, layer, matrix, kind, tensor.shape)
        elif family == "DSMoE" and ".attn.qkv." in name and config["positions"] != "sin_cos":
            order = _qkv_order(config)
            plan[name] = Conversion([published], tensor.shape, partial(_reorder, order))
        elif name == "pos_embed":
            plan[name] = Conversion([published], tensor[None].shape, lambda tensors: tensors[0][0])
        else:
            plan[name] = Conversion([published], tensor.shape, lambda tensors: tensors[0])
    if family == "JiT":  # held by a wrapper there
        plan = {k: Conversion([f"net.{n}" for n in c.names], c.shape, c.join) for k, c in plan.items()}
    return plan


def _one(family: str, layer: str, matrix: str, kind: str, shape: torch.Size) -> Conversion:
    """A matrix ("gate", "up", "down") or its bias of one SwiGLU or MLP, from a published layer."""
    if family != "JiT":
        return Conversion([f"{layer}.{matrix}_proj.{kind}"], shape, lambda tensors: tensors[0])
    if matrix == "down":
        return Conversion([f"{layer}.w3.{kind}"], shape, lambda tensors: tensors[0])
    half = slice(shape[0]) if matrix == "gate" else slice(shape[0], None)
    fused = torch.Size([2 * shape[0], *shape[1:]])
    return Conversion([f"{layer}.w12.{kind}"], fused, lambda tensors: tensors[0][half])


def _stacked(family: str, config: dict, block: str, matrix: str, kind: str, shape: torch.Size) -> Conversion:
    """A stacked expert weight, from the published experts' own."""
    kind = "weight" if kind == "proj" else "bias"
    layers = [f"{block}.mlp.experts.{'' if family == 'DiffMoE' else 'blocks.'}{e}" for e in range(shape[0])]
    if family == "DiffMoE" and not config["gated"]:
        names = [f"{layer}.{'fc1' if matrix == 'up' else 'fc2'}.{kind}" for layer in layers]
        return Conversion(names, shape[1:], torch.stack)
    experts = [_one(family, layer, matrix, kind, shape[1:]) for layer in layers]
    names = [name for expert in experts for name in expert.names]
    join = experts[0].join
    return Conversion(names, experts[0].shape, lambda tensors: torch.stack([join([tensor]) for tensor in tensors]))


def _reorder(order: torch.Tensor, tensors: list[torch.Tensor]) -> torch.Tensor:
    return tensors[0][order]


def _qkv_order(config: dict) -> torch.Tensor:
    """Rows of a published qkv in our order: each head's halves of pairs become neighbours, in queries and keys."""
    heads, width = config["num_heads"], config["hidden_size"] // config["num_heads"]
    axes = 2 if config["positions"] == "rope_2d" else 1
    pairs = torch.arange(width).view(axes, 2, -1).transpose(1, 2).flatten()
    rows = torch.arange(3 * heads * width).view(3, heads, width).clone()
    rows[:2] = rows[:2, :, pairs]
    return rows.flatten()


def check_state(model: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Raise InputError where a published state does not hold just the tensors that the model needs, in their shapes."""
    needed = {name: conversion.shape for conversion in conversions(model).values() for name in conversion.names}
    missing = [name for name in needed if name not in state]
    surplus = [name for name in state if name not in needed]
    other = [
        f"{name} is {list(state[name].shape)}, not {list(shape)}"
        for name, shape in needed.items()
        if name in state and state[name].shape != shape
    ]
    problems = [
        f"{len(found)} {what} ({', '.join(found[:3])}{', ...' if len(found) > 3 else ''})"
        for what, found in (("of another size", other), ("missing", missing), ("not part of it", surplus))
        if found
    ]
    if problems:
        raise InputError(f"the tensors are not those of this network: {'; '.join(problems)}")


# --- hyper-parameters -------------------------------------------------------------------------------------------------


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


def _read_meta(meta: dict[str, Any]) -> tuple[dict[str, Any], Flow]:
    """A recipe's ``model`` section, as a dict, and the objective."""
    readers = {"DSMoE": _dsmoe, "DiffMoE": _diffmoe, "JiT": _jit, "JiTMoE": _jit}
    whole = _Section("meta", meta)
    return whole.choose("family", readers)(whole)


def _latent_sizes(params: _Section) -> dict[str, Any]:
    """What DSMoE and DiffMoE have in common."""
    hidden_size, num_heads = params.get("hidden_size", 1152), params.get("num_heads", 16)
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
    net, denoiser = meta.section("net"), meta.section("denoiser")
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
