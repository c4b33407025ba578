"""The one way to derive randomness: Philox4x32-10, a pure function of (seed, stream, position, element).

A draw belongs to a sample's position in the run, or to an element of a named weight, never to a rank, a worker or a
moment, so results do not depend on how many processes share the work. The integers are bit-identical on CPU and GPU.
Source: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011. torch's own stateless generator
(torch.func._random) is private and experimental, and a run must not change with torch's version.
"""

import math
import zlib
from enum import IntEnum
from typing import Any

import numpy as np
import torch

_MASK = 0xFFFFFFFF
_CHUNK = 1 << 20  # counters handled at once when filling a large weight: bounds the temporary memory


class Stream(IntEnum):
    """What a draw is for. Numbers are part of a run's identity: add to the end, never renumber."""

    ORDER = 1
    FLIP = 2
    LATENT = 3
    NOISE = 4
    TIME = 5
    LABEL_DROP = 6
    WEIGHT = 7
    SAMPLE_NOISE = 8
    SAMPLE_LABEL = 9
    DROPOUT = 10
    WINDOW = 11


def philox(counter: list[torch.Tensor], key: tuple[int, int]) -> list[torch.Tensor]:
    """Philox4x32-10 of four int64 tensors that hold 32-bit counters, and a key of two 32-bit words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # The product of two 32-bit words may wrap int64's sign; shift and mask still give its high word.
        p0 = c0 * 0xD2511F53
        p1 = c2 * 0xCD9E8D57
        c0 = ((p1 >> 32) & _MASK) ^ c1 ^ k0
        c1 = p1 & _MASK
        c2 = ((p0 >> 32) & _MASK) ^ c3 ^ k1
        c3 = p0 & _MASK
        k0 = (k0 + 0x9E3779B9) & _MASK
        k1 = (k1 + 0xBB67AE85) & _MASK
    return [c0, c1, c2, c3]


def _key(seed: int, stream: Stream) -> tuple[int, int]:
    """Philox's key of a seed's stream."""
    return seed & _MASK, ((seed >> 32) & _MASK) ^ int(stream)


def _words(seed: int, stream: Stream, positions: torch.Tensor, block0: int, blocks: int, sub: int = 0) -> torch.Tensor:
    """32-bit words as int64 [N, blocks, 4]: one counter for each position and block of four elements."""
    positions = positions.to(torch.int64)
    block = torch.arange(block0, block0 + blocks, device=positions.device)
    c0 = (block & _MASK).expand(len(positions), blocks)
    # Blocks beyond 2^32 (no tensor has them) would need the word that `sub` uses.
    c1 = torch.full_like(c0, sub)
    c2 = (positions & _MASK)[:, None].expand_as(c0)
    c3 = (positions >> 32)[:, None].expand_as(c0)
    return torch.stack(philox([c0, c1, c2, c3], _key(seed, stream)), dim=-1)


def _to_uniform(words: torch.Tensor) -> torch.Tensor:
    return (words >> 8).to(torch.float32) * 2.0**-24


def _to_normal(words: torch.Tensor) -> torch.Tensor:
    """Box-Muller on the word pairs (0, 1) and (2, 3); |value| < 6.8."""
    radius = ((words[..., 0::2].to(torch.float32) + 0.5) * 2.0**-32).log().mul(-2).clamp_min(0).sqrt()
    angle = words[..., 1::2].to(torch.float32) * (2.0**-32 * 2 * torch.pi)
    return torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1).flatten(-2)


def _draw(to_value, seed, stream, positions, shape):
    numel = math.prod(shape)
    values = to_value(_words(seed, stream, positions, 0, -(-numel // 4)))
    return values.flatten(1)[:, :numel].reshape(len(positions), *shape)


def uniform(seed: int, stream: Stream, positions: torch.Tensor, shape: tuple[int, ...] = ()) -> torch.Tensor:
    """Uniform draws in [0, 1): float32 [N, *shape], row n belonging to positions[n] (int64 [N], its device)."""
    return _draw(_to_uniform, seed, stream, positions, shape)


def host_uniform(seed: int, stream: Stream, positions: np.ndarray) -> np.ndarray:
    """:func:`uniform`'s draws of one value a position, float32 [N] of int64 [N], in numpy.

    For the processes that read data: on some dozens of values numpy's operations take a fifth of torch's time.
    """
    zero = np.zeros_like(positions)
    words: Any = [zero, zero, positions & _MASK, positions >> 32]
    return (philox(words, _key(seed, stream))[0] >> 8).astype(np.float32) * np.float32(2.0**-24)  # type: ignore[attr-defined]


def normal(seed: int, stream: Stream, positions: torch.Tensor, shape: tuple[int, ...] = ()) -> torch.Tensor:
    """Unit normal draws: float32 [N, *shape], row n belonging to positions[n] (int64 [N], its device)."""
    return _draw(_to_normal, seed, stream, positions, shape)


def keep_mask(
    seed: int, layer: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor, channels: int, p: float
) -> torch.Tensor:
    """What dropout keeps: bool [R, channels], False with probability p.

    Args:
        layer: a 32-bit number of the layer that drops, int64 [].
        positions: int64 [R], the sample that a row belongs to.
        rows: int64 [R], which of the sample's rows it is; rows * ceil(channels / 8) must stay below 2^32.
        channels: values in a row; each takes 16 bits, so p is met to 2^-17.
    """
    per_row = -(-channels // 8)
    c0 = rows[:, None] * per_row + torch.arange(per_row, device=rows.device)
    c1 = layer.expand_as(c0)
    c2 = (positions & _MASK)[:, None].expand_as(c0)
    c3 = (positions >> 32)[:, None].expand_as(c0)
    words = torch.stack(philox([c0, c1, c2, c3], _key(seed, Stream.DROPOUT)), dim=-1)
    halves = torch.stack([words & 0xFFFF, words >> 16], dim=-1).flatten(1)[:, :channels]
    return halves >= round(p * 2**16)


def permutation(seed: int, epoch: int, n: int) -> np.ndarray:
    """The order of an epoch: int64 [n], a pure function of (seed, epoch)."""
    return np.random.Generator(np.random.Philox(key=[seed, (int(Stream.ORDER) << 32) + epoch])).permutation(n)


def window_permutation(seed: int, epoch: int, part: int, n: int) -> np.ndarray:
    """A permutation int64 [n] of a part of an epoch; a pure function of (seed, epoch, part)."""
    key = [seed, (int(Stream.WINDOW) << 32) + epoch]
    return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, part])).permutation(n)


def fill_weight(out: torch.Tensor, seed: int, name: str, start: int, kind: str, scale: float) -> None:
    """Fill ``out`` with elements [start, start + out.numel()) of the logical weight ``name``.

    Args:
        out: any contiguous float tensor; the draw is made on its device.
        start: offset of out in the flattened logical tensor, so that a rank that holds a slice gets its slice.
        kind: "normal" (standard deviation ``scale``) or "uniform" (in [-scale, scale)).
    """
    position = torch.zeros(1, dtype=torch.int64, device=out.device)
    flat = out.detach().view(-1)
    done = 0
    while done < flat.numel():
        block0, lane = divmod(start + done, 4)
        blocks = min(_CHUNK, -(-(lane + flat.numel() - done) // 4))
        words = _words(seed, Stream.WEIGHT, position, block0, blocks, sub=zlib.crc32(name.encode()))
        values = _to_normal(words) if kind == "normal" else _to_uniform(words) * 2 - 1
        values = values.flatten()[lane : lane + flat.numel() - done]
        flat[done : done + len(values)] = values * scale
        done += len(values)
