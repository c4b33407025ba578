"""The numbers that compare two sets of features; nothing here knows of images, networks or files.

Statistics are float64. Where torch-fidelity has a formula, it is called.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

BLOCK = 1024  # rows of features whose distances to others are there at once
ADM_SPLIT = 5000  # images of a part of which ADM's evaluator takes one Inception Score
_NOTHING = 1e-12  # of the largest eigenvalue: what rounding leaves of none
CONFIDENT = 1.959964  # standard errors at either side of a 95% interval


# --- mean and covariance ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Moments:
    """Mean [D] and covariance [D, D] (float64) of n features; n None: of a file that does not tell."""

    mu: torch.Tensor
    sigma: torch.Tensor
    n: int | None = None

    def to(self, device: torch.device) -> "Moments":
        return Moments(self.mu.to(device), self.sigma.to(device), self.n)


class Sums:
    """Sums of features and of their products, from which moments follow; they can be added up over parts and ranks."""

    def __init__(self, width: int, device: torch.device | str = "cpu"):
        self.n = 0
        self.first = torch.zeros(width, dtype=torch.float64, device=device)
        self.second = torch.zeros(width, width, dtype=torch.float64, device=device)

    def add(self, features_ND: torch.Tensor) -> None:
        """Count in features [N, D]."""
        x = features_ND.to(self.first)
        self.n += len(x)
        self.first += x.sum(dim=0)
        self.second.addmm_(x.T, x)

    def __add__(self, other: "Sums") -> "Sums":
        total = Sums(0, self.first.device)
        total.n = self.n + other.n
        total.first, total.second = self.first + other.first, self.second + other.second
        return total

    def moments(self) -> Moments:
        """Of at least two features; the covariance is the unbiased one."""
        mu = self.first / self.n
        return Moments(mu, (self.second - self.n * torch.outer(mu, mu)) / (self.n - 1), self.n)


def moments(features_ND: torch.Tensor) -> Moments:
    """Mean and covariance of features [N, D]."""
    sums = Sums(features_ND.shape[1], features_ND.device)
    for part in features_ND.split(8 * BLOCK):
        sums.add(part)
    return sums.moments()


# --- Frechet distance -------------------------------------------------------------------------------------------------


class Frechet:
    """FID to a reference: |mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) (arXiv:1706.08500).

    With S2 = B B^T, the root's trace is that of (B^T S1 B)^(1/2), whose eigenvalues are real. The distance's derivative
    by the samples says how it would move with other samples: what a bootstrap finds in the limit of many resamplings
    (the infinitesimal jackknife; Efron, The Jackknife, the Bootstrap and Other Resampling Plans, 1982, chapter 6).
    """

    def __init__(self, reference: Moments):
        self.reference = reference
        self._factor, failed = torch.linalg.cholesky_ex(reference.sigma)
        if failed:  # fewer images than features
            values, vectors = torch.linalg.eigh(reference.sigma)
            known = values > values[-1] * _NOTHING
            self._factor = vectors[:, known] * values[known].sqrt()

    def distance(self, samples: Moments) -> float:
        """The distance of samples with these moments."""
        return self._value(samples, torch.linalg.eigvalsh(self._between(samples)))

    def _between(self, samples: Moments) -> torch.Tensor:
        between = self._factor.T @ samples.sigma @ self._factor
        return (between + between.T) / 2

    def _value(self, samples: Moments, values: torch.Tensor) -> float:
        mean = (samples.mu - self.reference.mu).square().sum()
        trace = values.clamp_min(0).sqrt().sum()
        return (mean + samples.sigma.trace() + self.reference.sigma.trace() - 2 * trace).item()

    def with_errors(
        self,
        samples: Moments,
        features_ND: torch.Tensor,
        reference_MD: torch.Tensor | None = None,
        labels_N: torch.Tensor | None = None,
    ) -> tuple[float, float, float]:
        """The distance, and how far it would move with other samples and with other reference images.

        Args:
            samples: the moments of ``features_ND``.
            features_ND: the samples' features.
            reference_MD: features of reference images, or of some of them; None: the reference is what it is.
            labels_N: of the samples, int64; where every class has equally many, other samples would too, and what
                classes differ by moves nothing.

        Returns:
            the distance, and two standard errors.
        """
        values, vectors = torch.linalg.eigh(self._between(samples))
        known = values > values[-1] * _NOTHING
        values, vectors = values[known], vectors[:, known]
        # The derivative follows from the optimal transport from samples to reference, B (B^T S1 B)^(-1/2) B^T.
        half = self._factor @ (vectors * values.pow(-0.25))
        ours = _influence(features_ND, samples.mu, self.reference.mu, half)
        if labels_N is not None and _balanced(labels_N):
            counts = labels_N.bincount().clamp_min(1)
            means = (
                torch.zeros(len(counts), dtype=ours.dtype, device=ours.device).index_add_(0, labels_N, ours) / counts
            )
            ours = (ours - means[labels_N]) * (counts / (counts - 1)).sqrt()[labels_N]
            errors = [(ours.square().mean() / len(ours)).sqrt().item(), 0.0]
        else:
            errors = [ours.std().item() / len(ours) ** 0.5, 0.0]
        if reference_MD is not None and self.reference.n is not None:
            back = torch.linalg.lstsq(self._factor.T, vectors * values.pow(0.25)).solution
            theirs = _influence(reference_MD, self.reference.mu, samples.mu, back)
            errors[1] = theirs.std().item() / self.reference.n**0.5
        return self._value(samples, values), errors[0], errors[1]


def _balanced(labels_N: torch.Tensor) -> bool:
    """Whether classes have equally many, at least two each."""
    counts = labels_N.bincount()
    counts = counts[counts > 0]
    return bool(counts.max() - counts.min() <= 1 and counts.min() >= 2)


def _influence(features_ND: torch.Tensor, mu: torch.Tensor, other: torch.Tensor, half: torch.Tensor) -> torch.Tensor:
    """What each feature adds to the distance's change, [N], but for a constant; the transport is ``half half^T``."""
    slope = 2 * (mu - other)
    bend = torch.eye(len(mu), dtype=mu.dtype, device=mu.device) - half @ half.T
    parts = []
    for part in features_ND.split(8 * BLOCK):
        x = part.to(mu) - mu
        parts.append(x @ slope + (x @ bend * x).sum(dim=1))
    return torch.cat(parts)


def fid_infinity(frechet: Frechet, fid: float, halves: list[Sums]) -> float:
    """FID of infinitely many samples: on a line in 1/N through that of all and the mean of those of two halves.

    FID's bias falls as 1/N (Chong and Forsyth, arXiv:1911.07023, who draw the line through subsets of 15 sizes).

    Args:
        frechet: to the reference.
        fid: of all samples.
        halves: of the samples.
    """
    of_half = sum(frechet.distance(half.moments()) for half in halves) / 2
    inverse, inverse_of_half = 1 / sum(half.n for half in halves), sum(1 / half.n for half in halves) / 2
    return fid - (of_half - fid) / (inverse_of_half - inverse) * inverse


def torch_fidelity_distance(samples_ND: torch.Tensor, reference_MD: torch.Tensor) -> float:
    """FID by torch-fidelity's own formula, whose eigenvalues are those of a matrix that is not symmetric."""
    statistics = fid_features_to_statistics(samples_ND), fid_features_to_statistics(reference_MD)
    return fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID]


# --- the others -------------------------------------------------------------------------------------------------------


def inception_score(logits_NK: torch.Tensor, shuffle: bool = True) -> tuple[float, float]:
    """Inception Score, mean and standard deviation over parts (arXiv:1606.03498).

    Args:
        logits_NK: of the samples.
        shuffle: as torch-fidelity, ten parts of the samples in random order; else as ADM's evaluator, parts of 5,000 in
            the samples' own order.
    """
    if shuffle:
        result = isc_features_to_metric(logits_NK)
        return result[KEY_METRIC_ISC_MEAN], result[KEY_METRIC_ISC_STD]
    parts = [isc_features_to_metric(part, splits=1, shuffle=False) for part in logits_NK.split(ADM_SPLIT)]
    scores = [part[KEY_METRIC_ISC_MEAN] for part in parts]
    return float(np.mean(scores)), float(np.std(scores))


def kernel_distance(samples_ND: torch.Tensor, reference_MD: torch.Tensor) -> tuple[float, float]:
    """KID, mean and standard deviation over 100 subsets of up to 1,000 (arXiv:1801.01401)."""
    size = min(1000, len(samples_ND), len(reference_MD))
    result = kid_features_to_metric(samples_ND, reference_MD, kid_subset_size=size, verbose=False)
    return result[KEY_METRIC_KID_MEAN], result[KEY_METRIC_KID_STD]


def neighbour_scores(
    samples_ND: torch.Tensor, reference_MD: torch.Tensor, k: int = 3, k_density: int = 5
) -> dict[str, float]:
    """Precision and recall (arXiv:1904.06991), density and coverage (arXiv:2002.09797).

    Distances are there for BLOCK rows at a time.

    Args:
        samples_ND, reference_MD: features, on the device that computes.
        k: neighbours whose distance is a ball's radius for precision and recall.
        k_density: the same for density and coverage.
    """
    ours, _ = _radii(samples_ND, k, k_density)
    theirs, wide = _radii(reference_MD, k, k_density)
    inside = torch.zeros(len(reference_MD), dtype=torch.bool, device=reference_MD.device)
    nearest = torch.full((len(reference_MD),), torch.inf, device=reference_MD.device)
    precise, dense = torch.zeros(2, dtype=torch.int64, device=samples_ND.device)
    for start in range(0, len(samples_ND), BLOCK):
        distances = torch.cdist(samples_ND[start : start + BLOCK], reference_MD)
        precise += (distances <= theirs).any(dim=1).sum()
        dense += (distances <= wide).sum()
        inside |= (distances <= ours[start : start + BLOCK, None]).any(dim=0)
        nearest = torch.minimum(nearest, distances.amin(dim=0))
    n = len(samples_ND)
    return {
        "precision": int(precise) / n,
        "recall": inside.double().mean().item(),
        "density": int(dense) / (k_density * n),
        "coverage": (nearest <= wide).double().mean().item(),
    }


def _radii(features_ND: torch.Tensor, *counts: int) -> list[torch.Tensor]:
    """The distance to the n-th neighbour of each feature, [N], for each count n; with fewer, to the last."""
    found: list[Any] = []
    for start in range(0, len(features_ND), BLOCK):
        distances = torch.cdist(features_ND[start : start + BLOCK], features_ND)
        most = min(max(counts) + 1, len(features_ND))
        found.append(distances.topk(most, largest=False).values)  # the first is the feature itself
    sorted_NK = torch.cat(found)
    return [sorted_NK[:, min(count, sorted_NK.shape[1] - 1)] for count in counts]
