"""Networks whose features are compared: Inception V3, DINOv2, and a small classifier that is fitted to the real images.

Inception V3 is what published numbers use. It says nothing about images unlike photographs (handwritten digits), so for
those a classifier is fitted to the real labelled images, and its penultimate layer is compared instead. A further
network is a subclass of :class:`Network`, which sees the same images in the same pass, and a line in SPACES.
"""

import contextlib
import hashlib
import io
import os
import socket
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

from data_prep.autoencoder import hash_weights
from eval.images import BATCH, ImageFile, labels_of, read_batches
from eval.metrics import Moments, Sums
from moe_dit.runtime import hub, ranks
from moe_dit.runtime.errors import InputError
from moe_dit.runtime.files import explained, new_file
from moe_dit.runtime.precision import exact_float32
from moe_dit.runtime.progress import say, task
from moe_dit.runtime.reading import open_file, read_bytes
from moe_dit.store import SILENCE

PUBLISHED_INCEPTION = "6726825d"  # start of the SHA-256 of the weights, the TensorFlow ones of 2015-12-05
FIT_IMAGES = 20_000  # a bigger reference is thinned to about this many for the fit
ENOUGH = 1000  # images of which no tenth may be unreadable
LISTED = 100  # of unreadable ones that are named
KEPT = 10_000  # real images whose features are kept, as ADM's reference has for precision and recall (arXiv:2105.05233)


class Space(NamedTuple):
    """An array of features whose mean and covariance are compared.

    Attributes:
        score: the distance's name in results.
        ending: of the names of its mean and covariance in a file of statistics.
        rows: whether some features are kept, by which the distance's error is known.
    """

    score: str
    ending: str
    rows: bool


# By the array's name.
SPACES = {
    "features": Space("fid", "", rows=True),
    "spatial": Space("sfid", "_s", rows=False),
    "dinov2": Space("fd_dinov2", "_dinov2", rows=True),
}

# --- networks ---------------------------------------------------------------------------------------------------------


class Network(nn.Module):
    """A network in eval mode that makes features of images.

    Attributes:
        title: for the result: says whether numbers compare with published ones.
        identity: equal for networks that give equal features.
    """

    title: str
    identity: str

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Arrays [N, width] by name, of images [N, 3, H, W] in [0, 255], uint8 or float32.

        "features" are those that the scores compare, "logits" those of the Inception Score; a network that stands
        beside another one has names of its own.
        """
        raise NotImplementedError


class Inception(Network):
    """Inception V3 of 2015: 2048 features, 1008 logits without bias.

    Args:
        weights: torch-fidelity's or pytorch-fid's weight file, or "download" to let torch-fidelity fetch it.
        half_pixel: images are resized as pytorch-fid does (bilinear with half-pixel centres, 2 x - 1), instead of as
            TensorFlow 1, by which torch-fidelity and ADM's evaluator go.
        spatial: also "spatial", the first 7 channels of a 17 x 17 layer, of which ADM's evaluator computes sFID.

    Raises:
        InputError: no such file, another kind of file, or a download that failed.
    """

    def __init__(self, weights: str, half_pixel: bool = False, spatial: bool = False):
        super().__init__()
        path = None
        if weights != "download":
            path = Path(weights)
            _check_inception(path)
        try:
            # torch.hub announces its download on stderr, and waits for ever for a server that says nothing.
            with contextlib.redirect_stderr(io.StringIO()), _impatient():
                network = FeatureExtractorInceptionV3(
                    "inception-v3", ["2048"], feature_extractor_weights_path=path, verbose=False
                )
        except Exception as error:
            if path is None:
                raise InputError(
                    f"the Inception weights could not be downloaded ({error}); give their file: --inception FILE.pth"
                ) from None
            raise InputError(f"{path} does not hold torch-fidelity's Inception V3 weights") from None
        digest = PUBLISHED_INCEPTION if path is None else hashlib.sha256(read_bytes(path)).hexdigest()
        published = digest.startswith(PUBLISHED_INCEPTION)
        self.network = network
        self.half_pixel, self.spatial = half_pixel, spatial
        self.title = "Inception V3" + ("" if published else " with other weights (not comparable with published FID)")
        self.identity = f"inception-v3 {PUBLISHED_INCEPTION if published else digest}" + half_pixel * " half-pixel"

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        x, found = images.float(), {}
        if self.half_pixel:
            x = F.interpolate(x / 255, size=(299, 299), mode="bilinear", align_corners=False) * 2 - 1
        else:
            x = (interpolate_bilinear_2d_like_tensorflow1x(x, size=(299, 299), align_corners=False) - 128) / 128
        for name, layer in self.network.named_children():  # in the order in which they are computed
            if name == "Mixed_6d" and self.spatial:  # TensorFlow's mixed_6/conv, channels last
                found["spatial"] = layer.branch1x1(x)[:, :7].permute(0, 2, 3, 1).flatten(1)
            if name == "fc":
                break
            x = layer(x)
        found["features"] = x.flatten(1)
        found["logits"] = found["features"] @ self.network.fc.weight.T
        return found


@contextlib.contextmanager
def _impatient() -> Iterator[None]:
    """Connections that are made in the block fail where nothing comes for :data:`moe_dit.store.SILENCE` seconds."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(SILENCE)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


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


class DINOv2(Network):
    """DINOv2 ViT-L/14 (arXiv:2304.07193): 1024 features, compared as FDD (arXiv:2306.04675) the way EDM2 does.

    Args:
        weights: a file of its weights, Meta's or timm's, or "download" to let timm fetch them.

    Raises:
        InputError: no such file, another kind of file, or a download that failed.
    """

    ARCHITECTURE = "vit_large_patch14_dinov2.lvd142m"
    SIDE = 224
    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, weights: str):
        super().__init__()
        import timm
        from huggingface_hub import try_to_load_from_cache

        given: dict[str, Any] = {} if weights == "download" else {"pretrained_cfg_overlay": {"file": weights}}
        place = f"timm/{self.ARCHITECTURE}", "model.safetensors"
        try:
            silent = None if given else hub.away(*place)
            if silent is not None and not isinstance(try_to_load_from_cache(*place), str):
                raise silent
            if given and not zipfile.is_zipfile(weights) and not weights.endswith(".safetensors"):
                raise ValueError("no such file of weights")
            network: Any = timm.create_model(
                self.ARCHITECTURE, pretrained=True, img_size=self.SIDE, num_classes=0, **given
            )
        except Exception as error:  # torch, timm and the hub raise errors of many kinds
            said = (str(error).splitlines() or [type(error).__name__])[0]
            reason = hub.refusal(error, "their file") or said
            raise InputError(f"--dinov2 {weights} does not give the weights of {self.ARCHITECTURE}: {reason}") from None
        self.network = network.requires_grad_(False)
        self.title = "DINOv2"
        self.identity = f"dinov2 {hash_weights(network)}"
        mean, std = network.pretrained_cfg["mean"], network.pretrained_cfg["std"]
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        x = F.interpolate(images.float(), size=(self.SIDE, self.SIDE), mode="bicubic", antialias=True)
        return {"dinov2": self.network((x / 255 - self.mean) / self.std)}


class FittedCNN(Network):
    """A small classifier of small images; its penultimate layer (64) gives the features.

    Attributes:
        held_out_accuracy: share of unseen real images that it labels right.
    """

    title = "fitted CNN (not comparable with published FID)"
    held_out_accuracy: float

    def __init__(self, num_classes: int):
        super().__init__()
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

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        features = self.body(F.adaptive_avg_pool2d(images.float() / 127.5 - 1, 32))
        return {"features": features, "logits": self.head(features.relu())}


class Extractor:
    """Networks that make features of the same images in one pass.

    Args:
        networks: no two give arrays of one name.
        device: where they compute.

    Attributes:
        title: for the result.
        identity: equal for extractors that give equal features.
    """

    def __init__(self, networks: Sequence[Network], device: torch.device):
        self.networks = [cast(Network, network.requires_grad_(False).eval().to(device)) for network in networks]
        self.device = device
        self.title = " and ".join(network.title for network in networks)
        self.identity = " + ".join(network.identity for network in networks)

    @property
    def fitted(self) -> FittedCNN | None:
        """The classifier that was fitted to the real images, if it is one of the networks."""
        return next((network for network in self.networks if isinstance(network, FittedCNN)), None)

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Arrays [N, width] by name, float32 on the CPU, of images [N, 3, H, W] in [0, 255]."""
        images = images.to(self.device)
        with exact_float32():
            found = {name: array for network in self.networks for name, array in network(images).items()}
        return {name: array.float().cpu() for name, array in found.items()}


# --- over many images -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Features:
    """Arrays [N, width] by name, float32 on the CPU, of N images; labels [N], None where images have none."""

    arrays: dict[str, torch.Tensor]
    labels: torch.Tensor | None


@dataclass(frozen=True)
class Survey:
    """What is kept of real images, however many they are.

    Attributes:
        moments: of each array whose mean and covariance are compared, by name.
        rows: arrays of KEPT evenly spaced images at most, by name.
        count: images; None: a file does not tell.
        of_file: whether they were read from a file.
        unreadable: what :func:`told` says of images that were left out; None where there were none.
    """

    moments: dict[str, Moments]
    rows: dict[str, torch.Tensor]
    count: int | None
    of_file: bool = False
    unreadable: dict[str, Any] | None = None


def evenly(count: int) -> torch.Tensor:
    """Indices of KEPT of so many images at most, evenly spaced, so that every class has its share."""
    return torch.linspace(0, count - 1, min(KEPT, count), dtype=torch.float64).round().long()


def extract(
    extractor: Extractor,
    images: Sequence[ImageFile],
    size: int,
    description: str,
    unread: dict[int, str] | None = None,
) -> Features | None:
    """The features of images, read at size x size by all ranks; on rank 0, None elsewhere.

    Args:
        extractor: makes them.
        images: to read.
        size: their side.
        description: what is shown of the work.
        unread: gets the place and the reason of each image that cannot be read, on every rank; None: that is an error.
    """
    arrays = _over(extractor, images, size, description, lambda arrays, indices: (indices, arrays), unread)
    if arrays is None:
        return None
    return Features(arrays, labels_of([image for i, image in enumerate(images) if i not in (unread or {})]))


def survey(
    extractor: Extractor,
    images: Sequence[ImageFile],
    size: int,
    description: str,
    unread: dict[int, str] | None = None,
) -> Survey | None:
    """What is kept of real images, read at size x size by all ranks; on rank 0, None elsewhere.

    Those that cannot be read are left out, and ``unread`` gets them, as in :func:`extract`.
    """
    unread = {} if unread is None else unread
    chosen = torch.zeros(len(images), dtype=torch.bool)
    chosen[evenly(len(images))] = True
    sums: dict[str, Sums] = {}

    def count(arrays: dict[str, torch.Tensor], indices: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        kept = chosen[indices]
        there = SPACES.keys() & arrays.keys()
        for name in there:
            if name not in sums:
                sums[name] = Sums(arrays[name].shape[1], extractor.device)
            sums[name].add(arrays[name])
        return indices[kept], {name: arrays[name][kept] for name in there if SPACES[name].rows}

    rows = _over(extractor, images, size, description, count, unread)
    if unread and len(images) > KEPT:  # those that are evenly spaced are others
        left = [image for i, image in enumerate(images) if i not in unread]
        again = extract(extractor, [left[i] for i in evenly(len(left)).tolist()], size, f"{description}, again", {})
        rows = None if rows is None or again is None else {name: again.arrays[name] for name in rows}
    mine = {name: (part.n, part.first.cpu(), part.second.cpu()) for name, part in sums.items()}
    everyone = ranks.gathered(mine)
    if rows is None or everyone is None:
        return None
    totals: dict[str, Moments] = {}
    for name in SPACES:
        parts = [theirs[name] for theirs in everyone if name in theirs]
        if not parts:
            continue
        whole = Sums(0)
        whole.n, whole.first, whole.second = (sum(part[i] for part in parts) for i in range(3))
        totals[name] = whole.moments()
    return Survey(totals, rows, len(images) - len(unread), unreadable=told(images, unread))


def _over(
    extractor: Extractor,
    images: Sequence[ImageFile],
    size: int,
    description: str,
    keep: Any,
    unread: dict[int, str] | None,
) -> dict[str, torch.Tensor] | None:
    """What ``keep(arrays, indices int64 [N])`` keeps of each batch, indices and arrays, in the order of the images.

    On rank 0; None elsewhere. Ranks share batches. Without an image that cannot be read, those of one rank would be the
    same: what is left moves up.
    """
    world = ranks.world()
    mine = [i for k in world.share(-(-len(images) // BATCH)) for i in range(len(images))[k * BATCH : (k + 1) * BATCH]]
    broken: dict[int, str] | None = None if unread is None else {}
    found: list[tuple[torch.Tensor, dict[str, torch.Tensor]]] = []
    with task(description, len(images), unit="images") as progress:
        for places, batch in read_batches([images[i] for i in mine], size, broken):
            # Batches of one size: kernels chosen by it decide the last bits of a feature. Of one batch it is its own.
            whole = not found and len(mine) == len(images)
            missing = 0 if whole else BATCH - len(batch)
            filled = torch.cat([batch, batch[-1:].expand(missing, -1, -1, -1)]) if missing else batch
            arrays = {name: array[: len(batch)] for name, array in extractor(filled).items()}
            found.append(keep(arrays, torch.tensor([mine[place] for place in places])))
            # The other ranks do as much meanwhile.
            progress.advance(min(world.size * len(batch), len(images) - progress.done))
    everyone = ranks.gathered((found, {mine[place]: reason for place, reason in (broken or {}).items()}))
    if unread is not None:
        all_broken = {i: reason for _, theirs in everyone or () for i, reason in theirs.items()}
        unread |= ranks.from_rank_0(lambda: _leave_out(images, all_broken, description))
    if everyone is None:
        return None
    parts = [part for theirs, _ in everyone for part in theirs]
    order = torch.cat([indices for indices, _ in parts]).argsort()
    return {name: torch.cat([arrays[name] for _, arrays in parts])[order] for name in parts[0][1]}


def _leave_out(images: Sequence[ImageFile], unread: dict[int, str], description: str) -> dict[int, str]:
    """Tell of images that cannot be read, by their place; InputError where they are too many."""
    if unread:
        line = f"{description}: {len(unread)} of {len(images)} images cannot be read"
        first = unread[min(unread)]
        if len(images) - len(unread) < 2 or (len(images) >= ENOUGH and 10 * len(unread) > len(images)):
            raise InputError(f"{line}, too many to go on without them; the first: {first}")
        say(f"{line} and are left out; the first: {first}")
    return unread


def told(images: Sequence[ImageFile], unread: dict[int, str]) -> dict[str, Any] | None:
    """Images that could not be read as a result tells them: how many, and the first ones by name; None for none."""
    some = [{"image": images[i].name, "reason": unread[i]} for i in sorted(unread)[:LISTED]]
    return {"count": len(unread), "first": some} if unread else None


# --- the fitted classifier --------------------------------------------------------------------------------------------


def fit(images: Sequence[ImageFile], size: int) -> FittedCNN:
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
    unread: dict[int, str] = {}
    batches = [batch for _, batch in read_batches(images, size, unread)]
    _leave_out(images, unread, "images to fit a classifier to")
    x = torch.cat(batches)
    y = y[torch.tensor([i not in unread for i in range(len(y))])]
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
            guesses = [network(part)["logits"].argmax(1) for part in x[held_out].split(BATCH)]
            correct = torch.cat(guesses) == y[held_out]
    accuracy = correct.double().mean().item()
    say(
        f"classifier fitted to {int((~held_out).sum())} real images labels {accuracy:.1%} of {len(correct)} unseen ones"
    )
    if accuracy < 0.9:
        say("its features are weak for such images; --inception FILE.pth is the extractor for photographs")
    return _finished(network, accuracy)


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
                loss = F.cross_entropy(network(shifted)["logits"], y[chosen])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                progress.advance()
    return network.eval()


def _finished(network: FittedCNN, accuracy: float) -> FittedCNN:
    network.held_out_accuracy = accuracy
    network.identity = f"fitted-cnn {hash_weights(network)}"
    return network.requires_grad_(False).eval()


def save_fitted(network: FittedCNN, path: Path) -> None:
    """Write a fitted classifier, so that samples and reference meet the very same one."""
    with explained(str(path)), new_file(path) as file:
        torch.save(fitted_state(network), file)


def load_fitted(path: Path) -> FittedCNN:
    """Read what :func:`save_fitted` wrote; InputError where it is missing or damaged."""
    try:
        with open_file(path) as opened, zipfile.ZipFile(opened) as members:
            if broken := members.testzip():  # torch itself (2.14) loads tensors without a look at their checksums
                raise ValueError(f"{broken} has another checksum")
        return fitted_from_state(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # torch raises many kinds for a file that is not whole
        what = "missing" if isinstance(error, FileNotFoundError) else "damaged"
        raise InputError(
            f"{path} is {what}, without which the features beside it say nothing; sample into another --out"
        ) from None


def fitted_state(network: FittedCNN) -> dict[str, Any]:
    """A fitted classifier as plain values and tensors."""
    return {"state": network.state_dict(), "classes": network.num_classes, "accuracy": network.held_out_accuracy}


def fitted_from_state(saved: dict[str, Any]) -> FittedCNN:
    """The classifier of :func:`fitted_state`."""
    network = FittedCNN(saved["classes"])
    network.load_state_dict(saved["state"])
    return _finished(network, saved["accuracy"])
