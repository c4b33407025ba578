"""Being told to stop: by a signal, or by the end of the launcher that started this rank.

SIGTERM comes from a launcher or a preemption, SIGUSR1 from SLURM's --signal. A launcher that is killed outright
(SIGKILL, out of memory) cannot end its ranks, which would then hold GPUs and the run's folder with nobody knowing:
DeepSpeed 0.19.8 and torchrun leave them be, so each rank watches its launcher itself.
"""

import os
import signal
import threading
import time
from pathlib import Path

import psutil

SECONDS_BETWEEN_LOOKS = 0.5
_SCRIPTS = {"deepspeed", "ds", "torchrun"}
_MODULES = {"deepspeed.launcher.runner", "deepspeed.launcher.launch", "torch.distributed.run"}


class StopRequest:
    """Notes the signals; the training loop asks. A second signal changes nothing: a save under way is finished."""

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

    def __init__(self):
        self.asked = False
        for number in self.SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number, frame):
        self.asked = True


def launchers() -> list[psutil.Process]:
    """The ancestors of this process that are Python launchers of ranks."""
    return [process for process in psutil.Process().parents() if _is_launcher(process)]


def end_with_launcher() -> None:
    """From now on, end this process at once when a launcher above it is gone; nothing where there is none."""
    above = launchers()
    if above:
        threading.Thread(target=_watch, args=(above,), daemon=True).start()


def _is_launcher(process: psutil.Process) -> bool:
    try:
        python, *arguments = process.cmdline() or [""]
    except psutil.Error:
        return False
    # Only the words before the user's own script: a shell or a test that mentions a launcher is none.
    words = arguments[:4]
    named = any(Path(word).name in _SCRIPTS or word in _MODULES for word in words)
    return Path(python).name.startswith("python") and named


def _watch(above: list[psutil.Process]) -> None:
    while all(_alive(process) for process in above):
        time.sleep(SECONDS_BETWEEN_LOOKS)
    os._exit(1)


def _alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
