"""Whatever happens to a process that reads is one line; a command ends, whatever holds it."""

import errno
import json
import os
import re
import signal
import socket
import sys
import time
from functools import partial
from multiprocessing import active_children
from multiprocessing.util import Finalize
from pathlib import Path
from textwrap import dedent

import numpy as np
import psutil
import pytest
import torch

from data_prep import pack_pixels
from helpers import ENV, ROOT, TIMEOUT, call, forks, kill, losses, start_training, told, wait_for, wait_for_step
from moe_dit.runtime import loading
from moe_dit.runtime.errors import InputError, Stop, left_behind

HOST = socket.gethostname()
NAMED = r"loader process [12] of 2 \(pid \d+\) "
REMEDY = (
    r"; perhaps memory or /dev/shm \([\d,.]+ MiB\) is too small: give more, or fewer processes \(--workers, now 2\)"
)
SMALL = ["model.depth=2", "model.hidden_size=32", "model.num_heads=2", "model.moe.expert_width=16"]
SMALL = [word for change in [*SMALL, "global_batch_size=16"] for word in ("--set", change)]


class Numbers(torch.utils.data.Dataset):
    """Its samples are their own numbers, until one does something else."""

    def __init__(self, does=None, at: int = 9):
        self.does = does
        self.at = at

    def __getitem__(self, i: int) -> torch.Tensor:
        if i == self.at and self.does is not None:
            self.does()
        return torch.tensor(i)


def read(dataset, samples: int = 32, collate=torch.stack) -> list:
    """All batches of four, of two processes."""
    each = [list(range(first, first + 4)) for first in range(0, samples, 4)]
    return list(loading.read(dataset, 2, "--workers", collate, forked=True, batch_sampler=each))


def raises(error):
    def fail():
        raise error

    return fail


def test_what_is_read_is_whole_and_in_order():
    before = active_children()
    assert torch.cat(read(Numbers())).tolist() == list(range(32))
    assert active_children() == before


@pytest.mark.parametrize(
    ("does", "line"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGKILL), NAMED + "was ended by SIGKILL" + REMEDY),
        (lambda: os.kill(os.getpid(), signal.SIGBUS), NAMED + "was ended by SIGBUS" + REMEDY),
        (lambda: os.kill(os.getpid(), signal.SIGSEGV), NAMED + "was ended by SIGSEGV" + REMEDY),
        (lambda: os._exit(3), NAMED + "ended by itself, with status 3" + REMEDY),
        (raises(MemoryError()), NAMED + r"failed: MemoryError \(test_loading.py, line \d+\)" + REMEDY),
        (
            raises(OSError(errno.ENOSPC, "No space left on device")),
            NAMED + r"failed: OSError: \[Errno 28\] No space left on device \(test_loading.py, line \d+\)" + REMEDY,
        ),
        (raises(ImportError("no PIL")), NAMED + r"failed: ImportError: no PIL \(test_loading.py, line \d+\)"),
        (raises(InputError("shard x is damaged")), "shard x is damaged"),
    ],
    ids=["killed", "bus", "segment", "exit", "memory", "full", "import", "input"],
)
def test_what_befalls_a_process_is_one_line(capfd, does, line):
    before = active_children()
    with pytest.raises(Stop) as caught:
        read(Numbers(does))
    assert re.fullmatch(line, str(caught.value)) and "\n" not in str(caught.value)
    assert type(caught.value) is (InputError if line == "shard x is damaged" else Stop)
    assert capfd.readouterr() == ("", "")
    assert active_children() == before and not list(Path("/dev/shm").glob(f"torch_{os.getpid()}_*"))


def test_a_process_that_dies_when_all_is_read_changes_nothing():
    """Torch itself kills one that takes long to end."""

    class Ends(Numbers):
        def __getitem__(self, i: int) -> torch.Tensor:
            if i in (0, 4):  # the first samples of the two processes
                Finalize(None, partial(os._exit, 3) if i == 0 else partial(time.sleep, 1), exitpriority=0)
            return super().__getitem__(i)

    before = active_children()
    assert torch.cat(read(Ends())).tolist() == list(range(32))
    assert active_children() == before


def test_batches_outlive_the_process_that_read_them(tmp_path):
    """One of two has read all of its own, and has ended, before the other gives the batch whose turn is first."""

    class Parts(torch.utils.data.IterableDataset):
        def __iter__(self):
            if torch.utils.data.get_worker_info().id == 1:
                (tmp_path / "pid").write_text(str(os.getpid()))
            else:
                wait_for((tmp_path / "pid").exists, "the other process", None)
                wait_for(lambda: not psutil.pid_exists(int((tmp_path / "pid").read_text() or 0)), "its end", None)
            yield from (torch.full((3,), torch.utils.data.get_worker_info().id) for _ in range(2))

    found = list(loading.read(Parts(), 2, "--workers", torch.stack, forked=True, batch_size=2, prefetch_factor=4))
    assert [batch.tolist() for batch in found] == [[[0] * 3] * 2, [[1] * 3] * 2]


def test_a_message_cut_short_is_not_waited_for(monkeypatch):
    """A process is killed amid a message: what would be the rest of it never comes."""

    def send(self, content, write=os.write):
        if len(content) > 10_000:
            write(self._handle, content[:1000])
            os.kill(os.getpid(), signal.SIGKILL)
        while content:
            content = content[write(self._handle, content) :]

    def collate(samples):
        return np.zeros(100_000 if samples[0] == 8 else 1, np.uint8)

    monkeypatch.setattr("multiprocessing.connection.Connection._send", send)
    with pytest.raises(Stop, match=NAMED + "was ended by SIGKILL" + REMEDY):
        read(Numbers(), collate=collate)


def test_shared_memory_that_is_full_is_one_line(monkeypatch, capfd):
    """What torch says then, in the process that would send a batch."""

    def full(_):
        raise RuntimeError("unable to allocate shared memory(shm): No space left on device (28)\nException raised from")

    monkeypatch.setattr(torch.UntypedStorage, "_share_fd_cpu_", full)
    line = NAMED + r"failed: RuntimeError: unable to allocate.*\(28\) \(\w+.py, line \d+\)" + REMEDY
    with pytest.raises(Stop, match=line):
        read(Numbers())
    assert capfd.readouterr() == ("", "")


def test_a_batch_that_its_queue_cannot_take_is_not_waited_for(monkeypatch):
    def short(_):
        if os.getpid() != here:
            raise MemoryError

    here = os.getpid()
    monkeypatch.setattr(loading._Parcel, "__reduce__", short)
    with pytest.raises(Stop, match=NAMED + "ended by itself, with status 1" + REMEDY):
        read(Numbers())


def test_a_process_that_is_stopped_ends_with_the_rest(monkeypatch):
    monkeypatch.setattr(loading, "ENDING_SECONDS", 0.2)
    before = active_children()
    batches = loading.read(Numbers(), 2, "--workers", torch.stack, forked=True, batch_sampler=[[0], [1], [2]])
    next(batches)
    for worker in set(active_children()) - set(before):
        os.kill(worker.pid, signal.SIGSTOP)
    batches.close()
    assert active_children() == before


def test_processes_that_cannot_start_are_one_line(monkeypatch, capfd):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("multiprocessing.synchronize.SemLock.__init__", full)
    line = r"loader processes cannot be started: OSError: \[Errno 28\] No space left on device" + REMEDY
    with pytest.raises(Stop, match=line):
        read(Numbers())
    assert capfd.readouterr() == ("", "")


def test_packing_goes_on_where_a_process_died(few_digits, tmp_path, monkeypatch, capfd):
    flags = ["--images", few_digits / "images", "--size", 32, "--shard-size", 16]
    assert call("data_prep.pack_pixels", *flags, "--out", tmp_path / "whole") == 0
    image = pack_pixels.load_image
    count = iter(range(10_000))

    def dies(file, size):
        return os.kill(os.getpid(), signal.SIGKILL) if next(count) == 60 else image(file, size)

    capfd.readouterr()
    monkeypatch.setattr(pack_pixels, "load_image", dies)
    flags += ["--workers", "2", "--out", tmp_path / "out"]
    assert call("data_prep.pack_pixels", *flags) == 1
    errors = [line for line in capfd.readouterr().err.splitlines() if "error" in line.lower()]
    assert len(errors) == 1 and re.fullmatch("error: " + NAMED + "was ended by SIGKILL" + REMEDY, errors[0])
    assert not (tmp_path / "out" / "manifest.json").exists()
    monkeypatch.setattr(pack_pixels, "load_image", image)
    assert call("data_prep.pack_pixels", *flags) == 0
    shards = [{file.name: file.read_bytes() for file in (tmp_path / name).glob("*.tar")} for name in ("whole", "out")]
    assert len(shards[0]) == 19 and shards[0] == shards[1]


# --- in a run ---------------------------------------------------------------------------------------------------------


def workers_of(process: psutil.Process, rank: int) -> list[psutil.Process]:
    """The processes that read for a rank of a run."""
    found = []
    for child in process.children(recursive=True):
        try:
            server = child.parent()
            mine = server is not None and "forkserver" in " ".join(server.cmdline())
            if mine and child.environ().get("RANK", "0") == str(rank):
                found.append(child)
        except psutil.Error:  # it ends now
            pass
    return found


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_ends_where_a_loader_process_is_killed(latents, tmp_path, ranks):
    """The last rank's: the others are left in a collective, and the interpreter's end waits for the other process."""
    run = tmp_path / "run"
    flags = ["--steps", "100000", *SMALL, "--set", "data.workers=2", "--set", "checkpoint.every=100000"]
    process = start_training(ranks, "zero1_ep1" if ranks == 1 else "zero2_ep2", latents, run, *flags)
    try:
        wait_for_step(run, 3, process)
        started = psutil.Process(process.pid).children(recursive=True)
        wait_for(lambda: len(workers_of(psutil.Process(process.pid), ranks - 1)) == 2, "two processes", None)
        workers_of(psutil.Process(process.pid), ranks - 1)[1].kill()
        assert process.wait(TIMEOUT) == 1
        _, alive = psutil.wait_procs(started, timeout=TIMEOUT)
        assert not [child for child in alive if child.status() != psutil.STATUS_ZOMBIE]
    finally:
        kill(process)
    log = (tmp_path / "run.log").read_text()
    line = NAMED + "was ended by SIGKILL" + REMEDY.replace("--workers", "data.workers")
    where = rf"rank 1 \({HOST}\): " if ranks == 2 else ""
    errors = [said for said in log.splitlines() if "rror" in said]
    assert len(errors) == 1 and re.fullmatch(f"error: {where}{line}", errors[0]), log
    assert "Traceback" not in log
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["exit_status"]) == ("failed", 1)
    assert re.fullmatch(f"{where or 'Stop: '}{line}", status["message"])
    assert told(run) == ["started", "failed"] and losses(run)[:1] != []


# --- the end of a command ---------------------------------------------------------------------------------------------

HOLDS = {
    "a thread": "threading.Thread(target=time.sleep, args=(1000,)).start()",
    "a pool": "pools.append(ThreadPoolExecutor(1)); pools[0].submit(time.sleep, 1000)",
    "a process": dedent("""
        with signals_held():
            multiprocessing.get_context("fork").Process(target=time.sleep, args=(1000,), daemon=True).start()"""),
    "a destructor": "libc = ctypes.CDLL(None); libc.__cxa_atexit(libc.pause, None, None)",
}
ENDING = """\
import ctypes, multiprocessing, threading, time
from concurrent.futures import ThreadPoolExecutor
from moe_dit.runtime import command
from moe_dit.runtime.errors import InputError
from moe_dit.runtime.stopping import StopRequest, signals_held
command.LEAVING_SECONDS, command.HARD_SECONDS = {seconds}, 1
pools = []
def main():
    StopRequest()
    {hold}
    raise InputError("bad")
command.run(main)
"""


def ends(hold: str, seconds: int, number: int | None = None) -> int:
    """The status of a command that fails with 2, and is held up as it ends; sent a signal where there is a number."""
    code = ENDING.format(hold=HOLDS[hold].replace("\n", "\n    "), seconds=seconds)
    process = forks.Popen([sys.executable, "-c", code], finalize=True, cwd=ROOT, env=ENV, stderr=-1, text=True)
    try:
        assert process.stderr.readline() == "error: bad\n"
        while number is not None and process.poll() is None:
            process.send_signal(number)
            time.sleep(0.1)
        return process.wait(TIMEOUT)
    finally:
        kill(process)


@pytest.mark.parametrize(("hold", "status"), [("a thread", 2), ("a pool", 2), ("a destructor", -signal.SIGALRM)])
def test_a_command_ends_whatever_holds_it(hold, status):
    assert ends(hold, 1) == status


def test_a_command_ends_before_its_processes_that_see_no_signal():
    assert ends("a process", 10_000) == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_command_that_is_held_up_as_it_ends_ends_when_told_to(number):
    assert ends("a thread", 10_000, number) == 2


def test_gloos_word_for_a_rank_that_is_gone_is_known():
    said = "[/pytorch/gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:49826. Check the logs"
    assert left_behind(RuntimeError(said)) and not left_behind(RuntimeError("CUDA error: out of memory"))
    assert not left_behind(InputError(said)) and not left_behind(None)
