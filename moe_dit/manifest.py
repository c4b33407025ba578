"""The manifest of a folder of shards: what data_prep writes last, and readers look at first."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_dit.runtime.errors import InputError

FORMAT = "moe-dit-shards-1"
MANIFEST = "manifest.json"
KINDS = ("latents", "pixels")


@dataclass(frozen=True)
class Manifest:
    """What a folder of shards holds."""

    folder: Path
    kind: str  # "latents" or "pixels"
    samples: int
    classes: list[str]
    sample_shape: list[int]  # as stored; latents of a posterior: moments, twice the channels
    scale: float | None  # of latents: the network's input is (latent - shift) * scale
    shards: list[dict[str, Any]]  # name, samples, bytes, sha256
    shift: float = 0.0
    posterior: bool = True  # latents: moments to draw from, else the latents themselves
    vae: str | None = None  # what encoded latents: a hub name or a folder


def read_manifest(folder: str | Path, check_sizes: bool = True) -> Manifest:
    """Read a folder's manifest and hold each shard's size against it.

    Raises:
        InputError: no folder, no manifest, one that does not add up, or a shard missing, truncated or overlong.
    """
    folder = Path(folder)
    path = folder / MANIFEST
    make = "python -m data_prep.encode_latents (or pack_pixels) makes one"
    if not folder.is_dir():
        raise InputError(f"no folder of shards {folder}; {make}")
    try:
        values = json.loads(path.read_text())
        found = values.get("format"), values.get("kind")
        if found[0] != FORMAT or found[1] not in KINDS:
            raise InputError(f"{path}: format is {found[0]!r} and kind {found[1]!r}; expected {FORMAT!r} and {KINDS}")
        keys = ("kind", "samples", "classes", "sample_shape", "scale", "shards")
        manifest = Manifest(
            folder,
            **{key: values[key] for key in keys},
            # Older manifests lack these.
            shift=float(values.get("shift") or 0.0),
            posterior=values.get("posterior") is not False,
            vae=values.get("vae"),
        )
        total = sum(shard["samples"] for shard in manifest.shards)
        if total != manifest.samples or not total:
            raise InputError(f"{path}: says {manifest.samples} samples, but its shards have {total}")
    except FileNotFoundError:
        raise InputError(f"{folder} has no {MANIFEST}, so its shards are unfinished or not ours; {make}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} cannot be read as a manifest: {type(error).__name__} {error}") from None
    for shard in manifest.shards if check_sizes else ():
        file = folder / shard["name"]
        size = file.stat().st_size if file.is_file() else None
        if size != shard["bytes"]:
            state = "is missing" if size is None else f"has {size} bytes instead of {shard['bytes']}"
            raise InputError(
                f"shard {file} {state}; python -m data_prep.verify {folder} checks them all, and encoding again into "
                f"an empty folder makes them anew"
            )
    return manifest
