"""The manifest of a folder of shards: what data_prep writes last, and readers look at first."""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NotRequired

from pydantic import Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from moe_dit.runtime.errors import InputError
from moe_dit.runtime.files import explained, write_bytes
from moe_dit.runtime.reading import read_json
from moe_dit.schema import Count, Number, Positive, Size
from moe_dit.store import RemoteFolder, cache_folder, is_remote

FORMAT = "moe-dit-shards-1"
MANIFEST = "manifest.json"
KINDS = ("latents", "pixels")


class _Shard(TypedDict):
    name: Annotated[str, Field(pattern=r"^[^/\x00]+$", max_length=255)]
    samples: Count
    bytes: Size
    sha256: str


class _File(TypedDict):
    """The JSON file's keys; older manifests lack some, and what programs add is passed over."""

    samples: Size
    classes: Annotated[list[str], Field(min_length=1)]
    sample_shape: Annotated[list[Count], Field(min_length=3, max_length=3)]
    scale: Positive | None
    shards: list[_Shard]
    shift: NotRequired[Number | None]
    posterior: NotRequired[bool | None]
    vae: NotRequired[str | None]
    vae_sha256: NotRequired[str | None]


class Content(TypedDict):
    """What training sees of shards, as a checkpoint's state.json keeps it."""

    kind: str
    sample_shape: list[int]
    samples: int
    classes: list[str]  # in the order of their labels
    content: str  # SHA-256 over the shards' sizes and checksums, in their order


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
    vae_sha256: str | None = None  # of its weights (data_prep.autoencoder.hash_weights)
    remote: RemoteFolder | None = None  # where the shards come from, if ``folder`` is but their cache

    @property
    def place(self) -> str:
        """The folder, or its URL."""
        return str(self.folder) if self.remote is None else self.remote.url

    def content(self) -> Content:
        """What training sees of the shards, wherever they lie and whatever their files' names."""
        listed = [[shard["samples"], shard["bytes"], shard["sha256"]] for shard in self.shards]
        return {
            "kind": self.kind,
            "sample_shape": list(self.sample_shape),
            "samples": self.samples,
            "classes": list(self.classes),
            "content": hashlib.sha256(json.dumps(listed).encode()).hexdigest(),
        }

    def local(self, shard: dict[str, Any]) -> Path:
        """A shard's file on this node, fetched if need be."""
        if self.remote is None:
            return self.folder / shard["name"]
        return self.remote.fetch(shard["name"], shard["bytes"], shard["sha256"])


def read_manifest(folder: str | Path, check_sizes: bool = True, cache_gb: float | None = None) -> Manifest:
    """Read a folder's manifest and hold each shard's size against it.

    Args:
        folder: of shards, or its URL.
        check_sizes: look at the shards too; those behind a URL are checked when they are fetched.
        cache_gb: 10^9 bytes that shards behind a URL may take on this node; None: any.

    Raises:
        InputError: no folder, no manifest, one that does not add up, or a shard missing, truncated or overlong.
    """
    make = "python -m data_prep.encode_latents (or pack_pixels) makes one"
    remote = None
    if is_remote(folder):
        url = str(folder)
        remote = RemoteFolder(url, cache_folder(url), None if cache_gb is None else cache_gb * 1e9)
        folder = remote.folder
        try:
            text = remote.read(MANIFEST)
        except FileNotFoundError:
            raise InputError(f"{url} has no {MANIFEST}; {make}") from None
        with explained(f"into the cache {folder}"):
            folder.mkdir(parents=True, exist_ok=True)
            write_bytes(folder / MANIFEST, text)
    folder = Path(folder)
    path = folder / MANIFEST
    if not os.path.isdir(folder):
        raise InputError(f"no folder of shards {folder}; {make}")
    try:
        values = read_json(path)
        found = values.get("format"), values.get("kind")
        if found[0] != FORMAT or found[1] not in KINDS:
            raise InputError(f"{path}: format is {found[0]!r} and kind {found[1]!r}; expected {FORMAT!r} and {KINDS}")
        TypeAdapter(_File).validate_python(values)
        keys = ("kind", "samples", "classes", "sample_shape", "scale", "shards")
        manifest = Manifest(
            folder,
            **{key: values[key] for key in keys},
            # Older manifests lack these.
            shift=float(values.get("shift") or 0.0),
            posterior=values.get("posterior") is not False,
            vae=values.get("vae"),
            vae_sha256=values.get("vae_sha256"),
            remote=remote,
        )
        total = sum(shard["samples"] for shard in manifest.shards)
        if total != manifest.samples or not total:
            raise InputError(f"{path}: says {manifest.samples} samples, but its shards have {total}")
    except FileNotFoundError:
        raise InputError(f"{folder} has no {MANIFEST}, so its shards are unfinished or not ours; {make}") from None
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(str(part) for part in problem["loc"])
        raise InputError(f"{path} cannot be read as a manifest: {key}: {problem['msg']}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} cannot be read as a manifest: {type(error).__name__} {error}") from None
    for shard in manifest.shards if check_sizes and remote is None else ():
        file = folder / shard["name"]
        size = file.stat().st_size if os.path.isfile(file) else None
        if size != shard["bytes"]:
            state = "is missing" if size is None else f"has {size} bytes instead of {shard['bytes']}"
            raise InputError(
                f"shard {file} {state}; python -m data_prep.verify {folder} checks them all, and encoding again into "
                f"an empty folder makes them anew"
            )
    return manifest
