"""Damaged, foreign and made-up files, wherever a command reads one: one line that names the file, or no harm."""

import copy
import io
import json
import random
import tarfile
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from data_prep.digits import build_vae
from moe_dit import build_model, load_recipe
from moe_dit.build import load_settings
from moe_dit.data import ShardReader, batches, tar
from moe_dit.export import load_export, new_model_folder, save_export
from moe_dit.manifest import read_manifest
from moe_dit.recipe_file import parse_recipe
from moe_dit.reference.files import _read_checkpoint
from moe_dit.runtime.errors import InputError
from moe_dit.runtime.ranks import World
from moe_dit.upcycle import upcycle_model

DEEP = "[" * 100_000
RUBBISH = [
    None,
    True,
    -1,
    0,
    2**70,
    1.5,
    float("nan"),
    float("inf"),
    "",
    "x",
    "\x00",
    "../../x",
    [],
    [[]],
    {},
    {"a": 1},
]


def one_line(error: InputError, file) -> None:
    text = str(error)
    assert str(file) in text and "\n" not in text, text


def with_rubbish(whole: dict, places: list[tuple]) -> Iterator[dict]:
    """Copies of nested values, each with one of RUBBISH at one of the places (keys from the outside in)."""
    for *outer, last in places:
        for value in RUBBISH:
            changed = copy.deepcopy(whole)
            holder = changed
            for key in outer:
                holder = holder[key]
            holder[last] = value
            yield changed


def damaged(data: bytes, seed: int) -> bytes:
    """A copy with one to four bytes changed, or its end or a part cut out."""
    chosen = random.Random(seed)
    changed = bytearray(data)
    if seed % 4 == 0:
        start = chosen.randrange(len(data))
        del changed[start : start + chosen.choice([1, 512, 5000, len(data)])]
    for _ in range(chosen.randrange(1, 5)):
        if changed:
            changed[chosen.randrange(len(changed))] = chosen.randrange(256)
    return bytes(changed)


@pytest.fixture
def shard(tmp_path):
    """A folder of one shard of four latent samples; gives its file."""
    return write_shard(tmp_path / "shards", [(np.full((4, 8, 8), i, np.float32), b"3") for i in range(4)])


def write_shard(folder, samples):
    folder.mkdir()
    file = folder / "shard-000000.tar"
    with tarfile.open(file, "w") as tar:
        for number, (latent, label) in enumerate(samples):
            npy = io.BytesIO()
            np.save(npy, latent)
            members = {"cls": label, "latent.npy": npy.getvalue(), "latent_flip.npy": npy.getvalue()}
            for extension, content in members.items():
                member = tarfile.TarInfo(f"{number:09d}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    record = {"name": file.name, "samples": len(samples), "bytes": file.stat().st_size, "sha256": "0" * 64}
    manifest = {"format": "moe-dit-shards-1", "kind": "latents", "samples": len(samples), "scale": 1.0, "shift": None}
    manifest |= {"classes": list("0123456789"), "sample_shape": [4, 8, 8], "shards": [record]}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return file


def read_all(file):
    """Every sample of a folder of one shard, as training reads them."""
    recipe = load_recipe("digits", ["steps=1", "global_batch_size=4"])
    return list(batches(recipe, read_manifest(file.parent, check_sizes=False), 4, 0, World()))


def test_a_damaged_shard_is_one_line(shard):
    data = shard.read_bytes()
    outcomes = {"read": 0, "refused": 0}
    for seed in range(150):
        shard.write_bytes(damaged(data, seed))
        try:
            assert len(read_all(shard)) == 1
            outcomes["read"] += 1  # only values or times were changed, which --verify's checksum is for
        except InputError as error:
            one_line(error, shard)
            outcomes["refused"] += 1
        try:
            list(tar.members(io.BytesIO(shard.read_bytes())))
        except ValueError as error:
            assert "\n" not in str(error)
    assert outcomes["refused"] > 25, outcomes


@pytest.mark.parametrize("label", [b"10", b"-1", b"cat", b"", b"9" * 40, b"\xff"])
def test_a_label_that_is_none_of_the_classes_is_refused(tmp_path, label):
    file = write_shard(tmp_path / "shards", [(np.zeros((4, 8, 8), np.float32), label)] * 4)
    with pytest.raises(InputError, match=r"a label is|has no \.cls") as caught:
        read_all(file)
    one_line(caught.value, file)


def test_a_sample_of_another_shape_is_refused(tmp_path):
    file = write_shard(tmp_path / "shards", [(np.zeros((4, 8, 16), np.float32), b"1")] * 4)
    with pytest.raises(InputError, match=r"a sample has shape \[4, 8, 16\], its manifest says \[4, 8, 8\]") as caught:
        read_all(file)
    one_line(caught.value, file)


def test_a_manifest_of_any_values_is_one_line_or_true(shard):
    file = shard.parent / "manifest.json"
    whole = json.loads(file.read_text())
    assert read_manifest(file.parent).samples == 4
    places = [(key,) for key in whole] + [("shards", 0, key) for key in whole["shards"][0]] + [("sample_shape", 1)]
    refused = 0
    for changed in with_rubbish(whole, places):
        file.write_text(json.dumps(changed))
        try:
            ShardReader(read_manifest(file.parent, check_sizes=False))
        except InputError as error:
            one_line(error, file.parent)
            refused += 1
    assert refused > 0.8 * len(places) * len(RUBBISH)
    for text in ("", "null", "[]", "3", DEEP, '{"format": "moe-dit-shards-1", "kind": "latents"}'):
        file.write_text(text)
        with pytest.raises(InputError) as caught:
            read_manifest(file.parent)
        one_line(caught.value, file)


@pytest.mark.parametrize("text", ["day: 2024-99-99", "seed: " + "9" * 5000, DEEP, "a: &a [*a]", "\x00", "? [1]\n: 2"])
def test_a_recipe_of_anything_is_one_line(tmp_path, text):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(InputError) as caught:
        load_recipe(str(file))
    one_line(caught.value, file)


def test_any_value_of_any_key_of_a_recipe_is_one_line_or_taken():
    whole = load_recipe("digits").to_dict()
    places = [(key, inner) for key, value in whole.items() if isinstance(value, dict) for inner in value]
    places += [(key,) for key in whole] + [("model", "moe", key) for key in whole["model"]["moe"]]
    refused = 0
    for changed in with_rubbish(whole, places):
        try:
            parse_recipe(changed, "mine.yaml")
        except InputError as error:
            one_line(error, "mine.yaml")
            refused += 1
    assert refused > 0.7 * len(places) * len(RUBBISH)
    for values in (None, [], "x", 3):
        with pytest.raises(InputError, match="should be a mapping"):
            parse_recipe(values, "mine.yaml")


@pytest.fixture
def model(tmp_path):
    recipe = load_recipe("digits", ["model.depth=1"])
    save_export(build_model(recipe), recipe, tmp_path / "model")
    return tmp_path / "model"


def test_a_model_s_settings_of_any_values_are_one_line(model):
    file = model / "config.json"
    whole = json.loads(file.read_text())
    for text in ("", "null", "[]", DEEP, '{"_class_name": ["DSMoE"]}'):
        file.write_text(text)
        with pytest.raises(InputError) as caught:
            load_settings(model)
        one_line(caught.value, model)
    for key in whole:
        for value in RUBBISH:
            file.write_text(json.dumps(whole | {key: value}))
            try:
                load_settings(model)
            except InputError as error:
                one_line(error, model)


def test_a_model_whose_recipe_is_of_another_network_is_refused(model):
    recipe = model / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("depth: 1", "depth: 2"))
    with pytest.raises(InputError, match="its depth is 1, the recipe"):
        load_export(model)


def test_a_model_of_another_program_is_not_replaced(tmp_path):
    build_vae(seed=0).save_pretrained(tmp_path / "vae")  # the same file names as an export's
    before = {file: file.read_bytes() for file in (tmp_path / "vae").iterdir()}
    with (
        pytest.raises(InputError, match="holds files that are no exported model"),
        new_model_folder(tmp_path / "vae", load_recipe("digits")),
    ):
        pytest.fail("the block should not begin")
    assert {file: file.read_bytes() for file in (tmp_path / "vae").iterdir()} == before


def test_upcycling_never_replaces_the_dense_model(tmp_path):
    recipe = load_recipe("digits_pixels", ["model.depth=2", "model.in_context_start=1", "model.moe.expert_width=192"])
    dense = load_recipe("digits_pixels", ["model.depth=2", "model.in_context_start=1", "model.moe=null"])
    save_export(build_model(dense), dense, tmp_path / "dense")
    (tmp_path / "link").symlink_to(tmp_path / "dense")
    for name in ("dense", "link", "link/../dense"):
        with pytest.raises(InputError) as caught:
            upcycle_model(tmp_path / "dense", recipe, tmp_path / name)
        assert "would be replaced" in str(caught.value)


@pytest.mark.parametrize(
    ("value", "line"),
    [
        ({3: torch.zeros(2)}, "which is not a tensor with a name"),
        ({"a": [1.0]}, "which is not a tensor with a name"),
        ({"a": torch.zeros(3, dtype=torch.int64)}, "not a plain tensor of floating-point numbers"),
        ({"a": torch.zeros(3).to_sparse()}, "not a plain tensor of floating-point numbers"),
    ],
)
def test_published_weights_that_are_none_are_refused(tmp_path, value, line):
    file = tmp_path / "weights.pt"
    torch.save({"model": value}, file)
    with pytest.raises(InputError, match=line) as caught:
        _read_checkpoint(file, "model")
    one_line(caught.value, file)


def test_damaged_published_weights_are_one_line(tmp_path):
    file = tmp_path / "weights.pt"
    torch.save({"model": {"a": torch.arange(64.0)}}, file)
    data = file.read_bytes()
    for seed in range(150):
        file.write_bytes(damaged(data, seed))
        try:
            _read_checkpoint(file, "model")
        except InputError as error:
            one_line(error, file)
