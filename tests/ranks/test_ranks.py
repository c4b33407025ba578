"""What happens on one rank and concerns all: errors told once, with rank and host; groups left in order."""

import os
import shutil
import socket
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from helpers import ENV, ROOT, TIMEOUT, forks, run_ranks, run_scripts
from helpers.older_run import SHARDS
from helpers.small import flags_of

HOST = socket.gethostname()


def test_a_node_without_its_data_is_named(tmp_path):
    """Shards that one rank finds and the other does not, as where a node has not mounted them."""
    folders = [tmp_path / "mounted", tmp_path / "not_mounted"]
    for folder in folders:
        folder.mkdir()
    shutil.copytree(SHARDS, folders[0] / "shards")
    command = [sys.executable, str(ROOT / "jobs/train.py"), *flags_of(tmp_path / "run", "zero2_ep2"), "--data=shards"]
    first, second = run_ranks([command] * 2, folders)
    assert (first.returncode, second.returncode) == (2, 2)
    assert first.stderr.splitlines()[-1].startswith(f"error: rank 1 ({HOST}): no folder of shards shards")
    assert first.stderr.count("error: ") == 1 and second.stderr == ""
    assert not (tmp_path / "run").exists()


SAME = """
def fail():
    raise InputError("bad")
ranks.agreed(fail)
"""


DIFFERENT = """
def fail():
    if rank:
        raise InputError(f"bad {rank // 2}")
ranks.agreed(fail)
"""


OTHER = f"rank 1 ({HOST}): bad 0; and rank 2 ({HOST}): bad 1"


@pytest.mark.parametrize(
    ("body", "line"),
    [(SAME, "bad"), (DIFFERENT, OTHER), ("raise InputError('bad', everywhere=True)", "bad")],
    ids=["same", "different", "everywhere"],
)
def test_an_error_is_told_once(tmp_path, body, line):
    done = run_scripts(body, 3, tmp_path)
    assert "".join(rank.stderr for rank in done) == f"error: {line}\n"
    assert [rank.returncode for rank in done] == [2] * 3


def test_an_error_of_one_rank_alone_names_it(tmp_path):
    done = run_scripts("raise Stop('lost') if rank == 1 else SystemExit(0)", 2, tmp_path)
    assert done[1].stderr == f"error: rank 1 ({HOST}): lost\n" and done[1].returncode == 1
    assert done[0].stderr == "" and done[0].returncode == 0


@pytest.mark.parametrize("call", ["from_rank_0", "agreed"])
def test_whatever_fails_on_rank_0_ends_the_others(tmp_path, call):
    """Not an error that anybody foresaw: the traceback is rank 0's, and nobody waits for it."""
    done = run_scripts(f"ranks.{call}(lambda: {{}}['key'] if rank == 0 else None)", 2, tmp_path)
    assert "KeyError" in done[0].stderr and f"on rank 0, host {HOST}" in done[0].stderr
    assert (done[0].returncode, done[1].returncode) == (1, 1)
    assert done[1].stderr == ""


ENDING = """\
from moe_dit.engine import start_ranks
from moe_dit.runtime import command
from moe_dit.runtime.errors import InputError
def main():
    start_ranks()
    raise InputError("bad")
command.run(main)
"""


def test_bad_input_after_ranks_have_joined_never_aborts():
    """Three of eight such endings aborted (status -6) before commands left their group; four at a time make a load."""

    def end(_) -> tuple[int, str]:
        command = [sys.executable, "-c", ENDING]
        done = forks.run(command, finalize=True, cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=TIMEOUT)
        return done.returncode, done.stderr

    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(end, range(int(os.environ.get("ENDINGS", "16"))))) == {(2, "error: bad\n")}
