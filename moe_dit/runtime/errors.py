"""Errors that end a command with one plain line instead of a traceback."""

import errno
import os
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


# What the system says of a place that a user named: a file where a folder is meant, another user's, no name at all.
_NO_PLACE = {errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP}


def of_a_place(error: Exception) -> Exception:
    """An error, or the InputError that it amounts to where a path cannot be what it was given for."""
    if isinstance(error, OSError) and error.errno in _NO_PLACE and error.filename is not None:
        name = os.fsdecode(error.filename) if isinstance(error.filename, bytes) else str(error.filename)
        return InputError(f"{name} cannot be used: {error.strerror}")
    return error


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
    if isinstance(error, Stop):
        error = error.__cause__  # a save's
    return isinstance(error, RuntimeError) and _LEFT_BEHIND.search(str(error)) is not None
