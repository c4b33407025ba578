"""Class folders to latent shards: the posterior moments of a VAE, for each image and its mirror.

Moments, not samples, are kept, so that training draws a fresh latent each time; the mirror has its own, because a VAE
does not commute with mirroring.
"""

import hashlib
import io
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_prep.images import load_image
from data_prep.shards import add_arguments, positive, write_shards
from moe_dit.runtime import ranks
from moe_dit.runtime.command import Parser, run
from moe_dit.runtime.errors import InputError

EXAMPLES = """\
  python -m data_prep.encode_latents --images imagenet/train --vae stabilityai/sd-vae-ft-mse --out shards
  torchrun --nproc_per_node 8 -m data_prep.encode_latents --images imagenet/train --vae my_vae --out shards
  srun python -m data_prep.encode_latents --images imagenet/train --vae my_vae --out shards --batch 64

The same command again continues after a stop, with any number of ranks.
"""


def load_vae(name: str) -> Any:
    """A diffusers AutoencoderKL from a local folder or the hub, float32, in eval mode; InputError where it is none."""
    if Path(name).is_dir():
        try:
            kind = json.loads((Path(name) / "config.json").read_text())["_class_name"]
        except (OSError, ValueError, KeyError, TypeError):
            kind = None
        if kind != "AutoencoderKL":
            raise InputError(f"--vae {name} is not a diffusers AutoencoderKL folder (its config.json does not say so)")
    elif Path(name).is_absolute() or name.startswith(".") or name.count("/") > 1:
        raise InputError(f"--vae {name}: no such folder")

    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    try:
        # Missing weights would only be warned of, and left random.
        vae, info = diffusers.AutoencoderKL.from_pretrained(name, output_loading_info=True)
    # Network, hub, JSON, safetensors and shape errors all mean the same here.
    except Exception as error:
        reason = str(error).strip().split("\n")[0][:300]
        raise InputError(
            f"--vae {name} cannot be loaded as a diffusers AutoencoderKL (a hub name or a local folder): {reason}"
        ) from error
    if info["missing_keys"] or info["mismatched_keys"]:
        raise InputError(f"--vae {name}: weights are missing or of other shapes, e.g. {info['missing_keys'][:1]}")
    return vae.eval().requires_grad_(False)


def downsampling(vae: Any) -> int:
    """Image pixels a latent pixel, along a side: each stage but the last halves."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


def hash_weights(vae: Any) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(vae.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.contiguous().numpy())
    return digest.hexdigest()


def read_pixels(path: str, size: int) -> torch.Tensor:
    """An image file as uint8 [3, size, size]."""
    return torch.from_numpy(np.array(load_image(path, size))).permute(2, 0, 1).contiguous()


@torch.inference_mode()
def encode_moments(vae: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Posterior moments, cat(mean, log variance) along the channels, not scaled.

    Args:
        vae: an AutoencoderKL.
        pixels: uint8 [N, 3, H, W] in [0, 255].

    Returns:
        float16 [N, 2, 2 * latent_channels, h, w] on the CPU: [:, 0] of the images, [:, 1] of their mirrors.
    """
    images = pixels.to(vae.device, non_blocking=True).float() / 127.5 - 1
    moments = [vae.encode(x).latent_dist.parameters for x in (images, images.flip(-1))]
    return torch.stack(moments, dim=1).half().cpu()


def make_encoder(vae: Any) -> Callable[[torch.Tensor], list[dict[str, bytes]]]:
    def encode(pixels):
        try:
            moments = encode_moments(vae, pixels)
        except torch.OutOfMemoryError as error:
            raise InputError(f"--batch {len(pixels)} does not fit in the GPU's memory", local=True) from error
        if not moments.isfinite().all():
            raise InputError("the VAE gives moments that are not finite in float16; is --vae right?", local=True)
        return [{"latent.npy": _npy(image), "latent_flip.npy": _npy(mirror)} for image, mirror in moments.numpy()]

    return encode


def _npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def main() -> None:
    parser = Parser("Encode class folders of images to latent shards; continues after a stop.", EXAMPLES)
    add_arguments(parser)
    parser.add_argument("--vae", required=True, metavar="NAME_or_DIR", help="AutoencoderKL: hub name or local folder")
    parser.add_argument("--batch", type=positive, default=32, help="images encoded at once, a rank (32)")
    args = parser.parse_args()

    vae = load_vae(args.vae)
    factor = downsampling(vae)
    if args.size % factor:
        raise InputError(f"--size {args.size} is not a multiple of {factor}, the downsampling factor of --vae")
    vae_hash = hash_weights(vae)
    vae.to(ranks.device())
    # The same kernels each time, so that a continued run writes the bytes an uninterrupted one would.
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True
    write_shards(
        args,
        partial(read_pixels, size=args.size),
        make_encoder(vae),
        kind="latents",
        sample_shape=[2 * vae.config.latent_channels, args.size // factor, args.size // factor],
        batch=args.batch,
        vae=args.vae,
        vae_hash=vae_hash,
        scale=vae.config.scaling_factor,
    )


if __name__ == "__main__":
    run(main)
