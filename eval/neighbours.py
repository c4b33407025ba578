"""Samples beside real images: some of their class, and those of it that are nearest to them in a network's features."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from eval.features import extract
from eval.images import ImageFile, check_sizes, read_image, reference_images, sample_images
from eval.protocols import PROTOCOLS
from eval.reference import make_extractor
from moe_dit.classes import are_numbers, lacking, unnamed
from moe_dit.runtime import ranks
from moe_dit.runtime.errors import InputError
from moe_dit.runtime.progress import say

SHOWN = 6  # samples, of as many classes where there are as many
BESIDE = 3  # real images of each kind beside one


@dataclass(frozen=True)
class Comparison:
    """A sample and real images of its class, uint8 [H, W, 3] each.

    Attributes:
        label: the class.
        name: of the class, or its label.
        sample: what was made.
        real: evenly spaced ones.
        nearest: by the distance of features, the nearest first.
    """

    label: int
    name: str
    sample: np.ndarray
    real: list[np.ndarray]
    nearest: list[np.ndarray]


def comparisons(
    samples: Path, real: Path, inception: str | None, classes: Sequence[str] | None = None
) -> list[Comparison]:
    """Compare the first samples of SHOWN classes.

    Args:
        samples: a folder of eval.sample.
        real: labelled images, those that were trained on.
        inception: weights of the network whose features are compared; None: a classifier is fitted to ``real``.
        classes: the names of the samples' classes, by which those of the real images are taken; None: their labels are.

    Raises:
        InputError: there are no samples, or no labelled real images of their classes.
    """
    made = sample_images(samples / "images") or sample_images(samples / "preview")
    if not made:
        raise InputError(f"{samples} holds no images to compare; eval.sample makes them")
    images = reference_images(real)
    places, names = _by_name(images.classes, classes)
    if places and images.classes and (missing := lacking(names, images.classes, str(samples), str(real))):
        say(f"{missing}; samples of those stand beside nothing")
    by_class: dict[int | None, list[ImageFile]] = {}
    for image in images:
        by_class.setdefault(places.get(image.label, image.label), []).append(image)
    chosen: dict[int | None, ImageFile] = {}
    for image in made:
        if image.label in by_class:
            chosen.setdefault(image.label, image)
    chosen = dict(list(chosen.items())[:SHOWN])
    if not chosen or None in by_class:
        raise InputError(
            f"{real} holds no labelled images of the samples' classes; give class folders, or their shards"
        )
    size = check_sizes(samples, list(chosen.values()))
    extractor = make_extractor(PROTOCOLS["fidelity"], inception, None, images, size, ranks.device())
    labelled = [(label, image) for label in chosen for image in by_class[label]]
    unread: dict[int, str] = {}
    ours = extract(extractor, list(chosen.values()), size, "features of some samples")
    theirs = extract(extractor, [image for _, image in labelled], size, "features of real images", unread)
    assert ours is not None and theirs is not None
    labelled = [one for i, one in enumerate(labelled) if i not in unread]
    labels = torch.tensor([label for label, _ in labelled])
    found = []
    for k, (label, image) in enumerate(chosen.items()):
        assert label is not None
        inside = (labels == label).nonzero().flatten()
        away = (theirs.arrays["features"][inside] - ours.arrays["features"][k]).norm(dim=1)
        near = inside[away.argsort()[:BESIDE]].tolist()
        spaced = inside[torch.linspace(0, len(inside) - 1, min(BESIDE, len(inside))).round().long()].tolist()
        pick = [[_pixels(labelled[i][1], size) for i in some] for some in (spaced, near)]
        name = names[label] if label < len(names) else str(label)
        found.append(Comparison(label, name, _pixels(image, size), *pick))
    return found


def _by_name(theirs: Sequence[str] | None, ours: Sequence[str] | None) -> tuple[dict[int | None, int], Sequence[str]]:
    """What each of their labels is among ours, -1 where it is none; and the names of ours.

    Where not both have names, labels are what they are (an empty dict).
    """
    if ours is None or theirs is None or unnamed(theirs, ours):
        return {}, next((names for names in (ours, theirs) if names is not None and not are_numbers(names)), [])
    places = {name: label for label, name in enumerate(ours)}
    return {label: places.get(name, -1) for label, name in enumerate(theirs)}, ours


def _pixels(image: ImageFile, size: int) -> np.ndarray:
    return read_image(image, size).permute(1, 2, 0).numpy()
