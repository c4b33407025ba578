"""What may change when a run goes on: nothing silently, and what makes it another experiment only by its name.

A checkpoint's state.json says what it was trained with: its recipe, what that came to (precision, micro-batch) and its
shards. A start of the training command is held against it, key by key. Each key that differs is told in a line and an
event. What changes numbers must be named on the command line, by --set or --allow-change: a command that is given
again without its --set is refused, and so is one whose recipe file was edited.
"""

import difflib
import json
import shlex
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from moe_dit.classes import differing
from moe_dit.initial_weights import TRAINING_KEYS
from moe_dit.manifest import Content
from moe_dit.models import FAMILIES
from moe_dit.parallel.deepspeed_config import Parallelism, micro_batches, sums_in_fp32
from moe_dit.recipe import Recipe
from moe_dit.recipe_file import parse_recipe
from moe_dit.runtime.errors import InputError
from moe_dit.schema import differences, is_under

# With these a run is another experiment, from whichever run's checkpoint it begins: --allow-change alone lets them
# change, for --set says what a run should be, not that it may become another.
EXPERIMENT = ("seed", "global_batch_size", "model", "flow", "ema", "data.window_gb", "data.vae_sha256")
# The same of a run that goes on; one that begins from another run's checkpoint may have them of its own.
SHARDS = ("data.kind", "data.sample_shape", "data.samples", "data.classes", "data.content")
MICRO_BATCH = "micro_batch_size"
SUMS = "gradients.auto"  # what that comes to
# What leaves every number of training as it is, or follows from how a run is spread; all else must be named.
HARMLESS = (
    *("name", "max_micro_batch_size", "activation_checkpointing", "compile", "initial_weights", "sampling"),
    *("data.path", "data.workers", "data.cache_gb", "data.vae", "checkpoint", "looks", "metrics", SUMS),
)
# What not every checkpoint, and not every folder of shards, says.
PERHAPS_UNKNOWN = ("data.latent_scale", "data.latent_shift", "data.vae", "data.vae_sha256", *SHARDS, MICRO_BATCH, SUMS)


@dataclass(frozen=True)
class Named:
    """Keys and sections that a command names.

    Attributes:
        given: whose values it says (--set, --steps).
        allowed: those that may change (--allow-change): of the recipe, :data:`SHARDS` or :data:`MICRO_BATCH`.
    """

    given: Collection[str] = ()
    allowed: Collection[str] = ()

    def check(self, recipe: Recipe) -> None:
        """Refuse an --allow-change of what cannot change because there is none such (InputError)."""
        known = {*_paths(recipe.to_dict()), *SHARDS, MICRO_BATCH}
        for key in self.allowed:
            # Of a mixture, another recipe may have other keys.
            if key not in known and not is_under(key, ["model.moe"]):
                near = difflib.get_close_matches(key, sorted(known), 1)
                hint = f"did you mean {near[0]}?" if near else "give a key or section of the recipe, as optimizer.lr"
                raise InputError(f"--allow-change {key}: there is no such key; {hint}")


class Change(NamedTuple):
    """A key that differs from what a checkpoint was trained with."""

    key: str
    new: Any
    old: Any

    def __str__(self) -> str:
        return f"goes on with {self.key} {_shown(self.new)} instead of {_shown(self.old)}"


@dataclass(frozen=True)
class Asked:
    """What a start of the training command would train.

    Attributes:
        recipe: with what the shards decide (``train._resolve``).
        world_size: number of ranks.
        bf16: whether it computes in bf16, else in float32.
        data: its shards.
        named: what the command names.
    """

    recipe: Recipe
    world_size: int
    bf16: bool
    data: Content
    named: Named

    def changes(self, description: Mapping[str, Any], checkpoint: Path, own: bool) -> list[str]:
        """What changes where this goes on from a checkpoint, a line a key.

        Args:
            description: its state.json.
            checkpoint: its folder.
            own: whether it is the run's own, else another run begins from it.

        Raises:
            InputError: what must not change, or not without being named.
        """
        trained = parse_recipe(description["recipe"], str(checkpoint))  # a key it is older than has its default
        bf16 = {"bf16": True, "fp32": False}.get(str(description.get("precision")))
        ours = computed(self.recipe, self.world_size, None if bf16 is None else self.bf16, self.data)
        theirs = computed(trained, description.get("world_size"), bf16, description.get("data"))
        theirs["data"]["window_gb"] = kept_window(description)
        if ours["data"]["window_gb"] == "auto":
            ours["data"]["window_gb"] = theirs["data"]["window_gb"]
        told, refused = judge(ours, theirs, self.named, own)
        if refused:
            raise InputError(f"{checkpoint} was trained with {_refusal(refused, self)}")
        return [str(change) for change in told]


def kept_window(description: Mapping[str, Any]) -> float | None:
    """The ``data.window_gb`` that a checkpoint was trained with, as state.json says (before the key: null)."""
    return description["recipe"]["data"].get("window_gb")


def computed(recipe: Recipe, world_size: int | None, bf16: bool | None, data: Content | None) -> dict[str, Any]:
    """A recipe as nested dicts, with what it comes to.

    Args:
        recipe: what is trained.
        world_size: number of ranks; None where it is not known.
        bf16: whether in bf16; None where it is not known.
        data: the shards' description; None where it is not known.
    """
    values = recipe.to_dict()
    values["data"] |= data or {}
    if isinstance(world_size, int) and 0 < world_size <= recipe.global_batch_size:
        micro_batch_size, accumulation = micro_batches(recipe, world_size)
        if couples_micro_batch(recipe):
            values[MICRO_BATCH] = micro_batch_size
        if bf16 and recipe.gradients == "auto":
            spread = Parallelism("", 0, 1, world_size, micro_batch_size, accumulation, {})
            values[SUMS] = "fp32" if sums_in_fp32(recipe, spread, bf16) else "bf16"
    if bf16 is not None:
        values["precision"] = "bf16" if bf16 else "fp32"
    return values


def couples_micro_batch(recipe: Recipe) -> bool:
    """Whether what is trained depends on how many samples a rank computes at once."""
    if FAMILIES[recipe.model.family].network.couples_samples:
        return True
    losses = recipe.token_choice.auxiliary_losses if recipe.token_choice is not None else {}
    return any(weight for name, weight in losses.items() if name != "z_loss")  # which is a mean over tokens


def judge(
    ours: Mapping[str, Any], theirs: Mapping[str, Any], named: Named, own: bool = True
) -> tuple[list[Change], list[Change]]:
    """What differs between what would be trained and what was (both of :func:`computed`): told, and refused."""
    told: list[Change] = []
    refused: list[Change] = []
    for change in _changes(ours, theirs):
        key = change.key
        allowed = is_under(key, named.allowed) and not never(change)
        if is_under(key, EXPERIMENT):
            good = allowed
        elif is_under(key, HARMLESS) or not own:
            good = True
        elif is_under(key, (*SHARDS, MICRO_BATCH)):
            good = allowed
        elif key == "steps":
            # The rate of every step follows from it, unless the schedule is constant.
            good = ours["optimizer"]["schedule"] == "constant" or allowed or is_under(key, named.given)
        else:
            good = allowed or is_under(key, named.given)
        (told if good else refused).append(change)
    return told, refused


def never(change: Change) -> bool:
    """Whether the state of a checkpoint is of no use with a change: another network, or other averages."""
    if is_under(change.key, ["model"]):
        return not is_under(change.key.removeprefix("model."), TRAINING_KEYS)
    return change.key == "ema.second_decay" and None in (change.new, change.old)


def _changes(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> Iterator[Change]:
    known = theirs["data"].get("content") is not None  # then shards say what they are, wherever they lie
    for key, new, old in differences(ours, theirs):
        if (None in (new, old) and is_under(key, PERHAPS_UNKNOWN)) or (key == "data.path" and known):
            continue
        if key == "data.classes":
            new, old = differing(new, old)
        elif key == "data.content" and ours["data"]["samples"] != theirs["data"]["samples"]:
            continue  # of course
        elif key in ("data.content", "data.vae_sha256"):
            new, old = f"{new[:12]}...", f"{old[:12]}..."
        yield Change(key, new, old)


def _refusal(refused: Sequence[Change], asked: Asked) -> str:
    """What is said of changes that are refused, behind "was trained with"."""
    final = [change for change in refused if never(change)]
    shown = ", ".join(f"{key} {_shown(old)}, not {_shown(new)}" for key, new, old in final[:3] or refused)
    if final:
        return (
            f"{shown}, and its state is of no use with another; continue it with {_shown(final[0].old)}, or give "
            "another --out for another experiment"
        )
    them = "them" if len(refused) > 1 else "it"
    keep = " ".join(dict.fromkeys(_kept(change, asked) for change in refused))
    allow = " ".join(dict.fromkeys(f"--allow-change {_allowed(change.key)}" for change in refused))
    return f"{shown}; keep {them} with {keep}, change {them} with {allow}, or give another --out for another experiment"


def _kept(change: Change, asked: Asked) -> str:
    """What on a command line keeps a key as it was."""
    if is_under(change.key, (*SHARDS, "data.vae_sha256")):
        return "the same shards"
    if change.key == MICRO_BATCH:
        if asked.recipe.global_batch_size // asked.world_size % change.old:
            return "another number of ranks"
        return f"--set max_micro_batch_size={change.old}"
    if change.key == "steps":
        return f"--steps {change.old}"
    value = change.old if isinstance(change.old, str) else json.dumps(change.old)
    return f"--set {shlex.quote(f'{change.key}={value}')}"


def _allowed(key: str) -> str:
    return "data" if is_under(key, SHARDS) else key


def _shown(value: Any) -> str:
    return "null" if value is None else str(value)


def _paths(values: Mapping[str, Any], path: str = "") -> Iterator[str]:
    """The dotted names of keys and sections."""
    for key, value in values.items():
        yield f"{path}{key}"
        if isinstance(value, Mapping):
            yield from _paths(value, f"{path}{key}.")
