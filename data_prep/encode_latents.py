"""Class folders to latent shards: what an autoencoder makes of each image and of its mirror.

Where it gives a posterior, the moments are kept, not a sample, so that training draws a fresh latent each time. The
mirror has its own, because an autoencoder does not commute with mirroring.
"""

import io
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from data_prep.autoencoder import encode, hash_weights, latent_space, load_vae
from data_prep.shards import Broken, add_arguments, begun_with, check_arguments, join, positive, write_shards
from moe_dit.data.pixels import load_image
from moe_dit.runtime import ranks
from moe_dit.runtime.command import Parser, run
from moe_dit.runtime.errors import InputError

EXAMPLES = """\
  python -m data_prep.encode_latents --images imagenet/train --vae stabilityai/sd-vae-ft-mse --out shards
  torchrun --nproc_per_node 8 -m data_prep.encode_latents --images imagenet/train --vae my_vae --out shards
  srun python -m data_prep.encode_latents --images imagenet/train --vae my_vae --out shards --batch 64
  python -m data_prep.encode_latents --images imagenet/train --vae ORG/PIPELINE/vae --size 512 --out shards

The same command again continues after a stop, with any number of ranks.
"""

NOT_FINITE = "its latents are not finite in float16; is --vae right, and --precision?"


def read_pixels(file: str | bytes, size: int) -> torch.Tensor:
    """An image file as uint8 [3, size, size]."""
    return torch.from_numpy(np.array(load_image(file, size))).permute(2, 0, 1).contiguous()


@torch.inference_mode()
def encode_with_mirrors(vae: Any, pixels: torch.Tensor, means: bool = False) -> torch.Tensor:
    """What shards keep of images (see :func:`data_prep.autoencoder.encode`) and of their mirrors.

    Args:
        vae: an autoencoder.
        pixels: uint8 [N, 3, H, W] in [0, 255].
        means: keep the posterior's mean alone.

    Returns:
        float16 [N, 2, C or 2 C, h, w] on the CPU: [:, 0] of the images, [:, 1] of their mirrors.
    """
    images = pixels.to(vae.device, non_blocking=True).float() / 127.5 - 1
    if vae.dtype != torch.float32:
        images = images.to(vae.dtype, memory_format=torch.channels_last)
    kept = torch.stack([encode(vae, x) for x in (images, images.flip(-1))], dim=1)
    return (kept.chunk(2, dim=2)[0] if means else kept).half().cpu()


def make_encoder(vae: Any, means: bool) -> Callable[[torch.Tensor], list[np.ndarray | Broken]]:
    """From uint8 [N, 3, H, W] to each image's latent and its mirror's, float16, or why they cannot be kept."""

    def encoded(pixels):
        try:
            latents = encode_with_mirrors(vae, pixels, means)
        except torch.OutOfMemoryError as error:
            raise InputError(f"--batch {len(pixels)} does not fit in the GPU's memory") from error
        finite = latents.isfinite().flatten(1).all(1).tolist()
        # Of one image in a million, as SDXL's has them, or of all, where the VAE is not right.
        return [row if good else Broken(NOT_FINITE) for row, good in zip(latents.numpy(), finite, strict=True)]

    return encoded


def members(latents: np.ndarray) -> dict[str, bytes]:
    """A sample's files: the latent of the image, and of its mirror."""
    return {"latent.npy": _npy(latents[0]), "latent_flip.npy": _npy(latents[1])}


def _npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def main() -> None:
    parser = Parser("Encode class folders of images to latent shards; continues after a stop.", EXAMPLES)
    add_arguments(parser)
    parser.add_argument(
        "--vae", required=True, metavar="NAME_or_DIR", help="a diffusers autoencoder: hub name or local folder"
    )
    parser.add_argument("--batch", type=positive, default=32, help="images encoded at once, a rank (32)")
    parser.add_argument(
        "--precision",
        choices=("auto", "bf16", "fp32"),
        default="auto",
        help="of the VAE; auto: as the folder was begun, a new one bf16 on GPUs and fp32 on CPUs",
    )
    parser.add_argument(
        "--keep",
        choices=("moments", "means"),
        default="moments",
        help="mean and log variance, to draw a latent from each time (at 256 pixels 33 kB an image and its mirror), or "
        "the mean alone (16 kB)",
    )
    args = parser.parse_args()
    check_arguments(args)

    join()
    device = ranks.device()

    def load() -> Any:
        vae = load_vae(args.vae)
        factor = latent_space(vae).factor
        if args.size % factor:
            raise InputError(f"--size {args.size} is not a multiple of {factor}, the downsampling factor of --vae")
        return vae

    vae = ranks.agreed(load)
    space = latent_space(vae)
    vae_hash = hash_weights(vae)
    means = args.keep == "means"
    if means and not space.posterior:
        raise InputError("--keep means: this VAE gives latents themselves, not their moments; leave --keep out")
    precision = args.precision
    if precision == "auto":
        new = "bf16" if device.type == "cuda" else "fp32"
        precision = ranks.from_rank_0(lambda: begun_with(args.out, "precision", new))
    vae.to(device)
    if precision == "bf16":
        vae.to(dtype=torch.bfloat16, memory_format=torch.channels_last)
    side = args.size // space.factor
    write_shards(
        args,
        partial(read_pixels, size=args.size),
        make_encoder(vae, means),
        members,
        kind="latents",
        sample_shape=[space.channels if means else space.stored_channels, side, side],
        batch=args.batch,
        settings={"vae": vae_hash, "precision": precision, "keep": args.keep},
        vae=args.vae,
        vae_sha256=vae_hash,
        scale=space.scale,
        shift=space.shift,
        posterior=space.posterior and not means,
    )


if __name__ == "__main__":
    run(main)
