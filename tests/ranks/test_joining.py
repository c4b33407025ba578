"""Ranks that do not come are named."""

import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from helpers import ENV, ROOT, TIMEOUT, forks, free_port

HOST = socket.gethostname()


# Rank 0 is there until the others have read its answer, however long they take.
JOIN = """
from moe_dit.runtime import command, joining, ranks
joining.READ_SECONDS = 300.0
command.run(lambda: ranks.start() and 0)
"""
JOINING = [sys.executable, "-c", JOIN]


def join(ranks: list[int], size: int, tmp_path: Path, **env: str) -> list[subprocess.CompletedProcess]:
    """Some ranks of a group that only joins; the others never come."""
    common = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    common |= {"MOE_DIT_JOIN_SECONDS": "8", "PYTHONPATH": str(ROOT)} | env

    def one(rank: int) -> subprocess.CompletedProcess:
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        return forks.run(JOINING, env=ENV | common | own, capture_output=True, text=True, timeout=TIMEOUT)

    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(one, ranks))


def test_a_rank_that_never_comes_is_named(tmp_path):
    done = join([0, 1, 2], 4, tmp_path)
    assert [rank.returncode for rank in done] == [1, 1, 1]
    line = f"error: rank 3 did not join within 8 s; there came ranks 0 to 2 ({HOST})\n"
    assert "".join(rank.stderr for rank in done) == line


def test_a_node_that_never_comes_is_named_as_slurm_names_it(tmp_path):
    """Two tasks on this host, as SLURM says too, and two on another that do not start."""
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f"#!/bin/sh\necho {HOST}\necho n2\n")
    scontrol.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    slurm = {"SLURM_STEP_NODELIST": "x", "SLURM_STEP_TASKS_PER_NODE": "2(x2)", "PATH": path}
    done = join([0, 1], 4, tmp_path, **slurm)
    assert "".join(rank.stderr for rank in done) == "error: ranks 2, 3 did not join within 8 s (node n2)\n"


def test_without_rank_0_one_rank_of_a_node_says_where_it_should_be(tmp_path):
    port = str(free_port())
    done = join([1, 2], 3, tmp_path, MOE_DIT_JOIN_SECONDS="1", MASTER_PORT=port)
    line = f"error: rank 1 ({HOST}): rank 0 is not to be found at 127.0.0.1:{port}, tried for 1 s\n"
    assert "".join(rank.stderr for rank in done) == line
    assert [rank.returncode for rank in done] == [1, 1]


def test_a_port_of_another_program_is_told_of(tmp_path):
    """It takes what ranks say, and answers nothing: torch's own store would wait for that for ever."""
    with socket.socket() as other:
        other.bind(("0.0.0.0", 0))
        other.listen()
        port = other.getsockname()[1]
        done = join([0, 1], 2, tmp_path, MOE_DIT_JOIN_SECONDS="1", MASTER_PORT=str(port))
    cure = "; where another program has that port, give another (MASTER_PORT, or the launcher's --master_port)"
    assert [rank.returncode for rank in done] == [1, 1]
    assert done[0].stderr.startswith(f"error: rank 0 ({HOST}): rank 0 cannot make a store at 127.0.0.1:{port}: ")
    assert "address already in use" in done[0].stderr and done[0].stderr.endswith(f"{cure}\n")
    line = f"error: rank 1 ({HOST}): what listens at 127.0.0.1:{port} is not rank 0, asked for 1 s{cure}\n"
    assert done[1].stderr == line


def test_how_long_ranks_wait_is_checked(tmp_path):
    (done,) = join([0], 2, tmp_path, MOE_DIT_JOIN_SECONDS="soon")
    assert done.returncode == 2
    assert done.stderr == "error: MOE_DIT_JOIN_SECONDS is 'soon'; it should be a number of seconds\n"
