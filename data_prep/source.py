"""What every source of images is: a list in one fixed order, of which any process reads any image."""

import hashlib
import os
from collections import Counter
from collections.abc import Sequence

import numpy as np

from data_prep.classes import label
from moe_dit import randomness


class BrokenImage(Exception):
    """An image that a source has and cannot give; others can still be read."""


class Source:
    """Images with their classes.

    Attributes:
        labels: the class of each image.
        classes: the classes' names.
        told: what was taken for a class, and how classes are ordered, in words.
        left_out: files that are none of its images, by what they are.
    """

    labels: list[int]
    classes: list[str]
    told: str
    left_out: Counter[str]

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, i: int) -> str:
        """What image ``i`` is called, for people."""
        raise NotImplementedError

    def read(self, i: int) -> str | bytes:
        """Image ``i``: its path, or the bytes of its file.

        Raises:
            BrokenImage: it cannot be given, and others can.
            InputError: the source cannot be read.
        """
        raise NotImplementedError

    def fingerprint(self) -> str:
        """Tells this listing from another."""
        listing = "\n".join(self.name(i) for i in range(len(self)))
        return hashlib.sha256(os.fsencode(listing)).hexdigest()

    def order(self) -> np.ndarray:
        """The order in which images go into shards, int64 [N]."""
        return randomness.permutation(0, 0, len(self))

    def _number(
        self, kinds: Sequence, what: str, where: str, names: Sequence[str] | None, paths: Sequence
    ) -> list[int]:
        """Label images, and tell in which order of classes and paths they are listed."""
        found = label(kinds, where, names)
        order = sorted(range(len(kinds)), key=lambda i: (found.labels[i], paths[i]))
        self.labels, self.classes = [found.labels[i] for i in order], found.classes
        self.told = f"a class is {what}; {found.order}"
        return order
