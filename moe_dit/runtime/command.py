"""The top of every command: exit status, the one line of bad input, --help with examples."""

import argparse
import atexit
import gc
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable

from moe_dit.runtime.errors import Followed, InputError, Interrupted, NotJoined, Stop, left_behind
from moe_dit.runtime.processes import kill_children
from moe_dit.runtime.progress import console, leave_streams
from moe_dit.runtime.stopping import SIGNALS, end_torchrun, may_restart
from moe_dit.runtime.world import joined, world

LEAVING_SECONDS = 55.0  # for a command that has done all, or failed, to end at most
HARD_SECONDS = 5  # then, where the interpreter is gone and what it ran in does not end


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaint is one line, and whose --help ends with examples."""

    def __init__(self, description: str, examples: str):
        # Abbreviated flags would change meaning when a flag is added.
        spec = sys.modules["__main__"].__spec__
        super().__init__(
            prog=f"python -m {spec.name}" if spec else f"python {sys.argv[0]}",
            description=description,
            epilog="examples:\n" + examples,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message):
        raise InputError(f"{message}; see --help")


def run(main: Callable[[], int | None]) -> None:
    """Run a command's main and exit: with its status, or with one line and a :class:`Stop`'s (2 for bad input).

    An error that every rank raises is printed by rank 0 alone, any other by the rank that raised it, with its number
    and host. Before ranks have joined there is only the command line to be wrong, which all were given alike.
    """
    this = world()
    status = 1
    try:
        status = main() or 0
    except Stop as error:
        status = error.status
        alike = not (joined() or isinstance(error, NotJoined))
        everywhere = error.everywhere or alike
        if isinstance(error, Followed):
            pass
        elif this.rank == 0 or not everywhere:
            where = "" if everywhere or this.size == 1 else f"rank {this.rank} ({socket.gethostname()}): "
            kind = "" if isinstance(error, Interrupted) else "error: "
            console.print(f"{kind}{where}{error}", markup=False, soft_wrap=True)
        elif this.size > 1:
            time.sleep(2)  # launchers end every rank as soon as one exits, and rank 0 must speak first
        ends = error.ends_torchrun if isinstance(error, Interrupted) else everywhere and may_restart()
        if ends:
            end_torchrun(this.local_rank)
    except KeyboardInterrupt:
        status = 130
    except Exception as error:
        if left_behind(error):
            said = f"error: rank {this.rank} ({socket.gethostname()}): another rank has ended"
            console.print(said, markup=False, soft_wrap=True)
            sys.exit(status)
        if this.size > 1:
            error.add_note(f"on rank {this.rank}, host {socket.gethostname()}")
        raise
    finally:
        limit_the_end(status)
        kill_children()
        if joined():
            from moe_dit.runtime import ranks  # with torch, which a command that joined no group may never have needed

            ranks.stop()
        # Else the very last collection visits all that torch and DeepSpeed made: 2 s, and launchers wait for it.
        atexit.register(gc.freeze)
        leave_streams()
    sys.exit(status)


def limit_the_end(status: int) -> None:
    """From now on this process ends, whatever holds it: after :data:`LEAVING_SECONDS`, or at once when it is told to.

    Leaving NCCL may wait for ranks that are gone, and the interpreter waits for threads and processes; a failure must
    not hide in that. Nothing asks any more whether a signal came.
    """
    limit = threading.Timer(LEAVING_SECONDS, os._exit, [status or 1])
    limit.daemon = True
    limit.start()
    # The kernel's, for what runs when there are no threads of Python any more: destructors of libraries.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(int(LEAVING_SECONDS) + HARD_SECONDS)
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda *_: os._exit(status))
