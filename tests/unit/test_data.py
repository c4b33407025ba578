"""The reader: every sample once an epoch, whatever shares the work, and shards that are not as they should be."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import webdataset

from moe_dit.data import Latents, ShardReader, batches, check_manifest, training_inputs
from moe_dit.manifest import read_manifest
from moe_dit.recipe_file import load_recipe
from moe_dit.runtime.errors import InputError
from moe_dit.runtime.ranks import World

DIGITS = load_recipe("digits")


@pytest.fixture
def copy(latents, tmp_path):
    """Shards that a test may damage."""
    return shutil.copytree(latents, tmp_path / "shards")


def stream(latents, world, micro, first_step=0, steps=6, **data):
    recipe = replace(DIGITS, steps=steps, data=replace(DIGITS.data, **data))
    return list(batches(recipe, read_manifest(latents), micro, first_step, world))


def by_position(parts):
    samples = {}
    for batch in parts:
        for position, x, y in zip(batch["position"], batch["x"], batch["y"], strict=True):
            samples[int(position)] = x, int(y)
    return samples


def test_the_reader_finds_what_webdataset_reads(latents):
    urls = sorted(str(path) for path in latents.glob("*.tar"))
    assert len(urls) > 1
    want = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False).decode())
    reader = ShardReader(read_manifest(latents))
    assert len(reader) == len(want) == 1797
    for index in (0, 511, 512, 1000, 1796):
        members = reader.members(index)
        assert np.array_equal(members.array("latent.npy"), want[index]["latent.npy"])
        assert np.array_equal(members.array("latent_flip.npy"), want[index]["latent_flip.npy"])
        assert members.label() == want[index]["cls"]


def test_an_epoch_holds_every_sample_once(latents):
    reader = ShardReader(read_manifest(latents))
    seen = [int(p) % 1797 for batch in stream(latents, World(), 64, steps=29) for p in batch["position"]]
    assert sorted(seen[:1797]) == list(range(1797))
    batch = by_position(stream(latents, World(), 64, steps=58))
    labels = [batch[p][1] for p in range(1797)], [batch[p][1] for p in range(1797, 2 * 1797)]
    truth = np.bincount([reader.members(i).label() for i in range(1797)])
    for epoch in labels:
        assert np.array_equal(np.bincount(epoch), truth)
    assert labels[0] != labels[1]


def test_ranks_micro_batches_workers_and_restarts_share_one_run(latents):
    whole = by_position(stream(latents, World(), 64))
    parts = [stream(latents, World(rank, rank, 4), 8, workers=rank % 2) for rank in range(4)]
    shared = by_position(batch for part in parts for batch in part)
    later = by_position(stream(latents, World(), 64, first_step=4))
    assert whole.keys() == shared.keys() == set(range(6 * 64))
    assert later.keys() == set(range(4 * 64, 6 * 64))
    for position, (x, y) in (shared | later).items():
        assert torch.equal(x, whole[position][0]) and y == whole[position][1]


def test_flips_come_at_their_rate_and_are_the_mirror_image(latents):
    plain = by_position(stream(latents, World(), 64, steps=20))
    flipped = by_position(stream(latents, World(), 64, steps=20, horizontal_flip=0.3))
    changed = [not torch.equal(plain[p][0], flipped[p][0]) for p in plain]
    assert 0.26 < np.mean(changed) < 0.34
    reader = ShardReader(read_manifest(latents))
    mirrors = {reader.members(i).array("latent_flip.npy").tobytes() for i in range(len(reader))}
    assert all(flipped[p][0].numpy().tobytes() in mirrors for p, change in zip(plain, changed, strict=True) if change)


def test_training_inputs_are_drawn_as_the_recipe_says(latents):
    inputs = [training_inputs(DIGITS, batch, Latents(2.0)) for batch in stream(latents, World(), 64, steps=40)]
    dropped = torch.cat([i["y"] for i in inputs]) == 10
    assert 0.08 < dropped.float().mean() < 0.12
    u = torch.cat([i["u"] for i in inputs])
    assert abs(u.mean() - 0.5) < 0.02 and abs(u.std() - 12**-0.5) < 0.02
    batch = stream(latents, World(), 64, steps=1)[0]
    mean, log_variance = batch["x"].float().chunk(2, 1)
    draw = (inputs[0]["x"] / 2.0 - mean) / (0.5 * log_variance).exp()
    assert abs(draw.mean()) < 0.05 and abs(draw.std() - 1) < 0.05
    one = training_inputs(DIGITS, {key: value[5:6] for key, value in batch.items()}, Latents(2.0))
    for key, value in one.items():
        assert torch.equal(value[0], inputs[0][key][5])


def test_a_truncated_shard_is_named_before_anything_starts(copy):
    shard = copy / "shard-000001.tar"
    with open(shard, "r+b") as file:
        file.truncate(100_000)
    with pytest.raises(InputError, match=r"shard-000001\.tar has 100000 bytes instead of"):
        read_manifest(copy)


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (lambda f: shutil.rmtree(f), "no folder of shards"),
        (lambda f: (f / "manifest.json").unlink(), "has no manifest.json"),
        (lambda f: (f / "manifest.json").write_text("{"), "cannot be read as a manifest"),
        (lambda f: (f / "manifest.json").write_text("{}"), "format is None"),
        (lambda f: (f / "shard-000000.tar").unlink(), "is missing"),
    ],
)
def test_wrong_folders_are_one_line(copy, damage, line):
    damage(copy)
    with pytest.raises(InputError, match=line) as caught:
        read_manifest(copy)
    assert str(copy) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_damage_of_the_same_size_is_found_when_read(copy, workers):
    path = copy / "shard-000000.tar"
    content = path.read_bytes()
    path.write_bytes(content.replace(b"\x93NUMPY", b"\x93RUMPY"))
    with pytest.raises(InputError, match="is damaged") as caught:
        stream(copy, World(), 64, steps=20, workers=workers)
    assert "\n" not in str(caught.value) and "Traceback" not in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["data.kind=pixels"], "holds latents, but recipe digits trains on pixels"),
        (["model.input_size=16"], "holds samples of shape"),
        (["model.num_classes=5"], "has 10 classes"),
        (["data.latent_scale=0.18215"], "was encoded by a VAE of scale"),
    ],
)
def test_shards_that_do_not_fit_the_recipe(latents, overrides, line):
    with pytest.raises(InputError, match=line):
        check_manifest(read_manifest(latents), load_recipe("digits", overrides))


def test_the_manifest_counts(latents):
    manifest = json.loads((latents / "manifest.json").read_text())
    assert manifest["samples"] == sum(shard["samples"] for shard in manifest["shards"])
