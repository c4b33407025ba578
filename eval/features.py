"""Images in, features out: the networks whose features FID, IS, KID, precision and recall compare.

Inception V3 is what published numbers use. It says nothing about images unlike photographs (handwritten digits), so for
those a small classifier is fitted to the real labelled images, and its penultimate layer is compared instead.
"""

import contextlib
import hashlib
import io
import json
import os
import re
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from data_prep.images import EXTENSIONS, center_crop, list_images
from moe_dit.data import ShardReader
from moe_dit.manifest import read_manifest
from moe_dit.runtime.errors import InputError
from moe_dit.runtime.files import explained, new_file
from moe_dit.runtime.progress import say, task

PUBLISHED_INCEPTION = "6726825d"  # start of the SHA-256 of torch-fidelity's weights, the TensorFlow ones of 2015-12-05
BATCH = 64
WORKERS = min(8, os.cpu_count() or 1)  # image coding releases Python's lock, so threads are enough
PNG_END = b"\x00\x00\x00\x00IEND\xaeB`\x82"  # its last chunk, which is empty
FIT_IMAGES = 20_000  # a bigger reference is thinned to about this many for the fit

# --- images -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ImageFile:
    """Where one image's bytes are: a file of its own, or a piece of a tar file; label None where there is none."""

    file: Path
    label: int | None
    offset: int = 0
    length: int = -1  # the rest of the file


def reference_images(path: Path) -> list[ImageFile]:
    """List the real images of a folder of class folders, of a flat folder (no labels) or of pixel shards.

    Raises:
        InputError: nothing there, no images in it, or shards of latents.
    """
    if not os.path.isdir(path):
        raise InputError(f"no reference {path}; it should be a .npz file, a folder of shards or a folder of images")
    images = _shard_images(path) if (path / "manifest.json").exists() else _folder_images(path)
    if not images:
        raise InputError(f"the reference {path} holds no images; it should hold class folders of images")
    return images


def _folder_images(folder: Path) -> list[ImageFile]:
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise InputError(f"cannot list {folder}: {error.strerror}") from None
    if any(entry.is_dir() and not entry.name.startswith(".") for entry in entries):
        paths, labels, _ = list_images(folder)
        return [ImageFile(Path(path), label) for path, label in zip(paths, labels, strict=True)]
    return [ImageFile(file, None) for file in entries if file.name.lower().endswith(EXTENSIONS)]


def _shard_images(folder: Path) -> list[ImageFile]:
    manifest = read_manifest(folder)
    if manifest.kind != "pixels":
        raise InputError(
            f"the reference {folder} holds {manifest.kind}; scores need images: give the folder of images itself, "
            "or pack it with data_prep.pack_pixels"
        )
    reader = ShardReader(manifest)
    images = []
    for index in range(len(reader)):
        members = reader.members(index)
        offset, length = members.place("image")
        images.append(ImageFile(members.path, members.label(), offset, length))
    return images


def sample_images(folder: Path) -> list[ImageFile]:
    """List a sample folder's images by index: files named 000123_7.png (index, label)."""
    found = []
    for file in folder.iterdir() if folder.is_dir() else ():
        if match := re.fullmatch(r"(\d+)_(\d+)\.png", file.name):
            found.append((int(match[1]), ImageFile(file, int(match[2]))))
    return [image for _, image in sorted(found, key=lambda pair: pair[0])]


def fingerprint(images: list[ImageFile]) -> str:
    """Tells one list of images from another by names, labels and sizes, without reading them."""
    described = [(image.file.name, image.label, image.offset, image.file.stat().st_size) for image in images]
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()


def read_image(image: ImageFile, size: int | None = None) -> torch.Tensor:
    """Read one image as uint8 [3, H, W]; one that is not size x size is scaled and cropped as the training data was."""
    try:
        with open(image.file, "rb") as file:
            file.seek(image.offset)
            picture = Image.open(io.BytesIO(file.read(image.length))).convert("RGB")
        if size is not None and picture.size != (size, size):
            picture = center_crop(picture, size)
    except Exception:  # decoders raise whatever they meet
        raise _unreadable(image.file) from None
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def image_file_size(file: Path) -> tuple[int, int]:
    """Width and height of an image file, by its first bytes; InputError where those, or its last, are no image's."""
    try:
        with open(file, "rb") as opened, Image.open(opened) as image:
            if image.format == "PNG" and not ends_as_png(opened):
                raise _unreadable(file)
            return image.size
    except InputError:
        raise
    except Exception:  # decoders raise whatever they meet
        raise _unreadable(file) from None


def ends_as_png(file: BinaryIO) -> bool:
    """Whether the end of a PNG file is there."""
    file.seek(max(0, file.seek(0, os.SEEK_END) - 1024))  # a program may have put something behind it
    return PNG_END in file.read()


def _unreadable(file: Path) -> InputError:
    return InputError(f"{file} holds an image that cannot be read; remove or replace it")


def read_batches(images: list[ImageFile], size: int) -> Iterator[torch.Tensor]:
    """Read images as batches uint8 [N, 3, size, size], in order; the next batch is read while this one is used."""
    with ThreadPoolExecutor(WORKERS) as pool:

        def submit(start: int):
            return [pool.submit(read_image, image, size) for image in images[start : start + BATCH]]

        coming = submit(0)
        for start in range(0, len(images), BATCH):
            batch = coming
            coming = submit(start + BATCH)
            yield torch.stack([future.result() for future in batch])


# --- extractors -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Extractor:
    """A network in eval mode that maps uint8 images [N, 3, H, W] to (features [N, D], logits [N, K])."""

    network: FeatureExtractorBase
    name: str  # for the result: says whether numbers compare with published ones
    identity: str  # equal for extractors that give equal features
    held_out_accuracy: float | None = None  # fitted classifier only: share of unseen real images it labels right

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Features and logits, float32 on the CPU, of uint8 images [N, 3, H, W]."""
        device = next(self.network.parameters()).device
        features, logits = self.network(images.to(device))
        return features.float().cpu(), logits.float().cpu()


@dataclass(frozen=True)
class Features:
    """Features [N, D] and logits [N, K], float32 on the CPU, of N images; labels [N], None where images have none."""

    features: torch.Tensor
    logits: torch.Tensor
    labels: torch.Tensor | None


def extract(extractor: Extractor, images: list[ImageFile], size: int, description: str) -> Features:
    """Run the extractor over image files, read at size x size."""
    features: list[torch.Tensor] = []
    logits: list[torch.Tensor] = []
    with task(description, len(images)) as progress:
        for batch in read_batches(images, size):
            for parts, part in zip((features, logits), extractor(batch), strict=True):
                parts.append(part)
            progress.advance(len(batch))
    return Features(torch.cat(features), torch.cat(logits), labels_of(images))


def labels_of(images: list[ImageFile]) -> torch.Tensor | None:
    """Labels, int64 [N], or None where an image has none."""
    labels = [image.label for image in images if image.label is not None]
    return torch.tensor(labels) if len(labels) == len(images) else None


def inception(weights: str, device: torch.device) -> Extractor:
    """Inception V3 with 2048 features and 1008 logits, as torch-fidelity and published FIDs use it.

    Args:
        weights: torch-fidelity's weight file, or "download" to let torch-fidelity fetch it.

    Raises:
        InputError: no such file, another kind of file, or a download that failed.
    """
    path = None
    if weights != "download":
        path = Path(weights)
        _check_inception(path)
    try:
        # torch.hub announces its download on stderr.
        with contextlib.redirect_stderr(io.StringIO()):
            network = FeatureExtractorInceptionV3(
                "inception-v3", ["2048", "logits_unbiased"], feature_extractor_weights_path=path, verbose=False
            )
    except Exception as error:
        if path is None:
            raise InputError(
                f"the Inception weights could not be downloaded ({error}); give their file with --inception FILE.pth"
            ) from None
        raise InputError(f"{path} does not hold torch-fidelity's Inception V3 weights") from None
    digest = PUBLISHED_INCEPTION if path is None else hashlib.sha256(path.read_bytes()).hexdigest()
    published = digest.startswith(PUBLISHED_INCEPTION)
    name = "Inception V3" + ("" if published else " with other weights (not comparable with published FID)")
    identity = f"inception-v3 {PUBLISHED_INCEPTION if published else digest}"
    return Extractor(network.to(device), name, identity)


def _check_inception(path: Path) -> None:
    """torch-fidelity unpickles whatever the file holds: make sure first that it holds tensors alone."""
    advice = "torch-fidelity's file is weights-inception-2015-12-05-6726825d.pth"
    if not os.path.isfile(path):
        raise InputError(f"no Inception weights {path}; {advice}, and --inception download fetches it")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=False)
        good = tuple(state["fc.weight"].shape) == (1008, 2048)
    except Exception:
        good = False
    if not good:
        raise InputError(f"{path} does not hold torch-fidelity's Inception V3 weights; {advice}")


class FittedCNN(FeatureExtractorBase):
    """A small classifier of small images; its penultimate layer (64) gives the features."""

    def __init__(self, num_classes: int):
        super().__init__("fitted-cnn", ["64", "logits"])
        self.num_classes = num_classes
        layers: list[nn.Module] = []
        for width_in, width in ((3, 32), (32, 64), (64, 64)):
            convolution = nn.Conv2d(width_in, width, 3, stride=2, padding=1, bias=False)
            layers += [convolution, nn.BatchNorm2d(width), nn.ReLU()]
        # Features of unit variance on the real images, so that no few of them decide the distances.
        self.body = nn.Sequential(
            *layers, nn.Flatten(), nn.Dropout(0.5), nn.Linear(64 * 4 * 4, 64), nn.BatchNorm1d(64, affine=False)
        )
        self.head = nn.Linear(64, num_classes)

    @staticmethod
    def get_provided_features_list():
        return "64", "logits"

    @staticmethod
    def get_default_feature_layer_for_metric(metric):
        return {"isc": "logits", "fid": "64", "kid": "64", "prc": "64"}[metric]

    def forward(self, images):
        """(features [N, 64], logits [N, num_classes]) of uint8 images [N, 3, H, W]."""
        features = self.body(F.adaptive_avg_pool2d(images.float() / 127.5 - 1, 32))
        return features, self.head(features.relu())


def fit(images: list[ImageFile], size: int, device: torch.device) -> Extractor:
    """Fit :class:`FittedCNN` to real labelled images, read at size x size; one in five of a class is held out.

    The fit runs on one CPU thread from a fixed seed, so that the same images give the same extractor.

    Raises:
        InputError: no labels, fewer than two classes, or too few images.
    """
    images = images[:: max(1, len(images) // FIT_IMAGES)]
    y = labels_of(images)
    if y is None:
        raise InputError(
            f"the reference images in {images[0].file.parent} have no labels, so no classifier can be fitted to them; "
            "put them in class folders, or give --inception FILE.pth"
        )
    x = torch.cat(list(read_batches(images, size)))
    position_in_class = torch.zeros_like(y)
    for label in y.unique():
        position_in_class[y == label] = torch.arange(int((y == label).sum()))
    held_out = position_in_class % 5 == 4
    if len(y.unique()) < 2 or not held_out.any():
        raise InputError(
            f"the reference has {len(y)} images of {len(y.unique())} classes, too few to fit a classifier "
            "(two classes, five images of one); give more, or --inception FILE.pth"
        )
    with _one_thread():
        network = _fit(x[~held_out], y[~held_out])
        with torch.no_grad():
            correct = torch.cat([network(part)[1].argmax(1) for part in x[held_out].split(BATCH)]) == y[held_out]
    accuracy = correct.double().mean().item()
    say(
        f"classifier fitted to {int((~held_out).sum())} real images labels {accuracy:.1%} of {len(correct)} unseen ones"
    )
    if accuracy < 0.9:
        say("its features are weak for such images; --inception FILE.pth is the extractor for photographs")
    return _fitted(network, accuracy, device)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Sums in one order whatever the machine's or launcher's number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _fit(x: torch.Tensor, y: torch.Tensor, batch: int = 64) -> FittedCNN:
    batches = -(-len(x) // batch)
    epochs = min(40, max(5, 350 // batches))  # seconds of work, whatever the number of images
    with torch.random.fork_rng(devices=[]), task("fitting the classifier", epochs * batches) as progress:
        torch.manual_seed(0)
        network = FittedCNN(int(y.max()) + 1)
        optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=epochs * batches)
        for _ in range(epochs):
            for chosen in torch.randperm(len(x)).tensor_split(batches):
                # Shifted by up to a pixel: features of fitted images would otherwise differ from those of unseen ones.
                shifted = torch.roll(x[chosen], torch.randint(-1, 2, (2,)).tolist(), dims=(2, 3))
                loss = F.cross_entropy(network(shifted)[1], y[chosen])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                progress.advance()
    return network.eval()


def _fitted(network: FittedCNN, accuracy: float, device: torch.device) -> Extractor:
    digest = hashlib.sha256(b"".join(value.numpy().tobytes() for value in network.state_dict().values())).hexdigest()
    name = "fitted CNN (not comparable with published FID)"
    return Extractor(network.requires_grad_(False).eval().to(device), name, f"fitted-cnn {digest}", accuracy)


def save_fitted(extractor: Extractor, path: Path) -> None:
    """Write a fitted extractor, so that samples and reference meet the very same one."""
    with explained(str(path)), new_file(path) as file:
        torch.save(fitted_state(extractor), file)


def load_fitted(path: Path, device: torch.device) -> Extractor:
    """Read what :func:`save_fitted` wrote; InputError where it is missing or damaged."""
    try:
        with zipfile.ZipFile(path) as members:
            if broken := members.testzip():  # torch itself (2.14) loads tensors without a look at their checksums
                raise ValueError(f"{broken} has another checksum")
        return fitted_from_state(torch.load(path, map_location="cpu", weights_only=True), device)
    except Exception as error:  # torch raises many kinds for a file that is not whole
        what = "missing" if isinstance(error, FileNotFoundError) else "damaged"
        raise InputError(
            f"{path} is {what}, without which the features beside it say nothing; sample into another --out"
        ) from None


def fitted_state(extractor: Extractor) -> dict:
    """A fitted extractor as plain values and tensors."""
    network = extractor.network
    return {"state": network.state_dict(), "classes": network.num_classes, "accuracy": extractor.held_out_accuracy}


def fitted_from_state(saved: dict, device: torch.device) -> Extractor:
    """The extractor of :func:`fitted_state`."""
    network = FittedCNN(saved["classes"])
    network.load_state_dict(saved["state"])
    return _fitted(network, saved["accuracy"], device)
