"""Which sample stands at which position of a run: a pure function of (seed, epoch), whoever shares the work.

Position p of a run is sample ``order(seed, p // n)[p % n]`` of n. Two orders:

- full: a permutation of all samples. Each epoch holds 8 bytes a sample, and draws it in 60 ns a sample.
- windows: the shards permuted, cut into windows of so many that their bytes fit into memory, and the samples of each
  window permuted. Disks and servers are read shard after shard; an epoch holds 8 bytes a shard and 8 a sample of the
  window. A batch mixes the samples of one window's shards, others every epoch.
"""

from collections import OrderedDict
from typing import Any, Literal, Protocol

import numpy as np

from moe_dit.manifest import Manifest
from moe_dit.randomness import permutation, window_permutation


class Order(Protocol):
    """An order of samples over a run's positions."""

    def samples(self, positions: np.ndarray) -> np.ndarray:
        """The samples' indices at positions, int64 [N] both."""

    def shards_ahead(self, position: int) -> list[int]:
        """Numbers of the shards that positions from this one on read next, in order; empty: no few of them."""


class FullOrder:
    """A permutation of all samples each epoch."""

    def __init__(self, seed: int, samples: int):
        self.seed = seed
        self.count = samples
        self._epochs: OrderedDict[int, np.ndarray] = OrderedDict()

    def samples(self, positions: np.ndarray) -> np.ndarray:
        epochs, places = np.divmod(positions, self.count)
        found = np.empty_like(positions)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            found[here] = self._epoch(epoch)[places[here]]
        return found

    def shards_ahead(self, position: int) -> list[int]:
        return []

    def _epoch(self, epoch: int) -> np.ndarray:
        return _kept(self._epochs, epoch, lambda: permutation(self.seed, epoch, self.count))


class WindowOrder:
    """Windows of permuted shards, permuted inside.

    Args:
        seed: of the run.
        shard_samples: samples of each shard.
        shards: how many make a window.
    """

    def __init__(self, seed: int, shard_samples: list[int], shards: int):
        self.seed = seed
        self.shards = shards
        self.sizes = np.array(shard_samples, np.int64)
        self.starts = np.cumsum(self.sizes) - self.sizes
        self.count = int(self.sizes.sum())
        self._epochs: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()
        self._windows: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()

    def samples(self, positions: np.ndarray) -> np.ndarray:
        epochs, places = np.divmod(positions, self.count)
        found = np.empty_like(positions)
        for epoch in np.unique(epochs).tolist():
            in_epoch = epochs == epoch
            _, ends = self._epoch(epoch)
            windows = np.searchsorted(ends, places, side="right")
            for window in np.unique(windows[in_epoch]).tolist():
                here = in_epoch & (windows == window)
                first = int(ends[window - 1]) if window else 0
                found[here] = self._window(epoch, window)[places[here] - first]
        return found

    def shards_ahead(self, position: int) -> list[int]:
        epoch, place = divmod(position, self.count)
        shards, ends = self._epoch(epoch)
        window = int(np.searchsorted(ends, place, side="right"))
        ahead = shards[window * self.shards : (window + 2) * self.shards]
        if window + 1 == len(ends):
            ahead = np.concatenate([ahead, self._epoch(epoch + 1)[0][: self.shards]])
        return ahead.tolist()

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The shards in their order, and where each window ends among the epoch's places."""

        def make() -> tuple[np.ndarray, np.ndarray]:
            shards = window_permutation(self.seed, epoch, 0, len(self.sizes))
            sizes = np.add.reduceat(self.sizes[shards], np.arange(0, len(shards), self.shards))
            return shards, np.cumsum(sizes)

        return _kept(self._epochs, epoch, make)

    def _window(self, epoch: int, window: int) -> np.ndarray:
        """The samples of a window in their order."""

        def make() -> np.ndarray:
            shards = self._epoch(epoch)[0][window * self.shards : (window + 1) * self.shards]
            samples = np.concatenate([np.arange(self.starts[s], self.starts[s] + self.sizes[s]) for s in shards])
            return samples[window_permutation(self.seed, epoch, 1 + window, len(samples))]

        return _kept(self._windows, (epoch, window), make)


def _kept(made: OrderedDict, key: Any, make: Any) -> Any:
    """What is made once a key; the last two are kept, for a batch may reach into the next."""
    if key not in made:
        made[key] = make()
        if len(made) > 2:
            made.popitem(last=False)
    made.move_to_end(key)
    return made[key]


FULL_GB = 8.0  # shards that a machine's memory keeps beside all else: read in any order
WINDOW_GB = 4.0


def window_for(manifest: Manifest, window_gb: float | Literal["auto"] | None) -> float | None:
    """``data.window_gb`` with "auto" decided: no windows for up to FULL_GB of shards, else those of WINDOW_GB."""
    if window_gb != "auto":
        return window_gb
    total = sum(shard["bytes"] for shard in manifest.shards) / 1e9
    limit = manifest.remote.limit if manifest.remote is not None else None
    if limit is not None and total > limit / 1e9:
        return min(WINDOW_GB, limit / 1e9 / 4)  # this window, the next one, and room for what ranks still read
    return None if total <= FULL_GB else WINDOW_GB


def make_order(manifest: Manifest, seed: int, window_gb: float | None = None) -> Order:
    """The order of a run over shards: full, or in windows of at most so many 10^9 bytes (at least one shard)."""
    if window_gb is None:
        return FullOrder(seed, manifest.samples)
    largest = max(shard["bytes"] for shard in manifest.shards)
    shards = max(1, min(len(manifest.shards), int(window_gb * 1e9 // max(1, largest))))
    return WindowOrder(seed, [shard["samples"] for shard in manifest.shards], shards)
