"""Recipes: one YAML file says everything that makes an experiment, read into frozen dataclasses.

A recipe says what is computed; the DeepSpeed JSON beside it says how the work is spread, and changes nothing else.
"""

import dataclasses
import difflib
from collections.abc import Sequence
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from moe_dit.errors import InputError

RECIPES = Path(__file__).parent / "recipes"
DEFAULT_RECIPE = "dsmoe_s_e16"

_strict = ConfigDict(extra="forbid")
Count = Annotated[int, Field(strict=True, gt=0)]
Fraction = Annotated[float, Field(strict=True, ge=0, lt=1)]
Positive = Annotated[float, Field(strict=True, gt=0)]
Interval = Annotated[list[float], Field(min_length=2, max_length=2)]


@dataclass(frozen=True, config=_strict)
class MoE:
    """A token-choice mixture-of-experts layer (FACTS of it: paper section 3; DeepSeek-V3's router)."""

    num_experts: Count
    top_k: Count  # experts a token is sent to
    expert_width: Count  # hidden width of an expert's SwiGLU, and of the shared expert's
    routed_scale: Positive  # factor on the normalised routing weights
    num_groups: Count = 1  # group-limited routing: experts form this many groups ...
    num_groups_kept: Count = 1  # ... and a token sees only the best of them
    shared_expert: bool = True


@dataclass(frozen=True, config=_strict)
class PixelMoE(MoE):
    """JiTMoE's: the same layer, whose experts have biases, with dropout of their hidden values."""

    dropout: Fraction = 0.0


@dataclass(frozen=True, config=_strict)
class ExpertChoiceMoE:
    """DiffMoE's layer: experts choose tokens among a rank's whole batch (arXiv:2503.14487)."""

    num_experts: Count
    capacity: Positive  # experts a token gets on average in training
    shared_experts: Annotated[int, Field(strict=True, ge=0)] = 0


@dataclass(frozen=True, config=_strict)
class Model:
    """What all networks have. Sizes are in values of a square input, cut into patches."""

    input_size: Count  # side of the latent, or of the image in pixel space
    in_channels: Count
    patch_size: Count
    depth: Count
    hidden_size: Count
    num_heads: Count
    mlp_ratio: Positive  # width of the dense blocks' MLP over hidden_size
    num_classes: Count


@dataclass(frozen=True, config=_strict, kw_only=True)
class DSMoE(Model):
    """moe_dit.models.dsmoe."""

    family: Literal["dsmoe"]
    moe: MoE
    learn_sigma: bool = True  # twice the output channels; the second half is not used (as published)
    positions: Literal["rope_2d", "rope_1d", "sin_cos"] = "rope_2d"
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    interleave: bool = True  # MoE in the odd blocks; false: in all
    dense_first: Annotated[int, Field(strict=True, ge=0)] = 0  # first blocks that are dense in any case


@dataclass(frozen=True, config=_strict, kw_only=True)
class DiffMoE(Model):
    """moe_dit.models.diffmoe."""

    family: Literal["diffmoe"]
    moe: ExpertChoiceMoE
    capacity_loss_weight: Annotated[float, Field(strict=True, ge=0)]  # of the capacity predictors' loss
    learn_sigma: bool = True
    gated: bool = False  # SwiGLU without biases for every MLP
    interleave: bool = True


@dataclass(frozen=True, config=_strict, kw_only=True)
class JiT(Model):
    """moe_dit.models.jit: JiTMoE with ``moe``, JiT without."""

    family: Literal["jit"]
    bottleneck_dim: Count  # width between pixels and tokens
    in_context_len: Annotated[int, Field(strict=True, ge=0)]  # class tokens ...
    in_context_start: Annotated[int, Field(strict=True, ge=0)]  # ... that join before this block
    moe: PixelMoE | None = None
    attn_dropout: Fraction = 0.0  # dropout, this and all other, acts in the middle half of the depth
    proj_dropout: Fraction = 0.0


MODELS = {"dsmoe": DSMoE, "diffmoe": DiffMoE, "jit": JiT}


@dataclass(frozen=True, config=_strict)
class Flow:
    """The objective: how noise and data are mixed, and what is regressed."""

    label_dropout: Fraction  # share of labels replaced by the null class, for classifier-free guidance
    prediction: Literal["velocity", "data"] = "velocity"  # what the network gives; the loss is on the velocity
    time: Literal["uniform", "logit_normal"] = "uniform"  # distribution of training times
    time_mean: Annotated[float, Field(strict=True)] = 0.0  # of logit(t), where it is normal
    time_std: Positive = 1.0
    noise_scale: Positive = 1.0
    min_denominator: Fraction = 0.05  # least 1 - t to divide by (data prediction)


@dataclass(frozen=True, config=_strict)
class Sampling:
    """Defaults of eval.sample."""

    method: Literal["euler", "heun"]
    steps: Count
    cfg_scale: Annotated[float, Field(strict=True, ge=0)] = 1.0
    cfg_interval: Interval = field(default_factory=lambda: [0.0, 1.0])  # guidance acts on t inside it
    labels: Literal["balanced", "random"] = "random"


@dataclass(frozen=True, config=_strict)
class Data:
    """Where the shards are and how a sample becomes a network input."""

    path: str  # folder of shards; --data replaces it
    kind: Literal["latents", "pixels"]
    horizontal_flip: Fraction  # probability
    latent_scale: Positive | None = None  # factor on latents; None: the VAE's own, from the shards' manifest
    vae: str | None = None  # hub name or folder of the VAE that decodes samples
    workers: Annotated[int, Field(strict=True, ge=0)] = 4  # loader processes a rank


@dataclass(frozen=True, config=_strict)
class Optimizer:
    """AdamW."""

    lr: Positive
    betas: Annotated[list[Fraction], Field(min_length=2, max_length=2)]
    weight_decay: Annotated[float, Field(strict=True, ge=0)] = 0.0
    warmup_steps: Annotated[int, Field(strict=True, ge=0)] = 0  # linear from 0, then constant
    clip_grad_norm: Annotated[float, Field(strict=True, ge=0)] = (
        0.0  # largest gradient norm; 0: no clipping (as published)
    )


@dataclass(frozen=True, config=_strict)
class EMA:
    """Exponential moving averages of the weights."""

    decay: Fraction
    second_decay: Fraction | None = None  # of another average beside it (ema2 in checkpoints and exports)

    @property
    def decays(self) -> dict[str, float]:
        """Decay by the name of the average in checkpoints."""
        return {"ema": self.decay} | ({} if self.second_decay is None else {"ema2": self.second_decay})


@dataclass(frozen=True, config=_strict)
class Balance:
    """DeepSeek-V3's loss-free load balancing: each step the router's correction bias moves by rate * sign(error)."""

    rate: Annotated[float, Field(strict=True, ge=0)] = 0.0  # 0: biases stay as they are (as published)


@dataclass(frozen=True, config=_strict)
class Checkpoint:
    """When to save, and how many to keep."""

    every: Count  # steps
    keep: Count = 3  # newest ones kept
    milestone_every: Annotated[int, Field(strict=True, ge=0)] = 0  # steps between ones kept for good; 0: none


@dataclass(frozen=True, config=_strict)
class Recipe:
    """One experiment."""

    name: str
    seed: Annotated[int, Field(strict=True, ge=0, lt=2**32)]
    steps: Count
    global_batch_size: Count
    max_micro_batch_size: Count  # largest batch a rank computes at once; beyond it gradients are accumulated
    model: Annotated[DSMoE | DiffMoE | JiT, Field(discriminator="family")]
    flow: Flow
    sampling: Sampling
    data: Data
    optimizer: Optimizer
    ema: EMA
    checkpoint: Checkpoint
    balance: Balance = field(default_factory=Balance)
    activation_checkpointing: Literal["none", "blocks", "experts"] = "none"  # what is recomputed to save memory
    compile: Literal["none", "dense"] = "none"  # torch.compile of attention and dense MLPs; needs a C++ compiler
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # auto: bf16 on GPUs, fp32 on CPUs

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dicts, as in the YAML file."""
        return dataclasses.asdict(self)


def names() -> list[str]:
    """The recipes that come with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def load_recipe(name_or_file: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe by name, or from a YAML file.

    Args:
        name_or_file: a name of :func:`names`, or a path that ends in .yaml or .yml.
        overrides: "section.key=value" strings, the value in YAML (--set).

    Raises:
        InputError: no such recipe, or a key or value that is wrong; names the key, the file and the valid choice.
    """
    path = Path(name_or_file)
    if path.suffix not in (".yaml", ".yml"):
        path = RECIPES / f"{name_or_file}.yaml"
        if not path.exists():
            near = difflib.get_close_matches(name_or_file, names(), 1)
            hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(names())}, or give a .yaml file"
            raise InputError(f"no recipe named {name_or_file!r}; {hint}")
    return parse_recipe(_read_yaml(path), str(name_or_file), overrides)


def parse_recipe(values: dict[str, Any], source: str, overrides: Sequence[str] = ()) -> Recipe:
    """Check plain values against the schema; ``source`` names them in errors (see :func:`load_recipe`)."""
    sources: dict[str, str] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise InputError(f"--set {override}: expected section.key=value, for example --set optimizer.lr=1e-4")
        _set(values, key.strip().split("."), _parse_value(text, override), override)
        sources[key.strip()] = f"--set {override}"
    values = _floats(values)
    try:
        recipe = TypeAdapter(Recipe).validate_python(values)
    except ValidationError as error:
        raise InputError(_explain(error, values, source, sources)) from None
    _check(recipe, source)
    return recipe


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise InputError(f"no recipe file {path}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"cannot read recipe {path}: {error}") from None
    if not isinstance(values, dict):
        raise InputError(f"recipe {path} should be a mapping of keys to values, see {RECIPES / DEFAULT_RECIPE}.yaml")
    return values


def _parse_value(text: str, override: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise InputError(f"--set {override}: the value is not YAML") from None


def _set(values: dict[str, Any], keys: list[str], value: Any, override: str) -> None:
    for key in keys[:-1]:
        values = values.setdefault(key, {})
        if not isinstance(values, dict):
            raise InputError(f"--set {override}: {key} is a value, not a section")
    values[keys[-1]] = value


def _floats(value: Any) -> Any:
    """YAML 1.1 (PyYAML) reads 1e-4 as text, for want of a dot: read it as the number it is."""
    if isinstance(value, dict):
        return {key: _floats(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_floats(item) for item in value]
    if isinstance(value, str) and value[:1] in "0123456789.+-" and "e" in value.lower():
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _schema(loc: tuple, values: dict) -> Any:
    """The dataclass at a location, for the names of its keys."""
    schema: Any = Recipe
    if loc[:1] == ("model",):
        schema, loc = MODELS[values["model"]["family"]], loc[1:]
    for key in loc:
        fields = {f.name: f.type for f in dataclasses.fields(schema)} if dataclasses.is_dataclass(schema) else {}
        schema = fields.get(key)
        schema = next((arg for arg in get_args(schema) if dataclasses.is_dataclass(arg)), schema)
    return schema if dataclasses.is_dataclass(schema) else None


def _explain(error: ValidationError, values: dict, source: str, sources: dict[str, str]) -> str:
    """One line for the first problem pydantic found."""
    # An unknown key explains a missing one (a typo makes both), so it comes first.
    problem = sorted(error.errors(), key=lambda p: p["type"] != "unexpected_keyword_argument")[0]
    loc = problem["loc"]
    if loc[0] == "model":
        if problem["type"] in ("union_tag_not_found", "union_tag_invalid"):
            loc = ("model", "family")
            kind = "missing" if problem["type"] == "union_tag_not_found" else "literal_error"
            tag = problem["ctx"].get("tag")
            problem = problem | {"type": kind, "input": tag, "ctx": {"expected": ", ".join(MODELS)}}
        else:
            loc = (*loc[:1], *loc[2:])  # without the family, which pydantic puts between
    key = ".".join(str(part) for part in loc)
    where = next((text for name, text in sources.items() if f"{name}.".startswith(f"{key}.")), f"recipe {source}")
    if problem["type"] == "unexpected_keyword_argument":
        schema = _schema(loc[:-1], values)
        valid = [f.name for f in dataclasses.fields(schema)] if schema else []
        near = difflib.get_close_matches(str(loc[-1]), valid, 1)
        hint = f"did you mean {near[0]}?" if near else f"valid keys here: {', '.join(valid)}"
        return f"{where}: unknown key {key}; {hint}"
    if problem["type"] in ("missing", "missing_argument"):
        return f"{where}: key {key} is missing"
    if problem["type"] == "literal_error":
        choices = problem["ctx"]["expected"].replace("'", "").replace(" or ", ", ").split(", ")
        near = difflib.get_close_matches(str(problem["input"]), choices, 1)
        hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(choices)}"
        return f"{where}: {key} is {problem['input']!r}; {hint}"
    message = problem["msg"].replace("Input should be", "it should be")
    return f"{where}: {key} is {problem['input']!r}; {message}"


def _check(recipe: Recipe, source: str) -> None:
    """What one key's type cannot say."""
    model = recipe.model

    def need(good: bool, key: str, message: str) -> None:
        if not good:
            raise InputError(f"recipe {source}: {key} {message}")

    def divisors(n: int) -> str:
        return ", ".join(str(d) for d in range(1, n + 1) if n % d == 0)

    need(
        model.input_size % model.patch_size == 0,
        "model.patch_size",
        f"is {model.patch_size}, which does not divide model.input_size {model.input_size}",
    )
    need(
        model.hidden_size % model.num_heads == 0 and model.hidden_size // model.num_heads % 4 == 0,
        "model.num_heads",
        f"is {model.num_heads}; hidden_size / num_heads must be a multiple of 4 (2-D RoPE), "
        f"and hidden_size is {model.hidden_size}",
    )
    if isinstance(model, JiT):
        need(
            model.in_context_len == 0 or model.in_context_start < model.depth,
            "model.in_context_start",
            f"is {model.in_context_start}; it should be less than model.depth {model.depth}",
        )
    need(
        recipe.ema.second_decay is None or recipe.ema.second_decay != recipe.ema.decay,
        "ema.second_decay",
        f"is {recipe.ema.second_decay}, the same as ema.decay; leave it out or change one",
    )
    low, high = recipe.sampling.cfg_interval
    need(0 <= low <= high <= 1, "sampling.cfg_interval", f"is [{low}, {high}]; it should be 0 <= low <= high <= 1")
    moe = model.moe
    if not isinstance(moe, MoE):
        need(
            recipe.balance.rate == 0,
            "balance.rate",
            f"is {recipe.balance.rate}; only experts that tokens choose can be balanced, and this network has none",
        )
        return
    need(
        moe.num_experts % moe.num_groups == 0,
        "model.moe.num_groups",
        f"is {moe.num_groups}; it must divide num_experts {moe.num_experts}: {divisors(moe.num_experts)}",
    )
    need(
        moe.num_groups_kept <= moe.num_groups,
        "model.moe.num_groups_kept",
        f"is {moe.num_groups_kept}, more than num_groups {moe.num_groups}",
    )
    need(
        moe.num_groups == 1 or moe.num_experts // moe.num_groups >= 2,
        "model.moe.num_groups",
        f"is {moe.num_groups}; a group is scored by its two best experts and needs at least two",
    )
    reachable = moe.num_experts // moe.num_groups * moe.num_groups_kept
    need(
        moe.top_k <= reachable, "model.moe.top_k", f"is {moe.top_k}; at most the {reachable} experts of the kept groups"
    )
