"""A folder of samples on disk: settings.json, images or features, and the grid samples.png."""

import hashlib
import os
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision.utils import make_grid

from eval.arrays import read_arrays
from eval.features import Features
from eval.images import BATCH, WORKERS, any_images, ends_as_png, read_image, sample_images
from moe_dit.classes import are_names, differing
from moe_dit.runtime.errors import InputError
from moe_dit.runtime.files import explained, new_file, remove_unfinished, write_json
from moe_dit.runtime.progress import say, task
from moe_dit.runtime.reading import open_file, read_json

GRID = 100  # images shown in samples.png
SETTINGS = "settings.json"
WRITTEN = ("images", "features", "preview", "samples.png")  # what a folder gets beside its settings
NUMBERS = ("labels", "indices")  # of a batch's file, beside its features
ARRAYS = {"features", "logits"} | set(NUMBERS)  # that are in every one


# --- the settings -----------------------------------------------------------------------------------------------------


def model_fingerprint(model: Path) -> str:
    """SHA-256 over a model folder's configuration and weights."""
    digest = hashlib.sha256()
    for file in (model / "config.json", *sorted(model.glob("*.safetensors"))):
        with open_file(file) as opened:
            digest.update(f"{file.name} {hashlib.file_digest(opened, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def read_settings(folder: Path) -> dict[str, Any] | None:
    """The settings that a samples folder was made with; None where it has none (images that another program made).

    Raises:
        InputError: they are damaged, or another program's.
    """
    file = folder / SETTINGS
    try:
        settings = read_json(file)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise InputError(f"{file} is damaged ({error}); sample into another --out") from None
    kinds = {"num": int, "save": str, "image_size": int, "model_sha256": str}
    found = settings if isinstance(settings, dict) else {}
    wrong = [key for key, kind in kinds.items() if type(found.get(key)) is not kind]
    wrong += ["classes"] if not are_names(found.get("classes", [""])) else []
    if wrong or found["num"] < 1 or found["image_size"] < 1 or found["save"] not in ("images", "features"):
        what = f": {wrong[0]} is missing or of the wrong kind" if wrong else ""
        raise InputError(f"{file} is not what eval.sample writes{what}; move it away, or sample into another --out")
    return settings


def open_folder(out: Path, settings: dict[str, Any]) -> None:
    """Make the samples folder with its settings.json, or check that it continues the one that is there.

    Raises:
        InputError: there is something else, or samples made with other settings; names those that differ.
    """
    before = read_settings(out) if os.path.isdir(out) else None
    if before is None:
        _check_free(out)
    else:
        # Paths may change, as fingerprints tell the model and the VAE; and more samples continue the same ones. Classes
        # have no names in folders and models of earlier versions.
        kept = {key: before[key] for key in ("classes",) if key in before}
        free = {"model", "vae", "num"} if kept else {"model", "vae", "num", "classes"}
        changes = [key for key in settings if key not in free and before.get(key) != settings[key]]
        if changes:
            pairs: dict[str, Any] = {key: (settings[key], before.get(key)) for key in changes}
            pairs |= {key: differing(*pairs[key]) for key in kept if key in pairs}
            told = ", ".join(f"{key} was {old} and is now {new}" for key, (new, old) in pairs.items())
            raise InputError(f"{out} holds samples made otherwise: {told}; give the same settings or another --out")
        settings = settings | {"num": max(settings["num"], before["num"])} | kept
    with explained(f"samples to {out}"):
        out.mkdir(parents=True, exist_ok=True)
        # The settings first: by them what follows is known to be ours.
        write_json(out / SETTINGS, settings, indent=2)
        for name in (SETTINGS, "samples.png"):
            remove_unfinished(out, f"{name}.*")
        for name in ("images",) if settings["save"] == "images" else ("features", "preview"):
            (out / name).mkdir(exist_ok=True)
            remove_unfinished(out / name)


def _check_free(out: Path) -> None:
    """Raise InputError where samples would get in the way of what is there without settings of ours."""
    if os.path.lexists(out) and not os.path.isdir(out):
        raise InputError(f"{out} is taken: it is not a folder; give another --out")
    there = [name for name in WRITTEN if os.path.lexists(out / name)]
    if there:
        raise InputError(f"{out} is taken: it holds {there[0]} that eval.sample did not make; give another --out")


# --- images -----------------------------------------------------------------------------------------------------------


def image_name(index: int, label: int) -> str:
    """An image's file name: index and label."""
    return f"{index:06d}_{label}.png"


def write_image(path: Path, image: np.ndarray) -> None:
    """Write uint8 [H, W, 3] as PNG, atomically."""
    with new_file(path) as file:
        Image.fromarray(image).save(file, format="PNG")


def saved_images(folder: Path, labels: Sequence[int]) -> set[int]:
    """Which samples SAMPLES/images holds whole, of those with these labels; says which file is cut short."""
    there = set(os.listdir(folder / "images"))
    names = {i: image_name(i, label) for i, label in enumerate(labels)}
    saved = [i for i, name in names.items() if name in there]
    with ThreadPoolExecutor(WORKERS) as pool:
        whole = pool.map(lambda i: _has_its_end(folder / "images" / names[i]), saved)
        cut = {i for i, good in zip(saved, whole, strict=True) if not good}
    if cut:
        say(f"{folder}/images/{names[min(cut)]} is cut short{_and_more(len(cut))}; sampling again what it held")
    return set(saved) - cut


def _has_its_end(file: Path) -> bool:
    try:
        with open_file(file) as opened:
            return ends_as_png(opened)
    except OSError:
        return False


def _and_more(count: int) -> str:
    return f", and {count - 1} more" if count > 1 else ""


def write_grid(out: Path, save: str, labels: str) -> None:
    """Write samples.png from the first images; a column is a class where that is possible."""
    images = sample_images(out / ("images" if save == "images" else "preview"))[:GRID]
    if not images:
        return
    classes = len({image.label for image in images})
    columns = classes if labels == "balanced" and classes <= 10 else 10
    grid = make_grid([read_image(image) for image in images], nrow=columns, padding=2, pad_value=255)
    write_image(out / "samples.png", grid.permute(1, 2, 0).numpy())


def export_npz(folder: Path, num: int, file: Path) -> None:
    """Write images 0 to num - 1 as uint8 arr_0 [N, H, W, 3] and their labels as arr_1: what ADM's evaluator reads."""
    images = sample_images(folder / "images")[:num]
    height, width = read_image(images[0]).shape[1:]
    header = {"descr": "|u1", "fortran_order": False, "shape": (len(images), height, width, 3)}
    with (
        task("writing the images as an array", len(images), unit="images") as progress,
        explained(str(file)),
        new_file(file) as opened,
        zipfile.ZipFile(opened, "w", zipfile.ZIP_STORED, allowZip64=True) as members,
    ):
        with members.open("arr_0.npy", "w", force_zip64=True) as array:
            np.lib.format.write_array_header_1_0(array, header)
            with ThreadPoolExecutor(WORKERS) as pool:
                for start in range(0, len(images), BATCH):
                    for image in pool.map(read_image, images[start : start + BATCH]):
                        array.write(image.permute(1, 2, 0).numpy().tobytes())
                        progress.advance()
        with members.open("arr_1.npy", "w") as array:
            np.lib.format.write_array(array, np.array([image.label for image in images], np.int64))


def is_images(file: Path) -> bool:
    """Whether a file is one of :func:`export_npz`, or of ADM's sampler."""
    try:
        return bool(any_images(file)) if file.suffix == ".npz" else False
    except InputError:
        return False


# --- features ---------------------------------------------------------------------------------------------------------


def write_features(folder: Path, arrays: dict[str, torch.Tensor], indices: list[int], labels: list[int]) -> None:
    """Write the arrays of a batch's samples (float32 [n, width] by name), atomically."""
    kept: dict[str, Any] = {name: array.numpy() for name, array in arrays.items()}
    kept |= {"indices": np.array(indices), "labels": np.array(labels)}
    with new_file(folder / "features" / f"batch_{indices[0]:06d}.npz") as file:
        np.savez(file, **kept)


def read_features(file: Path) -> dict[str, np.ndarray]:
    """What :func:`write_features` wrote; ValueError where it is not whole or of another kind."""
    arrays = read_arrays(file)
    if not arrays.keys() >= ARRAYS:
        raise ValueError(f"it lacks {', '.join(sorted(ARRAYS - arrays.keys()))}")
    for name, array in arrays.items():
        kind, dimensions = ("i", 1) if name in NUMBERS else ("f", 2)
        if array.dtype.kind != kind or array.ndim != dimensions or len(array) != len(arrays["indices"]):
            raise ValueError(f"{name} is {array.dtype} {list(array.shape)}")
    return arrays


def saved_features(folder: Path) -> set[int]:
    """Which samples SAMPLES/features holds; says which file is damaged."""
    saved: set[int] = set()
    damaged = []
    for file in sorted((folder / "features").glob("batch_*.npz")):
        try:
            saved.update(read_features(file)["indices"].tolist())
        except ValueError:
            damaged.append(file)
    if damaged:
        say(f"{damaged[0]} is damaged{_and_more(len(damaged))}; sampling again what it held")
    return saved


def load_features(folder: Path, num: int) -> Features:
    """The features of samples 0 to num - 1 that eval.sample --save features left in a samples folder, in index order.

    Raises:
        InputError: some are missing or damaged.
    """
    again = "run eval.sample again, it continues"
    batches = []
    for file in sorted((folder / "features").glob("batch_*.npz")):
        try:
            batches.append(read_features(file))
        except ValueError as error:
            raise InputError(f"{file} is damaged ({error}); {again} and makes it anew") from None
    if not batches:
        raise InputError(f"{folder}/features holds no features; eval.sample --save features makes them")
    kinds = {tuple(sorted((name, array.shape[1:]) for name, array in batch.items())) for batch in batches}
    if len(kinds) > 1:
        raise InputError(f"{folder}/features mixes features of several networks; sample into another --out")
    whole = {name: torch.from_numpy(np.concatenate([batch[name] for batch in batches])) for name in batches[0]}
    # Runs with different --batch may have computed an index twice.
    _, first = np.unique(whole["indices"].numpy(), return_index=True)
    first = first[:num]
    if len(first) < num or int(whole["indices"][first[-1]]) != num - 1:
        raise InputError(f"{folder} holds {len(first)} of {num} samples; {again}")
    arrays = {name: array[first] for name, array in whole.items() if name not in NUMBERS}
    return Features(arrays, whole["labels"][first])
