"""Ranks that torchrun starts again."""

import socket
import subprocess
import sys

from helpers import ENV, ROOT, TIMEOUT, free_port

HOST = socket.gethostname()


RESTARTED = """\
import os, torch
from moe_dit.runtime import command, ranks
def main():
    ranks.start()
    seen = torch.ones(1)
    torch.distributed.all_reduce(seen)
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
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
    env = ENV | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"sum 2.0 ['{HOST}', '{HOST}']"] * 2
