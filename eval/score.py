"""Score samples against real images: FID with its uncertainty, Inception Score, KID, precision, recall and others.

How images are resized and what is compared is the protocol's (:mod:`eval.protocols`), which every result names.
Features are put in order and the statistics computed in float64, so the numbers do not depend on the number of ranks.
"""

import math
import os
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from eval import features, metrics
from eval.features import SPACES, Extractor, Features, Survey
from eval.images import BATCH, ImageFile, any_images, check_alone, check_sizes, images_below, listed, sample_images
from eval.protocols import PROTOCOLS, Protocol
from eval.reference import Reference, labels_in
from eval.sample_folder import load_features, read_settings
from moe_dit.classes import translated
from moe_dit.runtime import ranks
from moe_dit.runtime.command import Parser, run
from moe_dit.runtime.errors import InputError
from moe_dit.runtime.files import check_new_file, explained, write_json
from moe_dit.runtime.progress import say
from moe_dit.runtime.reading import read_json

EXAMPLES = """\
  python -m eval.score SAMPLES --reference imagenet/val --inception weights-inception-2015-12-05-6726825d.pth
  torchrun --nproc_per_node 8 -m eval.score SAMPLES --reference VIRTUAL_imagenet256_labeled.npz --protocol adm \\
      --inception download
  python -m eval.score SAMPLES --reference data/digits_images --out scores.json
  python -m eval.score SAMPLES --reference digits.npz --against other/metrics.json
"""
FEWEST = 10  # images; below, precision, recall and the Inception Score's ten parts have no meaning
SEED = 0  # of the halves by which FID is extrapolated


# --- inputs -----------------------------------------------------------------------------------------------------------


@dataclass
class _Given:
    """The samples that are to be scored, found out on rank 0.

    Attributes:
        settings: of eval.sample; {} for other images.
        images: the samples; none where their features are there.
        size: of the samples.
        fitted: the state of a classifier whose features were kept.
    """

    settings: dict[str, Any]
    images: list[ImageFile] = field(default_factory=list)
    size: int = 0
    fitted: dict[str, Any] | None = None


def _look_at(path: Path, inception: str | None, protocol: Protocol) -> _Given:
    given = _Given((read_settings(path) if os.path.isdir(path) else None) or {})
    if given.settings.get("save") == "features":
        kept = PROTOCOLS[given.settings.get("protocol", "fidelity")]
        same_images = (kept.half_pixel, kept.rounded) == (protocol.half_pixel, protocol.rounded)
        if not same_images or kept.spatial < protocol.spatial:
            raise InputError(
                f"the features in {path} were made for --protocol {kept.name} and cannot be scored by {protocol.name}; "
                "sample into another --out"
            )
        given.size = given.settings["image_size"]
        _need_enough(path, given.settings["num"])
        if inception is None:
            given.fitted = features.fitted_state(features.load_fitted(path / "features" / "extractor.pt"))
        return given
    given.images = _images(path, bool(given.settings))
    if not given.images:
        raise InputError(f"{path} holds no samples; it should hold images of any names, or what eval.sample makes")
    if len(given.images) < given.settings.get("num", 0):
        raise InputError(
            f"{path} holds {len(given.images)} of {given.settings['num']} samples; run eval.sample again, it continues"
        )
    _need_enough(path, len(given.images))
    given.size = check_sizes(path, given.images)
    return given


def _images(path: Path, ours: bool) -> list[ImageFile]:
    """The samples at a path, of eval.sample or of any names; InputError where others are beside them.

    Args:
        path: a folder or file.
        ours: whether it is eval.sample's, which may keep more than images/.
    """
    folder = path / "images" if os.path.isdir(path / "images") else path
    if folder != path and not ours:
        beside, others = listed(path)
        beside += [file for other in others if other != folder for file in images_below(other)]
        check_alone(path, images_below(folder), beside, "in its folder images")
    if not (made := sample_images(folder)):
        return _unlabelled(any_images(folder))
    named = [image.file for image in made]
    check_alone(folder, named, sorted(set(images_below(folder)) - set(named)), "that are named as eval.sample does")
    return made


def _unlabelled(images: list[ImageFile]) -> list[ImageFile]:
    """Images of any names: their folders need not be the reference's classes."""
    return [replace(image, label=None) if image.raw is None else image for image in images]


def _need_enough(path: Path, count: int) -> None:
    if count < FEWEST:
        raise InputError(f"{path} holds {count} samples; at least {FEWEST} are needed")


# --- scoring ----------------------------------------------------------------------------------------------------------


def score(
    path: Path,
    reference: Path,
    inception: str | None,
    protocol: Protocol = PROTOCOLS["fidelity"],
    dinov2: str | None = None,
) -> dict[str, Any] | None:
    """Score samples; every rank calls it, and shares the work.

    Args:
        path: images of any names, or a folder of images or features that eval.sample left.
        reference: real images, or a .npz of statistics (:mod:`eval.reference`, or ADM's or JiT's).
        inception: Inception weights or "download"; None to fit a classifier to the real images.
        dinov2: the same of DINOv2, whose features are compared too; None: they are not.

    Returns:
        What eval.score writes, on rank 0; a score that the reference does not allow is None. None elsewhere.

    Raises:
        InputError: samples missing or too few, or a reference that cannot be used.
    """
    truth = Reference(reference, inception, protocol)

    def look() -> tuple[_Given, np.ndarray | None]:
        count = len(truth.images)
        if 0 < count < FEWEST:
            raise InputError(f"the reference {reference} holds {count} images; at least {FEWEST} are needed")
        given = _look_at(path, inception, protocol)
        return given, labels_in(reference, given.settings.get("classes"), truth.images.classes, inception is None)

    given, places = ranks.from_rank_0(look)
    fitted = None if given.fitted is None else features.fitted_from_state(given.fitted)
    extractor = truth.extractor(dinov2, given.size, ranks.device(), fitted)
    made: Features | None
    if given.images:
        made = features.extract(extractor, given.images, given.size, "features of the samples")
    else:
        made = ranks.on_rank_0(lambda: _kept_features(path, given.settings, extractor))
    known = truth.survey(extractor, given.size)
    if made is None or known is None:
        return None
    say("computing the scores")
    result = compute(made, known, extractor, protocol, places)
    if not protocol.rounded and given.images:
        result["note"] = "these images are rounded to 8 bits, which the protocol is not; eval.run scores them as floats"
    return result | {"reference": str(reference), "sampling": given.settings}


def _kept_features(path: Path, settings: dict[str, Any], extractor: Extractor) -> Features:
    made = load_features(path, settings["num"])
    # Of a classifier that eval.sample fitted itself, the settings tell what it was fitted to.
    if extractor.fitted is None and extractor.identity != settings["features"]:
        raise InputError(f"the features in {path} were made with {settings['features']}, not {extractor.identity}")
    return made


def compute(
    made: Features,
    truth: Survey,
    extractor: Extractor,
    protocol: Protocol = PROTOCOLS["fidelity"],
    places: np.ndarray | None = None,
) -> dict[str, Any]:
    """The scores of the samples' features against what is known of the reference's.

    Args:
        made: of the samples.
        truth: of the reference.
        extractor: made both.
        protocol: what is computed.
        places: what the samples' labels are among the reference's (:func:`eval.reference.labels_in`).
    """
    device = extractor.device
    for whose, arrays in (("samples", made.arrays), ("reference", truth.rows)):
        if not all(value.isfinite().all() for value in arrays.values()):
            raise InputError(f"the features of the {whose} are not finite; are the weights of {extractor.title} whole?")
    samples = len(made.arrays["features"])
    result: dict[str, Any] = {"protocol": protocol.name, "features": extractor.title}
    result |= {"num_samples": samples, "num_reference": truth.count}
    if truth.unreadable is not None:
        result["unreadable"] = truth.unreadable
    for name in SPACES:
        if name in made.arrays and name in truth.moments:
            result |= _distance(made.arrays[name].to(device), made.labels, truth, name, protocol)
    result["inception_score"], result["inception_score_std"] = metrics.inception_score(
        made.arrays["logits"], protocol.shuffle
    )
    result |= dict.fromkeys(("kid", "kid_std", "precision", "recall", "density", "coverage"))
    real = truth.rows.get("features")
    if real is None:
        if protocol.neighbours:
            result["note"] = "the reference is statistics alone: no KID, precision or recall"
    else:
        if protocol.kernel:
            result["kid"], result["kid_std"] = metrics.kernel_distance(made.arrays["features"], real)
        if protocol.neighbours:
            chosen = torch.arange(samples) if protocol.all_samples else features.evenly(samples)
            some = made.arrays["features"][chosen].to(device)
            result |= metrics.neighbour_scores(some, real.to(device))
    if extractor.fitted is not None:
        result["held_out_accuracy"] = extractor.fitted.held_out_accuracy
        if made.labels is not None:
            agreed = made.arrays["logits"].argmax(1) == translated(made.labels, places)
            result["label_agreement"] = agreed.double().mean().item()
    bad = [key for key, value in result.items() if isinstance(value, float) and not math.isfinite(value)]
    if bad:
        raise InputError(f"{', '.join(bad)} of these samples is not finite; are they images?")
    width = made.arrays["features"].shape[1]
    if samples < 5 * width:
        result["warning"] = f"{samples} samples are few for {width} features: FID is biased; compare fid_infinity"
    return result


def _distance(
    made: torch.Tensor, labels: torch.Tensor | None, truth: Survey, name: str, protocol: Protocol
) -> dict[str, Any]:
    """A Frechet distance, its standard error over draws of samples, its 95% interval and its limit of many samples."""
    frechet = metrics.Frechet(truth.moments[name].to(made.device))
    halves = [metrics.Sums(made.shape[1], made.device) for _ in range(2)]
    # At random: in order, halves might differ in their classes.
    order = torch.randperm(len(made), generator=torch.Generator().manual_seed(SEED)).to(made.device)
    for half, chosen in zip(halves, order.tensor_split(2), strict=True):
        for part in chosen.split(64 * BATCH):
            half.add(made[part])
    samples = (halves[0] + halves[1]).moments()
    key = SPACES[name].score
    if not SPACES[name].rows:
        return {key: frechet.distance(samples)}
    rows = truth.rows.get(name)
    labels, real = (None if x is None else x.to(made.device) for x in (labels, rows))
    fid, error, reference_error = frechet.with_errors(samples, made, real, labels)
    all_rows = rows is not None and len(rows) == truth.count and not truth.of_file
    theirs = protocol.name == "fidelity" and name == "features"
    if theirs and rows is not None and all_rows and min(len(made), len(rows)) <= made.shape[1]:
        # Of fewer images than features torch-fidelity's number is rounding from the fifth digit on; it is theirs.
        fid = metrics.torch_fidelity_distance(made.cpu(), rows)
    wide = metrics.CONFIDENT * math.hypot(error, reference_error)
    found: dict[str, Any] = {key: fid, f"{key}_std_error": error, f"{key}_interval": [max(0.0, fid - wide), fid + wide]}
    return found | {f"{key}_infinity": metrics.fid_infinity(frechet, fid, halves)}


def difference(result: dict[str, Any], other: dict[str, Any], name: str) -> dict[str, Any]:
    """Whether FID differs from that of another result, and by how much.

    The two are taken as independent; of samples of the same noise, a smaller difference would be one.

    Raises:
        InputError: the two cannot be compared.
    """
    for key in ("protocol", "features", "reference"):
        if result[key] != other.get(key):
            raise InputError(f"--against {name}: its {key} is {other.get(key)!r}, here it is {result[key]!r}")
    if not isinstance(other.get("fid_std_error"), float):
        raise InputError(f"--against {name} tells no fid_std_error; score it again")
    apart = result["fid"] - other["fid"]
    error = math.hypot(result["fid_std_error"], other["fid_std_error"])
    differs = abs(apart) > metrics.CONFIDENT * error
    return {"scores": name, "fid_difference": apart, "fid_difference_std_error": error, "differs": differs}


NAMES = {
    "protocol": "protocol",
    "features": "features",
    "num_samples": "samples",
    "num_reference": "real images",
    "unreadable": "real images left out, which cannot be read",
    "fid": "FID",
    "fid_interval": "FID, 95% interval",
    "fid_infinity": "FID of infinitely many samples",
    "sfid": "sFID",
    "fd_dinov2": "FDD (DINOv2)",
    "fd_dinov2_interval": "FDD, 95% interval",
    "inception_score": "Inception Score",
    "kid": "KID",
    "precision": "precision",
    "recall": "recall",
    "density": "density",
    "coverage": "coverage",
    "label_agreement": "samples whose label the classifier agrees with",
    "held_out_accuracy": "unseen real images it labels right",
    "against": "against",
    "note": "note",
    "warning": "warning",
}


def rows(result: dict[str, Any]) -> list[tuple[str, str]]:
    """Names and values to show."""
    shown = []
    for key, name in NAMES.items():
        value = result.get(key)
        if isinstance(value, float):
            text = f"{value:.1%}" if key in ("label_agreement", "held_out_accuracy") else f"{value:.4g}"
            spread = result.get(f"{key}_std")
            value = text if spread is None else f"{text} ± {spread:.2g}"
        elif key.endswith("_interval") and value is not None:
            value = " to ".join(f"{end:.4g}" for end in value)
        elif key == "unreadable" and value is not None:
            value = value.get("count")
        elif key == "against" and value is not None:
            how = "differs" if value["differs"] else "does not differ"
            apart, error = value["fid_difference"], metrics.CONFIDENT * value["fid_difference_std_error"]
            value = f"FID {how} from that of {value['scores']}: {apart:+.4g} ± {error:.2g}"
        if value is not None:
            shown.append((name, str(value)))
    return shown


def present(result: dict[str, Any], out: Path | None) -> None:
    """Print the scores, and write them as JSON."""
    console = Console()
    if console.is_terminal:
        table = Table(show_header=False)
        for row in rows(result):
            table.add_row(*row)
        console.print(table)
    else:
        print("\n".join(f"{name}: {value}" for name, value in rows(result)))
    if out is not None:
        with explained(str(out)):
            write_json(out, result, indent=2, allow_nan=False)
        say(f"scores in {out}")


def conclude(result: dict[str, Any] | None, other: dict[str, Any] | None, name: str, out: Path | None) -> None:
    """Show and write a result that rank 0 has, beside other scores of this name; every rank calls it."""

    def finish() -> None:
        assert result is not None
        present(result if other is None else result | {"against": difference(result, other, name)}, out)

    ranks.from_rank_0(finish)


def read_scores(file: Path) -> dict[str, Any]:
    """What :func:`present` wrote.

    Raises:
        InputError: no such file, or it holds other things.
    """
    try:
        result = read_json(file)
        if not {"features", "num_samples", "fid"} <= result.keys() or not isinstance(result.get("sampling", {}), dict):
            raise ValueError("other keys")
        rows(result)
    except FileNotFoundError:
        raise InputError(f"no scores {file}; eval.score writes them") from None
    except (OSError, ValueError, AttributeError, TypeError):
        raise InputError(f"{file} does not hold scores; eval.score writes them") from None
    return result


def check_out(out: Path) -> None:
    """Raise InputError where the scores could not be written in the end, or would replace another file."""

    def ours(file: Path) -> bool:
        try:
            return bool(read_scores(file))
        except InputError:
            return False

    check_new_file(out, ours)


def add_scoring_arguments(parser: Parser, against: bool = True) -> None:
    """The flags that eval.score, eval.run and eval.sweep share; the last has no ``against``."""
    add = parser.add_argument
    add("--reference", type=Path, required=True, metavar="FILE.npz/SHARDS/DIR", help="real images, or statistics")
    about = "; ".join(f"{protocol.name}: {protocol.about}" for protocol in PROTOCOLS.values())
    add("--protocol", choices=PROTOCOLS, default="fidelity", help=f"{about} (fidelity)")
    add("--dinov2", metavar="FILE", help="compare DINOv2's features too: its ViT-L/14 weights, or the word download")
    if against:
        add("--against", type=Path, metavar="FILE.json", help="other scores: say whether FID differs from theirs")


def main() -> None:
    parser = Parser(__doc__ or "", EXAMPLES)
    add = parser.add_argument
    add("samples", type=Path, metavar="SAMPLES", help="a folder that eval.sample made, or any images")
    add("--inception", metavar="FILE.pth", help="Inception V3 weights, or the word download; else a fitted classifier")
    add("--out", type=Path, metavar="FILE.json", help="default SAMPLES/metrics.json")
    add("--local_rank", "--local-rank", type=int, help="given by the deepspeed launcher; not used")
    add_scoring_arguments(parser)
    args = parser.parse_args()
    out = args.out or (
        args.samples / "metrics.json" if os.path.isdir(args.samples) else args.samples.with_suffix(".json")
    )
    ranks.start(timedelta(hours=12))  # nobody gives up on the slowest

    def prepare() -> Any:
        if not os.path.exists(args.samples):
            raise InputError(f"no samples {args.samples}; eval.sample makes them")
        check_out(out)
        return None if args.against is None else read_scores(args.against)

    other = ranks.from_rank_0(prepare)
    result = score(args.samples, args.reference, args.inception, PROTOCOLS[args.protocol], args.dinov2)

    conclude(result, other, str(args.against), out)


if __name__ == "__main__":
    run(main)
