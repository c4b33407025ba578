"""Starts commands as :mod:`subprocess` does, from a process that has imported torch, DeepSpeed and the project already.

``run`` and ``Popen`` take what those of subprocess take, for command lines that begin with ``sys.executable``; each
process has a session of its own. What differs from a new interpreter: modules are there that the command itself does
not import, strings' hashes are alike in all ranks, and options of the interpreter (-X, -u, -W) are not known. Where
that is what a test is about, it starts a true one (tests/launchers).
"""

import atexit
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

from budget import LONGEST_ENDING, anything_may_start, may_start
from helpers.fork_server import LARGEST

ROOT = Path(__file__).parents[2]
ENV = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h

_lock = threading.RLock()  # threads that fork at once start a server once, and one at a time takes orphans
_servers: dict[str, "Server"] = {}


class Server:
    """The other end of tests/helpers/fork_server.py."""

    def __init__(self, preload: str, library: str = ""):
        self._connection, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, str(Path(__file__).with_name("fork_server.py")), str(theirs.fileno()), preload]
        environment = ENV | {"PYTHONPATH": str(ROOT)} | ({"LD_PRELOAD": library} if library else {})
        how = {"cwd": ROOT, "env": environment, "pass_fds": [theirs.fileno()], "start_new_session": True}
        with anything_may_start():
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, **how)
        theirs.close()
        if self._connection.recv(100) != b"ready":
            raise RuntimeError("the fork server ended as it began; its error is above")
        atexit.register(self.close)

    def fork(self, request: dict, streams: list[int]) -> int:
        """A new process's number; it is a child of this one."""
        with _lock, _taking_orphans():
            socket.send_fds(self._connection, [json.dumps(request).encode()], streams)
            number = int(self._connection.recv(100))
        # Raises where it is not a child of this process: subprocess would take that for status 0.
        os.waitid(os.P_PID, number, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        return number

    def left(self) -> list[int]:
        """The processes of what it started that have not ended."""
        with _lock:
            self._connection.send(b"left")
            return json.loads(self._connection.recv(LARGEST))

    def close(self) -> None:
        """End the server, and all that it started and that is still there."""
        self._connection.close()
        self._process.wait()


@contextmanager
def _taking_orphans():
    """Descendants whose parent ends become children of this process."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        yield
    finally:
        libc.prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


def close_all() -> list[int]:
    """End this process's servers; gives the processes that they had started and that had not ended."""
    deadline = time.monotonic() + LONGEST_ENDING
    while (left := [process for server in _servers.values() for process in server.left()]) and (
        time.monotonic() < deadline
    ):
        time.sleep(0.1)  # what was killed is still ending
    while _servers:
        _servers.popitem()[1].close()
    return left


def server(preload: str, library: str = "") -> Server:
    """This process's server, started when it is first asked for."""
    with _lock:
        if preload + library not in _servers:
            _servers[preload + library] = Server(preload, library)
        return _servers[preload + library]


class Popen(subprocess.Popen):
    """A process forked by the server.

    Args:
        preload: "project"; "libraries" for commands of a copy of the project; "nothing".
        finalize: end as Python does, to the last destructor, which takes 0.6 s.
        library: for LD_PRELOAD.
    """

    def __init__(self, args, *, preload: str = "project", finalize: bool = False, library: str = "", **options):
        may_start(" ".join(map(str, args)), forked=True)
        self._server, self._finalize = server(preload, library), finalize
        super().__init__(args, **options)

    # CPython's own (3.11 to 3.14): the one place where a process is made, with its ends of pipes, or -1 for ours.
    def _execute_child(
        self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, startupinfo, creationflags, shell,
        p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite, *rest,
    ):  # fmt: skip
        args = list(map(os.fspath, args))
        if args[0] != sys.executable or preexec_fn or pass_fds or shell or executable:
            raise ValueError(f"only python's command lines can be forked, not {args}")
        streams = [fd if fd >= 0 else number for number, fd in enumerate((p2cread, c2pwrite, errwrite))]
        environment = {name: os.fspath(value) for name, value in (os.environ if env is None else env).items()}
        try:
            request = {"command": args[1:], "cwd": os.path.abspath(cwd or "."), "env": environment}
            self.pid = self._server.fork(request | {"finalize": self._finalize}, streams)
            self._child_created = True
        finally:
            self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)


def kill(process: subprocess.Popen) -> None:
    """SIGKILL to a process that has a group of its own, and to all others in that."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def run(args, *, timeout: float | None = None, check: bool = False, **options) -> subprocess.CompletedProcess:
    """As :func:`subprocess.run`."""
    if options.pop("capture_output", False):
        options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    text = options.pop("input", None)
    if text is not None:
        options["stdin"] = subprocess.PIPE
    with Popen(args, **options) as process:
        try:
            out, err = process.communicate(text, timeout)
        except BaseException:
            kill(process)  # and what it has started
            raise
    done = subprocess.CompletedProcess(process.args, process.returncode, out, err)
    if check:
        done.check_returncode()
    return done
