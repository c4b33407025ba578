"""The shards' reader: every sample once an epoch, whatever shares the work; orders; the index; damaged shards."""

import json
import shutil
import tarfile
import zlib
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import webdataset

from data_prep import verify
from eval import sample
from eval.generate import resolve
from helpers.small_shards import DIGITS, flip, sequence, stream, write_latents
from moe_dit.data import Latents, ShardReader, batches, check_manifest, make_order, training_inputs
from moe_dit.data.index import ensure_index, index_name
from moe_dit.data.inputs import check_guidance, untrained_guidance, untrained_labels
from moe_dit.data.loader import TrainingSamples, workers_for
from moe_dit.data.order import FullOrder, WindowOrder, window_for
from moe_dit.manifest import read_manifest
from moe_dit.recipe_file import load_recipe
from moe_dit.recipe_file import names as recipe_names
from moe_dit.runtime.errors import InputError
from moe_dit.runtime.ranks import World
from moe_dit.train import _check as check_training


@pytest.fixture
def copy(latents, tmp_path):
    """Shards that a test may damage."""
    return shutil.copytree(latents, tmp_path / "shards")


def digits_of(latents, world, micro, first_step=0, steps=6, **data):
    """A rank's batches of the digits."""
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
    seen = [int(p) % 1797 for batch in digits_of(latents, World(), 64, steps=29) for p in batch["position"]]
    assert sorted(seen[:1797]) == list(range(1797))
    batch = by_position(digits_of(latents, World(), 64, steps=58))
    labels = [batch[p][1] for p in range(1797)], [batch[p][1] for p in range(1797, 2 * 1797)]
    truth = np.bincount([reader.members(i).label() for i in range(1797)])
    for epoch in labels:
        assert np.array_equal(np.bincount(epoch), truth)
    assert labels[0] != labels[1]


def test_ranks_micro_batches_and_restarts_share_one_run(latents):
    whole = by_position(digits_of(latents, World(), 64))
    parts = [digits_of(latents, World(rank, rank, 4), 8) for rank in range(4)]
    shared = by_position(batch for part in parts for batch in part)
    later = by_position(digits_of(latents, World(), 64, first_step=4))
    assert whole.keys() == shared.keys() == set(range(6 * 64))
    assert later.keys() == set(range(4 * 64, 6 * 64))
    for position, (x, y) in (shared | later).items():
        assert torch.equal(x, whole[position][0]) and y == whole[position][1]


def test_flips_come_at_their_rate_and_are_the_mirror_image(latents):
    plain = by_position(digits_of(latents, World(), 64, steps=20))
    flipped = by_position(digits_of(latents, World(), 64, steps=20, horizontal_flip=0.3))
    changed = [not torch.equal(plain[p][0], flipped[p][0]) for p in plain]
    assert 0.26 < np.mean(changed) < 0.34
    reader = ShardReader(read_manifest(latents))
    mirrors = {reader.members(i).array("latent_flip.npy").tobytes() for i in range(len(reader))}
    assert all(flipped[p][0].numpy().tobytes() in mirrors for p, change in zip(plain, changed, strict=True) if change)


def test_training_inputs_are_drawn_as_the_recipe_says(latents):
    inputs = [training_inputs(DIGITS, batch, Latents(2.0)) for batch in digits_of(latents, World(), 64, steps=40)]
    dropped = torch.cat([i["y"] for i in inputs]) == 10
    assert 0.08 < dropped.float().mean() < 0.12
    u = torch.cat([i["u"] for i in inputs])
    assert abs(u.mean() - 0.5) < 0.02 and abs(u.std() - 12**-0.5) < 0.02
    batch = digits_of(latents, World(), 64, steps=1)[0]
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


def test_damage_of_the_same_size_is_found_when_read(copy):
    path = copy / "shard-000000.tar"
    content = path.read_bytes()
    path.write_bytes(content.replace(b"\x93NUMPY", b"\x93RUMPY"))
    with pytest.raises(InputError, match="is damaged") as caught:
        digits_of(copy, World(), 64, steps=20)
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


@pytest.mark.parametrize(
    ("labels", "line"),
    [
        (10, None),
        (11, "has 10 classes, and model.num_classes is 11: label 10 is never trained, and sampling draws from all 11"),
        (1000, "has 10 classes, and model.num_classes is 1000: labels 10 to 999 are never trained, and sampling draws"),
    ],
)
def test_labels_that_no_shard_holds_are_told_of(latents, labels, line):
    recipe, manifest = load_recipe("digits", [f"model.num_classes={labels}"]), read_manifest(latents)
    check_manifest(manifest, recipe)
    said = untrained_labels(manifest, recipe)
    assert said is None if line is None else f"{latents} {line}" in said
    assert line is None or said.endswith("--set model.num_classes=10 leaves the others out")


UNTRAINED = "flow.label_dropout=0"


@pytest.mark.parametrize("flags", [[], ["--cfg-scale", "0"], ["--cfg-scale", "1.5", "--cfg-interval", "0", "0.5"]])
def test_samples_are_not_guided_by_a_null_class_that_was_never_trained(flags):
    parser = sample.Parser("", "")
    sample.add_sampling_arguments(parser)
    given = parser.parse_args(["--model", "none", "--num", "4", *flags])
    assert resolve(given, load_recipe("digits_pixels")).labels == "balanced"
    with pytest.raises(InputError, match=r"^guidance of cfg_scale .* flow\.label_dropout 0; give --cfg-scale 1$"):
        resolve(given, load_recipe("digits_pixels", [UNTRAINED]))
    given.cfg_scale = 1.0
    assert resolve(given, load_recipe("digits_pixels", [UNTRAINED])).cfg_scale == 1


@pytest.mark.parametrize(
    ("overrides", "refused"),
    [
        ([], False),  # it only trains
        (["looks.every=5", "looks.samples=0"], False),  # nor does a held-out loss sample
        (["looks.every=5"], True),
        (["looks.every=5", "looks.samples=0", "looks.score_samples=9", "looks.reference=x"], True),
        (["looks.every=5", "sampling.cfg_scale=1"], False),
        (["looks.every=5", "initial_weights=x"], False),  # which may have a trained one
    ],
)
def test_looks_are_not_guided_by_a_null_class_that_is_never_trained(latents, overrides, refused):
    recipe = load_recipe("digits", [f"data.path={latents}", *overrides, UNTRAINED])
    if refused:
        with pytest.raises(InputError, match=r"flow\.label_dropout 0; --set sampling\.cfg_scale=1, or leave looks"):
            check_training(recipe, "ds_configs/zero1_ep1.json")
    else:
        check_training(recipe, "ds_configs/zero1_ep1.json")


@pytest.mark.parametrize(
    ("overrides", "told"),
    [([UNTRAINED], True), ([], False), ([UNTRAINED, "sampling.cfg_scale=1"], False)],
)
def test_guidance_that_samples_will_be_refused_is_told_before_training(overrides, told):
    line = untrained_guidance(load_recipe("digits", overrides))
    assert (line is not None and "flow.label_dropout 0; sample with --cfg-scale 1" in line) == told


def test_every_recipe_s_samples_can_be_guided():
    for name in recipe_names():
        recipe = load_recipe(name)
        check_guidance(recipe, recipe.sampling.cfg_scale, "")


def test_the_manifest_counts(latents):
    manifest = json.loads((latents / "manifest.json").read_text())
    assert manifest["samples"] == sum(shard["samples"] for shard in manifest["shards"])


# --- orders -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """23 samples in five shards of different sizes."""
    return write_latents(tmp_path_factory.mktemp("small") / "shards")


@pytest.mark.parametrize("window_gb", [None, 4e-5], ids=["full", "windows"])
def test_one_sequence_whatever_shares_it(small, window_gb):
    """Two epochs and more: each sample once an epoch, the same at any world size and restart."""
    steps = 4  # of 12: two epochs of 23 are 46
    whole = sequence(small, 1, steps, window_gb=window_gb)
    assert sorted(whole) == list(range(48))
    numbers = [whole[position] for position in range(48)]
    assert sorted(numbers[:23]) == sorted(numbers[23:46]) == list(range(23)) and numbers[:23] != numbers[23:46]
    for size in (2, 3, 4):
        assert sequence(small, size, steps, window_gb=window_gb) == whole
    for size in (1, 2, 3, 4):
        later = sequence(small, size, steps, window_gb=window_gb, first_step=2)
        assert later == {position: whole[position] for position in range(24, 48)}


def test_windows_are_shards_that_were_permuted():
    """Ten shards of four, three a window: a window's samples come before the next one's, in an order of their own."""
    order = WindowOrder(seed=3, shard_samples=[4] * 10, shards=3)
    epochs = order.samples(np.arange(80)).reshape(2, 40)
    for epoch in epochs:
        assert sorted(epoch) == list(range(40))
        shards = epoch // 4
        windows = [set(shards[start : start + 12].tolist()) for start in (0, 12, 24, 36)]
        assert [len(window) for window in windows] == [3, 3, 3, 1]
        assert (np.diff(shards[:12]) != 0).sum() > 2  # not one shard after another
        assert epoch[:12].tolist() != sorted(epoch[:12]) and shards[:12].tolist() != sorted(shards[:12])
    assert (epochs[0] != epochs[1]).any() and set(epochs[0][:12] // 4) != set(epochs[1][:12] // 4)
    assert WindowOrder(4, [4] * 10, 3).samples(np.arange(40)).tolist() != epochs[0].tolist()


def test_what_is_read_ahead_is_what_comes():
    order = WindowOrder(seed=3, shard_samples=[4] * 10, shards=3)
    for position in (0, 11, 12, 30, 39, 40):
        ahead = order.shards_ahead(position)
        left = order.samples(np.arange(position, position + 13)) // 4
        assert set(left.tolist()) <= set(ahead)
        assert len(ahead) in (4, 6)
    assert FullOrder(3, 40).shards_ahead(0) == []


def test_the_size_of_windows(small):
    manifest = read_manifest(small)
    largest = max(shard["bytes"] for shard in manifest.shards)
    assert make_order(manifest, 0, 2.5 * largest / 1e9).shards == 2
    assert make_order(manifest, 0, 1e-9).shards == 1 and make_order(manifest, 0, 1e3).shards == 5
    assert window_for(manifest, "auto") is None and window_for(manifest, 2.0) == 2.0
    large = replace(manifest, shards=[shard | {"bytes": 10**9} for shard in manifest.shards] * 2)
    assert window_for(large, "auto") == 4.0 and window_for(large, None) is None


def test_windows_mix_classes_and_neighbours():
    """Shuffle quality: two neighbours of an epoch share a shard as often as chance in a window says, 1 in 16."""
    order = WindowOrder(seed=0, shard_samples=[256] * 64, shards=16)
    shards = order.samples(np.arange(64 * 256)) // 256
    assert abs((shards[1:] == shards[:-1]).mean() - 1 / 16) < 0.01
    first, second = (order.samples(np.arange(e * 16384, (e + 1) * 16384)) for e in (0, 1))
    moved = np.empty(16384, np.int64)
    moved[first] = np.arange(16384)
    again = np.empty(16384, np.int64)
    again[second] = np.arange(16384)
    # Where a sample stands in one epoch says nothing of where it stands in the next.
    assert abs(np.corrcoef(moved, again)[0, 1]) < 0.3


# --- the index --------------------------------------------------------------------------------------------------------


def test_the_index_says_where_everything_is(small):
    manifest = read_manifest(small)
    index = ensure_index(manifest)
    assert (small / index_name(manifest.shards)).stat().st_size < 400 + 52 * 23 and len(index) == 23
    row = 0
    for shard in manifest.shards:
        data = (small / shard["name"]).read_bytes()
        with tarfile.open(small / shard["name"]) as tar:
            for name in [name for name in tar.getnames() if name.endswith(".cls")]:
                for extension in ("cls", "latent.npy", "latent_flip.npy"):
                    content = tar.extractfile(name.replace("cls", extension)).read()
                    record = index[row][extension]
                    start = int(record["offset"])
                    assert data[start : start + int(record["size"])] == content
                    assert record["crc"] == zlib.crc32(content)
                assert index[row]["label"] == row % 10
                row += 1


def test_an_index_is_kept_elsewhere_where_the_shards_cannot_be_written(small, tmp_path, monkeypatch):
    shards = shutil.copytree(small, tmp_path / "shards", ignore=shutil.ignore_patterns("index*"))
    monkeypatch.setenv("MOE_DIT_CACHE", str(tmp_path / "cache"))
    manifest = read_manifest(shards)
    blocked = shards / index_name(manifest.shards)
    blocked.mkdir()  # a file cannot take its place
    assert len(ensure_index(manifest)) == 23
    assert (tmp_path / "cache" / "indexes" / blocked.name).is_file()
    monkeypatch.setenv("MOE_DIT_CACHE", str(small / "part-0.tar"))
    with pytest.raises(InputError, match="cannot be kept anywhere"):
        ensure_index(manifest)


@pytest.mark.parametrize("damage", [lambda b: b[:60], lambda b: b"", lambda b: b"\x00" * len(b), lambda b: b[:-40]])
def test_a_damaged_index_is_one_line(small, tmp_path, damage):
    shards = shutil.copytree(small, tmp_path / "shards")
    manifest = read_manifest(shards)
    ensure_index(manifest)
    path = shards / index_name(manifest.shards)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError, match="is damaged") as caught:
        ShardReader(manifest)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


# --- damage -----------------------------------------------------------------------------------------------------------


def test_workers_are_as_many_as_feed_a_rank(monkeypatch):
    """By a clock of our own: a sleep takes what a busy machine makes of it."""
    now = 0.0

    class Reader:
        def __len__(self):
            return 100

        def read(self, indices, flips):
            nonlocal now
            now += 0.05 if reads else 1  # the first time, files are opened
            reads.append(len(indices))

    def chosen(eats, cores=64):
        reads.clear()
        monkeypatch.setattr("moe_dit.data.loader.ranks.cores", lambda: cores)
        return workers_for(TrainingSamples(Reader(), 0, 0.5), list(range(10)), eats)

    reads = []
    monkeypatch.setattr("moe_dit.data.loader.time", SimpleNamespace(perf_counter=lambda: now))
    assert chosen(290) == 3 and reads == [10, 10, 10]  # one reads 200 a second
    assert chosen(290, cores=3) == 2
    assert chosen(0.1) == 1 and chosen(1e6, cores=1) == 1


@pytest.mark.parametrize(
    "what", ["label", "header", "values", "index label", "index place", "index checksum", "swapped"]
)
def test_a_flipped_bit_anywhere_is_one_line(small, tmp_path, what):
    shards = shutil.copytree(small, tmp_path / "shards")
    manifest = read_manifest(shards)
    index = np.array(ensure_index(manifest))
    assert len(stream(shards, World(), 2, None)) == 2
    shard = shards / "part-2.tar"
    place = index[10]["latent.npy"]["offset"]
    path = shards / index_name(manifest.shards)
    header = path.stat().st_size - 52 * 23
    if what == "swapped":
        (shards / "part-0.tar").rename(shards / "x")
        shard.rename(shards / "part-0.tar")
        (shards / "x").rename(shard)
    elif what.startswith("index"):
        # label 4; cls 16: offset 8, size 4, crc 4; latent.npy likewise
        flip(path, header + 52 * 10 + {"index label": 0, "index place": 4 + 16, "index checksum": 4 + 16 + 12}[what])
    else:
        flip(shard, int({"label": index[10]["cls"]["offset"], "header": place + 20, "values": place + 140}[what]))
    with pytest.raises(InputError) as caught:
        data = replace(DIGITS.data, window_gb=None, horizontal_flip=0.0)
        recipe = replace(DIGITS, steps=2, global_batch_size=12, data=data)
        list(batches(recipe, manifest, 12, 0, World()))
    assert "\n" not in str(caught.value) and str(shards) in str(caught.value)


def test_verify_finds_what_training_would(small, tmp_path):
    shards = shutil.copytree(small, tmp_path / "shards")
    manifest = read_manifest(shards)
    path = shards / index_name(manifest.shards)
    ensure_index(manifest)
    whole = path.read_bytes()
    for place in (len(whole) - 1, len(whole) - 52 * 23, len(whole) - 52 * 10 + 7):
        path.write_bytes(whole)
        flip(path, place)
        with pytest.raises(InputError, match=r"part-\d\.tar"):
            verify.verify(shards)
