"""The digits or 300 of them, a VAE that was fitted to them for a moment, and their latents."""

import hashlib
from pathlib import Path

import numpy as np
import webdataset

from data_prep import digits
from helpers import call


def encode(folder: Path) -> None:
    """Fill a folder with ``images``, a ``vae``, and ``shards`` that one rank encoded without a stop."""
    digits.write_images(folder / "images")
    for path in list((folder / "images").glob("*/*.png")):
        if int(path.stem) >= 300:
            path.unlink()
    digits.write_autoencoder(folder / "images", folder / "vae", steps=4, seed=0)
    flags = latent_flags(folder / "images", folder / "vae", folder / "shards")
    assert call("data_prep.encode_latents", *flags) == 0


def encode_all(folder: Path, steps: int) -> None:
    """The same for all digits, in shards of 512, with a VAE of so many steps."""
    digits.write_images(folder / "images")
    digits.write_autoencoder(folder / "images", folder / "vae", steps=steps, seed=0)
    flags = f"--images {folder}/images --vae {folder}/vae --size 32 --shard-size 512 --out {folder}/shards --workers 0"
    assert call("data_prep.encode_latents", *flags.split()) == 0


def latent_flags(images, vae, out) -> list[str]:
    return f"--images {images} --vae {vae} --out {out} --size 32 --shard-size 16 --batch 8".split()


def contents(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.tar")}


def assert_same_shards(got: Path, want: Path) -> None:
    """The same samples in the same shards; moments up to float16's rounding.

    A convolution's last bit may depend on where memory was allocated, so bytes are too much to ask.
    """
    assert contents(got).keys() == contents(want).keys()
    for name in contents(want):
        ours, theirs = ({sample["__key__"]: sample for sample in read_file(f / name)} for f in (got, want))
        assert list(ours) == list(theirs)
        for key, sample in theirs.items():
            assert ours[key]["cls"] == sample["cls"]
            for member in ("latent.npy", "latent_flip.npy"):
                np.testing.assert_allclose(ours[key][member], sample[member], rtol=2e-3, atol=1e-4)


def read_file(path: Path):
    return webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False).decode("rgb8")


def read_back(folder: Path) -> dict[str, dict]:
    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    dataset = webdataset.WebDataset(urls, shardshuffle=False, empty_check=False).decode("rgb8")
    return {sample["__key__"]: sample for sample in dataset}
