"""A process that has imported what commands import, and forks one for each command line that it is sent.

    python tests/helpers/fork_server.py SOCKET (project | libraries | nothing)

Its client is :mod:`helpers.forks`, which started it. It never computes, joins a group or starts a thread: so what it
forks is as sound as a new interpreter, and is there in a hundredth of the time.

A forked process belongs to the client, as if that had started it: it is forked twice, and as the first of the two ends,
the second is an orphan, which falls to the client while that takes orphans. When the client ends, however it does, what
is left of the sessions that were started for it is killed.
"""

import atexit
import gc
import importlib
import json
import os
import pkgutil
import random
import runpy
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import NoReturn

from setproctitle import getproctitle, setproctitle

LIBRARIES = ("torch", "torch.distributed.checkpoint", "deepspeed", "timm", "diffusers", "webdataset")
# What these import when an optimizer is made, a group is joined, a checkpoint is written; and what tests import.
LATER = ("torch._dynamo", "torch.utils.serialization.config", "deepspeed.comm.mori", "setuptools.command.build_ext")
TESTS = ("pytest", "sklearn.datasets", "scipy.linalg", "matplotlib.figure", "torch_fidelity")
PACKAGES = ("moe_dit", "data_prep", "eval")
LARGEST = 1 << 20  # bytes of a request or an answer


def preload(what: str) -> None:
    """Import nothing, the libraries, or for ``project`` its modules too."""
    if what == "nothing":
        return
    for name in (*LIBRARIES, *LATER, *TESTS):
        importlib.import_module(name)
    _ = sys.modules["deepspeed"].ops.__compatible_ops__  # asks a compiler, once
    for name in PACKAGES if what == "project" else ():
        package = importlib.import_module(name)
        for module in pkgutil.walk_packages(package.__path__, f"{name}."):
            if module.name != "moe_dit.kernels.triton_rows":  # for GPUs; its imports start more than a rank's do
                importlib.import_module(module.name)


def run(command: list[str]) -> None:
    """Be ``python COMMAND...``: a script, ``-m`` and a module, or ``-c`` and code, with arguments."""
    first, *rest = command
    sys.orig_argv = [sys.executable, *command]
    if first == "-m":
        sys.argv = rest
        sys.path[0] = os.getcwd()
        sys.modules.pop(rest[0], None)  # else runpy would warn
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif first == "-c":
        sys.argv = ["-c", *rest[1:]]
        sys.path[0] = ""
        main = sys.modules["__main__"] = ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec"), main.__dict__)
    else:
        sys.argv = command
        sys.path[0] = str(Path(first).resolve().parent)
        runpy.run_path(first, run_name="__main__")


def run_and_exit(command: list[str]) -> NoReturn:
    """As :func:`run`, and exit as Python does, but for taking all modules apart: 0.6 s of a forked process."""
    status, interrupted = 0, False
    try:
        run(command)
    except SystemExit as done:
        status = done.code if isinstance(done.code, int) else int(done.code is not None)
        if status and not isinstance(done.code, int):
            print(done.code, file=sys.stderr)
    except BaseException as error:
        sys.excepthook(*sys.exc_info())
        status, interrupted = 1, isinstance(error, KeyboardInterrupt)
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    if interrupted:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(status & 0xFF)


def become(request: dict, streams: list[int]) -> None:
    """Make this process, just forked, what the request says."""
    os.setsid()
    os.chdir(request["cwd"])
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    os.closerange(3, max([*streams, 1024]) + 1)
    os.environ.clear()
    os.environ.update(request["env"])
    # What an interpreter would do of itself, or libraries as they are loaded.
    sys.dont_write_bytecode = bool(request["env"].get("PYTHONDONTWRITEBYTECODE"))
    sys.path[1:1] = [path for path in request["env"].get("PYTHONPATH", "").split(os.pathsep) if path]
    random.seed()
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()
    if "torch" in sys.modules and (threads := request["env"].get("OMP_NUM_THREADS")):
        sys.modules["torch"].set_num_threads(int(threads))
    setproctitle(" ".join([sys.executable, *request["command"]]))


def fork(request: dict, streams: list[int]) -> int | None:
    """Fork a process that the client adopts; gives its number, and None in it."""
    read, write = os.pipe()
    between = os.fork()
    if between:
        os.close(write)
        os.waitpid(between, 0)
        number = int(os.read(read, 20))
        os.close(read)
        return number
    between = os.getpid()
    number = os.fork()
    if number:
        os.write(write, b"%d" % number)
        os._exit(0)
    while os.getppid() == between:
        time.sleep(0.0001)
    return None


def of_sessions(sessions: set[int]) -> dict[int, int]:
    """The processes of these sessions that have not ended, and the session of each."""
    found = {}
    for process in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):  # it ends now
            state, _, _, session = Path("/proc", process, "stat").read_text().rpartition(")")[2].split()[:4]
            if int(session) in sessions and state not in "ZX":
                found[int(process)] = int(session)
    return found


def serve(connection: socket.socket) -> dict:
    """Answer requests until the client is gone; returns only in what was forked, with the request."""
    sessions: set[int] = set()
    last = 0
    while True:
        message, streams, _, _ = socket.recv_fds(connection, LARGEST, 3)
        if message in (b"", b"left"):
            left = of_sessions(sessions)
            if message:
                connection.send(json.dumps(list(left)).encode())
                continue
            for number in left:
                with suppress(ProcessLookupError):
                    os.kill(number, signal.SIGKILL)
            os._exit(0)
        request = json.loads(message)
        number = fork(request, streams)
        if number is None:
            become(request, streams)
            return request
        for stream in streams:
            os.close(stream)
        if number < last:  # numbers begin again: what has ended may be somebody else's from now on
            sessions &= set(of_sessions(sessions).values())
        last = number
        sessions.add(number)
        connection.send(b"%d" % number)


def main() -> None:
    connection = socket.socket(fileno=int(sys.argv[1]))
    preload(sys.argv[2])
    threads = len(os.listdir("/proc/self/task"))
    assert threads == 1, f"{threads} threads: what is forked could wait for a lock of theirs for ever"
    gc.collect()
    gc.freeze()  # a collection in what is forked would copy the pages of all that was imported
    getproctitle()  # finds where the command line lies, while the environment is as the kernel made it
    connection.send(b"ready")
    request = serve(connection)
    if request["finalize"]:
        run(request["command"])
    else:
        run_and_exit(request["command"])


if __name__ == "__main__":
    main()
