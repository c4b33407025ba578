"""What several test files need: real digits as latents and as pixels, and the runs that others are held against."""

import os
import signal
from pathlib import Path

import pytest

from budget import Budget

# What imports torch is imported where it is used: of several test processes the first runs no test. Before:
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # test processes that each take every core slow each other down several times


# A shell starts what is in the background with SIGINT ignored, which all that tests start would inherit.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


# Of the long part these take longest: at its end they would leave cores idle. xdist gives a process two files at once,
# and that of test_faults.py gets the fourth, a short one.
FIRST = ["test_faults.py", "test_slurm.py", "test_gpu.py", "test_checkpoint_files.py", "test_weeks.py", "test_train.py"]


def pytest_configure(config):
    config.pluginmanager.register(Budget(config))


def pytest_collection_modifyitems(items):
    def place(item) -> int:
        first = item.get_closest_marker("long") and item.path.name in FIRST
        return FIRST.index(item.path.name) if first else len(FIRST)

    items.sort(key=place)


@pytest.fixture(scope="session")
def shared(tmp_path_factory) -> Path:
    """A folder that all test processes of this run of pytest have in common, for :func:`helpers.once`."""
    root = tmp_path_factory.getbasetemp()
    return root.parent if "PYTEST_XDIST_WORKER" in os.environ else root


@pytest.fixture(scope="session")
def latents(shared) -> Path:
    """All digits as latent shards, through an autoencoder that was hardly fitted."""
    from helpers import once
    from helpers.few_digits import encode_all

    return once(shared, "latents", lambda folder: encode_all(folder, steps=8)) / "shards"


@pytest.fixture(scope="session")
def pixels(shared) -> Path:
    """All digits as pixel shards."""
    from data_prep import digits
    from helpers import call, once

    def make(folder: Path) -> None:
        digits.write_images(folder / "images")
        flags = f"--images {folder}/images --size 32 --out {folder}/shards --workers 0"
        assert call("data_prep.pack_pixels", *flags.split()) == 0

    return once(shared, "pixels", make) / "shards"


@pytest.fixture(scope="session")
def few_digits(shared) -> Path:
    """300 of the digits, ``images``, their ``vae``, and ``shards`` that one rank encoded without a stop."""
    from helpers import once
    from helpers.few_digits import encode

    return once(shared, "few_digits", encode)


@pytest.fixture(scope="session")
def plain(latents):
    """The same steps in one plain torch process: losses, gradient norms and EMA."""
    from helpers import STEPS
    from helpers.small_runs import train_plainly
    from moe_dit import build_model, load_recipe

    recipe = load_recipe("digits")
    ema = {name: weight.detach().clone() for name, weight in build_model(recipe).named_parameters()}

    def average(model):
        for name, weight in model.named_parameters():
            ema[name] = 0.995 * ema[name] + 0.005 * weight.detach()

    trained = train_plainly(recipe, latents, STEPS, after_step=average)
    return trained.losses, trained.norms, ema


@pytest.fixture(scope="session")
def two_ranks(latents, shared) -> Path:
    """An uninterrupted run of STEPS steps on 2 expert-parallel ranks; to be read, not changed."""
    from helpers import STEPS, finish, once, start_training

    def make(folder: Path) -> None:
        flags = ["--steps", str(STEPS), "--set", "checkpoint.every=4"]
        finish(start_training(2, "zero2_ep2", latents, folder / "run", *flags), folder / "run")

    return once(shared, "two_ranks", make) / "run"
