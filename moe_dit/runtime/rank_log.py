"""A small log of each rank, RUN/logs/rank_00003.log: what it was, how long its steps took, where it stood or fell."""

import faulthandler
import os
import socket
import traceback
from importlib.metadata import version
from pathlib import Path
from typing import IO

import torch

from moe_dit.runtime import ranks
from moe_dit.runtime.errors import Stop
from moe_dit.runtime.files import open_to_append
from moe_dit.runtime.machine import now
from moe_dit.runtime.notes import noted

MOST_BYTES = 1_000_000  # of a log that a start continues; a longer one is put aside


class RankLog:
    """This rank's log, open for the length of a block; a crash of the interpreter leaves its stacks here too.

    One file open and one write now and then: some hundred ranks may share a slow file system. It is a note
    (:mod:`moe_dit.runtime.notes`).

    Args:
        run: the run's folder, which some rank holds.
        device: where this rank computes.
    """

    def __init__(self, run: Path, device: torch.device):
        self.path = run / "logs" / f"rank_{ranks.world().rank:05d}.log"
        self._file: IO[bytes] | None = None
        with noted(self.path.parent):
            self.path.parent.mkdir(exist_ok=True)
            if self.path.exists() and self.path.stat().st_size > MOST_BYTES:
                os.replace(self.path, self.path.with_name(self.path.name + ".old"))
            self._file = open(open_to_append(self.path), "ab", buffering=0)
        self._device = device

    def __enter__(self) -> "RankLog":
        self._before = faulthandler.is_enabled()
        if self._file is not None:
            faulthandler.enable(self._file)
        kind = torch.cuda.get_device_name(self._device) if self._device.type == "cuda" else "cpu"
        versions = f"torch {torch.__version__}, deepspeed {version('deepspeed')}"
        self.write(f"start on {socket.gethostname()}, process {os.getpid()}, device {kind}, {versions}")
        return self

    def write(self, text: str) -> None:
        """Add a line (or several) behind the time in UTC."""
        with noted(self.path.parent):
            if self._file is not None:
                self._file.write(f"{now()} {text}\n".encode())

    def stacks(self, text: str) -> None:
        """Add a line, and where each thread stands."""
        self.write(text)
        # By way of memory: while it writes, no other thread runs, and a disk may not answer.
        with noted(self.path.parent), open(os.memfd_create("stacks"), "w+b", buffering=0) as memory:
            faulthandler.dump_traceback(memory, all_threads=True)
            memory.seek(0)
            if self._file is not None:
                self._file.write(memory.read())

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Stop):
            self.write(f"end: {error}")
        elif error is not None:
            self.write("end: " + "".join(traceback.format_exception(error)).strip())
        else:
            self.write("end")
        faulthandler.disable()
        if self._before:
            faulthandler.enable()
        if self._file is not None:
            self._file.close()
