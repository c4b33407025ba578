"""What every network family offers: the settings and the base class that a new family starts from."""

from collections.abc import Iterator

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.modeling_utils import ModelMixin
from pydantic.dataclasses import dataclass

from moe_dit.schema import MOST, STRICT, BuiltCount, Count, Positive, Problem


@dataclass(frozen=True, config=STRICT)
class NetworkConfig:
    """What all networks have. Sizes are in values of a square input, cut into patches."""

    input_size: Count  # side of the latent, or of the image in pixel space
    in_channels: Count
    patch_size: Count
    depth: BuiltCount
    hidden_size: Count
    num_heads: Count
    mlp_ratio: Positive  # width of the dense blocks' MLP over hidden_size
    num_classes: Count

    @property
    def tokens(self) -> int:
        """Tokens of a sample."""
        return (self.input_size // self.patch_size) ** 2

    def problems(self) -> Iterator[Problem]:
        """What the keys' types cannot say: see :mod:`moe_dit.schema`."""
        if self.input_size % self.patch_size:
            yield "patch_size", f"is {self.patch_size}, which does not divide model.input_size {self.input_size}"
        if self.hidden_size % self.num_heads or self.hidden_size // self.num_heads % 4:
            yield (
                "num_heads",
                f"is {self.num_heads}; hidden_size / num_heads must be a multiple of 4 (2-D RoPE), "
                f"and hidden_size is {self.hidden_size}",
            )
        if self.tokens * self.hidden_size > MOST:
            yield (
                "input_size",
                f"is {self.input_size}, which makes {self.tokens} tokens of {self.hidden_size} values a sample; their "
                f"product should be at most {MOST}",
            )
        moe = getattr(self, "moe", None)
        for key, message in moe.problems() if moe is not None else ():
            yield f"moe.{key}", message


class Network(ModelMixin, ConfigMixin):  # type: ignore[misc]  # diffusers' own pair
    """A network: ``model(x, t, y)`` from a noisy input, its time and its label to the prediction.

    A family's constructor takes the keys of its settings and is decorated with diffusers' ``register_to_config``, so
    that an export's config.json says how to build it again. It sets the first three attributes below. Weights are
    uninitialised until :func:`moe_dit.models.initialization.initialize` or a load.

    Attributes:
        num_classes: labels are in [0, num_classes]; num_classes is the null label.
        in_channels: C of the input [N, C, side, side].
        out_channels: channels of the prediction, of which the first C are used.
        couples_samples: whether what is computed for a sample depends on the others of its batch.
        weight_rules: rules of initial weights that come before those of :mod:`moe_dit.models.initialization`.
    """

    num_classes: int
    in_channels: int
    out_channels: int
    couples_samples = False
    weight_rules: list = []  # noqa: RUF012  # a constant

    def auxiliary_losses(self) -> dict[str, torch.Tensor]:
        """Losses of the last training forward beside the objective, by name: scalars, weighted, to be added to it.

        They are what the network's layers left in their dicts ``layer_losses``, summed over the layers by name.
        """
        total: dict[str, torch.Tensor] = {}
        for module in self.modules():
            for name, loss in getattr(module, "layer_losses", {}).items():
                total[name] = total[name] + loss if name in total else loss
        return total
