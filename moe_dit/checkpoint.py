"""The one checkpoint format: training state by logical name, readable at any number of ranks, EP degree and ZeRO stage.

A checkpoint is a folder RUN/checkpoints/step_00000100 of torch.distributed.checkpoint's files, in which each rank wrote
what it owns, plus state.json (moe_dit/checkpoint_files.py reads them). Its tensors are flattened logical weights,
"weight/blocks.0.attn.qkv.weight", likewise "exp_avg/", "exp_avg_sq/" and "ema/", and "buffer/" for balance biases. It
is written under a temporary name and renamed when complete; RUN/checkpoints/latest names the newest complete one and
moves last. Which one a run continues from: moe_dit/lineage.py.
"""

import shutil
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException, FileSystemWriter
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from moe_dit.checkpoint_files import (
    Attempt,
    cause_of,
    check_complete,
    name_of,
    read_state,
    sizes_of,
    tensors_of,
    write_description,
)
from moe_dit.engine import Engine
from moe_dit.lineage import State, named_by_latest, newest_told, set_latest, superfluous
from moe_dit.manifest import Content
from moe_dit.runtime.errors import InputError, Stop
from moe_dit.runtime.files import (
    discard,
    publish_folder,
    put_aside,
    remove_folder,
    remove_unfinished,
    wait_until_seen,
)
from moe_dit.runtime.notes import noted
from moe_dit.runtime.pace import Pace, PacedFile
from moe_dit.runtime.progress import say
from moe_dit.runtime.ranks import from_rank_0, world
from moe_dit.runtime.tree import tree_group

BLOCK = 2**28  # numbers of host memory that are taken at once: a gigabyte


class FlatSlice(torch.Tensor):
    """A slice of a flattened logical tensor, as torch.distributed.checkpoint's planners take it.

    They accept any tensor subclass that offers the three methods below.
    """

    @staticmethod
    def __new__(cls, data: torch.Tensor, start: int, numel: int) -> Any:
        return torch.Tensor._make_wrapper_subclass(cls, torch.Size([numel]), dtype=data.dtype, device=data.device)

    def __init__(self, data: torch.Tensor, start: int, numel: int):
        self.data_1d = data
        self.start = start

    def _chunk(self) -> ChunkStorageMetadata:
        return ChunkStorageMetadata(torch.Size([self.start]), torch.Size([self.data_1d.numel()]))

    def __create_write_items__(self, name: str, tensor: Any) -> list[WriteItem]:
        write = TensorWriteData(self._chunk(), TensorProperties.create_from_tensor(self.data_1d), self.shape)
        index = MetadataIndex(name, torch.Size([self.start]))
        return [WriteItem(index=index, type=WriteItemType.SHARD, tensor_data=write)]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [self._chunk()]

    def __get_tensor_shard__(self, index: MetadataIndex) -> torch.Tensor:
        return self.data_1d

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise NotImplementedError(f"{function} of a FlatSlice: it only carries a slice to or from a checkpoint")


class _Staging:
    """The host memory that a rank's state is copied to when it is saved, kept from save to save.

    On a GPU it is pinned, and a stream of its own copies at the bus's speed while training goes on. Where the system
    refuses to pin so much memory, which one line says, the rest is plain memory, and training stands for its copies.

    Attributes:
        copies: float32 tensors, of what was copied last.
    """

    def __init__(self) -> None:
        self.copies: list[torch.Tensor] = []
        self._stream: torch.cuda.Stream | None = None

    def copy(self, tensors: list[torch.Tensor]) -> torch.cuda.Event | None:
        """Copy float32 tensors [n] of one device to :attr:`copies`, which nobody may be reading any more.

        Returns:
            What happens on the GPU when all are copied; until then they must not change. None: they are.
        """
        on_gpu = any(tensor.is_cuda for tensor in tensors)
        lengths = [len(tensor) for tensor in tensors]
        if lengths != [len(copy) for copy in self.copies]:
            self.copies = list(_host_memory(lengths, pinned=on_gpu))
        if not on_gpu:
            for copy, tensor in zip(self.copies, tensors, strict=True):
                copy.copy_(tensor)
            return None
        device = tensors[0].device
        self._stream = self._stream or torch.cuda.Stream(device)
        self._stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self._stream):
            for copy, tensor in zip(self.copies, tensors, strict=True):
                copy.copy_(tensor, non_blocking=True)
                tensor.record_stream(self._stream)  # its memory is not given to others before, were it freed
            return self._stream.record_event(torch.cuda.Event(blocking=True))


def _host_memory(lengths: list[int], pinned: bool) -> Iterator[torch.Tensor]:
    """float32 tensors of these lengths, in blocks: torch (2.11) rounds each that it pins up to a power of two bytes."""
    blocks: list[list[int]] = []
    room = 0
    for n in lengths:
        if n > room:
            blocks.append([])
            room = BLOCK
        blocks[-1].append(n)
        room -= n
    for block in blocks:
        try:
            memory = torch.empty(sum(block), pin_memory=pinned)
        except RuntimeError as error:
            say(f"training stands while a checkpoint is copied: no pinned host memory ({cause_of(error)})")
            pinned = False
            memory = torch.empty(sum(block))
        yield from memory.split(block)


class _Files(FileSystem):
    """torch.distributed.checkpoint's files, perhaps written at a pace."""

    def __init__(self, pace: Pace | None):
        self._pace = pace

    @contextmanager
    def create_stream(self, path, mode):
        with super().create_stream(path, mode) as stream:
            kept = _FirstError(stream)
            try:
                # torch's writer flushes each that it has written.
                yield kept if self._pace is None else PacedFile(kept, self._pace)
            except Exception as error:
                # After a write that failed torch's zip writer (2.14) fails once more, "unexpected pos 704 vs 598", and
                # other ranks get that error without what it came of.
                raise kept.error or error from None


class _FirstError:
    """A stream that keeps the operating system's first error in writing to it."""

    def __init__(self, stream: Any):
        self._stream = stream
        self.error: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, data: Any) -> int:
        try:
            return self._stream.write(data)
        except OSError as error:
            self.error = self.error or error
            raise


class _Writer(FileSystemWriter):
    """Writes a rank's share, when the folder that rank 0 has made for it is seen on this node too."""

    def __init__(self, folder: Path, pace: Pace | None):
        # All is on the host already. By default torch's writer (2.14) would wait, each ten megabytes, for the GPU's
        # current stream, where training computes.
        super().__init__(folder, per_thread_copy_ahead=0)
        self.fs = _Files(pace)

    def prepare_local_plan(self, plan):
        wait_until_seen(self.path)
        return super().prepare_local_plan(plan)


class Checkpointer:
    """Saves and loads the state of an engine in RUN/checkpoints.

    A save starts to copy this rank's pieces to host memory of its own (:class:`_Staging`) and returns; a thread writes
    them, over a gloo group of its own, while training goes on.

    Args:
        run: the run's folder.
        keep: newest checkpoints to keep.
        milestone_every: steps between checkpoints that are kept for good; 0 for none.
        write_gb_per_second: most that all ranks write together, in equal shares; None: as fast as it goes.

    Attributes:
        history: the starts of the training command that led to what is saved (:class:`moe_dit.lineage.Start`).
        data: what is trained on; None: checkpoints do not say.
    """

    def __init__(self, run: Path, keep: int, milestone_every: int = 0, write_gb_per_second: float | None = None):
        self.folder = run / "checkpoints"
        self.keep = keep
        self.milestone_every = milestone_every
        self.history: Sequence[Attempt] = []
        self.data: Content | None = None
        # Collectives of its own, apart from the ranks' training traffic.
        self.group: Any = tree_group()
        _connect(self.group)
        self._pace = None if write_gb_per_second is None else Pace(write_gb_per_second * 1e9 / world().size)
        # One for all saves: glibc (2.36) may give each thread that starts an arena of its own, here of half a megabyte,
        # up to eight for each core, and none goes back.
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._staging = _Staging()
        self._writing: Future | None = None
        self._error: Stop | None = None

    def save(self, engine: Engine, step: int, hurry: bool = False) -> None:
        """Start saving the state after ``step`` steps; waits for the save before it, whose copies are overwritten.

        Args:
            hurry: this save, and one that is under way, need not keep to a bandwidth: a run that was told to stop has
                little time, and trains no more.
        """
        if hurry and self._pace is not None:
            self._pace.hurry()
        self.wait()
        pieces = list(engine.pieces(owned_only=True))
        copied = self._staging.copy([tensor for piece in pieces for tensor in piece.tensors.values()])
        if copied is not None:
            engine.keep_until(copied)
        copies = iter(self._staging.copies)
        state: dict[str, Any] = {
            f"{kind}/{piece.name}": FlatSlice(next(copies), piece.start, piece.numel)
            for piece in pieces
            for kind in piece.tensors
        }
        if world().rank == 0:  # few numbers, which the next forward pass may change
            state |= {f"buffer/{name}": value.to("cpu", copy=True) for name, value in engine.buffers().items()}
        description = {
            "step": step,
            "position": step * engine.recipe.global_batch_size,
            "world_size": engine.parallelism.world_size,
            "ep_size": engine.parallelism.ep_size,
            "zero_stage": engine.parallelism.zero_stage,
            "history": [asdict(attempt) for attempt in self.history],
            "recipe": engine.recipe.to_dict(),
            "precision": "bf16" if engine.bf16 else "fp32",  # what the recipe's came to
            "data": self.data,
        }
        # A save has failed until it is done, whatever may keep its thread from saying so.
        self._error = Stop(f"checkpoint {self.folder / name_of(step)} was not written to its end", everywhere=True)
        self._writing = self._thread.submit(self._write, state, copied, description, engine.device)

    def wait(self) -> None:
        """Wait until the last save is complete.

        Raises:
            Stop: it failed, on every rank alike but where one is gone; names the cause and the newest complete
                checkpoint.
        """
        self._finish()
        if self._error is not None:
            raise self._error

    def _finish(self) -> None:
        """Wait until no save is under way; tell where one failed in its own handling of an error."""
        if self._writing is not None and (failure := self._writing.exception()) is not None:
            traceback.print_exception(failure)
        self._writing = None

    def failed(self) -> bool:
        """Whether a save has failed on this rank, without waiting for one that is under way."""
        under_way = self._writing is not None and not self._writing.done()
        return not under_way and self._error is not None

    def close(self) -> None:
        """Wait for a save under way to end, on every way out of a run; whether it failed is :meth:`wait`'s to tell."""
        self._finish()
        self._thread.shutdown()

    def confirm(self, step: int) -> Path:
        """Make sure, before a run says that it is done, that the checkpoint of its last step is there and whole.

        Returns:
            It.

        Raises:
            Stop: it is not, on every rank alike.
        """
        checkpoint = self.folder / name_of(step)

        def check() -> None:
            check_complete(checkpoint)
            if (named := named_by_latest(self.folder)) != checkpoint.name:
                raise ValueError(f"{self.folder / 'latest'} names {named} instead of {checkpoint.name}")

        try:
            from_rank_0(check, self.group)
        except (Stop, OSError, ValueError) as error:
            raise Stop(f"step {step} was reached, but it is not saved: {error}", everywhere=True) from None
        return checkpoint

    def _write(
        self,
        state: dict[str, Any],
        copied: torch.cuda.Event | None,
        description: dict[str, Any],
        device: torch.device,
    ) -> None:
        final = self.folder / name_of(description["step"])
        temporary = self.folder / f".{final.name}.tmp"
        try:
            if device.type == "cuda":
                # A thread begins on GPU 0, whichever is its rank's, and torch's writer looks at the current one.
                torch.cuda.set_device(device)
            if copied is not None:
                copied.synchronize()
            from_rank_0(lambda: _make_empty(temporary), self.group)
            dcp.save(state, storage_writer=_Writer(temporary, self._pace), process_group=self.group)
            from_rank_0(lambda: self._publish(description, temporary, final), self.group)
            self._error = None
        except BaseException as error:  # dcp's own is no Exception
            # Whatever a rank met in its own work all are told of. A collective itself fails where a rank is gone: then
            # torchrun starts all anew, as at any other time.
            alike = isinstance(error, (Stop, CheckpointException, OSError, ValueError))
            self._error = Stop(f"checkpoint {final} could not be written: {cause_of(error)}", everywhere=alike)
            free = _free(self.folder)
            if world().rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            self._error = Stop(
                f"checkpoint {final} could not be written{free}: {cause_of(error)}; the newest complete one is "
                f"{newest_told(self.folder)}, and the same command continues from it",
                everywhere=alike,
            )
            self._error.__cause__ = error  # by which left_behind knows it

    def _publish(self, description: dict[str, Any], temporary: Path, final: Path) -> None:
        """Check what was written, give it its name, let ``latest`` say so, and prune."""
        write_description(temporary, description)
        check_complete(temporary, just_written=True)
        publish_folder(temporary, final)  # one that is there is of a branch that the run has left
        set_latest(self.folder, final.name)
        # It is saved. That an old one stays for now is no reason to say otherwise.
        with noted(self.folder, consequence="old checkpoints stay for now"):
            remove_unfinished(self.folder, "*.old.*")  # what somebody still read, the last time
            state = State(self.history, description["step"])
            for old in superfluous(self.folder, state, self.keep, self.milestone_every):
                remove_folder(old)

    def load(self, engine: Engine, checkpoint: Path) -> int:
        """Fill the engine's state from a checkpoint, whatever topology wrote it; returns its step.

        Raises:
            Damaged: the checkpoint is unreadable, on every rank alike; the engine is as it was.
            InputError: it lacks what this recipe's training keeps, likewise.
        """

        def open_checkpoint() -> tuple[int, Any]:
            description, index = check_complete(checkpoint)
            if missing := sorted(tensors_of(engine.recipe).items() - sizes_of(index).items()):
                raise InputError(
                    f"{checkpoint} has no {missing[0][0]} of size {list(missing[0][1])}, which a run of recipe "
                    f"{engine.recipe.name} keeps; it was saved by one of {description['recipe']['name']}"
                )
            return description["step"], index

        step, index = from_rank_0(open_checkpoint, self.group)
        pieces = list(engine.pieces())
        targets: dict[str, Any] = {
            f"{kind}/{piece.name}": FlatSlice(torch.empty(tensor.shape), piece.start, piece.numel)
            for piece in pieces
            for kind, tensor in piece.tensors.items()
        }
        buffers = engine.buffers()
        plain = {f"buffer/{name}": torch.empty_like(value, device="cpu") for name, value in buffers.items()}
        read_state({**targets, **plain}, checkpoint, self.group, index)
        engine.before_change()
        with torch.no_grad():
            for piece in pieces:
                for kind, tensor in piece.tensors.items():
                    tensor.copy_(targets[f"{kind}/{piece.name}"].data_1d)
            for name, value in buffers.items():
                value.copy_(plain[f"buffer/{name}"])
        engine.set_step(step)
        return step


def _connect(group: Any) -> None:
    """Use each collective of a save once.

    gloo reads its fellows' addresses in the store when it first needs them (ranks.set_rendezvous makes it lazy), and
    torchrun keeps the store: where it was killed, ranks that had not saved yet could not any more.
    """
    this = world()
    parts: list[Any] = [None] * this.size
    torch.distributed.gather_object(None, parts if this.rank == 0 else None, dst=0, group=group)
    torch.distributed.scatter_object_list([None], parts if this.rank == 0 else None, src=0, group=group)
    torch.distributed.broadcast_object_list([None], src=0, group=group)


def _make_empty(folder: Path) -> None:
    with suppress(FileNotFoundError):
        discard(put_aside(folder))
    folder.mkdir(parents=True)


def _free(folder: Path) -> str:
    """How much room there is, for a message."""
    try:
        return f", with {shutil.disk_usage(folder).free / 1e6:.0f} MB free on that disk"
    except OSError:  # the folder could not even be made
        return ""
