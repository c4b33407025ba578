"""A small real data set and a small real VAE, so that everything can be tried on a CPU in minutes.

The data are scikit-learn's 1,797 handwritten digits (UCI "Optical Recognition of Handwritten Digits", test part).
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from sklearn.datasets import load_digits

from data_prep.images import list_images
from data_prep.shards import positive
from moe_dit.data.pixels import load_image
from moe_dit.randomness import Stream, normal, permutation
from moe_dit.runtime.command import Parser, run
from moe_dit.runtime.errors import InputError
from moe_dit.runtime.files import explained, new_folder
from moe_dit.runtime.progress import say, task

EXAMPLES = """\
  python -m data_prep.digits images --out digits/images
  python -m data_prep.digits autoencoder --images digits/images --out digits/vae
  python -m data_prep.encode_latents --images digits/images --vae digits/vae --out digits/shards --size 32
"""

SIZE = 32
BATCH = 16
STEPS = 300
MOST_STEPS = 100_000
LEARNING_RATE = 3e-3
KL_WEIGHT = 1e-4  # on the mean over latent values, beside the mean squared error over pixels


def write_images(out: Path) -> int:
    """Write the digits as out/LABEL/INDEX.png, RGB, 32x32, ink white on black; gives their number."""
    digits = load_digits()
    with explained(str(out)), new_folder(out) as folder:
        for index, (values, label) in enumerate(zip(digits.images, digits.target, strict=True)):
            (folder / str(label)).mkdir(exist_ok=True)
            small = Image.fromarray(np.rint(values * (255 / 16)).astype(np.uint8))
            image = small.resize((SIZE, SIZE), Image.Resampling.BICUBIC).convert("RGB")
            image.save(folder / str(label) / f"{index:04d}.png")
    return len(digits.target)


def build_vae(seed: int) -> Any:
    """An AutoencoderKL of 0.24e6 parameters: 32x32 images to 8x8 latents of 4 channels."""
    # diffusers initialises from torch's global generator.
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(16, 32, 32),
            layers_per_block=1,
            norm_num_groups=8,
            latent_channels=4,
            sample_size=SIZE,
        )


def fit(vae: Any, images: torch.Tensor, steps: int, seed: int) -> None:
    """Fit a VAE to images (float32 [N, 3, H, W] in [-1, 1]): Adam, squared error plus a little KL divergence."""
    optimizer = torch.optim.Adam(vae.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1 if steps > 20 else 0.5
    )
    order = np.concatenate([permutation(seed, epoch, len(images)) for epoch in range(steps * BATCH // len(images) + 1)])
    vae.train()
    with task("fitting the autoencoder", steps) as progress:
        for step in range(steps):
            places = torch.arange(step * BATCH, (step + 1) * BATCH)
            x = images[order[places]]
            posterior = vae.encode(x).latent_dist
            z = posterior.mean + posterior.std * normal(seed, Stream.LATENT, places, posterior.mean.shape[1:])
            error = (vae.decode(z).sample - x).square().mean()
            loss = error + KL_WEIGHT * posterior.kl().mean() / z[0].numel()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            progress.advance(note=f"squared error {error.item():.4f}")
    vae.eval()


@torch.inference_mode()
def measure(vae: Any, images: torch.Tensor) -> tuple[float, float]:
    """(mean squared error of decode(mean) in the [-1, 1] scale, standard deviation of the posteriors' samples)."""
    errors = []
    means = []
    variances = []
    for x in images.split(256):
        posterior = vae.encode(x).latent_dist
        errors.append((vae.decode(posterior.mean).sample - x).square().mean((1, 2, 3)))
        means.append(posterior.mean)
        variances.append(posterior.var)
    std = (torch.cat(means).var() + torch.cat(variances).mean()).sqrt()
    return torch.cat(errors).mean().item(), std.item()


def write_autoencoder(images: Path, out: Path, steps: int, seed: int) -> float:
    """Fit the VAE to class folders of images and save it with its scaling factor; gives the reconstruction error."""
    with explained(str(out)), new_folder(out) as folder:
        paths, _, _ = list_images(images)
        pixels = np.stack([np.asarray(load_image(path, SIZE)) for path in paths])
        values = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
        vae = build_vae(seed)
        fit(vae, values, steps, seed)
        error, std = measure(vae, values)
        vae.register_to_config(scaling_factor=1 / std)
        vae.save_pretrained(folder)
    return error


class _SubParser(Parser):
    def __init__(self, prog: str, description: str, **_):
        super().__init__(description, EXAMPLES)
        self.prog = prog


def main() -> None:
    parser = Parser("Make the digits data set, or a small VAE for it.", EXAMPLES)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_SubParser)
    images = commands.add_parser("images", description="Write 1,797 digits as class folders of 32x32 images.")
    images.add_argument("--out", required=True, type=Path, metavar="DIR")
    vae = commands.add_parser("autoencoder", description="Fit a VAE of 0.24e6 parameters to 32x32 images.")
    vae.add_argument("--images", required=True, type=Path, metavar="DIR", help="holds one folder of images a class")
    vae.add_argument("--out", required=True, type=Path, metavar="VAE", help="folder to write")
    vae.add_argument("--steps", type=positive, default=STEPS, help=f"optimizer steps ({STEPS})")
    vae.add_argument("--seed", type=int, default=0, help="of the initial weights, order and noise (0)")
    args = parser.parse_args()

    if args.command == "autoencoder" and not (args.steps <= MOST_STEPS and 0 <= args.seed < 2**63):
        raise InputError(f"--steps should be at most {MOST_STEPS:,}, and --seed at least 0 and below 2^63")
    if args.command == "images":
        say(f"{args.out}: {write_images(args.out)} images")
    else:
        error = write_autoencoder(args.images, args.out, args.steps, args.seed)
        say(f"{args.out}: mean squared reconstruction error {error:.2e} (values in [-1, 1])")


if __name__ == "__main__":
    run(main)
