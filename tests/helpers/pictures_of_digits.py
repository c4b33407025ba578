"""Some of the digits, as a folder of images."""

from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits


def some_digits(folder: Path, each: int) -> Path:
    """The first ones of each digit, as data_prep.digits writes them but for their sizes' interpolation."""
    found = load_digits()
    for label in range(10):
        (folder / str(label)).mkdir(parents=True)
        for index in np.flatnonzero(found.target == label)[:each]:
            small = Image.fromarray(np.rint(found.images[index] * (255 / 16)).astype(np.uint8))
            small.resize((32, 32)).convert("RGB").save(folder / str(label) / f"{index:04d}.png")
    return folder
