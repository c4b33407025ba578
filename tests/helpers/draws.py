"""A run's draws once more, in Python's own integers and floats: an independent truth for the tests."""

import math

# What a draw is for; the numbers are part of every run's identity.
FLIP, LATENT, NOISE, TIME, LABEL_DROP, SAMPLE_NOISE, SAMPLE_LABEL, DROPOUT = 2, 3, 4, 5, 6, 8, 9, 10


def philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 as its paper writes it (Salmon et al., SC 2011)."""
    c, k = list(counter), list(key)
    for _ in range(10):
        p0, p1 = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & 0xFFFFFFFF, (p0 >> 32) ^ c[3] ^ k[1], p0 & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def words(seed: int, stream: int, position: int, count: int) -> list[int]:
    """The first 32-bit words of a position of the run: four of each counter (block, 0, position)."""
    key = [seed & 0xFFFFFFFF, (seed >> 32) ^ stream]
    counters = ([block, 0, position & 0xFFFFFFFF, position >> 32] for block in range(-(-count // 4)))
    return [word for counter in counters for word in philox(counter, key)][:count]


def uniform(seed: int, stream: int, position: int) -> float:
    """A number in [0, 1): the upper 24 bits of the position's first word."""
    return (words(seed, stream, position, 1)[0] >> 8) / 2**24


def normal(seed: int, stream: int, position: int, count: int) -> list[float]:
    """Unit normal numbers, two of each pair of words (Box and Muller, 1958)."""
    drawn = words(seed, stream, position, -(-count // 2) * 2)
    values = []
    for first, second in zip(drawn[::2], drawn[1::2], strict=True):
        radius = math.sqrt(-2 * math.log((first + 0.5) / 2**32))
        angle = 2 * math.pi * second / 2**32
        values += [radius * math.cos(angle), radius * math.sin(angle)]
    return values[:count]
