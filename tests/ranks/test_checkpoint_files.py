"""Checkpoints that are damaged or foreign: what is refused, and in which words."""

import io
import json
import os
import pickle
import random
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex, StorageMeta

from helpers import small
from helpers.older_run import OLD
from helpers.small import copy, step
from moe_dit.checkpoint_files import (
    Damaged,
    check_complete,
    read_description,
    read_index,
    read_state,
    sizes_of,
    write_description,
)
from moe_dit.lineage import find_checkpoint


@pytest.fixture
def eight_steps(shared) -> Path:
    return small.eight_steps(shared)


def everything(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, as commands read it."""
    _, index = check_complete(checkpoint)
    state = {name: torch.full(size, torch.nan) for name, size in sizes_of(index).items()}
    read_state(state, checkpoint, index=index)
    return state


def flips(data: bytes, count: int):
    """Copies of a file with one random byte changed, and its place."""
    generator = random.Random(8)
    for _ in range(count):
        place = generator.randrange(len(data))
        changed = bytearray(data)
        changed[place] ^= generator.randrange(1, 256)
        yield place, bytes(changed)


@pytest.fixture(params=["new", "before checksums"])
def whole(request, eight_steps, tmp_path) -> Path:
    source = eight_steps / "checkpoints" / step(8) if request.param == "new" else OLD / "run/checkpoints" / step(3)
    return shutil.copytree(source, tmp_path / source.name)


MANY = pytest.mark.parametrize("count", [200, pytest.param(600, marks=pytest.mark.long)])


@MANY
def test_a_changed_byte_of_the_index_never_loads_wrong(whole, count):
    truth = everything(whole)
    outcomes = Counter()
    new = "index_sha256" in (whole / "state.json").read_text()
    for _, changed in flips((whole / ".metadata").read_bytes(), count):
        (whole / ".metadata").write_bytes(changed)
        try:
            got = everything(whole)
        except Damaged as error:
            outcomes["refused"] += 1
            assert str(error).startswith(f"checkpoint {whole} cannot be read: ") and "\n" not in str(error)
        else:  # a byte that means nothing
            outcomes["loaded"] += 1
            assert got.keys() == truth.keys() and all(torch.equal(got[name], truth[name]) for name in truth)
    assert outcomes["refused"] == count if new else outcomes["refused"] > 0.83 * count


@MANY
def test_a_changed_byte_of_the_description_is_noticed(whole, count):
    truth, _ = check_complete(whole)
    new = "sha256" in (whole / "state.json").read_text()
    for _, changed in flips((whole / "state.json").read_bytes(), count):
        (whole / "state.json").write_bytes(changed)
        try:
            got, _ = check_complete(whole)
        except Damaged as error:
            assert "\n" not in str(error)
        else:  # before there were checksums a value could become another one
            assert not new or got == truth


@MANY
def test_a_changed_byte_of_a_record_is_noticed(whole, count):
    """torch.load reads most of them without a word: it is built without the check of a zip archive's checksums."""
    _, index = check_complete(whole)
    file = whole / "__0_0.distcp"
    data, truth = file.read_bytes(), everything(whole)
    unnoticed_by_torch = 0
    for byte, changed in flips(data, count):
        file.write_bytes(changed)
        slices = ((key.fqn, place) for key, place in index.storage_data.items() if place.file == file.name)
        name, place = next(found for found in slices if found[1].offset <= byte < found[1].offset + found[1].length)
        record = slice(place.offset, place.offset + place.length)
        try:
            plain, good = (torch.load(io.BytesIO(of[record]), weights_only=True) for of in (changed, data))
            unnoticed_by_torch += not torch.equal(plain, good)
        except Exception:
            pass
        state = {name: torch.full_like(truth[name], torch.nan)}
        try:
            read_state(state, whole, index=index)
        except Damaged as error:
            assert f"{file.name}: the record at byte {place.offset} is damaged" in str(error) and "\n" not in str(error)
        else:  # padding, and dates of the archive
            assert torch.equal(state[name], truth[name])
    assert unnoticed_by_torch > count / 6


class Call:
    """Pickles as a call of a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("call", [(os.system, "touch {}"), (eval, "open('{}', 'w')"), (open, "{}", "w")])
def test_an_index_that_would_run_code_does_not(eight_steps, tmp_path, call):
    run = copy(eight_steps, tmp_path)
    checkpoint = run / "checkpoints" / step(8)
    ran = tmp_path / "ran"
    function, *arguments = call
    whole = pickle.loads((checkpoint / ".metadata").read_bytes())
    whole.planner_data = Call(function, *(argument.format(ran) for argument in arguments))
    for index in (whole, whole.planner_data):
        stranger(checkpoint, index)
        with pytest.raises(Damaged, match=r"\.metadata: it holds .* could run code"):
            everything(checkpoint)
        assert find_checkpoint(run) == run / "checkpoints" / step(6)
    assert not ran.exists()
    pickle.loads((checkpoint / ".metadata").read_bytes())  # it would have
    assert ran.exists()


def stranger(checkpoint: Path, index) -> None:
    """Write another index, as someone would who keeps to the format: with its checksum."""
    (checkpoint / ".metadata").write_bytes(pickle.dumps(index))
    description = json.loads((checkpoint / "state.json").read_text())
    for key in ("format", "sha256", "index_sha256"):
        description.pop(key, None)
    write_description(checkpoint, description)


def test_an_index_leads_to_no_other_files_and_no_pickled_values(eight_steps, tmp_path):
    checkpoint = copy(eight_steps, tmp_path) / "checkpoints" / step(8)
    good = (checkpoint / ".metadata").read_bytes()

    index = pickle.loads(good)
    secret = shutil.copy(checkpoint / "__0_0.distcp", tmp_path / "secret.distcp")
    for place in index.storage_data.values():
        place.relative_path = f"../../../{secret.name}"
    stranger(checkpoint, index)
    with pytest.raises(Damaged, match=r"'\.\./\.\./\.\./secret\.distcp' is no file of a checkpoint"):
        everything(checkpoint)

    index = pickle.loads(good)
    index.state_dict_metadata["weight/x_embedder.proj.weight"] = BytesStorageMetadata()
    stranger(checkpoint, index)
    with pytest.raises(Damaged, match=r"BytesStorageMetadata, which is no part of an index"):
        everything(checkpoint)

    # Setting an attribute of a class, here of torch's own, is no way out either.
    attack = pickle.dumps(pickle.loads(good), protocol=2)[:-1]
    attack += b"ctorch.distributed.checkpoint.metadata\nStorageMeta\nN}\x8c\x04nameK\x01s\x86b0."
    (checkpoint / ".metadata").write_bytes(attack)
    pickle.loads(attack)
    assert StorageMeta.name == 1
    del StorageMeta.name
    description = read_description(checkpoint)
    del description["index_sha256"]
    with pytest.raises(Damaged):
        read_index(checkpoint, description)
    assert not hasattr(StorageMeta, "name")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda index: index.state_dict_metadata.pop("ema/final_layer.linear.bias"), "but no such slice"),
        (lambda index: index.storage_data.pop(next(iter(index.storage_data))), "no record holds weight/"),
        (lambda index: move(index, 1), "weight/x_embedder.proj.weight"),
        (lambda index: rename(index, "ema/final_layer.linear.bias", "ema/other"), "it has no ema/final_layer"),
        (lambda index: share(index), "__0_0.distcp"),
    ],
)
def test_an_index_that_does_not_describe_each_element_once_is_refused(eight_steps, tmp_path, change, reason):
    """Without its checksum, as of an earlier version."""
    checkpoint = copy(eight_steps, tmp_path) / "checkpoints" / step(8)
    index = pickle.loads((checkpoint / ".metadata").read_bytes())
    change(index)
    stranger(checkpoint, index)
    with pytest.raises(Damaged) as error:
        check_complete(checkpoint)
    assert reason in str(error.value)


def move(index, by: int) -> None:
    tensor = index.state_dict_metadata["weight/x_embedder.proj.weight"]
    key = next(key for key in index.storage_data if key.fqn == "weight/x_embedder.proj.weight")
    offsets = torch.Size([key.offset[0] + by])
    index.storage_data[MetadataIndex(key.fqn, offsets)] = index.storage_data.pop(key)
    tensor.chunks[0].offsets = offsets


def rename(index, old: str, new: str) -> None:
    index.state_dict_metadata[new] = index.state_dict_metadata.pop(old)
    for key in [key for key in index.storage_data if key.fqn == old]:
        index.storage_data[MetadataIndex(new, key.offset)] = index.storage_data.pop(key)


def share(index) -> None:
    """Let two slices of one size lie at one place."""
    biases = [f"ema/c_embedder.time.linear_{number}.bias" for number in (1, 2)]
    first, second = (key for key in index.storage_data if key.fqn in biases)
    index.storage_data[first] = index.storage_data[second]
