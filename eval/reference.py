"""Statistics of real images in one file: every feature space at once, over all ranks, however many images there are.

The file is a .npz that other programs read too: mu and sigma of Inception's features, mu_s and sigma_s of its spatial
ones, as in ADM's and JiT's files; beside them the features of 10,000 images, by which KID, precision and recall are
computed, and what it all was computed from.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch

from eval import features
from eval.arrays import read_arrays
from eval.features import SPACES, Extractor, Survey, extract, survey, told
from eval.images import KINDS, ImageFile, Images, any_images, check_sizes, reference_images
from eval.metrics import Moments
from eval.protocols import PROTOCOLS, Protocol
from moe_dit.classes import are_names, labels_among, lacking, unnamed
from moe_dit.manifest import read_manifest
from moe_dit.runtime import ranks
from moe_dit.runtime.command import Parser, run
from moe_dit.runtime.errors import InputError
from moe_dit.runtime.files import check_new_file, explained, new_file
from moe_dit.runtime.progress import say
from moe_dit.runtime.reading import open_file

EXAMPLES = """\
  torchrun --nproc_per_node 8 -m eval.reference imagenet/train --size 256 --inception FILE.pth --out imagenet256.npz
  python -m eval.reference data/digits_images --out digits.npz
  srun python -m eval.reference imagenet256_pixels --inception download --dinov2 download --out imagenet256.npz

Without --inception and --dinov2 a classifier is fitted to the images and kept in the file.
"""
FORMAT = "moe-dit-reference-1"
WIDTHS = {"features": 2048, "spatial": 2023}  # of Inception's
FITTED = "fitted_"  # beginning of the names of a fitted classifier's weights in a file


# --- files ------------------------------------------------------------------------------------------------------------


def is_statistics(reference: Path) -> bool:
    """Whether a reference is a .npz file with mu and sigma; one with images alone is not."""
    if reference.suffix != ".npz" or not os.path.isfile(reference):
        return reference.suffix == ".npz"
    try:
        with open_file(reference) as opened, np.load(opened) as arrays:
            return "mu" in arrays.files or "arr_0" not in arrays.files
    except Exception:  # what is wrong with it is said where it is read
        return True


def about(file: Path) -> dict[str, Any]:
    """What a file of :func:`write_reference` was computed from; nothing for those of other programs."""
    try:
        with open_file(file) as opened, np.load(opened) as arrays:
            found = json.loads(str(arrays["about"])) if "about" in arrays.files else {}
    except Exception:  # what is wrong with it is said where it is read
        return {}
    return found if isinstance(found, dict) and found.get("format") == FORMAT else {}


def write_reference(
    file: Path, found: Survey, extractor: Extractor, described: dict[str, Any], protocol: Protocol
) -> None:
    """Write what :func:`load_reference` reads."""
    arrays: dict[str, Any] = {}
    for name, (_, ending, _) in SPACES.items():
        if name in found.moments:
            arrays |= {
                f"mu{ending}": found.moments[name].mu.numpy(),
                f"sigma{ending}": found.moments[name].sigma.numpy(),
            }
        if name in found.rows:
            arrays[f"features{ending}"] = found.rows[name].numpy()
    networks = [network.identity for network in extractor.networks]
    fitted = extractor.fitted
    if fitted is not None:
        arrays |= {f"{FITTED}{name}": value.cpu().numpy() for name, value in fitted.state_dict().items()}
        described = described | {"classes": fitted.num_classes, "accuracy": fitted.held_out_accuracy}
    if found.unreadable is not None:
        described = described | {"unreadable": found.unreadable}
    described = {"format": FORMAT} | described | {"count": found.count, "networks": networks, "protocol": protocol.name}
    with explained(str(file)), new_file(file) as opened:
        np.savez(opened, **arrays, about=np.array(json.dumps(described)))


def load_statistics(file: Path) -> tuple[Survey, dict[str, Any]]:
    """Read a file of statistics, ours or ADM's or JiT's, and what it was computed from (nothing, of others' files).

    Raises:
        InputError: it is none.
    """
    described = about(file)
    try:
        with open_file(file) as opened, np.load(opened) as arrays:
            there = set(arrays.files)
        wanted = {
            f"{kind}{ending}"
            for _, ending, _ in SPACES.values()
            for kind in ("mu", "sigma", "features")
            if (ending == "" and kind != "features") or f"{kind}{ending}" in there
        }
        found = read_arrays(file, sorted(wanted))
    except FileNotFoundError:
        raise InputError(f"no reference {file}; it should be a .npz file of statistics, or {KINDS}") from None
    except Exception as error:  # a damaged byte makes zipfile and numpy raise errors of many kinds
        reason = str(error) or type(error).__name__
        raise InputError(
            f"{file} does not hold mu and sigma, as ADM's and JiT's statistics files do, or is damaged: {reason}"
        ) from None
    for name, array in found.items():
        if array.dtype.kind not in "fiu":
            raise InputError(f"{file}: {name} holds {array.dtype}; it should hold real numbers")
        if not np.isfinite(array).all():
            raise InputError(f"{file}: {name} holds numbers that are not finite; compute the statistics again")
    totals, rows = {}, {}
    for name, (_, ending, _) in SPACES.items():
        if f"mu{ending}" in found and f"sigma{ending}" in found:
            mu, sigma = (found[f"{kind}{ending}"].astype(np.float64) for kind in ("mu", "sigma"))
            _check_moments(file, mu, sigma, ending, None if described else WIDTHS.get(name))
            totals[name] = Moments(torch.from_numpy(mu), torch.from_numpy(sigma), described.get("count"))
            kept = found.get(f"features{ending}")
            if kept is not None and kept.ndim == 2 and kept.shape[1] == len(mu):
                rows[name] = torch.from_numpy(kept.astype(np.float32))
    return Survey(totals, rows, described.get("count"), True, described.get("unreadable")), described


def _check_moments(file: Path, mu: np.ndarray, sigma: np.ndarray, ending: str, width: int | None) -> None:
    width = width or (mu.shape[0] if mu.ndim == 1 else 0)
    if mu.shape != (width,) or sigma.shape != (width, width):
        raise InputError(
            f"{file}: mu{ending} has shape {list(mu.shape)} and sigma{ending} {list(sigma.shape)}; "
            f"Inception's are [{width}] and [{width}, {width}]"
        )
    # 1e-3 of the largest is far above any rounding.
    if np.abs(sigma - sigma.T).max() > 1e-3 * np.abs(sigma).max() or sigma.diagonal().min() < 0:
        raise InputError(f"{file}: sigma{ending} is not symmetric or has negative variances, so it is no covariance")


def fitted_of(file: Path) -> features.FittedCNN | None:
    """The classifier whose features a file of ours holds; None where it holds another network's."""
    described = about(file)
    if "classes" not in described:
        return None
    try:
        with open_file(file) as opened, np.load(opened) as arrays:
            state = {
                name.removeprefix(FITTED): torch.from_numpy(arrays[name])
                for name in arrays.files
                if name.startswith(FITTED)
            }
        saved = {"state": state, "classes": described["classes"], "accuracy": described["accuracy"]}
        return features.fitted_from_state(saved)
    except Exception as error:  # torch and numpy raise many kinds for a file that is not whole
        raise InputError(f"{file} is damaged: {error}; compute it again with eval.reference") from None


def check_reference(
    reference: Path, inception: str | None, protocol: Protocol
) -> tuple[Survey | None, dict[str, Any], Images]:
    """Look at a reference, and raise InputError where it cannot serve, as far as that can be known before the work.

    Returns:
        statistics and what they were computed from, where it is a file of them, else None and nothing; and its images,
        with the names of its classes.
    """
    protocol.check(inception)
    if not is_statistics(reference):
        return None, {}, reference_images(reference)
    if inception is None and "classes" not in about(reference):
        raise InputError(f"{reference} holds statistics of Inception features; give --inception FILE.pth or download")
    found, described = load_statistics(reference)
    made = PROTOCOLS.get(described.get("protocol", protocol.name))
    if made is not None and made.half_pixel != protocol.half_pixel:
        raise InputError(
            f"{reference} was made for --protocol {made.name}, whose images are resized otherwise than "
            f"{protocol.name}'s; make another with eval.reference --protocol {protocol.name}"
        )
    if protocol.spatial and "spatial" not in found.moments:
        raise InputError(f"{reference} lacks mu_s and sigma_s; eval.reference --protocol {protocol.name} makes them")
    names = described.get("class_names")
    return found, described, Images(classes=names if are_names(names) else None)


def labels_in(
    reference: Path, classes: Sequence[str] | None, theirs: Sequence[str] | None, fitted: bool
) -> np.ndarray | None:
    """What a model's labels are among a reference's (:func:`moe_dit.classes.labels_among`).

    Args:
        reference: for messages.
        classes: the names of the model's classes.
        theirs: of the reference's; None, of either: there is nothing to compare.
        fitted: whether what compares was fitted to the reference's labels. If not, labels are of no concern, and other
            classes are told of alone.

    Raises:
        InputError: labels count, and the reference lacks classes of the model.
    """
    if classes is None or theirs is None:
        return None
    whose, of = "the model", f"the reference {reference}"
    places = labels_among(classes, theirs, whose, of) if fitted else None
    other = lacking(classes, theirs, whose, of) or lacking(theirs, classes, of, whose)
    if other is not None and not unnamed(classes, theirs):
        say(other)
    return places


class Reference:
    """What samples are compared to: real images, or a file of statistics. Every rank makes one, and calls its methods.

    Args:
        path: of either.
        inception: Inception weights or "download"; None: a classifier is fitted to the images, or is the file's.
        protocol: of the scores.

    Attributes:
        images: the real images, none where it is statistics; with the names of the reference's classes.

    Raises:
        InputError: it cannot serve.
    """

    images: Images

    def __init__(self, path: Path, inception: str | None, protocol: Protocol):
        self.path, self.inception, self.protocol = path, inception, protocol
        self._statistics: Survey | None = None  # on rank 0 alone

        def look() -> Any:
            self._statistics, described, images = check_reference(path, inception, protocol)
            rows = Images()
            if self._statistics is not None and protocol.neighbours and "features" not in self._statistics.rows:
                rows = any_images(path)
            fitted = None if inception else fitted_of(path)
            return images, rows, described.get("networks"), fitted and features.fitted_state(fitted)

        # rows: images beside the statistics, by which precision and recall are computed.
        self.images, self._rows, self._networks, state = ranks.from_rank_0(look)
        self._fitted = state and features.fitted_from_state(state)

    def extractor(
        self, dinov2: str | None, size: int, device: torch.device, fitted: features.FittedCNN | None = None
    ) -> Extractor:
        """The networks that the scores compare, of images of this size.

        Args:
            fitted: the classifier by which samples' features were made, where there is one.

        Raises:
            InputError: the reference's statistics were made with others.
        """
        fitted = fitted or self._fitted
        extractor = make_extractor(self.protocol, self.inception, dinov2, self.images, size, device, fitted)

        def check() -> None:
            for network in extractor.networks if self._networks is not None else ():
                if network.identity not in self._networks:
                    raise InputError(
                        f"{self.path} was made with {' and '.join(self._networks)}, not with {network.identity}; "
                        "compute it again with eval.reference"
                    )

        ranks.agreed(check)
        return extractor

    def survey(self, extractor: Extractor, size: int) -> Survey | None:
        """What is known of the real images, on rank 0; None elsewhere."""
        if self.images:
            return survey(extractor, self.images, size, "features of the reference")
        if not self._rows:
            return self._statistics
        unread: dict[int, str] = {}
        rows = extract(extractor, self._rows, size, "features of the reference's images", unread)
        if rows is None or self._statistics is None:
            return None
        unreadable = told(self._rows, unread) or self._statistics.unreadable
        return replace(self._statistics, rows={"features": rows.arrays["features"]}, unreadable=unreadable)


# --- the command ------------------------------------------------------------------------------------------------------


def image_side(path: Path, images: Sequence[ImageFile], size: int | None) -> int:
    """The side to which real images are cropped: as asked, as their manifest says, or their own where all have one."""
    if size is not None:
        return size
    if os.path.exists(path / "manifest.json"):
        return read_manifest(path).sample_shape[-1]
    try:
        return check_sizes(path, images, strict=False)
    except InputError as error:
        raise InputError(f"{error}; --size crops real images") from None


def content_hash(images: Sequence[ImageFile]) -> str:
    """SHA-256 over the bytes of all images, by all ranks; the same however many they are."""
    digests = {}
    for i in ranks.world().share(len(images)):
        with open_file(images[i].file) as file:
            file.seek(images[i].offset)
            digests[i] = hashlib.sha256(file.read(images[i].length)).hexdigest()
    everyone = ranks.gathered(digests)
    whole = {i: digest for part in everyone or [] for i, digest in part.items()}
    return hashlib.sha256("".join(whole[i] for i in sorted(whole)).encode()).hexdigest()


def main() -> None:
    parser = Parser(__doc__ or "", EXAMPLES)
    add = parser.add_argument
    add("images", type=Path, metavar="IMAGES_or_SHARDS", help=KINDS)
    add("--out", type=Path, required=True, metavar="FILE.npz", help="file to write")
    add("--size", type=int, metavar="N", help="side of the images' centre crops (their own)")
    add("--protocol", choices=PROTOCOLS, default="fidelity", help="what it is for (fidelity)")
    add("--inception", metavar="FILE.pth", help="Inception V3 weights, or the word download")
    add("--dinov2", metavar="FILE", help="DINOv2 ViT-L/14 weights, or the word download")
    add("--local_rank", "--local-rank", type=int, help="given by the deepspeed launcher; not used")
    args = parser.parse_args()
    ranks.start(timedelta(hours=12))  # nobody gives up on the slowest
    device = ranks.device()
    protocol = PROTOCOLS[args.protocol]
    if args.size is not None and not 8 <= args.size <= 8192:
        raise InputError(f"--size is {args.size}; it should be 8 to 8192")
    if args.out.suffix != ".npz":
        raise InputError(f"--out {args.out}: it should end in .npz")
    protocol.check(args.inception)

    def prepare() -> tuple[Images, int]:
        check_new_file(args.out, lambda file: bool(about(file)))
        images = reference_images(args.images)
        if len(images) < 2:
            raise InputError(f"{args.images} holds {len(images)} image; statistics are of two at least")
        return images, image_side(args.images, images, args.size)

    images, size = ranks.from_rank_0(prepare)
    extractor = make_extractor(protocol, args.inception, args.dinov2, images, size, device)
    unread: dict[int, str] = {}
    found = survey(extractor, images, size, "features of the images", unread)
    whole = [image for i, image in enumerate(images) if i not in unread]
    digest = content_hash(whole)
    if found is not None:
        described = {"images": str(args.images), "size": size, "sha256": digest}
        described |= {"class_names": images.classes} if images.classes else {}
        write_reference(args.out, found, extractor, described, protocol)
    say(f"{args.out}: {extractor.title} of {len(whole)} images at {size}x{size}")


def make_extractor(
    protocol: Protocol,
    inception: str | None,
    dinov2: str | None,
    images: Sequence[ImageFile],
    size: int,
    device: torch.device,
    fitted: features.FittedCNN | None = None,
) -> Extractor:
    """The networks that a protocol and the flags ask for; every rank calls it.

    Args:
        images: real ones, to fit a classifier to where no Inception weights are given, on rank 0.
        fitted: the classifier, where there is one already.
    """
    networks: list[features.Network] = []
    # What may be wrong comes before what takes long.
    if dinov2 is not None:
        networks.append(ranks.first_on_rank_0(lambda: features.DINOv2(dinov2)))
    if inception is not None:
        inside = ranks.first_on_rank_0(lambda: features.Inception(inception, protocol.half_pixel, protocol.spatial))
        networks.insert(0, inside)
    elif fitted is not None:
        networks.insert(0, fitted)
    else:
        state = ranks.from_rank_0(lambda: features.fitted_state(features.fit(images, size)))
        networks.insert(0, features.fitted_from_state(state))
    return Extractor(networks, device)


if __name__ == "__main__":
    run(main)
