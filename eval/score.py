"""Score samples against real images: FID, Inception Score, KID, precision and recall.

The formulas are torch-fidelity's. Features are put in index order and the statistics computed in float64, so the
numbers do not depend on the batch size or the number of ranks.
"""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from eval import features
from eval.arrays import read_arrays
from eval.sample_folder import check_sizes, load_features, read_settings
from moe_dit.runtime import ranks
from moe_dit.runtime.command import Parser, run
from moe_dit.runtime.errors import InputError
from moe_dit.runtime.files import check_new_file, explained, write_json
from moe_dit.runtime.progress import say

EXAMPLES = """\
  python -m eval.score SAMPLES --reference imagenet/val --inception weights-inception-2015-12-05-6726825d.pth
  python -m eval.score SAMPLES --reference VIRTUAL_imagenet256_labeled.npz --inception download
  python -m eval.score SAMPLES --reference data/digits_images --out scores.json
"""
FEWEST = 10  # images; below, precision, recall and the Inception Score's ten splits have no meaning
PR_REFERENCE = 10_000  # real images for precision and recall, as in ADM's evaluation (arXiv:2105.05233)
PUBLISHED_DIM = 2048


# --- the scores -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Statistics:
    """Mean [D] and covariance [D, D], float64."""

    mu: np.ndarray
    sigma: np.ndarray


def statistics(features: torch.Tensor) -> Statistics:
    """Mean and covariance of features [N, D], in float64."""
    return Statistics(**fid_features_to_statistics(features.double()))


def frechet_distance(samples: Statistics, reference: Statistics) -> float:
    """FID: |mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)) (arXiv:1706.08500)."""
    return fid_statistics_to_metric(vars(samples), vars(reference), verbose=False)[KEY_METRIC_FID]


def inception_score(logits: torch.Tensor) -> tuple[float, float]:
    """Inception Score, mean and standard deviation over ten splits, of logits [N, K] (arXiv:1606.03498)."""
    result = isc_features_to_metric(logits)
    return result[KEY_METRIC_ISC_MEAN], result[KEY_METRIC_ISC_STD]


def kernel_distance(samples: torch.Tensor, reference: torch.Tensor) -> tuple[float, float]:
    """KID, mean and standard deviation over 100 subsets, of features [N, D] and [M, D] (arXiv:1801.01401)."""
    size = min(1000, len(samples), len(reference))
    result = kid_features_to_metric(samples.double(), reference.double(), kid_subset_size=size, verbose=False)
    return result[KEY_METRIC_KID_MEAN], result[KEY_METRIC_KID_STD]


def precision_recall(samples: torch.Tensor, reference: torch.Tensor) -> tuple[float, float]:
    """Improved precision and recall, 3 neighbours, of features [N, D] and [M, D] (arXiv:1904.06991)."""
    device = ranks.device()
    result = prc_features_to_metric(samples.to(device), reference.to(device), verbose=False, save_cpu_ram=True)
    return result["precision"], result["recall"]


# --- inputs -----------------------------------------------------------------------------------------------------------


def load_statistics(file: Path) -> Statistics:
    """Read published statistics: a .npz with mu [2048] and sigma [2048, 2048] of Inception features.

    Raises:
        InputError: another kind of file.
    """
    try:
        arrays = read_arrays(file, ("mu", "sigma"))
    except FileNotFoundError:
        raise InputError(f"no reference {file}; it should be a .npz file, a folder of shards or of images") from None
    except ValueError as error:
        raise InputError(
            f"{file} does not hold mu and sigma, as ADM's and JiT's statistics files do, or is damaged: {error}"
        ) from None
    for name, array in arrays.items():
        if array.dtype.kind not in "fiu":
            raise InputError(f"{file}: {name} holds {array.dtype}; it should hold real numbers")
    mu = arrays["mu"].astype(np.float64)
    sigma = arrays["sigma"].astype(np.float64)
    if mu.shape != (PUBLISHED_DIM,) or sigma.shape != (PUBLISHED_DIM, PUBLISHED_DIM):
        raise InputError(
            f"{file}: mu has shape {list(mu.shape)} and sigma {list(sigma.shape)}; "
            f"Inception's are [{PUBLISHED_DIM}] and [{PUBLISHED_DIM}, {PUBLISHED_DIM}]"
        )
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise InputError(f"{file}: mu or sigma holds numbers that are not finite; compute the statistics again")
    # 1e-3 of the largest is far above any rounding.
    if np.abs(sigma - sigma.T).max() > 1e-3 * np.abs(sigma).max() or sigma.diagonal().min() < 0:
        raise InputError(f"{file}: sigma is not symmetric or has negative variances, so it is no covariance")
    return Statistics(mu, sigma)


def check_reference(reference: Path, inception: str | None) -> None:
    """Raise InputError where the reference is statistics of Inception features and Inception is not given."""
    if reference.suffix == ".npz" and inception is None:
        raise InputError(f"{reference} holds statistics of Inception features; give --inception FILE.pth or download")


# --- scoring ----------------------------------------------------------------------------------------------------------


def score(folder: Path, reference: Path, inception: str | None) -> dict[str, Any]:
    """Score a samples folder.

    Args:
        folder: images, or features, that eval.sample left.
        reference: real images (folder or pixel shards), or a .npz of Inception statistics.
        inception: Inception weights or "download"; None to fit a classifier to the real images.

    Returns:
        What eval.score writes; a score that the reference does not allow is None.

    Raises:
        InputError: samples missing or too few, or a reference that cannot be used.
    """
    device = ranks.device()
    settings = read_settings(folder) or {}
    check_reference(reference, inception)
    published = load_statistics(reference) if reference.suffix == ".npz" else None
    real = [] if published is not None else features.reference_images(reference)
    if published is None and len(real) < FEWEST:
        raise InputError(f"the reference {reference} holds {len(real)} images; at least {FEWEST} are needed")

    if settings.get("save") == "features":
        made = load_features(folder, settings["num"])
        if inception is not None:
            extractor = features.inception(inception, device)
        else:
            extractor = features.load_fitted(folder / "features" / "extractor.pt", device)
        if inception is not None and extractor.identity != settings["features"]:
            raise InputError(f"the features in {folder} were made with {settings['features']}, not with {inception}")
        size = settings["image_size"]
    else:
        images = features.sample_images(folder / "images") or features.sample_images(folder)
        if not images:
            raise InputError(f"{folder} holds no samples (images/000123_7.png: index, label); eval.sample makes them")
        if len(images) < settings.get("num", 0):
            raise InputError(
                f"{folder} holds {len(images)} of {settings['num']} samples; run eval.sample again, it continues"
            )
        _need_enough(folder, len(images))
        size = check_sizes(folder, images)
        extractor = features.inception(inception, device) if inception else features.fit(real, size, device)
        made = features.extract(extractor, images, size, "features of the samples")
    _need_enough(folder, len(made.features))
    truth = features.extract(extractor, real, size, "features of the reference") if real else None
    say("computing the scores")
    return compute(made, published or truth, extractor) | {"reference": str(reference), "sampling": settings}


def _need_enough(folder: Path, count: int) -> None:
    if count < FEWEST:
        raise InputError(f"{folder} holds {count} samples; at least {FEWEST} are needed")


def compute(made, truth, extractor) -> dict[str, Any]:
    """The scores of the samples' Features against the reference's Features or Statistics."""
    known = isinstance(truth, Statistics)
    for whose, found in (("samples", made), ("reference", truth)):
        values = () if isinstance(found, Statistics) else (found.features, found.logits)
        if not all(value.isfinite().all() for value in values):
            raise InputError(f"the features of the {whose} are not finite; are the weights of {extractor.name} whole?")
    result: dict[str, Any] = {"features": extractor.name}
    result |= {"num_samples": len(made.features), "num_reference": None if known else len(truth.features)}
    result["fid"] = frechet_distance(statistics(made.features), truth if known else statistics(truth.features))
    result["inception_score"], result["inception_score_std"] = inception_score(made.logits)
    result |= dict.fromkeys(("kid", "kid_std", "precision", "recall"))
    if known:
        result["note"] = "the reference is statistics alone: no KID, precision or recall"
    else:
        real = truth.features
        result["kid"], result["kid_std"] = kernel_distance(made.features, real)
        # Evenly spaced, so that every class has its share.
        chosen = torch.linspace(0, len(real) - 1, min(PR_REFERENCE, len(real))).round().long()
        result["precision"], result["recall"] = precision_recall(made.features, real[chosen])
    if extractor.held_out_accuracy is not None:
        result["held_out_accuracy"] = extractor.held_out_accuracy
        if made.labels is not None:
            result["label_agreement"] = (made.logits.argmax(1) == made.labels).double().mean().item()
    bad = [key for key, value in result.items() if isinstance(value, float) and not math.isfinite(value)]
    if bad:
        raise InputError(f"{', '.join(bad)} of these samples is not finite; are they images?")
    return result


NAMES = {
    "features": "features",
    "num_samples": "samples",
    "num_reference": "real images",
    "fid": "FID",
    "inception_score": "Inception Score",
    "kid": "KID",
    "precision": "precision",
    "recall": "recall",
    "label_agreement": "samples whose label the classifier agrees with",
    "held_out_accuracy": "unseen real images it labels right",
    "note": "note",
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


def read_scores(file: Path) -> dict[str, Any]:
    """What :func:`present` wrote.

    Raises:
        InputError: no such file, or it holds other things.
    """
    try:
        result = json.loads(file.read_text())
        if not {"features", "num_samples", "fid"} <= result.keys() or not isinstance(result.get("sampling", {}), dict):
            raise ValueError("other keys")
        rows(result)
    except FileNotFoundError:
        raise InputError(f"no scores {file}; eval.score writes them") from None
    except (OSError, ValueError, AttributeError, TypeError, RecursionError):
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


def main() -> None:
    parser = Parser(__doc__, EXAMPLES)
    add = parser.add_argument
    add("samples", type=Path, metavar="SAMPLES", help="a folder that eval.sample made")
    add("--reference", type=Path, required=True, metavar="FILE.npz/SHARDS/DIR", help="real images, or statistics")
    add("--inception", metavar="FILE.pth", help="Inception V3 weights, or the word download; else a fitted classifier")
    add("--out", type=Path, metavar="FILE.json", help="default SAMPLES/metrics.json")
    args = parser.parse_args()
    out = args.out or args.samples / "metrics.json"
    if not os.path.isdir(args.samples):
        raise InputError(f"no samples {args.samples}; eval.sample makes them")
    check_out(out)
    present(score(args.samples, args.reference, args.inception), out)


if __name__ == "__main__":
    run(main)
