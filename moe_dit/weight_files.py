"""The weights of a model folder: one safetensors file, or several with an index, as diffusers writes them.

Every name and every shape is held against the network that they are for. Libraries fill what a folder lacks with random
numbers and a warning.
"""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import nn

from moe_dit.runtime.errors import InputError
from moe_dit.runtime.reading import check_regular, shard_names

SHOWN = 3  # names of tensors in a message


@contextmanager
def open_weights(folder: Path) -> Iterator[Mapping[str, Any]]:
    """The tensors of a model folder by name, as safetensors' slices: nothing is read before it is asked for.

    Raises:
        InputError: the folder has no weights, or its files cannot be read.
    """
    with ExitStack() as stack:
        try:
            index = folder / SAFE_WEIGHTS_INDEX_NAME
            names = shard_names(index) if os.path.lexists(index) else [SAFETENSORS_WEIGHTS_NAME]
            tensors = held_by([folder / name for name in names], stack)
        except (OSError, ValueError, SafetensorError) as error:
            raise InputError(f"the weights in {folder} cannot be read: {error}") from None
        yield tensors


def held_by(files: Sequence[Path], stack: ExitStack) -> dict[str, Any]:
    """The tensors of safetensors files by name, as slices that can be read until the stack ends.

    Raises:
        OSError, ValueError, SafetensorError: a file cannot be read, or holds a tensor that another holds too.
    """
    tensors: dict[str, Any] = {}
    for path in files:
        check_regular(path)
        file = stack.enter_context(safe_open(path, "pt"))
        for key in file.keys():  # noqa: SIM118  # no dict
            if key in tensors:
                raise ValueError(f"{path.name} holds {key}, which another file holds too")
            tensors[key] = file.get_slice(key)
    return tensors


def is_floating(tensor: Any) -> bool:
    """Whether a tensor, safetensors' slice, is of floating-point numbers."""
    return tensor.get_dtype().startswith(("F", "BF"))


def check_weights(weights: Mapping[str, Any], needed: Mapping[str, torch.Tensor], folder: Path, what: str) -> None:
    """Raise InputError where a folder does not hold just the tensors that a network needs, in their shapes.

    Args:
        weights: :func:`open_weights`'.
        needed: the network's state; its tensors may be on the meta device.
        folder: for the message.
        what: needs them, for the message.
    """
    missing = [name for name in needed if name not in weights]
    if missing:
        raise InputError(f"{folder} has no weights {_shown(missing)}, which {what} needs")
    surplus = [name for name in weights if name not in needed]
    if surplus:
        raise InputError(f"{folder} has weights {_shown(surplus)}, which {what} does not have")
    for name, value in needed.items():
        if (shape := weights[name].get_shape()) != list(value.shape):
            raise InputError(f"{folder} has {name} of shape {shape}, but {what} needs {list(value.shape)}")
        if not is_floating(weights[name]):
            kind = weights[name].get_dtype()
            raise InputError(f"{folder} has {name} of {kind}; it should hold floating-point numbers")


def load_weights(network: nn.Module, folder: Path) -> None:
    """Give a network on the meta device all its weights from a model folder, float32.

    Raises:
        InputError: the folder does not hold just those, or they cannot be read.
    """
    needed = network.state_dict()
    with open_weights(folder) as weights:
        check_weights(weights, needed, folder, f"this {type(network).__name__} network")
        values = {name: weights[name][:].to(value.dtype) for name, value in needed.items()}
    network.load_state_dict(values, assign=True)


def read_flat(tensor: Any, start: int, numel: int) -> torch.Tensor:
    """Elements [start, start + numel) of a flattened tensor, reading the rows (of dimension 0) that they lie in.

    Args:
        tensor: safetensors' slice of a tensor with at least one dimension.
        start: offset of the first element.
        numel: how many.
    """
    row = math.prod(tensor.get_shape()[1:])
    first = start // row
    last = -(-(start + numel) // row)
    return tensor[first:last].flatten()[start - first * row :][:numel]


def _shown(names: Sequence[str]) -> str:
    rest = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(name[:100] for name in names[:SHOWN]) + rest
