"""Starts a command's ranks as srun starts tasks, in a third of the time that DeepSpeed's launcher takes:

    python tests/tasks.py RANKS PORT COMMAND...

Where a rank fails the others are told to end, as by `srun --kill-on-bad-exit`; exits with its status.
"""

import os
import signal
import subprocess
import sys
import time

GRACE = 60.0  # seconds that ranks have to end when told to


def environments(ranks: int, port: str, env: dict[str, str]) -> list[dict[str, str]]:
    """What each rank sees, beside an environment."""
    step = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": str(ranks), "MASTER_ADDR": "127.0.0.1"}
    step["MASTER_PORT"] = port
    return [env | step | {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)} for i in range(ranks)]


def main() -> int:
    size, port, *command = sys.argv[1:]
    ranks = [subprocess.Popen(command, env=env) for env in environments(int(size), port, dict(os.environ))]
    while any(rank.poll() is None for rank in ranks) and not any(rank.poll() for rank in ranks):
        time.sleep(0.05)
    status = next((rank.returncode for rank in ranks if rank.returncode), 0)
    for number in (signal.SIGTERM, signal.SIGKILL):
        for rank in ranks:
            rank.send_signal(number)
        deadline = time.monotonic() + GRACE
        while any(rank.poll() is None for rank in ranks) and time.monotonic() < deadline:
            time.sleep(0.05)
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main())
