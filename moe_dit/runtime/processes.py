"""How helper processes start, and end."""

import multiprocessing
import multiprocessing.util
import os
import select
import tempfile
import threading
import time
from typing import Any

import psutil

from moe_dit.runtime.errors import InputError

LONGEST_PLACE = 60  # bytes of a folder; multiprocessing adds 32, and a socket's path has at most 107


def forkserver() -> Any:
    """Processes forked from one that has only imported what they need, a multiprocessing context.

    They must not inherit a CUDA context or gloo's threads, and each would take seconds to import torch.
    """
    shorten_sockets()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["moe_dit.data"])
    return context


def kill_children() -> None:
    """End all processes that multiprocessing started for this one, whatever they do.

    An interpreter sends them SIGTERM as it ends, which they never see (:func:`signals_held`), and waits for them.
    """
    for child in multiprocessing.active_children():
        child.kill()


def shorten_sockets() -> None:
    """Let multiprocessing's sockets lie where their paths fit into what the kernel takes, however long TMPDIR is."""
    place = tempfile.gettempdir()
    if len(os.fsencode(place)) <= LONGEST_PLACE:
        return
    for short in ("/tmp", "/var/tmp", "/dev/shm"):
        if os.path.isdir(short) and os.access(short, os.W_OK | os.X_OK):
            tempfile.tempdir = short
            try:
                multiprocessing.util.get_temp_dir()  # made once, and removed at the end; child processes get it too
            finally:
                tempfile.tempdir = place
            return
    raise InputError(f"TMPDIR {place} is too long for sockets ({LONGEST_PLACE} bytes fit); give a shorter one")


def end_with(pid: int, *_: Any) -> None:
    """End this process when process ``pid`` of this machine ends, however it does.

    A forkserver's children are not told: torch's DataLoader workers (2.14) watch their parent, which is the server, and
    the server (Python 3.11) stays while a child of its holds its pipe. After kill -9 both would stay for good.
    """
    descriptor = None
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        os._exit(1)
    except OSError:  # Linux before 5.3, or forbidden in a container
        pass

    def wait() -> None:
        if descriptor is not None:
            select.select([descriptor], [], [])
        while descriptor is None and psutil.pid_exists(pid):
            time.sleep(2)
        os._exit(1)

    threading.Thread(target=wait, name="end with the main process", daemon=True).start()
