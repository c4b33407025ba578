"""One run in every topology, killed and continued in every other; tests/tools/matrix.py says what must hold."""

import pytest

from helpers import ROOT, call
from helpers.older_run import SHARDS


def matrix(*flags: str) -> int:
    """The command's exit status."""
    return call(str(ROOT / "tests/tools/matrix.py"), "--data", SHARDS, "--small", *flags)


def test_kills_during_saves_of_two_ranks():
    assert matrix("--only", "kills", "--kills", "3") == 0


@pytest.mark.long
def test_every_topology_and_every_other_that_continues_it():
    assert matrix("--kills", "8") == 0
