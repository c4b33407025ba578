"""The DeepSpeed JSON: how the work is spread. Checked here, completed from the recipe and the number of ranks."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_dit.recipe import Recipe
from moe_dit.runtime.errors import InputError

# What decides the experiment stands in the recipe alone, so that a JSON can never change a result.
RECIPE_DECIDES = {
    "train_batch_size": "global_batch_size",
    "train_micro_batch_size_per_gpu": "max_micro_batch_size",
    "gradient_accumulation_steps": "max_micro_batch_size",
    "gradient_clipping": "optimizer.clip_grad_norm",
    "optimizer": "optimizer",
    "scheduler": "optimizer.warmup_steps",
    "bf16": "precision",
    "fp16": "precision",
    "torch_autocast": "precision",
}


@dataclass(frozen=True)
class Parallelism:
    """How one run is spread: the JSON's choices and the batch sizes that follow."""

    file: str
    zero_stage: int
    ep_size: int
    world_size: int
    micro_batch_size: int  # samples a rank computes at once
    accumulation: int  # micro-batches a step
    json: dict[str, Any]  # the file's content, for DeepSpeed


def load_parallelism(file: str, recipe: Recipe, world_size: int) -> Parallelism:
    """Read a DeepSpeed JSON and check it against the recipe and the number of ranks.

    Raises:
        InputError: an unreadable file, a key that the recipe decides, sizes that do not divide.
    """
    path = Path(file)
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        known = sorted(str(p) for p in path.parent.glob("*.json"))
        raise InputError(
            f"no DeepSpeed configuration {file}; {'there are ' + ', '.join(known) if known else ''}"
        ) from None
    except (OSError, ValueError) as error:
        raise InputError(f"{file} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise InputError(f"{file} should hold a JSON object")
    for key, instead in RECIPE_DECIDES.items():
        if key in config:
            raise InputError(f"{file}: {key} is decided by the recipe; remove it and set {instead} there")
    zero = config.get("zero_optimization", {})
    stage = zero.get("stage", 0) if isinstance(zero, dict) else None
    if stage not in (0, 1, 2, 3):
        raise InputError(f"{file}: zero_optimization.stage should be 0, 1, 2 or 3")
    experts = config.get("expert_parallel", {})
    unknown = set(experts) - {"enabled", "autoep_size"} if isinstance(experts, dict) else {"expert_parallel"}
    if unknown:
        raise InputError(f"{file}: expert_parallel takes enabled and autoep_size, not {', '.join(sorted(unknown))}")
    ep_size = experts.get("autoep_size", 1) if experts.get("enabled", False) else 1
    if not isinstance(ep_size, int) or isinstance(ep_size, bool) or ep_size < 1:
        raise InputError(f"{file}: expert_parallel.autoep_size is {ep_size!r}; it should be a positive integer")
    return _divide(file, config, stage, ep_size, recipe, world_size)


def _divide(file: str, config: dict, stage: int, ep_size: int, recipe: Recipe, world_size: int) -> Parallelism:
    moe = recipe.token_choice
    if ep_size > 1 and moe is None:
        raise InputError(
            f"{file}: expert_parallel.autoep_size is {ep_size}, but the network of recipe {recipe.name} has no experts "
            f"that ranks can share; give a --ds file with autoep_size 1"
        )
    if moe is not None and moe.num_experts % ep_size:
        fitting = ", ".join(str(n) for n in range(1, moe.num_experts + 1) if moe.num_experts % n == 0)
        raise InputError(
            f"{file}: expert_parallel.autoep_size {ep_size} does not divide the {moe.num_experts} experts of recipe "
            f"{recipe.name}; choose one of {fitting}"
        )
    if world_size % ep_size:
        ranks = "1 rank" if world_size == 1 else f"{world_size} ranks"
        raise InputError(
            f"{file}: expert_parallel.autoep_size {ep_size} does not divide the {ranks} started; start a multiple of "
            f"{ep_size} (deepspeed --num_gpus {ep_size} ...) or give a --ds file with a smaller autoep_size"
        )
    batch = recipe.global_batch_size
    if batch % world_size:
        raise InputError(
            f"global_batch_size {batch} of recipe {recipe.name} is not a multiple of the {world_size} ranks"
        )
    share = batch // world_size
    accumulation = next(a for a in range(1, share + 1) if share % a == 0 and share // a <= recipe.max_micro_batch_size)
    return Parallelism(file, stage, ep_size, world_size, share // accumulation, accumulation, config)


def for_deepspeed(parallelism: Parallelism, recipe: Recipe, bf16: bool) -> dict[str, Any]:
    """The configuration that deepspeed.initialize gets."""
    config = dict(parallelism.json)
    # Expert-parallel layers are built before the engine sees the model (moe_dit.parallel).
    config.pop("expert_parallel", None)
    return config | {
        "train_batch_size": recipe.global_batch_size,
        "train_micro_batch_size_per_gpu": parallelism.micro_batch_size,
        "gradient_accumulation_steps": parallelism.accumulation,
        # Without ZeRO the engine clips itself (Engine._clip_without_zero says why).
        "gradient_clipping": recipe.optimizer.clip_grad_norm if parallelism.zero_stage else 0.0,
        "bf16": {"enabled": bf16},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,  # progress and metrics are ours
    }
