"""Autoencoders of images: any of diffusers', loaded by the class its config.json names, and what its latents are.

Some give a normal distribution to draw a latent from, the posterior (AutoencoderKL: Stable Diffusion's, SD3's, FLUX's),
the others one latent (AutoencoderDC, AutoencoderTiny, VQModel). As in diffusers, the network's input is
(latent - shift) * scale, and what is decoded is x / scale + shift.
"""

import hashlib
import inspect
import math
import os
import re
import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from moe_dit.runtime import hub
from moe_dit.runtime.errors import InputError
from moe_dit.runtime.precision import exact_float32
from moe_dit.runtime.reading import check_regular, shard_names

PROBE = 512  # side of the images that a network is measured with, a multiple of every factor in use
DECODE_BATCH = 16  # latents decoded at once ...
DECODE_PIXELS = 16 * 256 * 256  # ... and their pixels: a decoder needs far more memory for an image than the network


@dataclass(frozen=True)
class LatentSpace:
    """What an autoencoder makes of images."""

    channels: int  # of a latent
    factor: int  # pixels of the image for one of the latent, along a side
    posterior: bool  # images become the posterior's moments (mean, log variance), else one latent
    scale: float | None  # 1 / the latents' standard deviation; None where the configuration has no such number
    shift: float  # the latents' mean

    @property
    def stored_channels(self) -> int:
        """Channels of what :func:`encode` gives."""
        return self.channels * (2 if self.posterior else 1)


_spaces: "WeakKeyDictionary[nn.Module, LatentSpace]" = WeakKeyDictionary()


def load_vae(name: str) -> Any:
    """An autoencoder of diffusers, float32, in eval mode, on the CPU.

    Args:
        name: a local folder, or a model of the hub, ORGANISATION/NAME or ORGANISATION/NAME/SUBFOLDER (as in
            ORGANISATION/PIPELINE/vae).

    Raises:
        InputError: it is none, not of images, cannot be fetched or read, lacks weights or the numbers that its latents
            are shifted and scaled by, or holds ones that are not finite.
    """
    local = os.path.isdir(name)
    if not local and (Path(name).is_absolute() or name.startswith(".")):
        raise InputError(f"VAE {name}: no such folder")
    parts = name.split("/")
    place = (name, None) if local else ("/".join(parts[:2]), "/".join(parts[2:]) or None)

    # diffusers takes seconds to import: --help and wrong flags should not have to wait.
    import diffusers
    import huggingface_hub
    from diffusers.models import autoencoders

    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    other = f"VAE {name} is not a diffusers AutoencoderKL, AutoencoderDC or other autoencoder of images"
    file = os.path.join(place[1] or "", "config.json")
    silent = None if local else hub.away(place[0], file)
    # Of files with an index diffusers asks the hub even offline, unless it is told not to.
    offline = huggingface_hub.constants.HF_HUB_OFFLINE or silent is not None
    try:
        if local:
            _check_files(Path(name))
        with warnings.catch_warnings():
            # diffusers (0.42) names an argument that huggingface_hub (2.4) warns of.
            warnings.filterwarnings("ignore", "The `local_dir_use_symlinks` argument", UserWarning)
            # A config.json is found in the same way for every class.
            config = diffusers.AutoencoderKL.load_config(place[0], subfolder=place[1], local_files_only=offline)
    except Exception as error:  # JSON's, the hub's and the network's
        why = hub.refusal(error, file, silent) or _reason(error)
        raise InputError(f"{other if local else f'VAE {name} cannot be loaded'}: {why}") from error
    class_name = config.get("_class_name") if isinstance(config, Mapping) else None
    kind = getattr(autoencoders, str(class_name), None)
    if kind is None:
        found = f"names the class {class_name}" if class_name else "names no class of diffusers"
        raise InputError(f"{other}: its config.json {found}")
    # Before the weights, which may have to be fetched.
    for key, words in (("scaling_factor", "a finite number > 0"), ("shift_factor", "a finite number")):
        value = config.get(key)
        if value is not None and not (_is_finite(value) and (value > 0 or key == "shift_factor")):
            raise InputError(f"VAE {name}: {key} of its config.json is {str(value)[:40]}; it should be {words}")
    try:
        space = _measure(kind, config)
        unknown = sorted(key for key in config.keys() - _keys(kind, config) if key[:1] != "_")
    except Exception as error:
        raise InputError(
            f"{other}: {class_name} with its config.json does not take [N, 3, H, W] to latents [N, C, h, w] and back "
            f"({_reason(error)})"
        ) from error
    if unknown:  # they would only be warned of, and passed over
        raise InputError(f"VAE {name}: its config.json has keys that no {class_name} has: {', '.join(unknown[:3])}")
    try:
        # Weights that are missing or too many would only be warned of, and left random or out.
        vae, info = kind.from_pretrained(
            place[0], subfolder=place[1], output_loading_info=True, local_files_only=offline
        )
    except Exception as error:  # safetensors', of shapes, and again the hub's
        why = hub.refusal(error, "a file of its weights", silent) or _reason(error)
        raise InputError(f"VAE {name} cannot be loaded as a diffusers {class_name}: {why}") from error
    try:
        held, sharded = _held(*place)
    except Exception as error:  # safetensors' and torch's
        raise InputError(f"VAE {name} cannot be loaded as a diffusers {class_name}: {_reason(error)}") from error
    vae = vae.float().eval().requires_grad_(False)
    needed = vae.state_dict()
    # Of files with an index diffusers says what is missing by the index, not by what they hold. A single file it reads
    # itself, and older names in it are others here.
    missing = needed.keys() - held.keys() if sharded else info["missing_keys"]
    surplus = held.keys() - needed.keys() if sharded else info["unexpected_keys"]
    for keys, what in (
        (missing or info["mismatched_keys"], "weights are missing or of other shapes"),
        (surplus or info["unexpected_keys"], f"it holds weights that no such {class_name} has"),
        ([key for key, floating in held.items() if not floating], "weights are not floating-point numbers"),
        ([key for key, value in needed.items() if not value.isfinite().all()], "weights are not finite as float32"),
    ):
        if keys:
            raise InputError(f"VAE {name}: {what}, e.g. {min(map(str, keys))}")
    _spaces[vae] = space
    return vae


def _check_files(folder: Path) -> None:
    """Raise OSError or ValueError where a folder's weights would be read from elsewhere, or reading them would wait."""
    for file in folder.iterdir():
        if file.suffix in (".json", ".safetensors", ".bin"):
            check_regular(file)
        if file.name.endswith(".index.json"):
            shard_names(file)


def _held(source: str, subfolder: str | None) -> tuple[dict[str, bool], bool]:
    """What the files that diffusers has just read hold.

    Args:
        source: a folder, or a model of the hub, which is in the cache by now.
        subfolder: of that.

    Returns:
        Whether each tensor is of floating-point numbers, by name; and whether the files have an index.
    """
    from diffusers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
    from huggingface_hub import try_to_load_from_cache

    from moe_dit.weight_files import held_by, is_floating

    # In diffusers' order.
    for name in (SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME):
        inside = os.path.join(subfolder or "", name)
        found = os.path.join(source, name) if os.path.isdir(source) else try_to_load_from_cache(source, inside)
        if isinstance(found, str) and os.path.isfile(found):
            break
    else:
        raise ValueError("its weights are not there any more")
    sharded = name == SAFE_WEIGHTS_INDEX_NAME
    held: dict[str, bool] = {}
    for file in [Path(found).parent / shard for shard in shard_names(Path(found))] if sharded else [Path(found)]:
        if file.suffix == ".safetensors":
            with ExitStack() as stack:
                kinds = {key: is_floating(tensor) for key, tensor in held_by([file], stack).items()}
        else:
            state = torch.load(file, map_location="meta", weights_only=True)
            kinds = {key: value.is_floating_point() for key, value in state.items()}
        if twice := held.keys() & kinds.keys():
            raise ValueError(f"{file.name} holds {min(twice)}, which another file holds too")
        held |= kinds
    return held, sharded


def latent_space(vae: Any) -> LatentSpace:
    """What an autoencoder makes of images; one of :func:`load_vae`'s, or any other of diffusers'."""
    if vae not in _spaces:
        _spaces[vae] = _measure(type(vae), vae.config)
    return _spaces[vae]


def _keys(kind: Any, config: Mapping[str, Any]) -> set[str]:
    """The keys of a configuration that a class knows: its constructor's, and those that this makes of them itself."""
    with torch.device("meta"):
        known = inspect.signature(kind.__init__).parameters
        return set(kind(**{key: value for key, value in config.items() if key in known}).config)


def _measure(kind: Any, config: Mapping[str, Any]) -> LatentSpace:
    """Run the class through an image without weights: configurations tell the factor in a way of their own each."""
    with torch.device("meta"), torch.no_grad():
        vae = kind.from_config(config).eval()
        images = torch.empty(1, 3, PROBE, PROBE)
        output = vae.encode(images)
        stored = _stored(output)
        posterior = "latent_dist" in output
        latents = output["latent_dist"].mean if posterior else stored
        decoded = vae.decode(latents).sample
    channels = latents.shape[1]
    side = latents.shape[-1]
    factor = PROBE // side
    if (
        latents.shape != (1, channels, side, side)
        or stored.shape != (1, channels * (2 if posterior else 1), side, side)
        or factor * side != PROBE
        or decoded.shape != images.shape
    ):
        shapes = " to ".join(str(list(x.shape)) for x in (images, latents, decoded))
        raise ValueError(f"it takes {shapes}")
    scale = config.get("scaling_factor")
    shift = config.get("shift_factor")
    if config.get("latents_mean") or config.get("latents_std"):
        scale = shift = None  # a number a channel: not what is meant here
    return LatentSpace(channels, factor, posterior, None if scale is None else float(scale), float(shift or 0.0))


def _stored(output: Any) -> torch.Tensor:
    """The moments or latents of what diffusers' ``encode`` gives, whose names differ."""
    return output["latent_dist"].parameters if "latent_dist" in output else output.to_tuple()[0]


def encode(vae: Any, images: torch.Tensor) -> torch.Tensor:
    """What shards keep of images.

    Args:
        vae: an autoencoder.
        images: float32 [N, 3, H, W] in [-1, 1].

    Returns:
        Neither shifted nor scaled, [N, 2 C, h, w]: the posterior's moments, cat(mean, log variance); or [N, C, h, w]:
        the latents, where there is no posterior.
    """
    with exact_float32():
        return _stored(vae.encode(images))


def decode(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """Images [N, 3, H, W] in [-1, 1], not clamped, of latents [N, C, h, w] that are neither shifted nor scaled."""
    pixels = (latents.shape[-1] * latent_space(vae).factor) ** 2
    batch = min(DECODE_BATCH, max(1, DECODE_PIXELS // pixels))
    with exact_float32():
        return torch.cat([vae.decode(part).sample for part in latents.split(batch)])


def hash_weights(vae: Any) -> str:
    """SHA-256 of the weights by name; they must be on the CPU."""
    digest = hashlib.sha256()
    for name, value in sorted(vae.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.contiguous().numpy())
    return digest.hexdigest()


def _is_finite(value: Any) -> bool:
    """Whether a value is a number that is finite as float64."""
    try:
        return type(value) in (int, float) and math.isfinite(value)
    except OverflowError:
        return False


def _reason(error: Exception) -> str:
    return re.sub(r":\s*\n\s*", ": ", str(error).strip()).split("\n")[0][:300] or type(error).__name__
