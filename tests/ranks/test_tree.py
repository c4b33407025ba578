"""Ranks that talk over trees connect with few others: as many real ones as a machine carries."""

import json
import sys

import pytest

from helpers import ENV, ROOT, forks


def many(ranks: int, **env: str) -> list[dict]:
    """Real ranks over gloo with a training run's groups (tests/tools/many_ranks.py), EP 8: what each had open."""
    command = [sys.executable, "tests/tools/many_ranks.py", str(ranks), "8"]
    environment = ENV | {"DS_ACCELERATOR": "cpu"} | env
    done = forks.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_ranks_connect_with_few_others():
    """16 ranks have 11 or 12 connections each beside the store's; as a mesh they would have 45 and more."""
    found = many(16)
    assert len(found) == 16
    for moment in ("before", "after"):
        assert [rank[moment]["store"] for rank in found] == [17] + 15 * [1]
        assert max(rank[moment]["sockets"] - rank[moment]["store"] for rank in found) <= 14
    assert {rank["groups"] for rank in found} == {12}
    assert max(sum(rank["calls"].values()) for rank in found) <= 50


@pytest.mark.long
def test_64_ranks_connect_with_few_others():
    """64 ranks: at most 100 sockets and 200 files; without what is done about it, some 250 sockets (24 ranks: 90)."""
    meshes = many(24, TORCH_GLOO_LAZY_INIT="0")
    assert len(meshes) == 24 and min(rank["before"]["sockets"] for rank in meshes) > 3 * 23
    found = many(64)
    assert len(found) == 64
    for moment in ("before", "after"):
        assert max(rank[moment]["sockets"] for rank in found) <= 100
        assert max(rank[moment]["files"] for rank in found) <= 200
        # Of rank 0's, 65 are the store's: one of every rank, its own at both ends. The rest are its neighbours in rings
        # and trees, no more than other ranks have.
        first, *others = (rank[moment]["sockets"] - rank[moment]["store"] for rank in found)
        assert found[0][moment]["store"] == 65 and {rank[moment]["store"] for rank in found[1:]} == {1}
        assert max(first, *others) <= 24
    # Each group is a call on every rank, but only members speak with the store: of themselves, and of whom they meet.
    assert {rank["groups"] for rank in found} == {18}
    assert max(sum(rank["calls"].values()) for rank in found) <= 50
