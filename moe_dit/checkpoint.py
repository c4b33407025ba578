"""The one checkpoint format: training state by logical name, readable at any number of ranks, EP degree and ZeRO stage.

A checkpoint is a folder RUN/checkpoints/step_00000100 of torch.distributed.checkpoint's files, in which each rank wrote
what it owns, plus state.json. Its tensors are flattened logical weights, "weight/blocks.0.attn.qkv.weight", likewise
"exp_avg/", "exp_avg_sq/" and "ema/", and "buffer/" for balance biases. It is written under a temporary name and
renamed when complete; RUN/checkpoints/latest names the newest complete one and moves last.
"""

import json
import pickle
import shutil
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from moe_dit.engine import Engine
from moe_dit.runtime.errors import InputError, Stop
from moe_dit.runtime.files import publish_folder, remove_folder, write_json, write_text
from moe_dit.runtime.progress import say
from moe_dit.runtime.ranks import world

FORMAT = 1


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


class Checkpointer:
    """Saves and loads the state of an engine in RUN/checkpoints.

    A save copies this rank's pieces to the CPU and returns; a thread writes them, over a gloo group of its own, while
    training goes on.

    Args:
        run: the run's folder.
        keep: newest checkpoints to keep.
        milestone_every: steps between checkpoints that are kept for good; 0 for none.
    """

    def __init__(self, run: Path, keep: int, milestone_every: int = 0):
        self.folder = run / "checkpoints"
        self.keep = keep
        self.milestone_every = milestone_every
        # Collectives of its own, apart from the ranks' training traffic.
        self.group: Any = torch.distributed.new_group(backend="gloo")
        self._writer: threading.Thread | None = None
        self._error: Stop | None = None

    def save(self, engine: Engine, step: int) -> None:
        """Start saving the state after ``step`` steps; waits for the save before it."""
        self.wait()
        state: dict[str, Any] = {}
        for piece in engine.pieces(owned_only=True):
            for kind, tensor in piece.tensors.items():
                state[f"{kind}/{piece.name}"] = FlatSlice(tensor.to("cpu", copy=True), piece.start, piece.numel)
        if world().rank == 0:
            state |= {f"buffer/{name}": value.to("cpu", copy=True) for name, value in engine.buffers().items()}
        description = {
            "format": FORMAT,
            "step": step,
            "position": step * engine.recipe.global_batch_size,
            "world_size": engine.parallelism.world_size,
            "ep_size": engine.parallelism.ep_size,
            "zero_stage": engine.parallelism.zero_stage,
            "recipe": engine.recipe.to_dict(),
        }
        self._writer = threading.Thread(target=self._write, args=(state, description), name="checkpoint")
        self._writer.start()

    def wait(self) -> None:
        """Wait until the last save is complete.

        Raises:
            Stop: it failed, on every rank alike; names the cause and the newest complete checkpoint.
        """
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        if self._error is not None:
            raise self._error

    def failed(self) -> bool:
        """Whether a save has failed on this rank, without waiting for one that is under way."""
        return self._error is not None

    def close(self) -> None:
        """Wait for a save under way to end, on every way out of a run; whether it failed is :meth:`wait`'s to tell."""
        if self._writer is not None:
            self._writer.join()

    def _write(self, state: dict[str, Any], description: dict[str, Any]) -> None:
        final = self.folder / name_of(description["step"])
        temporary = self.folder / f".{final.name}.tmp"
        try:
            self._on_rank_0(lambda: _make_empty(temporary))
            dcp.save(state, storage_writer=FileSystemWriter(temporary), process_group=self.group)
            self._on_rank_0(lambda: self._publish(description, temporary, final))
        except (Exception, CheckpointException) as error:
            if world().rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            free = shutil.disk_usage(self.folder).free
            last = newest(complete_checkpoints(self.folder))
            self._error = Stop(
                f"checkpoint {final} could not be written, with {free / 1e6:.0f} MB free on that disk: "
                f"{_cause(error)}; the newest complete one is {last or 'none'}, and the same command continues from it"
            )

    def _on_rank_0(self, function: Callable[[], None]) -> None:
        """Call a function on rank 0, and let every rank know how it ended."""
        outcome: list[str | None] = [None]
        if world().rank == 0:
            try:
                function()
            except (OSError, ValueError) as error:
                outcome = [_cause(error)]
        torch.distributed.broadcast_object_list(outcome, src=0, group=self.group)
        if outcome[0] is not None:
            raise OSError(outcome[0])

    def _publish(self, description: dict[str, Any], temporary: Path, final: Path) -> None:
        """Check what was written, give it its name, let ``latest`` say so, and prune."""
        write_json(temporary / "state.json", description)
        check_complete(temporary)
        publish_folder(temporary, final)  # one that is there is of a run that was taken back to an earlier step
        set_latest(self.folder, final.name)
        for old in complete_checkpoints(self.folder)[: -self.keep]:
            if not self.milestone_every or step_of(old) % self.milestone_every:
                remove_folder(old)

    def load(self, engine: Engine, checkpoint: Path) -> int:
        """Fill the engine's state from a checkpoint, whatever topology wrote it; returns its step.

        Raises:
            InputError: the checkpoint is unreadable or of another network; the engine is as it was.
        """
        description = read_description(checkpoint)
        pieces = list(engine.pieces())
        targets: dict[str, Any] = {
            f"{kind}/{piece.name}": FlatSlice(torch.empty(tensor.shape), piece.start, piece.numel)
            for piece in pieces
            for kind, tensor in piece.tensors.items()
        }
        buffers = engine.buffers()
        plain = {f"buffer/{name}": torch.empty_like(value, device="cpu") for name, value in buffers.items()}
        read_state({**targets, **plain}, checkpoint, self.group)
        with torch.no_grad():
            for piece in pieces:
                for kind, tensor in piece.tensors.items():
                    tensor.copy_(targets[f"{kind}/{piece.name}"].data_1d)
            for name, value in buffers.items():
                value.copy_(plain[f"buffer/{name}"])
        engine.set_step(description["step"])
        return description["step"]


def name_of(step: int) -> str:
    """A checkpoint's folder name."""
    return f"step_{step:08d}"


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint's folder name says."""
    return int(checkpoint.name.removeprefix("step_"))


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _cause(error: BaseException) -> str:
    """What went wrong, without torch's wrapping: dcp gathers each rank's error into one exception."""
    failures = getattr(error, "failures", {})
    cause = next((exception for exception, _ in failures.values()), error)
    # A write that fails makes torch's zip writer fail once more, with a message of its own.
    while not isinstance(cause, OSError) and isinstance(cause.__context__, OSError):
        cause = cause.__context__
    text = f"{type(cause).__name__}: {cause}" if not isinstance(cause, OSError) else str(cause)
    return " ".join(text.split())[:300]


def check_complete(checkpoint: Path) -> None:
    """Hold a checkpoint's files against its index: every element of every tensor is there; ValueError otherwise."""
    metadata = FileSystemReader(checkpoint).read_metadata()
    for name, tensor in metadata.state_dict_metadata.items():
        if isinstance(tensor, TensorStorageMetadata):
            stored = sum(chunk.sizes.numel() for chunk in tensor.chunks)
            if stored != tensor.size.numel():
                raise ValueError(f"{name} has {stored} of {tensor.size.numel()} elements")
    for place in (metadata.storage_data or {}).values():
        file = checkpoint / place.relative_path
        if file.stat().st_size < place.offset + place.length:
            raise ValueError(f"{file.name} is truncated")


def set_latest(folder: Path, name: str) -> None:
    """Let ``latest`` name a checkpoint, in one indivisible step."""
    write_text(folder / "latest", name + "\n")


def complete_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of RUN/checkpoints, oldest first."""
    return sorted(path for path in folder.glob("step_*") if (path / "state.json").is_file())


def newest(checkpoints: list[Path]) -> Path | None:
    """The last of a list, or None."""
    return checkpoints[-1] if checkpoints else None


def find_checkpoint(run_or_checkpoint: Path) -> Path | None:
    """The checkpoint that a path means: itself, or the newest readable one of a run; None where a run has none.

    Raises:
        InputError: a run's checkpoints are all unreadable.
    """
    if (run_or_checkpoint / "state.json").is_file():
        return run_or_checkpoint
    folder = run_or_checkpoint / "checkpoints"
    candidates = complete_checkpoints(folder)
    if (folder / "latest").is_file():
        # `latest` may have been taken back to an earlier step on purpose.
        last = (folder / "latest").read_text().strip()
        candidates = [path for path in candidates if path.name <= last]
    for checkpoint in reversed(candidates):
        try:
            read_description(checkpoint)
            check_complete(checkpoint)
            return checkpoint
        except (InputError, OSError, ValueError, CheckpointException, pickle.UnpicklingError, EOFError) as error:
            say(f"checkpoint {checkpoint} cannot be read ({_cause(error)}); taking the one before it")
    if candidates:
        raise InputError(f"no checkpoint in {folder} can be read; give another --out, or --resume CHECKPOINT")
    return None


def read_description(checkpoint: Path) -> dict[str, Any]:
    """A checkpoint's state.json: step, position, recipe and the topology that wrote it."""
    try:
        description = json.loads((checkpoint / "state.json").read_text())
        if description["format"] != FORMAT:
            raise InputError(f"{checkpoint} has format {description['format']}; this version reads {FORMAT}")
        return description
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{checkpoint} is not a readable checkpoint: state.json: {error}") from None


def read_state(targets: dict[str, torch.Tensor], checkpoint: Path, group: Any = None) -> None:
    """Fill targets (whole flattened tensors or FlatSlices, on the CPU) by their names in a checkpoint."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as meant where group is None
            dcp.load(targets, storage_reader=FileSystemReader(checkpoint), process_group=group, no_dist=group is None)
    except (Exception, CheckpointException) as error:
        raise InputError(f"checkpoint {checkpoint} cannot be read: {_cause(error)}") from None
