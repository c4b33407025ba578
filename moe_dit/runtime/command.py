"""The top of every command: exit status, the one line of bad input, --help with examples."""

import argparse
import atexit
import gc
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from moe_dit.runtime.errors import Followed, InputError, Interrupted, NotJoined, Stop, left_behind, of_a_place
from moe_dit.runtime.processes import kill_children, shorten_sockets
from moe_dit.runtime.progress import console, leave_streams
from moe_dit.runtime.stopping import SIGNALS, end_torchrun, may_restart
from moe_dit.runtime.wording import shortened
from moe_dit.runtime.world import joined, world

MOST_NUMBER = 2**53
LONGEST_NAME, LONGEST_PATH = 255, 4095  # bytes, of Linux
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
        raise InputError(f"{shortened(message, 1000)}; see --help")

    def parse_args(self, *args, **more):
        """As argparse's; without numbers that are none, and names that no file can have."""
        found = super().parse_args(*args, **more)
        for name, value in vars(found).items():
            for one in _each(value):
                if problem := _problem(one):
                    self.error(f"{name.replace('_', '-')}: {shortened(repr(str(one)))} {problem}")
        return found


def _each(value: Any) -> Iterator[Any]:
    """The single values of an argument, which may be lists of lists."""
    if isinstance(value, list):
        for one in value:
            yield from _each(one)
    else:
        yield value


def _problem(value: Any) -> str | None:
    """What is wrong with a value whatever it is for; None where nothing is."""
    if isinstance(value, float) and not math.isfinite(value):
        return "should be a finite number"
    if isinstance(value, int) and abs(value) > MOST_NUMBER:
        return f"should be at most {MOST_NUMBER}"
    if isinstance(value, str | Path) and "\0" in str(value):
        return "should not hold a zero byte"
    if isinstance(value, Path):
        name = os.fsencode(value)
        if len(name) > LONGEST_PATH or max(map(len, name.split(b"/"))) > LONGEST_NAME:
            return f"is longer than a path may be: {LONGEST_PATH} bytes, {LONGEST_NAME} a name"
    return None


def run(main: Callable[[], int | None]) -> None:
    """Run a command's main and exit: with its status, or with one line and a :class:`Stop`'s (2 for bad input).

    An error that every rank raises is printed by rank 0 alone, any other by the rank that raised it, with its number
    and host. Before ranks have joined there is only the command line to be wrong, which all were given alike.
    """
    this = world()
    status = 1
    try:
        try:
            shorten_sockets()
            status = main() or 0
        except OSError as error:  # of a command that is at work, it may pass
            raise error if joined() else of_a_place(error) from None
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
        status = status if leave_streams() else status or 1
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
    limit = threading.Timer(LEAVING_SECONDS, os._exit, [status])
    limit.daemon = True
    limit.start()
    # The kernel's, for what runs when there are no threads of Python any more: destructors of libraries.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(int(LEAVING_SECONDS) + HARD_SECONDS)
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda *_: os._exit(status))
