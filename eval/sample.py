"""Sample an exported model, on any number of ranks; continues after a stop.

Sample i is a function of (seed, i) alone. Indices are cut into fixed batches, which the ranks share; a batch is always
computed whole, so neither the number of ranks nor a stop changes the arithmetic, unless there are so many ranks that a
smaller batch lets none idle (then kernels may round otherwise, by a grey level at most). Where the samples of a batch
depend on each other (DiffMoE), that holds for the last batch too, which goes beyond --num, and a folder keeps to one
--batch.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from data_prep.autoencoder import hash_weights
from eval.captured import captured
from eval.features import Extractor, FittedCNN, fit, load_fitted, save_fitted
from eval.generate import Sampling, generate, image_size, labels_for, load_decoder, resolve
from eval.images import fingerprint, reference_images
from eval.protocols import PROTOCOLS, Protocol
from eval.reference import check_reference, fitted_of, is_statistics, labels_in, make_extractor
from eval.sample_folder import (
    GRID,
    export_npz,
    image_name,
    is_images,
    model_fingerprint,
    open_folder,
    saved_features,
    saved_images,
    write_features,
    write_grid,
    write_image,
)
from moe_dit.build import to_compute
from moe_dit.classes import model_classes
from moe_dit.export import load_export
from moe_dit.recipe import Recipe
from moe_dit.runtime import ranks
from moe_dit.runtime.command import Parser, run
from moe_dit.runtime.errors import InputError
from moe_dit.runtime.files import check_new_file, explained
from moe_dit.runtime.progress import say, task
from moe_dit.runtime.ranks import from_rank_0
from moe_dit.sampler import METHODS

EXAMPLES = """\
  python -m eval.sample --model MODEL --num 50000 --out SAMPLES
  torchrun --nproc_per_node 8 -m eval.sample --model MODEL -n 50000 --out SAMPLES --cfg-scale 1.5
  deepspeed --module eval.sample --model MODEL -n 50000 --out SAMPLES
  srun python -m eval.sample --model MODEL --num 50000 --out SAMPLES --labels balanced
  python -m eval.sample --model MODEL --num 50000 --out SAMPLES --save features --inception FILE.pth

Under torchrun and deepspeed write -n, not --num: they would take it for a flag of their own.
"""
MOST_SAMPLES = 10_000_000  # a folder of more images is of no use to anybody, and their labels would fill the memory
MOST_AT_ONCE = 100_000


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
    add("--method", choices=METHODS, help="integrator")
    add("--labels", choices=("balanced", "random"), help="sample i has class i mod classes, or a random one")
    add("--vae", metavar="NAME_or_DIR", help="VAE that decodes latents: a hub name or a folder")
    add("--seed", type=int, default=0, metavar="N", help="default 0")
    add("--batch", type=int, metavar="N", help="samples computed at once on a rank")
    add("--capture", action="store_true", help="replay the network as a CUDA graph (bf16 on a GPU; not DiffMoE)")
    add("--inception", metavar="FILE.pth", help="Inception V3 weights for features, or the word download")
    add("--local_rank", "--local-rank", type=int, help="given by the deepspeed launcher; not used")


def usual_batch(num: int, device: torch.device, couples_samples: bool) -> int:
    """Samples computed at once on a rank; fewer than usual where there would be ranks without any."""
    usual = 256 if device.type == "cuda" else 64
    return usual if couples_samples else min(usual, -(-num // ranks.world().size))


def batches_of(num: int, batch_size: int, couples_samples: bool) -> list[torch.Tensor]:
    """The indices of each batch; where samples depend on each other the last one is whole, and goes beyond ``num``."""
    end = -(-num // batch_size) * batch_size if couples_samples else num
    return list(torch.arange(end).split(batch_size))


def add_feature_arguments(parser: Parser) -> None:
    """The flags of eval.sample that say which features are kept; eval.run has its own."""
    add = parser.add_argument
    add("--save", choices=("images", "features"), default="images", help="default images")
    add("--reference", type=Path, metavar="DIR", help="with --save features: what they will be compared to")
    add("--protocol", choices=PROTOCOLS, default="fidelity", help="with --save features (fidelity)")
    add("--dinov2", metavar="FILE", help="with --save features: DINOv2 weights, or the word download")
    add("--export-npz", type=Path, metavar="FILE.npz", help="write the images as arr_0 too, for ADM's evaluator")


def sample(args, out: Path, save: str) -> None:
    """Sample this rank's share of the batches into the folder ``out``.

    Args:
        args: the flags of :func:`add_sampling_arguments`, with ``reference`` (real images for the fitted extractor).
        out: the folder.
        save: "images" or "features".
    """
    for flag, most in (("num", MOST_SAMPLES), ("batch", MOST_AT_ONCE)):
        if (getattr(args, flag) or 0) > most:
            raise InputError(f"--{flag} is {getattr(args, flag)}; it should be at most {most:,}")
    device = ranks.device()

    def load() -> tuple[Any, Recipe, Sampling]:
        model, recipe = load_export(args.model)
        return model, recipe, resolve(args, recipe)

    model, recipe, sampling = ranks.agreed(load)
    vae = ranks.first_on_rank_0(lambda: load_decoder(sampling, recipe))
    size = image_size(recipe, vae)
    extractor = None
    protocol = PROTOCOLS[args.protocol]
    if save == "features":
        from_rank_0(lambda: _check_source(args, protocol, model_classes(args.model)))
        if args.inception is not None:
            extractor = make_extractor(protocol, args.inception, args.dinov2, [], size, device)
    batch_size = args.batch or usual_batch(args.num, device, model.couples_samples)

    def open_once() -> None:
        settings = {"model": str(args.model), "model_sha256": model_fingerprint(args.model), "num": args.num}
        settings |= vars(sampling) | {"cfg_interval": list(sampling.cfg_interval), "save": save}
        settings |= {"vae_sha256": hash_weights(vae) if vae is not None else None, "image_size": size}
        settings |= {"batch": batch_size} if model.couples_samples else {}
        settings |= {"classes": names} if (names := model_classes(args.model)) else {}
        settings |= {"protocol": protocol.name} if protocol.name != "fidelity" else {}
        open_folder(out, settings | {"features": _source(args, extractor) if save == "features" else None})

    from_rank_0(open_once)
    labels = labels_for(torch.arange(args.num), sampling, recipe.model.num_classes).tolist()
    # On rank 0 alone: every rank must know what is there before one of them adds files.
    saved = from_rank_0(lambda: saved_images(out, labels) if save == "images" else saved_features(out))
    if save == "features" and extractor is None:
        fitted = _fitted_extractor(out, args.reference, size, anew=not saved)
        extractor = make_extractor(protocol, None, args.dinov2, [], size, device, fitted)
    couples_samples = model.couples_samples
    model = to_compute(model, recipe, device)
    if args.capture:
        model = captured(model, recipe, device)
    vae = vae.to(device) if vae is not None else None
    batches = batches_of(args.num, batch_size, couples_samples)

    def generate_batch(indices: torch.Tensor) -> torch.Tensor:
        try:
            return generate(model, recipe, sampling, vae, indices.to(device), save == "images" or protocol.rounded)
        except torch.OutOfMemoryError:
            raise InputError(f"--batch {batch_size} does not fit into the GPU's memory; give a smaller one") from None

    with explained(f"samples to {out}"):
        _sample_missing(out, batches, set(range(args.num)) - saved, generate_batch, labels, extractor)
    ranks.barrier()
    if ranks.world().rank == 0:
        with explained(f"samples to {out}"):
            write_grid(out, save, sampling.labels)


def _sample_missing(
    out: Path,
    batches: list[torch.Tensor],
    missing: set[int],
    generate_batch: Callable[[torch.Tensor], torch.Tensor],
    labels: list[int],
    extractor: Extractor | None,
) -> None:
    """Sample this rank's batches that are not whole yet.

    Args:
        out: the samples folder.
        batches: indices of all batches; those beyond the labels' number are computed, and not kept.
        missing: indices to sample.
        generate_batch: from indices to images [N, 3, H, W] in [0, 255].
        labels: of all samples that are kept.
        extractor: where features are kept, not images.
    """
    world = ranks.world()
    num = len(labels)
    if len(missing) < num:
        say(f"{num - len(missing)} of {num} samples are there; {len(missing)} to go")
    share = [batches[k] for k in world.share(len(batches))]
    to_do = [batch for batch in share if not missing.isdisjoint(batch.tolist())]
    folder, end = (out / "images", num) if extractor is None else (out / "preview", GRID)
    writes: list[Any] = []

    with (
        task("sampling", num, num - len(missing), unit="images") as progress,
        ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool,
    ):

        def write(kept: list[int], pixels: torch.Tensor, arrived: Any) -> None:
            """Give a batch's files to the threads, once those of the batch before are written."""
            if arrived is not None:
                arrived.synchronize()
            for done in writes:
                done.result()
            writes[:] = [
                pool.submit(write_image, folder / image_name(i, labels[i]), picture)
                for i, picture in zip(kept, pixels.numpy(), strict=False)  # none, where none is kept
                if i in missing and i < end
            ]
            # The other ranks make as many meanwhile.
            progress.advance(min(world.size * len(kept), num - progress.done))

        # A batch's pixels are taken up one batch later: the GPU waits once a batch, for the check in generate, no more.
        last = None
        for batch in to_do:
            kept = batch[batch < num].tolist()
            images = generate_batch(batch)[: len(kept)]
            if extractor is not None:
                write_features(out, extractor(images), kept, [labels[i] for i in kept])
            # Images leave the GPU only where they are kept.
            some = images if kept and kept[0] < end else images[:0]
            copying = _start_copy(some.to(torch.uint8).permute(0, 2, 3, 1).contiguous())
            if last is not None:
                write(*last)
            last = (kept, *copying)
        if last is not None:
            write(*last)
        for done in writes:
            done.result()


def _start_copy(pixels: torch.Tensor) -> tuple[torch.Tensor, Any]:
    """A tensor's copy on the CPU, and the event after which it is whole (None: it is already)."""
    if not pixels.is_cuda:
        return pixels, None
    copy = torch.empty(pixels.shape, dtype=pixels.dtype, pin_memory=True)
    copy.copy_(pixels, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()
    return copy, arrived


def _check_source(args, protocol: Protocol, classes: list[str] | None) -> None:
    """Raise InputError where no features can be made by the flags, or not of a model of these classes."""
    if args.inception is None and args.reference is None:
        raise InputError("--save features needs --inception FILE.pth, or --reference DIR to fit a classifier to")
    if args.inception is None and is_statistics(args.reference) and fitted_of(args.reference) is None:
        raise InputError(f"no classifier can be fitted to the statistics {args.reference}; give --inception FILE.pth")
    if args.reference is not None:
        images = check_reference(args.reference, args.inception, protocol)[2]
        labels_in(args.reference, classes, images.classes, args.inception is None)
    else:
        protocol.check(args.inception)


def _source(args, extractor: Extractor | None) -> str:
    """What tells one extractor from another, known before a classifier is fitted."""
    if extractor is not None:
        return extractor.identity
    if is_statistics(args.reference):
        fitted = fitted_of(args.reference)
        assert fitted is not None
        return fitted.identity
    return f"fitted-cnn to {fingerprint(reference_images(args.reference))}"


def _fitted_extractor(out: Path, reference: Path, size: int, anew: bool) -> FittedCNN:
    """The classifier that rank 0 fits and keeps, so that all ranks and the reference meet the very same one.

    Args:
        anew: nothing was made with the kept one.
    """
    kept = out / "features" / "extractor.pt"

    def make() -> None:
        save_fitted(fitted_of(reference) or fit(reference_images(reference), size), kept)

    if anew:
        from_rank_0(make)
    return load_fitted(kept)


def main() -> None:
    parser = Parser(__doc__, EXAMPLES)
    add_sampling_arguments(parser)
    parser.add_argument("--out", required=True, type=Path, metavar="SAMPLES", help="folder of samples")
    add_feature_arguments(parser)
    args = parser.parse_args()
    if args.save == "images" and (args.inception or args.reference or args.dinov2):
        raise InputError(
            "--inception, --reference and --dinov2 are for --save features; eval.score takes them for images"
        )
    if args.export_npz is not None and args.save == "features":
        raise InputError("--export-npz writes images; give --save images")
    ranks.start(timedelta(hours=12))
    if args.export_npz is not None:
        from_rank_0(lambda: check_new_file(args.export_npz, is_images))
    sample(args, args.out, args.save)
    if args.export_npz is not None:
        from_rank_0(lambda: export_npz(args.out, args.num, args.export_npz))
    say(f"{args.num} samples in {args.out}")


if __name__ == "__main__":
    run(main)
