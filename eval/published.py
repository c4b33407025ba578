"""The scores that arXiv:2512.01252 prints for these recipes: FID-50K and Inception Score."""

from typing import NamedTuple


class Published(NamedTuple):
    """One number of the table.

    Attributes:
        recipe: whose.
        guidance: scale.
        fid: of 50,000 samples.
        inception_score: the same.
        protocol: by which it was scored, of :mod:`eval.protocols`.
    """

    recipe: str
    guidance: float
    fid: float
    inception_score: float
    protocol: str


SAMPLES = 50_000
# After 700,000 steps, 250 Euler steps, without guidance and with 1.5.
_LATENT = {
    "dsmoe_s_e16": (39.84, 38.63, 14.53, 97.55),
    "dsmoe_s_e48": (40.20, 38.09, 14.81, 96.51),
    "dsmoe_b_e16": (20.33, 71.42, 4.50, 186.79),
    "dsmoe_b_e48": (19.46, 72.69, 4.27, 191.03),
    "dsmoe_l_e16": (9.80, 115.45, 2.59, 272.55),
    "dsmoe_l_e48": (9.19, 118.52, 2.55, 278.35),
    "dsmoe_3b_e16": (7.52, 135.29, 2.38, 304.93),
    "diffmoe_s_e16": (41.02, 37.53, 15.47, 94.04),
    "diffmoe_b_e16": (20.83, 70.26, 4.87, 183.43),
    "diffmoe_l_e16": (11.16, 107.74, 2.84, 256.57),
}
# After 200 epochs, 50 Heun steps, guidance 2.9 for t in (0.1, 1).
_PIXELS = {
    "jit_b_16": (4.81, 222.32),
    "jitmoe_b_16_e16": (4.23, 245.53),
    "jit_l_16": (3.19, 309.72),
    "jitmoe_l_16_e16": (3.10, 311.34),
}
TABLE = [
    *(Published(recipe, 1.0, row[0], row[1], "diffmoe") for recipe, row in _LATENT.items()),
    *(Published(recipe, 1.5, row[2], row[3], "diffmoe") for recipe, row in _LATENT.items()),
    *(Published(recipe, 2.9, *row, "jit") for recipe, row in _PIXELS.items()),
]


def published(recipe: str) -> list[Published]:
    """What is printed of a recipe; nothing of others."""
    return [row for row in TABLE if row.recipe == recipe]
