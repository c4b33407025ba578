"""Made-up images of classes that differ in colour and contrast."""

from pathlib import Path

import numpy as np
from PIL import Image

from eval.images import any_images, read_image

SIDE = 32
KINDS = {"a": ((200, 60, 30), 40), "b b": ((40, 90, 220), 60), "c": ((90, 200, 90), 20)}  # colour and contrast by class


def picture(kind: str, generator: np.random.Generator) -> Image.Image:
    """A smooth random image of a class's colours."""
    colour, contrast = KINDS[kind]
    small = generator.normal(colour, contrast, (4, 4, 3)).clip(0, 255).astype(np.uint8)
    return Image.fromarray(small).resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def write_pictures(folder: Path, counts: dict[str, int], generator: np.random.Generator) -> None:
    """So many images of each class, in class folders."""
    for kind, count in counts.items():
        (folder / kind).mkdir(parents=True)
        for i in range(count):
            picture(kind, generator).save(folder / kind / f"{i}.png")


def arrays(path: Path) -> np.ndarray:
    """All images as uint8 [N, H, W, 3], in the order of their names."""
    return np.stack([read_image(image).permute(1, 2, 0).numpy() for image in any_images(path)])
