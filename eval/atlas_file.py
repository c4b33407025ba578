"""A routing atlas: what eval.atlas counted, and its file."""

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from eval.arrays import read_arrays
from moe_dit.runtime.errors import InputError
from moe_dit.runtime.files import explained, new_file
from moe_dit.runtime.reading import parse_json
from moe_dit.runtime.wording import printable

FORMAT = "moe-dit-atlas-1"
# Kind and dimensions: layers, times, experts, classes, rows and columns.
ARRAYS = {
    "by_time": ("i", "LTE"),
    "by_class": ("i", "LCE"),
    "by_position": ("i", "LRKE"),
    "together": ("i", "LEE"),
    "entropy": ("f", "LT"),
    "class_tokens_by_time": ("i", "LTE"),
    "times": ("f", "T"),
    "samples_by_class": ("i", "C"),
    "layers": ("U", "L"),
    "classes": ("U", "C"),
}
FEWEST = 5  # expected counts for a ratio: the usual rule for tables of counts


@dataclass(frozen=True)
class Atlas:
    """Counts of (token, expert) choices, int64; L MoE layers, E experts. :func:`shares` makes shares of them.

    The first five are of the tokens that have a place in the image; a class token (JiT) has none and is counted apart.
    """

    by_time: np.ndarray  # [L, times, E]
    by_class: np.ndarray  # [L, classes, E]
    by_position: np.ndarray  # [L, rows, columns, E] of the token grid
    together: np.ndarray  # [L, E, E]: tokens that both experts have; on the diagonal, tokens that the expert has
    entropy: np.ndarray  # float64 [L, times]: of the shares by time, in bits; log2 E where all are even
    class_tokens_by_time: np.ndarray  # [L, times, E]
    times: np.ndarray  # float64 [times] in (0, 1), 0 is noise and 1 is data
    samples_by_class: np.ndarray  # int64 [classes]: samples that were looked at
    layers: np.ndarray  # [L] str: the MoE layers' names in the network
    classes: np.ndarray  # [classes] str
    settings: dict[str, Any]  # model, its SHA-256, data, samples, seed, batch, and choice: "token" or "expert"

    @property
    def tokens(self) -> int:
        """Tokens with a place that a layer saw at each of the times."""
        return self.settings["samples"] * self.by_position.shape[1] * self.by_position.shape[2]

    def together_ratio(self) -> np.ndarray:
        """How often two experts share a token, over how often they would by chance: [L, E, E].

        NaN on the diagonal, and for pairs of which chance would make fewer than FEWEST: their ratio says nothing.

        By chance means quasi-independence: the pairs' table w_i w_j off the diagonal that has the same number of pairs
        for each expert, found by iterative proportional fitting (Bishop, Fienberg & Holland 1975, chapter 5).
        """
        off_diagonal = 1.0 - np.eye(self.together.shape[-1])
        seen = self.together * off_diagonal
        expected = np.broadcast_to(off_diagonal, seen.shape).copy()
        wanted = seen.sum(-1)
        with np.errstate(invalid="ignore", divide="ignore"):
            for _ in range(500):
                expected *= np.nan_to_num(wanted / expected.sum(-1))[:, :, None]
                expected *= np.nan_to_num(wanted / expected.sum(-2))[:, None, :]
            return np.where(expected >= FEWEST, seen / expected, np.nan)


def shares(counts: np.ndarray) -> np.ndarray:
    """Counts [..., E] as shares that sum to 1 over the experts; NaN where nothing was counted."""
    with np.errstate(invalid="ignore"):
        return counts / counts.sum(-1, keepdims=True)


def entropy_bits(share: np.ndarray) -> np.ndarray:
    """Entropy in bits of shares [..., E]."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return -np.where(share > 0, share * np.log2(share), 0.0).sum(-1) + 0.0  # no negative zero


def save_atlas(atlas: Atlas, file: Path) -> None:
    """Write an atlas as a .npz file: an array for each field, and settings as a JSON string."""
    arrays = {field.name: getattr(atlas, field.name) for field in fields(Atlas)}
    arrays["settings"] = np.array(json.dumps({"format": FORMAT} | atlas.settings))
    with explained(str(file)), new_file(file) as opened:
        np.savez_compressed(opened, **arrays)


def load_atlas(file: Path) -> Atlas:
    """Read what :func:`save_atlas` wrote; InputError where it is something else."""
    try:
        values: dict[str, Any] = read_arrays(file, [field.name for field in fields(Atlas)])
        values["settings"] = parse_json(str(values["settings"]).encode())
        found = values["settings"].pop("format")
    except FileNotFoundError:
        raise InputError(f"no atlas {file}; python -m eval.atlas makes one") from None
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise InputError(f"{file} is not an atlas, or damaged; python -m eval.atlas makes one") from None
    if found != FORMAT:
        raise InputError(f"{file}: its format is {found!r}, expected {FORMAT!r}; make it anew with eval.atlas")
    if wrong := _wrong(values):
        raise InputError(f"{file}: {wrong} is not what an atlas holds; make it anew with eval.atlas")
    for name in ("layers", "classes"):  # which are drawn as text
        values[name] = np.array([printable(text) for text in values[name].tolist()])
    return Atlas(**values)


def is_atlas(file: Path) -> bool:
    """Whether a file is what :func:`save_atlas` wrote."""
    try:
        return isinstance(load_atlas(file), Atlas)
    except InputError:
        return False


def _wrong(values: dict[str, Any]) -> str | None:
    """The first value that an atlas cannot have, or None."""
    sizes: dict[str, int] = {}
    for name, (kind, dimensions) in ARRAYS.items():
        array = values[name]
        if array.dtype.kind != kind or array.ndim != len(dimensions) or not array.size:
            return name
        if any(sizes.setdefault(letter, size) != size for letter, size in zip(dimensions, array.shape, strict=True)):
            return name
        if (kind == "i" and array.min() < 0) or (kind == "f" and not np.isfinite(array).all()):
            return name
    settings = values["settings"]
    counted = all(type(settings.get(key)) is int and settings[key] >= 0 for key in ("samples", "seed"))
    return None if counted and settings["samples"] and settings.get("choice") in ("token", "expert") else "settings"
