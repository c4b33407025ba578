"""A command line of docs/extending.md as its reader gives it, to a shell; tests/ranks has all of the page."""

import pytest

from helpers import losses
from helpers.extending import DIGITS, Copy


@pytest.mark.long
def test_a_command_of_the_page_as_it_stands(latents, tmp_path):
    """DeepSpeed's launcher, in the copy, starts the ranks that tests/ranks forks: to the same losses."""
    found = []
    for launched in (True, False):
        project = Copy(tmp_path / f"launched_{launched}", launched)
        project.link(latents)
        [command] = project.extend("3")
        assert command.startswith("deepspeed --num_gpus 2 ")
        found.append(losses(project.train(command, DIGITS)))
    assert found[0] == pytest.approx(found[1], rel=1e-6)
