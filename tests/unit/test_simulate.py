"""What is asked of a simulation and cannot be."""

import pytest

from helpers import refused


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--simulate", "--rank", "16"], "--rank 16: it should be from 0 to 15"),
        (["--simulate", "--rank", "-1"], "--rank -1: it should be from 0 to 15"),
        (["--rank", "1"], "--rank says which rank --simulate is; give both or neither"),
        (["--simulate", "--table"], "--table and --simulate: give one of them"),
        (["--simulate", "--ds", "ds_configs/zero3_ep8.json"], "simulate ZeRO 1 or 2"),
    ],
)
def test_what_cannot_be_simulated_is_one_line(flags, line, capsys):
    command = ["jobs/plan.py", "--recipe", "digits", "--ds", "ds_configs/zero2_ep8.json", "--gpus", "16"]
    assert line in refused(capsys, *command, *flags)
