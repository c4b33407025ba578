"""A folder of samples on disk: settings.json, images or features, and the grid samples.png."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torchvision.utils import make_grid

from eval.features import read_image, sample_images
from moe_dit.runtime.errors import InputError
from moe_dit.runtime.files import new_file, remove_unfinished, write_json

GRID = 100  # images shown in samples.png


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
            remove_unfinished(out / name)
        write_json(file, settings, indent=2)
    except OSError as error:
        raise InputError(f"{out} cannot be written: {error.strerror}; give another --out") from None


def image_name(index: int, label: int) -> str:
    """An image's file name: index and label."""
    return f"{index:06d}_{label}.png"


def write_image(path: Path, image: np.ndarray) -> None:
    """Write uint8 [H, W, 3] as PNG, atomically."""
    with new_file(path) as file:
        Image.fromarray(image).save(file, format="PNG")


def saved_indices(folder: Path) -> set[int]:
    """Indices of the samples whose features are in SAMPLES/features."""
    indices: set[int] = set()
    for file in (folder / "features").glob("batch_*.npz"):
        with np.load(file) as batch:
            indices.update(batch["indices"].tolist())
    return indices


def write_grid(out: Path, save: str, labels: str) -> None:
    """Write samples.png from the first images; a column is a class where that is possible."""
    images = sample_images(out / ("images" if save == "images" else "preview"))[:GRID]
    if not images:
        return
    classes = len({image.label for image in images})
    columns = classes if labels == "balanced" and classes <= 10 else 10
    grid = make_grid([read_image(image) for image in images], nrow=columns, padding=2, pad_value=255)
    write_image(out / "samples.png", grid.permute(1, 2, 0).numpy())
