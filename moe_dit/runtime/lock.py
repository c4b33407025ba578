"""Holding a folder, so that two commands cannot write into it at once."""

import errno
import fcntl
import os
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

from moe_dit.runtime.errors import InputError
from moe_dit.runtime.files import write_bytes
from moe_dit.runtime.progress import say

# What file systems without locks answer (Lustre mounted without flock, some FUSE and parallel file systems).
_NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL}
MOST_TRIES = 10
_HELD = {errno.EAGAIN, errno.EACCES}


class Held(InputError):
    """Another process holds the folder."""


def lock_folder(folder: Path, what: str, patience: Callable[[], float] = lambda: 0.0) -> IO[str]:
    """Make and hold a folder until the file that this gives is closed or the process ends, however it ends.

    A POSIX record lock on FOLDER/.lock: child processes do not inherit it, and it works on NFS. Where the file system
    has no locks, one line says so. A folder that was copied by hard links gets a lock of its own.

    Args:
        folder: to hold.
        what: who else could be holding it, for the message.
        patience: how many seconds to wait for another holder in all; asked anew while waiting.

    Raises:
        Held: another process holds it.
        InputError: it cannot be written.
    """
    begin = time.monotonic()
    tries = 0  # to have the folder's own file; on some file systems two looks at one never agree
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
            file = os.fdopen(os.open(folder / ".lock", flags, 0o666), "a")
        except OSError as error:
            raise InputError(f"cannot write into {folder}: {error.strerror}; give another --out") from None
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise InputError(f"{folder}/.lock is not a file; move it away, or give another --out")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            status, named = os.fstat(file.fileno()), os.stat(folder / ".lock")
            same = os.path.samestat(status, named)
            if (same and named.st_nlink <= 1) or tries == MOST_TRIES:
                return file
            tries += 1
            if same:  # It is the lock of a copy by hard links too. Nobody holds it, so both can have one.
                write_bytes(folder / ".lock", b"")
            file.close()  # no longer the folder's
            continue
        except FileNotFoundError:  # removed by somebody since
            file.close()
            continue
        except OSError as error:
            if error.errno in _NO_LOCKS:
                say(
                    f"{folder} is on a file system without locks ({error.strerror}): take care that no two commands "
                    f"write into it at once, for nothing would notice"
                )
                return file
            file.close()
            if error.errno not in _HELD:
                raise InputError(f"cannot lock {folder}/.lock: {error.strerror}; give another --out") from None
        if time.monotonic() - begin >= patience():
            raise Held(f"{what} is writing into {folder}; wait for it, or give another --out")
        time.sleep(0.5)
