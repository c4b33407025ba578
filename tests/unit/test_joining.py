"""Ranks in words."""

import pytest

from moe_dit.runtime.joining import numbered


@pytest.mark.parametrize(
    ("ranks", "text"),
    [([3], "rank 3"), ([0, 1], "ranks 0, 1"), ([0, 1, 2, 5, 8, 9, 10], "ranks 0 to 2, 5, 8 to 10")],
)
def test_ranks_for_people(ranks, text):
    assert numbered(ranks) == text
