"""The top of every command: exit status, the one line of bad input, --help with examples."""

import argparse
import sys
import time
from collections.abc import Callable

from moe_dit.runtime.errors import InputError, Interrupted, Stop
from moe_dit.runtime.ranks import world


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
    """Run a command's main and exit: with its status, or with one line and a :class:`Stop`'s (2 for bad input)."""
    try:
        status = main() or 0
    except Stop as error:
        status = error.status
        rank = world().rank
        if rank == 0 or error.local:
            where = f"rank {rank}: " if world().size > 1 and error.local else ""
            kind = "" if isinstance(error, Interrupted) else "error: "
            print(f"{kind}{where}{error}", file=sys.stderr, flush=True)
        else:
            # Launchers end every rank as soon as one exits; rank 0, which met the same problem, must speak first.
            time.sleep(5)
    except KeyboardInterrupt:
        status = 130
    sys.exit(status)
