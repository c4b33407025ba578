"""Reading by processes beside this one: whatever happens to one of them is one line, and ends the command."""

import os
import re
import shutil
import signal
import threading
import traceback
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from functools import partial
from multiprocessing import connection, get_context, queues, resource_tracker
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info
from torch.utils.data._utils import signal_handling

from moe_dit.runtime.errors import Stop
from moe_dit.runtime.processes import end_with, forkserver, kill_children
from moe_dit.runtime.stopping import signals_held

ENDING_SECONDS = 5.0  # for processes that are no longer needed, to end by themselves
SHARED = Path("/dev/shm")

# What errors say where memory, shared memory, or the files that stand for it, are short.
_SHORT = re.compile(r"memory|shm|no space|too many open files|resource temporarily", re.IGNORECASE)


def read(
    dataset: Any,
    workers: int,
    flag: str,
    collate: Callable[[Any], Any] = list,
    pin: bool = False,
    forked: bool = False,
    **options: Any,
) -> Generator[Any, None, None]:
    """Batches of a dataset, in order, read ahead by worker processes that end with the generator.

    It is torch's DataLoader, in which a process that dies, or an error that one meets, would leave the command waiting
    for ever, or end it in a worker's traceback.

    Args:
        dataset: for torch's DataLoader.
        workers: how many processes; 0: this one reads.
        flag: what sets their number, for messages.
        collate: makes a batch of samples; runs in the processes.
        pin: whether tensors come in pinned memory.
        forked: whether the processes inherit the dataset, which may be too large to be sent to each.
        options: DataLoader's own that say which samples make a batch, and how many are read ahead.

    Raises:
        Stop: a dataset's own; or what else a process met, or that it died or could not be started.
    """
    told = _Told(flag, workers)
    source = dataset if isinstance(dataset, IterableDataset) else _Guarded(dataset, told)
    gathered = _Collated(collate, told)
    if not workers:
        for batch in DataLoader(source, collate_fn=gathered, pin_memory=pin, **options):
            yield _opened(batch)
        return
    options |= {"multiprocessing_context": get_context("fork") if forked else forkserver(), "pin_memory": pin}
    loader = DataLoader(
        source, num_workers=workers, collate_fn=gathered, worker_init_fn=partial(_begin, os.getpid()), **options
    )
    with _Workers(loader, told, pin) as started:
        while True:
            batch = started.next()
            if batch is None:
                return
            yield batch


class _Told:
    """The words for what happens to processes that read."""

    def __init__(self, flag: str, workers: int):
        self.flag = flag
        self.workers = workers

    def error(self, error: Exception) -> Stop:
        """For an error that reading met, in the process that met it."""
        if isinstance(error, Stop):
            return error
        worker = get_worker_info()
        who = "reading" if worker is None else self._name(worker.id, os.getpid())
        frame = traceback.extract_tb(error.__traceback__)[-1]
        what = f"{_first_line(error)} ({Path(frame.filename).name}, line {frame.lineno})"
        return Stop(f"{who} failed: {what}{self._advice(what)}")

    def death(self, number: int, process: Any) -> Stop:
        code = process.exitcode
        how = f"was ended by {_signal(-code)}" if code < 0 else f"ended by itself, with status {code}"
        return Stop(f"{self._name(number, process.pid)} {how}{self._advice()}")

    def unstarted(self, error: Exception) -> Stop:
        return Stop(f"loader processes cannot be started: {_first_line(error)}{self._advice()}")

    def unread(self, error: Exception) -> Stop:
        return Stop(f"loader processes cannot be read: {_first_line(error)}{self._advice()}")

    def _name(self, number: int, pid: int | None) -> str:
        return f"loader process {number + 1} of {self.workers} (pid {pid})"

    def _advice(self, what: str = "memory") -> str:
        if not _SHORT.search(what):
            return ""
        size = ""
        with suppress(OSError):
            size = f" ({shutil.disk_usage(SHARED).total / 2**20:,.1f} MiB)"
        fewer = f", or fewer processes ({self.flag}, now {self.workers})" if self.workers else ""
        return f"; perhaps memory or {SHARED}{size} is too small: give more{fewer}"


def _first_line(error: BaseException) -> str:
    """An error in a line; of one that torch brought from another process, with its traceback, the error itself."""
    lines = str(error).strip().splitlines() or [""]
    return lines[-1] if lines[0].startswith("Caught ") else f"{type(error).__name__}: {lines[0]}".rstrip(": ")


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


class _Guarded(Dataset):
    """A dataset whose errors are values: raised, they would reach the main process in a worker's traceback."""

    def __init__(self, dataset: Any, told: _Told):
        self.dataset = dataset
        self.told = told

    def __getitems__(self, indices: Sequence[int]) -> Any:
        try:
            if hasattr(self.dataset, "__getitems__"):
                return self.dataset.__getitems__(indices)
            return [self.dataset[index] for index in indices]
        except Exception as error:
            return self.told.error(error)


class _Collated:
    """Makes batches of samples, and each what can be sent; errors are values here too."""

    def __init__(self, collate: Callable[[Any], Any], told: _Told):
        self.collate = collate
        self.told = told

    def __call__(self, samples: Any) -> Any:
        if isinstance(samples, Stop):
            return samples
        try:
            batch = self.collate(samples)
            return batch if get_worker_info() is None else _Parcel(batch)
        except Exception as error:
            return self.told.error(error)


class _Parcel:
    """A batch as a process sends it, its tensors in shared memory.

    Queues would do that themselves, but in a thread, and what that meets (no room, no file left) nobody hears of. What
    comes out of a queue is the batch itself: a process that has read all of its own ends, and its memory goes with it,
    while batches wait for the turn of another's.
    """

    def __init__(self, batch: Any):
        self.content = bytes(ForkingPickler.dumps(batch))

    def __reduce__(self) -> tuple[Callable[[bytes], Any], tuple[bytes]]:
        return _unpacked, (self.content,)


class _Unopened:
    """Stands for a batch that could not be opened: what is raised in torch's thread that pins ends that unheard."""

    def __init__(self, error: Exception):
        self.error = error


def _unpacked(content: bytes) -> Any:
    try:
        return ForkingPickler.loads(content)
    except Exception as error:
        return _Unopened(error)


def _opened(batch: Any) -> Any:
    if isinstance(batch, _Unopened):
        raise batch.error
    if isinstance(batch, Stop):
        raise batch
    return batch


def _begin(pid: int, _: int) -> None:
    """What each worker does first."""
    end_with(pid)
    for number in (signal.SIGBUS, signal.SIGSEGV, signal.SIGFPE):
        signal.signal(number, signal.SIG_DFL)  # torch's handlers speak, and the main process does
    # A batch that cannot be sent would be waited for.
    queues.Queue._on_queue_feeder_error = staticmethod(lambda *_: os._exit(1))  # type: ignore[attr-defined]


# Errors whose tracebacks hold what is no whole iterator: torch's cannot end that, and complains.
_half_started: list[Exception] = []


class _Workers:
    """The processes of a DataLoader, from their start to their end."""

    def __init__(self, loader: Any, told: _Told, pin: bool):
        self._told = told
        self._pin = pin
        handler = signal.getsignal(signal.SIGCHLD)
        try:
            with signals_held():
                # It unblocks two of the signals as it starts (Python 3.11), so it has to be there before the workers.
                resource_tracker.ensure_running()
            with signals_held():
                self._batches = iter(loader)
        except Exception as error:
            _half_started.append(error)
            kill_children()
            raise told.unstarted(error) from None
        if threading.current_thread() is threading.main_thread():
            # torch's raises errors in whatever the main thread does then; the deaths are found below.
            signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)
        self._processes = list(self._batches._workers)
        self._closing = False
        self._death: Stop | None = None
        self._died = threading.Event()
        threading.Thread(target=self._watch, name="loader watch", daemon=True).start()

    def __enter__(self) -> "_Workers":
        return self

    def next(self) -> Any:
        """The next batch, None behind the last."""
        try:
            return _opened(next(self._batches))
        except StopIteration:
            return None
        except Stop:
            raise
        except Exception as error:
            met = self._told.unread(error)
        # The death of a process is often the cause, and may be a moment behind it.
        self._died.wait(1)
        raise self._death or met

    def _watch(self) -> None:
        """Wait until a process ends before its time. Then end the others, and whatever waits for what it would send."""
        alive = {process.sentinel: number for number, process in enumerate(self._processes)}
        while alive:
            for sentinel in connection.wait(list(alive)):
                number = alive.pop(sentinel)
                process = self._processes[number]
                if self._closing:
                    return
                process.join()  # it has closed its files, and may not have ended yet
                if process.exitcode:  # one that has read all that it was to read ends with 0
                    self._death = self._told.death(number, process)
                    self._kill()
                    if not self._pin:
                        # A message may have been cut short, of which the rest would be waited for.
                        self._batches._worker_result_queue._writer.close()
                    self._died.set()
                    return

    def _kill(self) -> None:
        for process in self._processes:
            process.kill()
            for file in SHARED.glob(f"torch_{process.pid}_*"):  # is nameless but for a moment
                with suppress(OSError):
                    file.unlink()

    def __exit__(self, *_: Any) -> None:
        self._closing = True
        if self._death is not None:
            self._batches._shutdown = True  # torch's way would wait for locks that the dead may have held
            # It knows iterators by where they lie, and would take the next one there for this one. Behind the last
            # batch it has forgotten this one by itself, and may have ended a process that was slow to end.
            if self._batches._worker_pids_set:
                signal_handling._remove_worker_pids(id(self._batches))
                self._batches._worker_pids_set = False
        else:
            # In a thread, since it may wait for long for a process that is stopped.
            ending = threading.Thread(target=self._batches._shutdown_workers, name="loader end", daemon=True)
            ending.start()
            ending.join(ENDING_SECONDS)
            self._kill()
            ending.join(ENDING_SECONDS)
        for process in self._processes:
            process.join(1)
