"""What a recipe says: everything that makes an experiment, as frozen dataclasses, a class a section of the YAML file.

A recipe says what is computed; the DeepSpeed JSON beside it says how the work is spread, and changes nothing else. A
new key gets a default that means what was done before the key existed, so that older runs continue. The ``model``
section is its family's own (:mod:`moe_dit.models`); :mod:`moe_dit.recipe_file` reads recipes.
"""

import dataclasses
import operator
import re
from collections.abc import Iterator
from dataclasses import field
from functools import reduce
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from moe_dit.models import FAMILIES, NetworkConfig
from moe_dit.models.moe import MoEConfig
from moe_dit.schema import (
    STRICT,
    BuiltCount,
    Count,
    Fraction,
    Interval,
    ListedCount,
    ListedNatural,
    Natural,
    NonNegative,
    Number,
    Positive,
    Problem,
    Text,
)

# It becomes a part of paths (runs/NAME) and of jobs' names.
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True, config=STRICT)
class FlowConfig:
    """The objective: how noise and data are mixed, and what is regressed."""

    label_dropout: Fraction  # share of labels replaced by the null class, for classifier-free guidance
    prediction: Literal["velocity", "data"] = "velocity"  # what the network gives; the loss is on the velocity
    time: Literal["uniform", "logit_normal"] = "uniform"  # distribution of training times
    time_mean: Number = 0.0  # of logit(t), where it is normal
    time_std: Positive = 1.0
    noise_scale: Positive = 1.0
    min_denominator: Fraction = 0.05  # least 1 - t to divide by (data prediction)


@dataclass(frozen=True, config=STRICT)
class SamplingConfig:
    """Defaults of eval.sample, and how looks sample."""

    method: Literal["euler", "heun", "unipc"]
    steps: BuiltCount
    cfg_scale: NonNegative = 1.0
    cfg_interval: Interval = field(default_factory=lambda: [0.0, 1.0])  # guidance acts on t inside it
    labels: Literal["balanced", "random"] = "random"


@dataclass(frozen=True, config=STRICT)
class DataConfig:
    """Where the shards are and how a sample becomes a network input."""

    path: Text  # folder of shards, or its URL; --data replaces it
    kind: Literal["latents", "pixels"]
    horizontal_flip: Fraction  # probability
    latent_scale: Positive | None = None  # factor on latents; null: the VAE's own, from the shards' manifest
    latent_shift: Number | None = None  # taken from latents before the factor; null: the VAE's own, likewise
    vae: Text | None = None  # hub name or folder of the VAE that decodes samples; null: the one that encoded the shards
    vae_sha256: str | None = None  # of that VAE's weights, from the shards' manifest; another one is refused
    workers: Natural | Literal["auto"] = "auto"  # loader processes a rank; auto: as many as feed it, by measurement
    # Shards are shuffled in windows of so many GB, read one after another (moe_dit.data.order); null: all samples at
    # once; auto: null up to 8 GB of shards, else 4. A run keeps what it began with (before the key: null)
    window_gb: Positive | Literal["auto"] | None = "auto"
    cache_gb: Positive | None = None  # GB that shards behind a URL may take on a node; null: any


@dataclass(frozen=True, config=STRICT)
class OptimizerConfig:
    """The optimizer, and the learning rate over a run (:mod:`moe_dit.schedule`)."""

    lr: Positive
    betas: Annotated[list[Fraction], Field(min_length=2, max_length=2)]
    weight_decay: NonNegative = 0.0
    warmup_steps: Natural = 0  # the rate rises linearly from 0 over these
    clip_grad_norm: NonNegative = 0.0  # largest gradient norm; 0: no clipping (as published)
    name: str = "adamw"  # one of moe_dit.optimizer.OPTIMIZERS
    schedule: Literal["constant", "cosine", "linear"] = "constant"  # after the warm-up
    final_lr: NonNegative = 0.0  # where cosine and linear end, at the recipe's last step


@dataclass(frozen=True, config=STRICT)
class EMAConfig:
    """Exponential moving averages of the weights."""

    decay: Fraction
    second_decay: Fraction | None = None  # of another average beside it (ema2 in checkpoints and exports)

    @property
    def decays(self) -> dict[str, float]:
        """Decay by the name of the average in checkpoints."""
        return {"ema": self.decay} | ({} if self.second_decay is None else {"ema2": self.second_decay})


@dataclass(frozen=True, config=STRICT)
class BalanceConfig:
    """DeepSeek-V3's loss-free load balancing: each step the router's correction bias moves by rate * sign(error)."""

    rate: NonNegative = 0.0  # 0: biases stay as they are (as published)


@dataclass(frozen=True, config=STRICT)
class CheckpointConfig:
    """When to save, and how many to keep."""

    every: Count  # steps
    keep: Count = 3  # newest ones kept
    milestone_every: Natural = 0  # steps between ones kept for good; 0: none
    write_gb_per_second: Positive | None = None  # most that all ranks write together; null: as fast as it goes


@dataclass(frozen=True, config=STRICT)
class LooksConfig:
    """Looks at the averaged weights while a run trains (:mod:`moe_dit.looks`)."""

    every: Natural = 0  # steps between looks; 0: none
    samples: ListedNatural = 16  # images of the grid, always of the same noise and labels; 0: no grid
    held_out: Text | None = None  # folder of shards that are not trained on, for the held-out loss; null: none
    held_out_samples: ListedCount = 512  # of them, the first in order
    time_buckets: BuiltCount = 10  # equal parts of [0, 1] that the held-out loss is told by
    score_samples: ListedNatural = 0  # samples that are scored at a look; 0: no scores
    reference: Text | None = None  # folder of images or shards, or statistics, that scores compare with
    inception: Text | None = None  # Inception V3 weights, or "download"; null: a classifier fitted to the reference


@dataclass(frozen=True, config=STRICT)
class MetricsConfig:
    """Where a run's numbers go beside metrics.jsonl."""

    sinks: list[str] = field(default_factory=lambda: ["tensorboard"])  # of moe_dit.sinks.SINKS


if TYPE_CHECKING:
    ModelSection = Any  # a NetworkConfig with its family's own keys
else:
    # One settings class a family; which one a section is, its key `family` says.
    _settings = (family.config for family in FAMILIES.values())
    ModelSection = Annotated[reduce(operator.or_, _settings), Field(discriminator="family")]


@dataclass(frozen=True, config=STRICT)
class Recipe:
    """One experiment."""

    name: str  # of the form NAME
    seed: Annotated[int, Field(strict=True, ge=0, lt=2**32)]
    steps: Count
    global_batch_size: Count
    max_micro_batch_size: Count  # largest batch a rank computes at once; beyond it gradients are accumulated
    model: ModelSection
    flow: FlowConfig
    sampling: SamplingConfig
    data: DataConfig
    optimizer: OptimizerConfig
    ema: EMAConfig
    checkpoint: CheckpointConfig
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    activation_checkpointing: Literal["none", "blocks", "experts"] = "none"  # what is recomputed to save memory
    # What torch.compile makes kernels of; needs a C++ compiler. blocks: all but the exchange of tokens between experts;
    # dense: attention and dense MLPs; auto: blocks on GPUs under ZeRO 0 to 2, else none
    compile: Literal["auto", "none", "dense", "blocks"] = "auto"
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # auto: bf16 on GPUs, fp32 on CPUs
    # In bf16: what gradients are summed in, over micro-batches and ranks. auto: fp32 where micro-batches are
    # accumulated or more than 8 ranks meet, else bf16
    gradients: Literal["auto", "bf16", "fp32"] = "auto"
    initial_weights: Text | None = None  # model folder to begin from (an export, an upcycled one); null: drawn
    looks: LooksConfig = field(default_factory=LooksConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dicts, as in the YAML file."""
        return dataclasses.asdict(self)  # type: ignore[call-overload]  # pydantic's dataclasses are dataclasses

    def compiled(self, device_type: str, zero_stage: int) -> str:
        """What is compiled on "cuda" or "cpu" under a ZeRO stage: "none", "dense" or "blocks"."""
        if self.compile != "auto":
            return self.compile
        return "blocks" if device_type == "cuda" and zero_stage < 3 else "none"

    def in_bf16(self, device_type: str) -> bool:
        """Whether the network computes in bf16 on such a device ("cuda", "cpu"), else in float32."""
        return self.precision == "bf16" or (self.precision == "auto" and device_type == "cuda")

    @property
    def token_choice(self) -> MoEConfig | None:
        """The mixture whose tokens choose experts, which ranks can share and biases balance; None without one."""
        moe = getattr(self.model, "moe", None)
        return moe if isinstance(moe, MoEConfig) else None

    def problems(self) -> Iterator[Problem]:
        """What one key's type cannot say: see :mod:`moe_dit.schema`."""
        if not NAME.fullmatch(self.name):
            yield (
                "name",
                f"is {self.name[:100]!r}; it should be letters (a to z, A to Z), digits and ._- only, at most 100, and "
                "begin with none of .-",
            )
        model: NetworkConfig = self.model
        for key, message in model.problems():
            yield f"model.{key}", message
        if self.ema.second_decay == self.ema.decay:
            yield "ema.second_decay", f"is {self.ema.decay}, the same as ema.decay; leave it out or change one"
        low, high = self.sampling.cfg_interval
        if not 0 <= low <= high <= 1:
            yield "sampling.cfg_interval", f"is [{low}, {high}]; it should be 0 <= low <= high <= 1"
        if self.balance.rate and self.token_choice is None:
            yield (
                "balance.rate",
                f"is {self.balance.rate}; only experts that tokens choose can be balanced, and this network has none",
            )
        if self.optimizer.final_lr > self.optimizer.lr:
            yield "optimizer.final_lr", f"is {self.optimizer.final_lr}, more than optimizer.lr {self.optimizer.lr}"
        if self.optimizer.schedule != "constant" and self.optimizer.warmup_steps >= self.steps:
            yield "optimizer.warmup_steps", f"is {self.optimizer.warmup_steps}, not less than steps {self.steps}"
        if self.looks.score_samples and self.looks.reference is None:
            yield "looks.reference", "is null; looks.score_samples need images or statistics to compare with"
