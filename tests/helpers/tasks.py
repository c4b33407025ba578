"""Starts a command's ranks as srun starts tasks, each forked from this process:

    python tests/helpers/tasks.py RANKS PORT COMMAND...

Where a rank fails the others are told to end, as by `srun --kill-on-bad-exit`; exits with its status.
"""

import os
import signal
import sys
import time
from pathlib import Path

from setproctitle import setproctitle

sys.path.insert(0, str(Path(__file__).parents[1]))
from helpers.fork_server import run_and_exit

GRACE = 60.0  # seconds that ranks have to end when told to


def environments(ranks: int, port: str, env: dict[str, str]) -> list[dict[str, str]]:
    """What each rank sees, beside an environment."""
    step = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": str(ranks), "MASTER_ADDR": "127.0.0.1"}
    step["MASTER_PORT"] = port
    return [env | step | {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)} for i in range(ranks)]


class Rank:
    """A forked process."""

    def __init__(self, pid: int):
        self.pid = pid
        self.status: int | None = None

    def poll(self) -> int | None:
        """Its exit status, negative for a signal; None while it runs."""
        if self.status is None and (ended := os.waitpid(self.pid, os.WNOHANG))[0]:
            self.status = os.waitstatus_to_exitcode(ended[1])
        return self.status

    def send(self, number: int) -> None:
        """Send it a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)


def main() -> int:
    size, port, *command = sys.argv[1:]
    ranks = []
    for env in environments(int(size), port, dict(os.environ)):
        pid = os.fork()
        if not pid:
            os.environ.update(env)
            setproctitle(" ".join([sys.executable, *command]))
            run_and_exit(command)
        ranks.append(Rank(pid))
    while any(rank.poll() is None for rank in ranks) and not any(rank.poll() for rank in ranks):
        time.sleep(0.02)
    status = next((rank.status for rank in ranks if rank.status), 0)
    for number in (signal.SIGTERM, signal.SIGKILL):
        for rank in ranks:
            rank.send(number)
        deadline = time.monotonic() + GRACE
        while any(rank.poll() is None for rank in ranks) and time.monotonic() < deadline:
            time.sleep(0.02)
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main())
