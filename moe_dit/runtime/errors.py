"""Errors that end a command with one plain line instead of a traceback."""

import re

# What gloo (in torch 2.14) and NCCL say to ranks that wait for one that is no more.
_LEFT_BEHIND = re.compile(r"gloo.*(closed|reset) by peer|gloo.*broken pipe|remote process exited", re.I | re.S)


class Stop(Exception):
    """A command cannot go on, and a person should read why, in one line.

    Commands print it and exit with ``status`` (see :func:`moe_dit.runtime.command.run`); nothing else catches it.

    Args:
        message: the line to print: what is wrong, where, and what would be right.
        everywhere: True where every rank raises this same error, so that rank 0 alone prints it; otherwise each rank
            that raises one prints it, with its number and host.
    """

    status = 1

    def __init__(self, message: str, *, everywhere: bool = False):
        super().__init__(" ".join(message.split()))
        self.everywhere = everywhere


class InputError(Stop):
    """What a user gave (a recipe, a flag, a file) cannot be used: the one error type for bad input."""

    status = 2


class Interrupted(Stop):
    """Told to stop (SIGTERM, SIGUSR1, ...), and everything is saved."""

    status = 75  # sysexits.h's EX_TEMPFAIL: try again later
    ends_torchrun = True  # StopRequest.ends_torchrun's word


class NotJoined(Stop):
    """Ranks did not find each other; unlike any other error before they have, not all ranks know the same."""


class Followed(Stop):
    """Another rank failed, and has said why: this one ends with it, and says nothing."""


def left_behind(error: BaseException | None) -> bool:
    """Whether a collective failed because another rank has ended."""
    return isinstance(error, RuntimeError) and _LEFT_BEHIND.search(str(error)) is not None
