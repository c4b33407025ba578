"""A checkpoint's files, read without trust: they run no code, and what is damaged is noticed, not loaded.

    state.json    the step, the recipe, the shards, the history (moe_dit/lineage.py) and the topology that wrote it
    .metadata     torch.distributed.checkpoint's index: where each slice of each tensor lies
    __0_0.distcp  what rank 0 wrote: records one after another, each a slice as torch.save writes it, a zip archive

torch.distributed.checkpoint (torch 2.14) unpickles .metadata whatever stands in it, and torch.load is built without
the check of a zip archive's CRC-32. So the index is unpickled here into stand-ins that run nothing, and a record's
CRC-32 is compared before it is loaded. state.json holds its own SHA-256 and that of .metadata (checkpoints of earlier
versions do not).
"""

import hashlib
import io
import json
import os
import pickle
import re
import warnings
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from pydantic import TypeAdapter
from torch.distributed.checkpoint import CheckpointException, StorageReader
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.futures import Future

from moe_dit.build import build_model
from moe_dit.manifest import Content
from moe_dit.optimizer import optimizer_kind
from moe_dit.recipe import Recipe
from moe_dit.recipe_file import parse_recipe
from moe_dit.runtime.errors import InputError, left_behind
from moe_dit.runtime.files import wait_until_seen, write_json
from moe_dit.runtime.reading import open_file, read_bytes, read_json

FORMAT = 1
STATE = "state.json"
INDEX = ".metadata"


class Damaged(InputError):
    """A checkpoint is not one, or not whole."""


class Pruned(Damaged):
    """A checkpoint went away while it was read: its run keeps its newest ones."""


def damaged(checkpoint: Path, error: BaseException, file: str = "") -> Damaged:
    """What to raise where reading a checkpoint (one of its files) met an error."""
    if not os.path.lexists(checkpoint) and checkpoint.parent.is_dir():
        return Pruned(f"checkpoint {checkpoint} is not there any more: its run has pruned it since (checkpoint.keep)")
    return Damaged(f"checkpoint {checkpoint} cannot be read: {file and f'{file}: '}{cause_of(error)}")


def name_of(step: int) -> str:
    """A checkpoint's folder name."""
    return f"step_{step:08d}"


def step_of(name: str) -> int | None:
    """The step that a folder's name says; None where it is no checkpoint's."""
    digits = re.fullmatch("step_([0-9]{8,19})", name)  # steps have 64 bits at most
    return int(digits[1]) if digits and name == name_of(int(digits[1])) else None


def cause_of(error: BaseException) -> str:
    """What went wrong, without torch's wrapping: dcp gathers each rank's error into one exception."""
    failures = getattr(error, "failures", {})
    cause = next((exception for exception, _ in failures.values()), error)
    # A write that fails makes torch's zip writer fail once more, with a message of its own.
    while not isinstance(cause, OSError) and isinstance(cause.__context__, OSError):
        cause = cause.__context__
    if left_behind(cause):
        return "another rank has ended"
    text = f"{type(cause).__name__}: {cause}" if not isinstance(cause, (OSError, ValueError)) else str(cause)
    return " ".join(text.split())[:300]


# --- state.json -------------------------------------------------------------------------------------------------------


def write_description(checkpoint: Path, description: dict[str, Any]) -> None:
    """Write state.json beside an index that is complete; it holds checksums of both."""
    index = hashlib.sha256((checkpoint / INDEX).read_bytes()).hexdigest()
    description = description | {"format": FORMAT, "index_sha256": index}
    write_json(checkpoint / STATE, description | {"sha256": _digest(description)})


def read_description(checkpoint: Path) -> dict[str, Any]:
    """A checkpoint's state.json: step, position, recipe, precision, shards, history, the topology that wrote it.

    Raises:
        Damaged: there is none, or it is not what was written.
    """
    try:
        description = read_json(checkpoint / STATE)
        sha256 = description.pop("sha256", None)
        if sha256 is None and "index_sha256" in description:
            raise ValueError("it has no sha256")
        if sha256 is not None and sha256 != _digest(description):
            raise ValueError("its values do not match its checksum")
        if description["format"] != FORMAT:
            raise ValueError(f"its format is {description['format']!r}; this version reads {FORMAT}")
        step = description["step"]
        if type(step) is not int or step < 0 or step_of(checkpoint.name) not in (None, step):
            raise ValueError(f"its step is {step!r}")
        description["history"] = [Attempt(**attempt) for attempt in description.get("history", [])]
        parse_recipe(description["recipe"], str(checkpoint))
        TypeAdapter(Content | None).validate_python(description.get("data"))  # earlier versions kept none
    except Exception as error:  # whatever can be made of damaged values
        raise damaged(checkpoint, error, STATE) from None
    return description


def _digest(description: dict[str, Any]) -> str:
    """SHA-256 of the values, however they are laid out."""
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Attempt:
    """One start of the training command, as state.json and RUN/history.json name it.

    Attributes:
        attempt: its own random name.
        first_step: the steps that had been done when it began.
        asked: it began from one of the run's own checkpoints because --resume named that one.
    """

    attempt: str
    first_step: int
    asked: bool = False

    def __post_init__(self):
        if [type(value) for value in (self.attempt, self.first_step, self.asked)] != [str, int, bool]:
            raise ValueError(f"{self} is no attempt")


# --- .metadata --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """Where a record lies, and the size of the slice in it."""

    file: str
    offset: int
    length: int
    size: torch.Size


class _StandIn:
    """Stands for an object of the index while it is unpickled: keeps what it would be made of, and runs nothing."""

    arguments: tuple
    state: Any

    def __new__(cls, *arguments):
        self = super().__new__(cls)
        self.arguments = arguments
        self.state = None
        return self

    def __setstate__(self, state):
        self.state = state


_DCP = "torch.distributed.checkpoint"
# All that an index of tensors consists of. A value that is no tensor (BytesStorageMetadata) would be unpickled when it
# is loaded; a checkpoint here has none.
_CLASSES: dict[tuple[str, str], Any] = {
    (module, name): type(name, (_StandIn,), {})
    for module, name in [
        (f"{_DCP}.metadata", "Metadata"),
        (f"{_DCP}.metadata", "MetadataIndex"),
        (f"{_DCP}.metadata", "TensorStorageMetadata"),
        (f"{_DCP}.metadata", "TensorProperties"),
        (f"{_DCP}.metadata", "ChunkStorageMetadata"),
        (f"{_DCP}.metadata", "StorageMeta"),
        (f"{_DCP}.metadata", "_MEM_FORMAT_ENCODING"),
        (f"{_DCP}.filesystem", "_StorageInfo"),
        ("torch", "Size"),
        ("torch.serialization", "_get_layout"),
        ("pathlib", "PosixPath"),
        ("pathlib._local", "PosixPath"),
    ]
} | {("torch", "float32"): torch.float32}


def _member(owner: Any, name: str) -> Any:
    """What Python 3.11.0 to 3.11.3 pickle of an enum's member: getattr(enum, name); of anything else, nothing."""
    if owner is not _CLASSES[(f"{_DCP}.metadata", "_MEM_FORMAT_ENCODING")] or not isinstance(name, str):
        raise ValueError("it asks for an attribute that is no part of an index and could run code")
    return owner(name)


_CLASSES["builtins", "getattr"] = _member


# pickle's own implementation in Python: the one in C (Python 3.11) makes room for as many objects as a damaged file
# says there are, gigabytes at once.
class _Unpickler(pickle._Unpickler):  # type: ignore[name-defined]
    def find_class(self, module, name):
        if (module, name) not in _CLASSES:
            raise ValueError(f"it holds {module}.{name}, which is no part of an index and could run code")
        return _CLASSES[module, name]


def read_index(checkpoint: Path, description: dict[str, Any]) -> Metadata:
    """A checkpoint's index, whose storage_data are :class:`Place`.

    Raises:
        Damaged: it is not what was written, or does not describe each element of its tensors once.
    """
    try:
        data = read_bytes(checkpoint / INDEX)
        sha256 = description.get("index_sha256")
        if sha256 is not None and sha256 != hashlib.sha256(data).hexdigest():
            raise ValueError("it does not match its checksum")
        tensors, places = _tensors_and_places(_Unpickler(io.BytesIO(data)).load())
        _check_slices(tensors, places)
    except Exception as error:  # whatever a damaged file makes of pickle
        raise damaged(checkpoint, error, INDEX) from None
    return Metadata(state_dict_metadata=dict(tensors), storage_data=places)


def _tensors_and_places(
    index: Any,
) -> tuple[dict[str, TensorStorageMetadata], dict[MetadataIndex, Place]]:
    """The tensors of an unpickled index, and where their slices lie."""
    values = _values(index, "Metadata")
    tensors = {}
    for name, tensor in values["state_dict_metadata"].items():
        parts = _values(tensor, "TensorStorageMetadata")
        dtype = _state(parts["properties"], "TensorProperties")[0]
        if dtype is not torch.float32:
            raise ValueError(f"{name} is of {dtype}")
        chunks = []
        for chunk in parts["chunks"]:
            sizes = _values(chunk, "ChunkStorageMetadata")
            chunks.append(ChunkStorageMetadata(_size(sizes["offsets"]), _size(sizes["sizes"])))
        tensors[_text(name)] = TensorStorageMetadata(TensorProperties(dtype), _size(parts["size"]), chunks)
    sizes = {(name, chunk.offsets): chunk.sizes for name, tensor in tensors.items() for chunk in tensor.chunks}
    places = {}
    for tensor_slice, place in values["storage_data"].items():
        key = _values(tensor_slice, "MetadataIndex")
        where = _values(place, "_StorageInfo")
        if where.keys() - {"relative_path", "offset", "length"}:
            raise ValueError(f"a record is stored with {', '.join(where)}")
        name, offsets = _text(key["fqn"]), _size(key["offset"])
        file = _text(where["relative_path"])
        if not re.fullmatch(r"[\w.-]+\.distcp", file):
            raise ValueError(f"{file!r} is no file of a checkpoint")
        if (name, offsets) not in sizes:
            raise ValueError(f"it has a record of {name} from {list(offsets)}, but no such slice")
        offset, length = _count(where["offset"]), _count(where["length"])
        places[MetadataIndex(name, offsets)] = Place(file, offset, length, sizes[name, offsets])
    return tensors, places


def _state(value: Any, name: str) -> Any:
    if type(value).__name__ != name or not isinstance(value, _StandIn):
        raise ValueError(f"a {name} is a {type(value).__name__}")
    return value.state


def _values(value: Any, name: str) -> dict:
    state = _state(value, name)
    if not isinstance(state, dict):
        raise ValueError(f"a {name} has no values")
    return state


def _text(value: Any) -> str:
    if type(value) is not str:
        raise ValueError(f"{value!r} is no name")
    return value


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is no number of bytes or elements")
    return value


def _size(value: Any) -> torch.Size:
    if type(value) is not _CLASSES["torch", "Size"]:
        raise ValueError(f"{value!r} is no size")
    (numbers,) = value.arguments
    return torch.Size([_count(number) for number in numbers])


def _check_slices(tensors: dict[str, TensorStorageMetadata], places: dict[MetadataIndex, Place]) -> None:
    """Raise ValueError unless each element of each tensor is in one record."""
    for name, tensor in tensors.items():
        slices = sorted((tuple(chunk.offsets), chunk.sizes.numel()) for chunk in tensor.chunks)
        whole = len(slices) == 1 and tensor.chunks[0].sizes == tensor.size and not any(slices[0][0])
        if not whole:
            _check_tiles([(start, numel) for (start,), numel in slices], tensor.size.numel(), name)
        for chunk in tensor.chunks:
            if MetadataIndex(name, chunk.offsets) not in places:
                raise ValueError(f"no record holds {name} from {list(chunk.offsets)}")


def _check_tiles(pieces: list[tuple[int, int]], total: int, what: str) -> None:
    """Raise ValueError unless sorted (start, length) pieces cover [0, total) once."""
    end = 0
    for start, length in pieces:
        if start != end:
            raise ValueError(f"the parts of {what} end at {end} and go on at {start}")
        end += length
    if end != total:
        raise ValueError(f"{what} has size {total} instead of {end}")


# --- all of it --------------------------------------------------------------------------------------------------------


def tensors_of(recipe: Recipe) -> dict[str, torch.Size]:
    """All that a checkpoint of a recipe's training keeps: name -> size."""
    model: Any = build_model(recipe, device="meta")
    weights = dict(model.named_parameters())
    kinds = ["weight", *optimizer_kind(recipe.optimizer.name).state, *recipe.ema.decays]
    sizes = {f"{kind}/{name}": torch.Size([weight.numel()]) for kind in kinds for name, weight in weights.items()}
    buffers = {name: value for name, value in model.state_dict().items() if name not in weights}
    return sizes | {f"buffer/{name}": value.shape for name, value in buffers.items()}


def sizes_of(index: Metadata) -> dict[str, torch.Size]:
    """The tensors of a checkpoint's index: name -> size."""
    return {name: tensor.size for name, tensor in index.state_dict_metadata.items()}  # type: ignore[union-attr]


def _by_file(items: Iterable[Any], place: Callable[[Any], Place]) -> dict[str, list]:
    """Items by the file that they lie in."""
    files = defaultdict(list)
    for item in items:
        files[place(item).file].append(item)
    return files


def check_complete(checkpoint: Path, just_written: bool = False) -> tuple[dict[str, Any], Metadata]:
    """Read a checkpoint's description and index, and make sure that all it should hold is there.

    The records themselves are checked when they are read (:func:`read_state`).

    Args:
        checkpoint: its folder.
        just_written: by all ranks; a file that this node does not see yet is waited for.

    Returns:
        what :func:`read_description` and :func:`read_index` give.

    Raises:
        Damaged: something is missing or damaged.
    """
    description = read_description(checkpoint)
    index = read_index(checkpoint, description)
    try:
        needed = tensors_of(parse_recipe(description["recipe"], str(checkpoint)))
        if missing := sorted(needed.items() - sizes_of(index).items()):
            raise ValueError(f"it has no {missing[0][0]} of size {list(missing[0][1])}")
        for file, places in _by_file(index.storage_data.values(), lambda place: place).items():
            records = sorted((place.offset, place.length) for place in places)
            if just_written:
                wait_until_seen(checkpoint / file, sum(records[-1]))
            _check_tiles(records, (checkpoint / file).stat().st_size, file)
    except (OSError, ValueError, InputError) as error:
        raise damaged(checkpoint, error) from None
    return description, index


class _Reader(StorageReader):
    """Reads records from a checkpoint's folder, each held against its CRC-32."""

    def __init__(self, checkpoint: Path, index: Metadata):
        self.checkpoint = checkpoint
        self.index = index

    def reset(self, checkpoint_id=None):
        """Nothing is kept between loads."""

    def read_metadata(self):
        return self.index

    def set_up_storage_reader(self, metadata, is_coordinator):
        """The index is all that reading needs."""

    def prepare_local_plan(self, plan):
        return plan

    def prepare_global_plan(self, plans):
        return plans

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        return True

    def read_data(self, plan, planner) -> Future[None]:
        places = self.index.storage_data
        for file, requests in _by_file(plan.items, lambda request: places[request.storage_index]).items():
            with open_file(self.checkpoint / file) as opened:
                for request in requests:
                    record = _read_record(opened, places[request.storage_index])
                    for dim, (start, length) in enumerate(zip(request.storage_offsets, request.lengths, strict=True)):
                        record = record.narrow(dim, start, length)
                    target = planner.resolve_tensor(request).detach()
                    target.copy_(record)
                    planner.commit_tensor(request, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done


def _read_record(file: Any, place: Place) -> torch.Tensor:
    """One record; ValueError where it is not what was saved."""
    file.seek(place.offset)
    data = file.read(place.length)
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"the checksum of {damaged} is another")
        tensor = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        if tensor.shape != place.size or tensor.dtype != torch.float32:
            raise ValueError(f"it is {tensor.dtype} of {list(tensor.shape)}")
    except Exception as error:  # whatever damaged bytes make of zipfile and torch.load
        raise ValueError(f"{place.file}: the record at byte {place.offset} is damaged: {cause_of(error)}") from None
    return tensor


def read_state(
    targets: dict[str, torch.Tensor], checkpoint: Path, group: Any = None, index: Metadata | None = None
) -> None:
    """Fill targets by their names in a checkpoint.

    Args:
        targets: whole flattened tensors or slices of them (checkpoint.FlatSlice), on the CPU.
        checkpoint: its folder.
        group: of the ranks that read together; None for this process alone.
        index: of a checkpoint that :func:`check_complete` has seen.

    Raises:
        Damaged: something is missing or damaged, alike on all ranks of the group; targets may be filled in part.
    """
    if index is None:
        _, index = check_complete(checkpoint)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as meant where group is None
            dcp.load(targets, storage_reader=_Reader(checkpoint, index), process_group=group, no_dist=group is None)
    except (Exception, CheckpointException) as error:
        raise damaged(checkpoint, error) from None
