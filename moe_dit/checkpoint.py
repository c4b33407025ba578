"""The one checkpoint format: training state by logical name, readable at any number of ranks, EP degree and ZeRO stage.

A checkpoint is a folder RUN/checkpoints/step_00000100 of torch.distributed.checkpoint's files, in which each rank wrote
what it owns, plus state.json. Its tensors are flattened logical weights, "weight/blocks.0.attn.qkv.weight", likewise
"exp_avg/", "exp_avg_sq/" and "ema/", and "buffer/" for balance biases. It is written under a temporary name and
renamed when complete; RUN/checkpoints/latest names the newest complete one and moves last.
"""

import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from moe_dit.distributed import barrier, world
from moe_dit.engine import Engine
from moe_dit.errors import InputError
from moe_dit.progress import say

FORMAT = 1


class FlatSlice(torch.Tensor):
    """A slice of a flattened logical tensor, as torch.distributed.checkpoint's planners take it.

    They accept any tensor subclass that offers the three methods below.
    """

    @staticmethod
    def __new__(cls, data: torch.Tensor, start: int, numel: int) -> Any:
        return torch.Tensor._make_wrapper_subclass(cls, torch.Size([numel]), dtype=data.dtype, device=data.device)

    def __init__(self, data: torch.Tensor, start: int, numel: int):
        self.data_1d, self.start = data, start

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

    Args:
        run: the run's folder.
        keep: complete checkpoints to keep; older ones are removed after a save.
    """

    def __init__(self, run: Path, keep: int):
        self.folder, self.keep = run / "checkpoints", keep
        # Collectives of its own on CPU tensors, apart from the ranks' training traffic.
        self.group = torch.distributed.new_group(backend="gloo")

    def save(self, engine: Engine, step: int) -> Path:
        """Write the state after ``step`` steps; returns the checkpoint's folder once it is complete."""
        final, temporary = self.folder / name_of(step), self.folder / f".{name_of(step)}.tmp"
        if world().rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        barrier()
        state: dict[str, Any] = {}
        for piece in engine.pieces(owned_only=True):
            for kind, tensor in piece.tensors.items():
                state[f"{kind}/{piece.name}"] = FlatSlice(tensor.to("cpu", copy=True), piece.start, piece.numel)
        if world().rank == 0:
            state |= {f"buffer/{name}": value.to("cpu", copy=True) for name, value in engine.buffers().items()}
        dcp.save(state, storage_writer=FileSystemWriter(temporary), process_group=self.group)
        if world().rank == 0:
            self._publish(engine, step, temporary, final)
        barrier()
        return final

    def _publish(self, engine: Engine, step: int, temporary: Path, final: Path) -> None:
        facts = {
            "format": FORMAT,
            "step": step,
            "position": step * engine.recipe.global_batch_size,
            "world_size": engine.parallelism.world_size,
            "ep_size": engine.parallelism.ep_size,
            "zero_stage": engine.parallelism.zero_stage,
            "recipe": engine.recipe.to_dict(),
        }
        (temporary / "state.json").write_text(json.dumps(facts, indent=1))
        if final.exists():  # a run that was taken back to an earlier step
            shutil.rmtree(final)
        os.replace(temporary, final)
        set_latest(self.folder, final.name)
        for old in complete_checkpoints(self.folder)[: -self.keep]:
            shutil.rmtree(old)

    def load(self, engine: Engine, checkpoint: Path) -> int:
        """Fill the engine's state from a checkpoint, whatever topology wrote it; returns its step.

        Raises:
            InputError: the checkpoint is unreadable or of another network.
        """
        facts = read_facts(checkpoint)
        pieces = list(engine.pieces())
        targets: dict[str, Any] = {
            f"{kind}/{piece.name}": FlatSlice(torch.empty(tensor.shape), piece.start, piece.numel)
            for piece in pieces
            for kind, tensor in piece.tensors.items()
        }
        buffers = engine.buffers()
        plain = {f"buffer/{name}": torch.empty_like(value, device="cpu") for name, value in buffers.items()}
        read_state({**targets, **plain}, checkpoint, self.group)
        for piece in pieces:
            for kind, tensor in piece.tensors.items():
                tensor.copy_(targets[f"{kind}/{piece.name}"].data_1d)
        for name, value in buffers.items():
            value.copy_(plain[f"buffer/{name}"])
        engine.set_step(facts["step"])
        return facts["step"]


def name_of(step: int) -> str:
    return f"step_{step:08d}"


def set_latest(folder: Path, name: str) -> None:
    """Let ``latest`` name a checkpoint, in one indivisible step."""
    (folder / ".latest.tmp").write_text(name + "\n")
    os.replace(folder / ".latest.tmp", folder / "latest")


def complete_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of RUN/checkpoints, oldest first."""
    return sorted(path for path in folder.glob("step_*") if (path / "state.json").is_file())


def find_checkpoint(run_or_checkpoint: Path) -> Path | None:
    """The checkpoint that a path means: itself, or the newest complete one of a run; None where a run has none."""
    if (run_or_checkpoint / "state.json").is_file():
        return run_or_checkpoint
    folder = run_or_checkpoint / "checkpoints"
    try:
        named = folder / (folder / "latest").read_text().strip()
        if (named / "state.json").is_file():
            return named
        say(f"{folder / 'latest'} names {named.name}, which is not there; taking the newest complete checkpoint")
    except FileNotFoundError:
        pass
    return next(reversed(complete_checkpoints(folder)), None)


def remove_unfinished(run: Path) -> None:
    """Remove what a killed save left behind."""
    for leftover in (run / "checkpoints").glob(".step_*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)


def read_facts(checkpoint: Path) -> dict[str, Any]:
    """A checkpoint's state.json: step, position, recipe and the topology that wrote it."""
    try:
        facts = json.loads((checkpoint / "state.json").read_text())
        if facts["format"] != FORMAT:
            raise InputError(f"{checkpoint} has format {facts['format']}; this version reads {FORMAT}")
        return facts
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{checkpoint} is not a readable checkpoint: state.json: {error}") from None


def read_state(targets: dict[str, torch.Tensor], checkpoint: Path, group: Any = None) -> None:
    """Fill targets (whole flattened tensors or FlatSlices, on the CPU) by their names in a checkpoint."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as meant where group is None
            dcp.load(targets, storage_reader=FileSystemReader(checkpoint), process_group=group, no_dist=group is None)
    except (Exception, CheckpointException) as error:
        # dcp gathers what went wrong on each rank into one exception, not derived from Exception.
        failures = getattr(error, "failures", {})
        cause = next((exception for exception, _ in failures.values()), error)
        raise InputError(f"checkpoint {checkpoint} cannot be read: {type(cause).__name__} {cause}") from None
