"""Being told to stop: by a signal, or by the end of the launcher that started this rank.

SIGTERM comes from a launcher or a preemption, SIGUSR1 from SLURM's --signal, SIGINT from a terminal, SIGHUP from one
that was closed. Each means the same: finish the step, save, end with status 75.

A launcher that ends without ending its ranks (SIGKILL; or SIGTERM and SIGUSR1, which kill DeepSpeed 0.19.8's runner at
once, and SIGUSR1 torchrun) leaves them behind, holding GPUs and the run's folder with nobody knowing. So each rank
watches its launchers itself, and takes the end of one for a request to stop.
"""

import os
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

GRACE_SECONDS = 300.0  # for a rank whose launcher is gone, to finish its step and save; then it ends in any case
SECONDS_BETWEEN_LOOKS = 0.5
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)

_TORCHRUN = {"torchrun", "torch.distributed.run"}
_LAUNCHERS = _TORCHRUN | {"deepspeed", "ds", "deepspeed.launcher.runner", "deepspeed.launcher.launch"}


class StopRequest:
    """Notes that this rank was told to stop; the training loop asks.

    A second signal changes nothing, so that a save under way is finished, but for a second SIGINT: whoever presses
    Ctrl-C twice wants the end at once.
    """

    def __init__(self) -> None:
        self.asked = False
        self.number: int | None = None  # of a signal that it was told by; another than SIGTERM, where one came
        for number in SIGNALS:
            # nohup ignores SIGHUP, and is meant. The others a job script ignores, for launchers that they would kill.
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._note)

    def _note(self, number: int, frame: object) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True
        if self.number in (None, signal.SIGTERM):
            self.number = number

    def ends_torchrun(self) -> bool:
        """Whether torchrun is to end with this rank (:func:`end_torchrun`) rather than decide itself.

        Where torchrun may start ranks anew, it sends SIGTERM itself, before it starts them with more or fewer nodes. A
        rank that was not signalled cannot know why others were. SLURM and people reach torchrun and all its ranks.
        """
        return not may_restart() or self.number not in (None, signal.SIGTERM)

    def watch_launchers(self) -> None:
        """From now on, take the end of a launcher above this process for a request; nothing where there is none."""
        above = launchers()
        if above or _left_behind(above):
            threading.Thread(target=self._watch, args=(above,), name="launcher watch", daemon=True).start()

    def _watch(self, above: list[psutil.Process]) -> None:
        while not _left_behind(above) and all(_alive(process) for process in above):
            time.sleep(SECONDS_BETWEEN_LOOKS)
        self.asked = True
        time.sleep(GRACE_SECONDS)
        os._exit(1)  # nothing can be waiting for it any more, and a collective would wait on


@contextmanager
def signals_held() -> Iterator[None]:
    """Processes started in the block never see the signals; this one sees those that came meanwhile afterwards.

    A launcher signals its ranks' children and process groups too, and a rank cannot finish a step without the workers
    that read its data.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def launchers() -> list[psutil.Process]:
    """The ancestors of this process that are Python launchers of ranks."""
    return [process for process in psutil.Process().parents() if _is(process, _LAUNCHERS)]


def _left_behind(above: list[psutil.Process]) -> bool:
    """Whether a launcher was gone before this rank could see it; ``above`` are those that it saw."""
    if not above:  # what torchrun and DeepSpeed's launcher give to their ranks
        return "TORCHELASTIC_RUN_ID" in os.environ or "CROSS_RANK" in os.environ
    # DeepSpeed's runner starts its launcher, which ssh or a person starts otherwise, and never init.
    try:
        parent = above[-1].parent() if _is(above[-1], {"deepspeed.launcher.launch"}) else None
        return parent is not None and (parent.pid == 1 or parent.name() == "systemd")
    except psutil.Error:
        return True


def may_restart() -> bool:
    """Whether torchrun starts this rank anew where ranks or nodes fail (--max-restarts)."""
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0


def was_restarted() -> bool:
    """Whether torchrun has started this rank anew."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def end_torchrun(local_rank: int) -> None:
    """Where all ranks end alike: end torchrun by SIGUSR1, so that its status (138 in a shell) tells of a stop.

    torchrun (torch 2.14) makes status 1 and a traceback of every end of its ranks but 0, SIGTERM to itself included;
    and where it may restart ranks, it would start those anew that were told to stop, or that would fail in the same way
    again. All ranks of the node call it.
    """
    # jobs/slurm/job.sh has torchrun ignore SIGUSR1 and SIGTERM, which SLURM sends to all processes of a step. Then it
    # ends by SIGHUP, which it passes on to its ranks, and waits for them.
    handled = "SIGTERM" not in os.environ.get("TORCHELASTIC_SIGNALS_TO_HANDLE", "SIGTERM")
    number = signal.SIGHUP if handled else signal.SIGUSR1
    for agent in (process for process in launchers() if _is(process, _TORCHRUN)):
        try:
            if local_rank == 0:
                agent.send_signal(number)
            # A rank that left earlier would be the failure that torchrun reports.
            agent.wait(2 if handled else 10)
        except (psutil.NoSuchProcess, psutil.TimeoutExpired):
            pass


def end_lost_torchrun(seconds: float) -> None:
    """Kill the torchrun above this rank if the store of its rendezvous does not answer within some seconds.

    torchrun (torch 2.14) waits for that without a limit of its own and does not see meanwhile that its ranks have
    ended; the kernel lets go after a quarter of an hour. One whose rendezvous answers starts its ranks anew.
    """
    for agent in (process for process in launchers() if _is(process, _TORCHRUN)):
        with suppress(psutil.Error):
            found = re.search(r"\0--rdzv[-_]endpoint[=\0]\[?([^\0]+?)\]?:(\d+)\0", "\0".join([*agent.cmdline(), ""]))
            # Without the flag it is where the ranks meet.
            place = found.groups() if found else (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"])
            try:
                socket.create_connection((place[0], int(place[1])), seconds).close()
            except ConnectionRefusedError:
                continue  # which it sees itself
            except OSError:
                agent.kill()


def _is(process: psutil.Process, names: set[str]) -> bool:
    """Whether a process is Python running one of these scripts or modules."""
    try:
        python, *arguments = process.cmdline() or [""]
    except psutil.Error:
        return False
    # Only the words before the user's own script: a shell or a test that mentions a launcher is none.
    words = arguments[:4]
    named = any(Path(word).name in names or word in names for word in words)
    return Path(python).name.startswith("python") and named


def _alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
