"""Ranks that torchrun starts again."""

import socket
import subprocess
import sys

from helpers import ENV, ROOT, TIMEOUT, free_port

HOST = socket.gethostname()


# When they meet again, rank 0 begins only after rank 1 has found the answer of before the restart.
RESTARTED = """\
import os, torch
from pathlib import Path
from moe_dit.runtime import command, joining, ranks
gather, get, found = joining._gather, joining._get, Path("found")
def gather_late(*arguments):
    joining._until(found.exists, 300)
    return gather(*arguments)
def get_and_tell(store, key):
    if os.environ["RANK"] == "1" and key.endswith("/answer"):
        found.touch()
    return get(store, key)
def main():
    restarted = os.environ["TORCHELASTIC_RESTART_COUNT"] == "1"
    if restarted:
        joining._gather, joining._get = gather_late, get_and_tell
    ranks.start()
    seen = torch.ones(1)
    torch.distributed.all_reduce(seen)
    if not restarted:
        os._exit(3)
    os.write(1, f"sum {seen.item()} {ranks.hosts()}\\n".encode())  # at once: print's parts may mix with another rank's
command.run(main)
"""


def test_ranks_that_torchrun_restarts_meet_anew(tmp_path):
    """Its store outlives them, with all that the first ones left there."""
    script = tmp_path / "script.py"
    script.write_text(RESTARTED)
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--max-restarts", "1", "--monitor-interval=0.1"]
    command = [sys.executable, *torchrun, "--master_port", str(free_port()), str(script)]
    env = ENV | {"PYTHONPATH": str(ROOT), "MOE_DIT_JOIN_SECONDS": "60"}
    out, log = tmp_path / "out", tmp_path / "log"
    with open(out, "w") as stdout, open(log, "w") as stderr:  # to no pipe: what is left of a broken run would hold it
        done = subprocess.run(command, cwd=tmp_path, env=env, stdout=stdout, stderr=stderr, timeout=TIMEOUT)
    assert done.returncode == 0, log.read_text()
    assert (tmp_path / "found").exists()
    assert out.read_text().splitlines() == [f"sum 2.0 ['{HOST}', '{HOST}']"] * 2
