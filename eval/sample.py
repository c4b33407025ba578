"""Sample an exported model, on any number of ranks; continues after a stop.

Sample i is a function of (seed, i) alone. Indices are cut into fixed batches, which the ranks share; a batch is always
computed whole, so neither the number of ranks nor a stop changes the arithmetic.
"""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from moe_dit import distributed
from moe_dit.command import Parser, run
from moe_dit.errors import InputError
from moe_dit.progress import say, task
from moe_dit.randomness import Stream, normal, uniform

if TYPE_CHECKING:
    from torch import nn

    from eval.features import Extractor
    from moe_dit.recipe import Recipe

EXAMPLES = """\
  python -m eval.sample --model MODEL --num 50000 --out SAMPLES
  torchrun --nproc_per_node 8 -m eval.sample --model MODEL -n 50000 --out SAMPLES --cfg-scale 1.5
  deepspeed --module eval.sample --model MODEL -n 50000 --out SAMPLES
  srun python -m eval.sample --model MODEL --num 50000 --out SAMPLES --labels balanced
  python -m eval.sample --model MODEL --num 50000 --out SAMPLES --save features --inception FILE.pth

Under torchrun and deepspeed write -n, not --num: they would take it for a flag of their own.
"""
GRID = 100  # images shown in samples.png
DECODE_BATCH = 16  # a VAE decoder at 256 x 256 needs far more memory per image than the network


# --- command line -----------------------------------------------------------------------------------------------------


def add_sampling_arguments(parser: Parser, default_num: int | None = None) -> None:
    """The flags that eval.sample and eval.run share; None stands for the recipe's own value."""
    add = parser.add_argument
    add("--model", required=True, type=Path, metavar="MODEL", help="an exported model (jobs/export.py)")
    num_help = "number of samples" + (f" (default {default_num})" if default_num else "")
    # The short form is for torchrun and deepspeed, which take --num for a shortening of flags of their own.
    add("-n", "--num", type=int, required=default_num is None, default=default_num, metavar="N", help=num_help)
    add("--cfg-scale", type=float, metavar="S", help="classifier-free guidance; 1 is none")
    add("--cfg-interval", type=float, nargs=2, metavar=("LO", "HI"), help="guidance acts on times t inside it")
    add("--steps", type=int, metavar="N", help="integration steps")
    add("--method", choices=("euler", "heun"), help="integrator")
    add("--labels", choices=("balanced", "random"), help="sample i has class i mod classes, or a random one")
    add("--vae", metavar="NAME_or_DIR", help="VAE that decodes latents: a hub name or a folder")
    add("--seed", type=int, default=0, metavar="N", help="default 0")
    add("--batch", type=int, metavar="N", help="samples computed at once on a rank")
    add("--inception", metavar="FILE.pth", help="Inception V3 weights for features, or the word download")
    add("--local_rank", "--local-rank", type=int, help="given by the deepspeed launcher; not used")


@dataclass(frozen=True)
class Sampling:
    """How to sample; resolved, so nothing is None but ``vae`` in pixel space."""

    seed: int
    method: str
    steps: int
    cfg_scale: float
    cfg_interval: tuple[float, float]
    labels: str
    vae: str | None
    latent_scale: float | None


def resolve(args, recipe: "Recipe") -> Sampling:
    """Flags over the recipe's defaults, checked."""

    def choose(flag, default):
        return default if flag is None else flag

    defaults, latents = recipe.sampling, recipe.data.kind == "latents"
    interval = choose(args.cfg_interval, defaults.cfg_interval)
    sampling = Sampling(
        seed=args.seed,
        method=choose(args.method, defaults.method),
        steps=choose(args.steps, defaults.steps),
        cfg_scale=float(choose(args.cfg_scale, defaults.cfg_scale)),
        cfg_interval=(float(interval[0]), float(interval[1])),
        labels=choose(args.labels, defaults.labels),
        vae=choose(args.vae, recipe.data.vae) if latents else None,
        latent_scale=recipe.data.latent_scale if latents else None,
    )
    low, high = sampling.cfg_interval
    for good, complaint in (
        (args.num >= 1, f"--num is {args.num}; it should be at least 1"),
        (args.batch is None or args.batch >= 1, f"--batch is {args.batch}; it should be at least 1"),
        (0 <= args.seed < 2**63, f"--seed is {args.seed}; it should be at least 0 and below 2^63"),
        (sampling.steps >= 1, f"--steps is {sampling.steps}; it should be at least 1"),
        (0 <= sampling.cfg_scale < float("inf"), f"--cfg-scale is {sampling.cfg_scale}; it should be at least 0"),
        (0 <= low <= high <= 1, f"--cfg-interval is {low} {high}; it should be 0 <= LO <= HI <= 1"),
        (latents or args.vae is None, "--vae has no use: the model makes pixels; leave it out"),
        (not latents or sampling.latent_scale is not None, "the model's recipe.yaml has no data.latent_scale; add it"),
        (not latents or sampling.vae is not None, "the recipe names no VAE to decode its latents; give --vae"),
    ):
        if not good:
            raise InputError(complaint)
    return sampling


# --- the folder -------------------------------------------------------------------------------------------------------


def model_fingerprint(model: Path) -> str:
    """SHA-256 over a model folder's configuration and weights."""
    digest = hashlib.sha256()
    for file in (model / "config.json", *sorted(model.glob("*.safetensors"))):
        with open(file, "rb") as opened:
            digest.update(f"{file.name} {hashlib.file_digest(opened, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def open_folder(out: Path, settings: dict[str, Any]) -> None:
    """Make the samples folder with its settings.json, or check that it continues the one that is there.

    Raises:
        InputError: the folder holds samples made with other settings; names those that differ.
    """
    from eval.features import write_atomically

    file = out / "settings.json"
    taken = out.exists() and (not out.is_dir() or any(out.glob("images/*.png")) or any(out.glob("features/batch_*")))
    if taken:
        try:
            before = json.loads(file.read_text())
            largest = max(settings["num"], before["num"])
        except (OSError, ValueError, KeyError, TypeError):
            raise InputError(f"{out} is taken, and {file} does not tell by what; give another --out") from None
        # Paths may change, as fingerprints tell the model and the VAE; and more samples continue the same ones.
        differing = [key for key in settings if key not in ("model", "vae", "num") and before.get(key) != settings[key]]
        if differing:
            changes = ", ".join(f"{key} was {before.get(key)} and is now {settings[key]}" for key in differing)
            raise InputError(f"{out} holds samples made otherwise: {changes}; give the same settings or another --out")
        settings = settings | {"num": largest}
    try:
        for name in ("images",) if settings["save"] == "images" else ("features", "preview"):
            (out / name).mkdir(parents=True, exist_ok=True)
            for leftover in (out / name).glob(".*.tmp"):  # of a run that was killed
                leftover.unlink()
        write_atomically(file, lambda opened: opened.write((json.dumps(settings, indent=2) + "\n").encode()))
    except OSError as error:
        raise InputError(f"{out} cannot be written: {error.strerror}; give another --out") from None


def image_name(index: int, label: int) -> str:
    """An image's file name: index and label."""
    return f"{index:06d}_{label}.png"


def write_image(path: Path, image: np.ndarray) -> None:
    """Write uint8 [H, W, 3] as PNG, atomically."""
    from eval.features import write_atomically

    write_atomically(path, lambda file: Image.fromarray(image).save(file, format="PNG"))


def saved_indices(folder: Path) -> set[int]:
    """Indices of the samples whose features are in SAMPLES/features."""
    indices: set[int] = set()
    for file in (folder / "features").glob("batch_*.npz"):
        with np.load(file) as batch:
            indices.update(batch["indices"].tolist())
    return indices


def write_grid(out: Path, save: str, labels: str) -> None:
    """Write samples.png from the first images; a column is a class where that is possible."""
    from torchvision.utils import make_grid

    from eval.features import read_image, sample_images

    images = sample_images(out / ("images" if save == "images" else "preview"))[:GRID]
    if not images:
        return
    classes = len({image.label for image in images})
    columns = classes if labels == "balanced" and classes <= 10 else 10
    grid = make_grid([read_image(image) for image in images], nrow=columns, padding=2, pad_value=255)
    write_image(out / "samples.png", grid.permute(1, 2, 0).numpy())


# --- sampling ---------------------------------------------------------------------------------------------------------


def labels_for(indices: torch.Tensor, sampling: Sampling, num_classes: int) -> torch.Tensor:
    """The label of each sample index, int64 [N]."""
    if sampling.labels == "balanced":
        return indices % num_classes
    draws = uniform(sampling.seed, Stream.SAMPLE_LABEL, indices).double()
    return (draws * num_classes).long()


def load_decoder(sampling: Sampling, recipe: "Recipe") -> "nn.Module | None":
    """The VAE that decodes the model's samples, float32, on the CPU; None in pixel space."""
    if sampling.vae is None:
        return None
    from data_prep.encode_latents import load_vae

    vae = load_vae(sampling.vae).float()
    if vae.config.latent_channels != recipe.model.in_channels:
        raise InputError(
            f"the VAE {sampling.vae} has {vae.config.latent_channels} latent channels and the model makes "
            f"{recipe.model.in_channels}; give the VAE that encoded the training data with --vae"
        )
    return vae


def image_size(recipe: "Recipe", vae: "nn.Module | None") -> int:
    """Side of the images that the model's samples become."""
    from data_prep.encode_latents import downsampling

    return recipe.model.input_size * (downsampling(vae) if vae is not None else 1)


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Images in [-1, 1] as uint8 of the same shape; the rounding that FID is computed on."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


@torch.no_grad()
def generate(
    model: "nn.Module",
    recipe: "Recipe",
    sampling: Sampling,
    vae: Any,
    indices: torch.Tensor,
) -> torch.Tensor:
    """The samples of these indices (int64 [N] on the model's device): images uint8 [N, 3, H, W]."""
    from moe_dit.flow import build_flow

    shape = (recipe.model.in_channels, recipe.model.input_size, recipe.model.input_size)
    z = normal(sampling.seed, Stream.SAMPLE_NOISE, indices, shape)
    # The sampler and the VAE stay in float32; bf16 is for the network's matrix products on a GPU.
    bf16 = indices.is_cuda and recipe.precision != "fp32"
    with torch.autocast(indices.device.type, torch.bfloat16, enabled=bf16):
        x = build_flow(recipe).sample(
            model,
            z,
            labels_for(indices, sampling, recipe.model.num_classes),
            steps=sampling.steps,
            method=sampling.method,
            cfg_scale=sampling.cfg_scale,
            cfg_interval=sampling.cfg_interval,
        )
    if vae is not None and sampling.latent_scale is not None:
        parts = (x / sampling.latent_scale).split(DECODE_BATCH)
        x = torch.cat([vae.decode(part).sample for part in parts])
    if not torch.isfinite(x).all():
        raise InputError("the model's samples are not finite; was it trained to divergence?", local=True)
    return to_uint8(x)


def sample(args, out: Path, save: str) -> None:
    """Sample this rank's share of the batches into the folder ``out``.

    Args:
        args: the flags of :func:`add_sampling_arguments`, with ``reference`` (real images for the fitted extractor).
        out: the folder.
        save: "images" or "features".
    """
    from data_prep.encode_latents import hash_weights
    from moe_dit.distributed import from_rank_0
    from moe_dit.export import load_export

    device = distributed.device()
    model, recipe = load_export(args.model)
    sampling = resolve(args, recipe)
    # Rank 0 first: what must be fetched is fetched once, and what is wrong is said once.
    from_rank_0(lambda: load_decoder(sampling, recipe) and None)
    vae = load_decoder(sampling, recipe)
    size = image_size(recipe, vae)
    extractor = None
    if save == "features":
        from_rank_0(lambda: _check_source(args, device))
        if args.inception is not None:
            from eval.features import inception

            extractor = inception(args.inception, device)

    def open_once() -> None:
        settings = {"model": str(args.model), "model_sha256": model_fingerprint(args.model), "num": args.num}
        settings |= vars(sampling) | {"cfg_interval": list(sampling.cfg_interval), "save": save}
        settings |= {"vae_sha256": hash_weights(vae) if vae is not None else None, "image_size": size}
        open_folder(out, settings | {"features": _source(args, extractor) if save == "features" else None})

    from_rank_0(open_once)
    if save == "features" and extractor is None:
        extractor = _fitted_extractor(out, args.reference, size, device)
    labels = labels_for(torch.arange(args.num), sampling, recipe.model.num_classes).tolist()
    model = model.to(device).eval()
    vae = vae.to(device) if vae is not None else None
    _sample_missing(args, out, lambda indices: generate(model, recipe, sampling, vae, indices), labels, extractor)
    distributed.barrier()
    if distributed.world().rank == 0:
        write_grid(out, save, sampling.labels)


def _sample_missing(args, out, generate_batch, labels: list[int], extractor: "Extractor | None") -> None:
    """Sample this rank's batches that are not whole yet; generate_batch gives the images of indices."""
    here, device = distributed.world(), distributed.device()
    if extractor is None:
        done = set(os.listdir(out / "images"))
        missing = {i for i in range(args.num) if image_name(i, labels[i]) not in done}
    else:
        missing = set(range(args.num)) - saved_indices(out)
    if len(missing) < args.num:
        say(f"{args.num - len(missing)} of {args.num} samples are there; {len(missing)} to go")
    batches = torch.arange(args.num).split(args.batch or (256 if device.type == "cuda" else 64))
    share = [batches[k] for k in here.share(len(batches))]
    to_do = [batch for batch in share if not missing.isdisjoint(batch.tolist())]
    total = sum(len(batch) for batch in share)
    # Every rank must have looked before one of them adds files.
    distributed.barrier()
    description = "sampling" if here.size == 1 else f"sampling (rank 0 of {here.size})"
    writes: list[Any] = []
    with (
        task(description, total, total - sum(len(batch) for batch in to_do)) as progress,
        ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool,
    ):
        for batch in to_do:
            images = generate_batch(batch.to(device))
            if extractor is not None:
                _write_features(out, extractor, images, batch, labels)
            folder, end = (out / "images", args.num) if extractor is None else (out / "preview", GRID)
            pixels = images.permute(0, 2, 3, 1).cpu().numpy()
            # The files of one batch are written while the next is computed.
            for write in writes:
                write.result()
            writes = [
                pool.submit(write_image, folder / image_name(i, labels[i]), picture)
                for i, picture in zip(batch.tolist(), pixels, strict=True)
                if i in missing and i < end
            ]
            progress.advance(len(batch))
        for write in writes:
            write.result()


def _write_features(out: Path, extractor: "Extractor", images: torch.Tensor, batch: torch.Tensor, labels: list) -> None:
    from eval.features import write_atomically

    features, logits = extractor(images)
    arrays: dict[str, Any] = {"features": features.numpy(), "logits": logits.numpy(), "indices": batch.numpy()}
    arrays["labels"] = np.array([labels[i] for i in batch.tolist()])
    name = f"batch_{int(batch[0]):06d}.npz"  # the first index of the batch
    write_atomically(out / "features" / name, lambda file: np.savez(file, **arrays))


def _check_source(args, device: torch.device) -> None:
    """Raise InputError where no extractor can be made of the flags."""
    from eval.features import inception, reference_images

    if args.inception is not None:
        inception(args.inception, device)
    elif args.reference is None:
        raise InputError("--save features needs --inception FILE.pth, or --reference DIR to fit a classifier to")
    elif args.reference.suffix == ".npz":
        raise InputError(f"no classifier can be fitted to the statistics {args.reference}; give --inception FILE.pth")
    else:
        reference_images(args.reference)


def _source(args, extractor: "Extractor | None") -> str:
    """What tells one extractor from another, known before a classifier is fitted."""
    from eval.features import fingerprint, reference_images

    return extractor.identity if extractor else f"fitted-cnn to {fingerprint(reference_images(args.reference))}"


def _fitted_extractor(out: Path, reference: Path, size: int, device: torch.device) -> "Extractor":
    """The classifier that rank 0 fits and keeps, so that all ranks and the reference meet the very same one."""
    from eval.features import fit, load_fitted, reference_images, save_fitted
    from moe_dit.distributed import from_rank_0

    kept = out / "features" / "extractor.pt"
    if not saved_indices(out):  # nothing was made with the kept one
        from_rank_0(lambda: save_fitted(fit(reference_images(reference), size, device), kept))
    return load_fitted(kept, device)


def main() -> None:
    parser = Parser(__doc__, EXAMPLES)
    add_sampling_arguments(parser)
    parser.add_argument("--out", required=True, type=Path, metavar="SAMPLES", help="folder of samples")
    parser.add_argument("--save", choices=("images", "features"), default="images", help="default images")
    parser.add_argument(
        "--reference", type=Path, metavar="DIR", help="with --save features and no --inception: labelled real images"
    )
    args = parser.parse_args()
    if args.save == "images" and (args.inception or args.reference):
        raise InputError("--inception and --reference are for --save features; eval.score takes them for images")
    distributed.start(timedelta(hours=12))
    sample(args, args.out, args.save)
    say(f"{args.num} samples in {args.out}")
    distributed.stop()


if __name__ == "__main__":
    run(main)
