"""The DeepSpeed JSON: how the work is spread. Checked here, completed from the recipe and the number of ranks.

A JSON must not change a result, so it is held against a list of what is known not to (:data:`NEUTRAL`, by the sources
of DeepSpeed 0.19.8); everything else is refused.
"""

import difflib
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from moe_dit.recipe import Recipe
from moe_dit.runtime.errors import InputError
from moe_dit.runtime.reading import read_json
from moe_dit.runtime.wording import shortened
from moe_dit.schema import divisors, listed


@dataclass(frozen=True)
class Kind:
    """What a value may be: in words, and as a test."""

    words: str
    fits: Callable[[Any], bool]


MOST_NUMBER = 2**53  # what every program's numbers hold exactly


def _whole(value: Any) -> bool:
    """Whether a number is an integer; people write 2e8, which JSON reads as a float."""
    return type(value) in (int, float) and abs(value) <= MOST_NUMBER and float(value).is_integer()


FLAG = Kind("true or false", lambda value: isinstance(value, bool))
COUNT = Kind("a positive integer", lambda value: _whole(value) and value > 0)
NATURAL = Kind("a non-negative integer", lambda value: _whole(value) and value >= 0)
# allgather_bucket_size must be a multiple of DeepSpeed's nccl_start_alignment_factor.
EVEN = Kind("a positive, even integer", lambda value: _whole(value) and value > 0 and value % 2 == 0)
# Without these two DeepSpeed does not train expert-parallel layers, and for others they make no difference.
ALWAYS = Kind("true", lambda value: value is True)
NAMES = Kind("a list of names", lambda value: isinstance(value, list) and all(isinstance(v, str) for v in value))
PATH = Kind("a file name or null", lambda value: value is None or (isinstance(value, str) and "\0" not in value))

# The keys that say how work is spread, or look at it, and leave results as they are.
NEUTRAL: dict[str, Kind | dict[str, Kind]] = {
    "zero_optimization": {
        "stage": Kind("0, 1, 2 or 3", lambda value: _whole(value) and value in (0, 1, 2, 3)),
        "overlap_comm": FLAG,
        "contiguous_gradients": ALWAYS,
        "reduce_scatter": ALWAYS,
        "reduce_bucket_size": COUNT,
        "allgather_bucket_size": EVEN,
        "use_multi_rank_bucket_allreduce": FLAG,
        "sub_group_size": COUNT,
        "stage3_prefetch_bucket_size": NATURAL,
        "stage3_param_persistence_threshold": NATURAL,
        "stage3_model_persistence_threshold": NATURAL,
        "stage3_max_live_parameters": NATURAL,
        "stage3_max_reuse_distance": NATURAL,
    },
    "expert_parallel": {
        "enabled": FLAG,
        "autoep_size": COUNT,
        # How a rank learns the sizes it sends, and sends rows, on GPUs.
        "async_split_plan": FLAG,
        "comm_backend": Kind("comm or deepep", lambda value: value in ("comm", "deepep")),
    },
    "comms_logger": {"enabled": FLAG, "verbose": FLAG, "prof_all": FLAG, "debug": FLAG, "prof_ops": NAMES},
    "flops_profiler": {
        "enabled": FLAG,
        "profile_step": COUNT,
        "module_depth": Kind("an integer", _whole),
        "top_modules": COUNT,
        "detailed": FLAG,
        "output_file": PATH,
    },
    "wall_clock_breakdown": FLAG,
    "memory_breakdown": FLAG,
    "dump_state": FLAG,
}

EXCHANGE = {"async_split_plan", "comm_backend"}
FEW_RANKS = 8  # a node's; what sums over them may be rounded to bf16 on the way

# What decides the experiment stands in the recipe alone.
RECIPE_DECIDES = {
    "train_batch_size": "global_batch_size",
    "train_micro_batch_size_per_gpu": "max_micro_batch_size",
    "gradient_accumulation_steps": "max_micro_batch_size",
    "gradient_clipping": "optimizer.clip_grad_norm",
    "optimizer": "optimizer",
    "scheduler": "optimizer.warmup_steps",
    "bf16": "precision",
    "bfloat16": "precision",
    "fp16": "precision",
    "torch_autocast": "precision",
    "data_types": "gradients",
    "communication_data_type": "gradients",
    "activation_checkpointing": "activation_checkpointing",
    "compile": "compile",
    "tensorboard": "metrics.sinks",
    "wandb": "metrics.sinks",
    "csv_monitor": "metrics.sinks",
    "comet": "metrics.sinks",
}

_SUMS = "changes how gradients are summed"
_ROUNDS = "rounds what ranks send each other, and so changes results"
_OFFLOADS = "moves training state to where checkpoints here do not find it; use more GPUs or a higher ZeRO stage"
REFUSED = {
    "prescale_gradients": _SUMS,
    "gradient_predivide_factor": _SUMS,
    "gradient_allreduce_op": _SUMS,
    "managed_gradient_accumulation": "is decided here, by the recipe's batch sizes",
    "checkpoint": "is of no use: checkpoints here are not DeepSpeed's",
    "steps_per_print": "is of no use: a run reports its own progress",
    "zero_allow_untested_optimizer": "is set here",
    "zero_force_ds_cpu_optimizer": _OFFLOADS,
    "zero_optimization.offload_optimizer": _OFFLOADS,
    "zero_optimization.offload_param": _OFFLOADS,
    "zero_optimization.cpu_offload": _OFFLOADS,
    "zero_optimization.cpu_offload_param": _OFFLOADS,
    "zero_optimization.zenflow": "changes how weights are updated",
    "zero_optimization.zero_quantized_weights": _ROUNDS,
    "zero_optimization.zero_quantized_nontrainable_weights": _ROUNDS,
    "zero_optimization.zero_quantized_gradients": _ROUNDS,
    "zero_optimization.zero_hpz_partition_size": "does not go with expert-parallel layers",
    "zero_optimization.round_robin_gradients": "serves offloading alone, which is not used here",
    "zero_optimization.parameter_alignment": "pads state in another way than plans and checkpoints here reckon with",
    "zero_optimization.compute_grad_norm": "leaves out the gradient's norm, which a run records and checks",
    "zero_optimization.stage3_gather_16bit_weights_on_model_save": "is of no use: jobs/export.py makes models",
    "expert_parallel.load_balance_coeff": "is decided by the recipe; set balance.rate there",
}


def wrong_keys(config: Mapping[str, Any]) -> Iterator[str]:
    """What a JSON says that it should not, a line a key: refused and unknown keys, and wrong types."""
    for key, value in config.items():
        if key in RECIPE_DECIDES:
            yield f"{key} is decided by the recipe; remove it and set {RECIPE_DECIDES[key]} there"
            continue
        yield from _wrong(key, value, NEUTRAL, "a DeepSpeed JSON here")
        section = NEUTRAL.get(key)
        if isinstance(section, dict) and isinstance(value, dict):
            for inner, inner_value in value.items():
                yield from _wrong(inner, inner_value, section, key, f"{key}.")


def _wrong(key: str, value: Any, valid: Mapping[str, Kind | dict], where: str, prefix: str = "") -> Iterator[str]:
    name = prefix + key
    kind = valid.get(key)
    if name in REFUSED:
        yield f"{name} {REFUSED[name]}; remove it"
    elif kind is None:
        near = difflib.get_close_matches(key, valid, 1)
        hint = f"did you mean {near[0]}?" if near else "remove it: what is not known to be neutral could change results"
        *keys, last = valid
        yield f"{where} takes {', '.join(keys)} and {last}, not {shortened(key)}; {hint}"
    elif isinstance(kind, dict):
        if not isinstance(value, dict):
            yield f"{name} is {shortened(repr(value))}; it should be an object"
    elif not kind.fits(value):
        yield f"{name} is {shortened(repr(value))}; it should be {kind.words}"


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

    def in_precision(self, bf16: bool) -> "Parallelism":
        """How it is done in bf16 or float32: one float32 rank has nothing to shard, and goes without ZeRO.

        It would compute the same, and copy each weight and gradient several times a step.
        """
        return replace(self, zero_stage=0) if self.world_size == 1 and not bf16 else self

    def exchange(self, recipe: Recipe, bf16: bool) -> dict[str, Any]:
        """How expert-parallel layers exchange tokens: AutoEP's settings, from the JSON's ``expert_parallel``.

        Raises:
            InputError: DeepEP where it is not installed or cannot carry the rows.
        """
        given = {key: value for key, value in self.json.get("expert_parallel", {}).items() if key in EXCHANGE}
        settings = {"async_split_plan": True} | given
        if settings.get("comm_backend") == "deepep" and self.ep_size > 1:
            why = None
            if importlib.util.find_spec("deep_ep") is None:
                why = "needs the package deep_ep, which is not installed"
            elif not bf16:
                why = "carries bf16 alone, and this run computes in float32"
            elif getattr(recipe.token_choice, "dropout", 0):
                why = "cannot carry what dropout of experts needs to know (model.moe.dropout)"
            if why:
                raise InputError(f'{self.file}: expert_parallel.comm_backend deepep {why}; set "comm" there')
            settings["comm_max_tokens_per_rank"] = self.micro_batch_size * recipe.model.tokens
        return settings


def load_parallelism(file: str, recipe: Recipe, world_size: int) -> Parallelism:
    """Read a DeepSpeed JSON and check it against the recipe and the number of ranks.

    Raises:
        InputError: an unreadable file, a key that could change a result, a wrong value, sizes that do not divide.
    """
    path = Path(file)
    try:
        config = read_json(path, partial(_without_duplicates, file))
    except FileNotFoundError:
        known = sorted(str(p) for p in path.parent.glob("*.json"))
        raise InputError(
            f"no DeepSpeed configuration {file}; {'there are ' + ', '.join(known) if known else ''}"
        ) from None
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise InputError(f"{file} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise InputError(f"{file} should hold a JSON object")
    for problem in wrong_keys(config):
        raise InputError(f"{file}: {problem}")
    stage = int(config.get("zero_optimization", {}).get("stage", 0))
    experts = config.get("expert_parallel", {})
    ep_size = int(experts.get("autoep_size", 1)) if experts.get("enabled", False) else 1
    return _divide(file, config, stage, ep_size, recipe, world_size)


def _without_duplicates(file: str, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; of keys that stand twice, json alone would take the last and say nothing."""
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise InputError(f"{file}: {key} stands twice in one object; leave one")
        values[key] = value
    return values


def _divide(file: str, config: dict, stage: int, ep_size: int, recipe: Recipe, world_size: int) -> Parallelism:
    moe = recipe.token_choice
    if ep_size > 1 and moe is None:
        raise InputError(
            f"{file}: expert_parallel.autoep_size is {ep_size}, but the network of recipe {recipe.name} has no experts "
            f"that ranks can share; give a --ds file with autoep_size 1"
        )
    if moe is not None and moe.num_experts % ep_size:
        raise InputError(
            f"{file}: expert_parallel.autoep_size {ep_size} does not divide the {moe.num_experts} experts of recipe "
            f"{recipe.name}; choose one of {listed(divisors(moe.num_experts))}"
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
    return Parallelism(file, stage, ep_size, world_size, *micro_batches(recipe, world_size), config)


def micro_batches(recipe: Recipe, world_size: int) -> tuple[int, int]:
    """Samples that each of so many ranks, which divide the batch, computes at once; and how often in a step."""
    share = recipe.global_batch_size // world_size
    accumulation = next(a for a in divisors(share) if share // a <= recipe.max_micro_batch_size)
    return share // accumulation, accumulation


def sums_in_fp32(recipe: Recipe, parallelism: Parallelism, bf16: bool) -> bool:
    """Whether gradients are summed in float32, over micro-batches and ranks, where weights compute in bf16.

    A sum of n numbers of bf16, rounded as it grows, is off by about 2^-9 of itself in each step, and from some hundred
    equal terms on takes no more. So ``gradients: auto`` is float32 where micro-batches are accumulated, and where more
    than FEW_RANKS ranks meet.
    """
    if not bf16 or recipe.gradients != "auto":
        return not bf16 or recipe.gradients == "fp32"
    return parallelism.accumulation > 1 or parallelism.world_size > FEW_RANKS


def for_deepspeed(parallelism: Parallelism, recipe: Recipe, bf16: bool) -> dict[str, Any]:
    """The configuration that deepspeed.initialize gets."""
    config = dict(parallelism.json)
    # Expert-parallel layers are built before the engine sees the model (moe_dit.parallel).
    config.pop("expert_parallel", None)
    if not parallelism.zero_stage:
        config["zero_optimization"] = {"stage": 0}
    if bf16 and sums_in_fp32(recipe, parallelism, bf16):
        config |= {"data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"}
    return config | {
        "train_batch_size": recipe.global_batch_size,
        "train_micro_batch_size_per_gpu": parallelism.micro_batch_size,
        "gradient_accumulation_steps": parallelism.accumulation,
        # Without ZeRO the engine clips itself (Engine._clip_without_zero says why).
        "gradient_clipping": recipe.optimizer.clip_grad_norm if parallelism.zero_stage else 0.0,
        # A run looks for numbers that are not finite itself; DeepSpeed's look waits for the GPU twice a step.
        # With float32 sums, ZeRO 1 is another class in DeepSpeed 0.19.8 (BF16_Optimizer), which computes the same. Told
        # to update at once, it frees each bf16 gradient when it has added it; else it keeps them all beside the sums.
        "bf16": {"enabled": bf16, "immediate_grad_update": bf16, "check_grad_overflow": False},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,  # progress and metrics are ours
        # DeepSpeed 0.19.8 would wait for the GPU twice a step, to time it: seen on the first GPU that ran this.
        "timers": {"throughput": {"enabled": False}},
    }
