"""The published code's networks, read into ours: hyper-parameters, weights, and checkpoint files.

``from_reference(meta, state)`` gives a published network and its objective; ``reference.files.import_checkpoint`` turns
a published checkpoint into a model folder.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from moe_dit.flow import Flow
from moe_dit.models import FAMILIES
from moe_dit.reference.hyperparameters import read_meta
from moe_dit.reference.weights import check_state, conversions

__all__ = ["from_reference", "model_section"]


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
    section, flow = read_meta(meta)
    with torch.device("meta"):
        model = FAMILIES[section.pop("family")].network(**section)
    check_state(model, state)
    model.load_state_dict({name: c.convert(state) for name, c in conversions(model).items()}, assign=True)
    return model, flow


def model_section(meta: dict[str, Any]) -> dict[str, Any]:
    """A recipe's ``model`` section, as in its YAML, from published hyper-parameters (see :func:`from_reference`)."""
    return read_meta(meta)[0]
