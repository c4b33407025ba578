"""Ranks in words, and a rank that meets nobody."""

import socket

import pytest
import torch

from moe_dit.runtime import ranks
from moe_dit.runtime.joining import numbered


@pytest.mark.parametrize(
    ("ranks", "text"),
    [([3], "rank 3"), ([0, 1], "ranks 0, 1"), ([0, 1, 2, 5, 8, 9, 10], "ranks 0 to 2, 5, 8 to 10")],
)
def test_ranks_for_people(ranks, text):
    assert numbered(ranks) == text


def test_one_rank_needs_no_port(monkeypatch):
    """Another program may have it."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        given = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(other.getsockname()[1]), "TORCH_GLOO_LAZY_INIT": "1"}
        for name, value in (given | {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}).items():
            monkeypatch.setenv(name, value)
        ranks.start(alone=True)
        try:
            seen = torch.ones(1)
            torch.distributed.all_reduce(seen)
            assert seen.item() == 1 and ranks.meeting() is None
        finally:
            ranks.stop()
