"""Reading at size: the index, orders in windows, damage that only checksums see, and starting fast."""

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import psutil
import pytest
import webdataset

from data_prep import verify
from helpers import ENV, ROOT, kill, losses, start_training, wait_for_step
from moe_dit.data import ShardReader, batches, make_order
from moe_dit.data.index import ensure_index, index_name, record_type
from moe_dit.data.loader import TrainingSamples, workers_for
from moe_dit.data.order import FullOrder, WindowOrder, window_for
from moe_dit.manifest import Manifest, read_manifest
from moe_dit.recipe_file import load_recipe
from moe_dit.runtime.errors import InputError
from moe_dit.runtime.ranks import World

DIGITS = load_recipe("digits")


def write_latents(folder, sizes, seed=0):
    """Shards of so many samples each, latents [4, 2, 2] whose first value is the sample's number."""
    folder.mkdir(parents=True)
    number, records = 0, []
    generator = np.random.default_rng(seed)
    for k, size in enumerate(sizes):
        name = f"part-{k}.tar"
        with webdataset.TarWriter(str(folder / name), mtime=0) as tar:
            for _ in range(size):
                latent = generator.normal(size=(4, 2, 2)).astype(np.float16)
                latent[0, 0, 0] = number
                tar.write(
                    {
                        "__key__": f"{number:06d}",
                        "cls": number % 10,
                        "latent.npy": latent,
                        "latent_flip.npy": latent[:, :, ::-1].copy(),
                    }
                )
                number += 1
        records.append({"name": name, "samples": size, "bytes": (folder / name).stat().st_size, "sha256": ""})
    values = {"kind": "latents", "samples": number, "classes": list("0123456789"), "sample_shape": [4, 2, 2]}
    values |= {"scale": 1.0, "shards": records, "posterior": False}
    (folder / "manifest.json").write_text(json.dumps({"format": "moe-dit-shards-1"} | values))
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """23 samples in five shards of different sizes."""
    return write_latents(tmp_path_factory.mktemp("small") / "shards", [5, 3, 7, 6, 2])


def stream(folder, world, steps, window_gb, workers=0, first_step=0, global_batch=12):
    data = replace(DIGITS.data, workers=workers, window_gb=window_gb, horizontal_flip=0.0)
    recipe = replace(DIGITS, steps=steps, global_batch_size=global_batch, data=data)
    return list(batches(recipe, read_manifest(folder), global_batch // world.size, first_step, world))


def sequence(folder, size, steps, **how):
    """The samples' numbers in the order of positions, put together from all ranks."""
    found = {}
    for rank in range(size):
        for batch in stream(folder, World(rank, rank, size), steps, **how):
            for position, x, y in zip(batch["position"].tolist(), batch["x"], batch["y"].tolist(), strict=True):
                number = int(x[0, 0, 0])
                assert position not in found and y == number % 10
                found[position] = number
    return found


@pytest.mark.parametrize("window_gb", [None, 4e-5], ids=["full", "windows"])
def test_one_sequence_whatever_shares_it(small, window_gb):
    """Two epochs and more: each sample once an epoch, the same at any world size, workers and restart."""
    steps = 4  # of 12: two epochs of 23 are 46
    whole = sequence(small, 1, steps, window_gb=window_gb)
    assert sorted(whole) == list(range(48))
    numbers = [whole[position] for position in range(48)]
    assert sorted(numbers[:23]) == sorted(numbers[23:46]) == list(range(23)) and numbers[:23] != numbers[23:46]
    for size, workers in ((2, 0), (3, 1), (4, 0), (1, 3), (2, 2), (1, "auto")):
        assert sequence(small, size, steps, window_gb=window_gb, workers=workers) == whole
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
    import tarfile
    import zlib

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


def test_ten_thousand_shards_are_ready_at_once(tmp_path):
    """1,281,167 samples by index alone: little memory, and no walk over the shards."""
    samples, shards = 1_281_167, 10_000
    sizes = [samples // shards + (i < samples % shards) for i in range(shards)]
    records = [
        {"name": f"{i}.tar", "samples": n, "bytes": n * 12_000, "sha256": f"{i:064x}"} for i, n in enumerate(sizes)
    ]
    manifest = Manifest(tmp_path, "latents", samples, [str(i) for i in range(1000)], [8, 32, 32], 0.18215, records)
    index = np.zeros(samples, record_type("latents"))
    np.save(tmp_path / index_name(records), index)
    del index
    code = (
        "import sys, json, numpy as np, psutil\n"
        "from pathlib import Path\n"
        "from moe_dit.data import ShardReader, make_order\n"
        "from moe_dit.manifest import Manifest\n"
        "values = json.loads(sys.stdin.read())\n"
        "values['folder'] = Path(values['folder'])\n"
        # The index's own pages are the file's, which the kernel maps as it likes, many at once.
        "own = lambda: (lambda memory: memory.rss - memory.shared)(psutil.Process().memory_info())\n"
        "before = own()\n"
        "reader = ShardReader(Manifest(**values))\n"
        "for window in (None, 4.0):\n"
        "    order = make_order(reader.manifest, 0, window)\n"
        "    rows = reader.index[order.samples(np.arange(64))]\n"
        "print((own() - before) / 1e6)\n"
    )
    values = vars(manifest) | {"folder": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps(values),
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=ENV | {"PYTHONPATH": str(ROOT)},
    )
    assert float(done.stdout) < 60, done.stderr


# --- damage -----------------------------------------------------------------------------------------------------------


def flip(path, place):
    with open(path, "r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1]))


def test_workers_are_as_many_as_feed_a_rank(monkeypatch):
    class Reader:
        def __len__(self):
            return 100

        def read(self, indices, flips):
            time.sleep(0.05 if reads else 1)  # the first time, files are opened
            reads.append(len(indices))

    def chosen(eats, cores=64):
        reads.clear()
        monkeypatch.setattr("moe_dit.data.loader.ranks.cores", lambda: cores)
        return workers_for(TrainingSamples(Reader(), 0, 0.5), list(range(10)), eats)

    reads = []
    assert chosen(290) == 3 and reads == [10, 10, 10]  # one reads 200 a second
    assert chosen(290, cores=3) == 2
    assert chosen(0.1) == 1 and chosen(1e6, cores=1) == 1


def read_all(folder, workers=0):
    return stream(folder, World(), 2, None, workers=workers)


@pytest.mark.parametrize(
    "what", ["label", "header", "values", "index label", "index place", "index checksum", "swapped"]
)
@pytest.mark.parametrize("workers", [0, 1])
def test_a_flipped_bit_anywhere_is_one_line(small, tmp_path, what, workers):
    shards = shutil.copytree(small, tmp_path / "shards")
    manifest = read_manifest(shards)
    index = np.array(ensure_index(manifest))
    assert len(read_all(shards)) == 2
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
        data = replace(DIGITS.data, workers=workers, window_gb=None, horizontal_flip=0.0)
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


def test_a_shard_deleted_while_training_is_one_line(latents, tmp_path):
    shards, run = shutil.copytree(latents, tmp_path / "shards"), tmp_path / "run"
    process = start_training(1, "zero1_ep1", shards, run, "--steps", "5000", "--set", "data.workers=1")
    try:
        wait_for_step(run, 3, process)
        (shards / "shard-000000.tar").unlink()
        assert process.wait(90) == 2
    finally:
        kill(process)
    errors = [line for line in (tmp_path / "run.log").read_text().splitlines() if "rror" in line]
    assert len(errors) == 1 and "shard-000000.tar was deleted or replaced" in errors[0]


def test_workers_end_with_a_rank_that_is_killed(latents, tmp_path):
    process = start_training(1, "zero1_ep1", latents, tmp_path / "run", "--steps", "5000", "--set", "data.workers=2")
    try:
        wait_for_step(tmp_path / "run", 2, process)
        workers = psutil.Process(process.pid).children(recursive=True)
        assert len(workers) >= 3
        os.kill(process.pid, 9)
        process.wait()
        _, alive = psutil.wait_procs(workers, timeout=10)
        assert not [worker for worker in alive if worker.status() != psutil.STATUS_ZOMBIE]
    finally:
        kill(process)


def test_the_order_of_a_run_is_kept(latents, tmp_path):
    """A run goes on in the order that it began with, whatever the recipe says now."""
    run, straight = tmp_path / "run", tmp_path / "straight"

    def train(out, *flags):
        return start_training(1, "zero1_ep1", latents, out, "--set", "checkpoint.every=2", *flags).wait(120)

    windows = ("--set", "data.window_gb=0.0001")
    assert train(run, "--steps", "2", *windows) == 0
    assert train(run, "--steps", "4", "--set", "data.window_gb=2") == 2
    assert "was trained with data.window_gb 0.0001, not 2.0" in (tmp_path / "run.log").read_text()
    assert train(run, "--steps", "4") == 0
    assert "window_gb: 0.0001" in (run / "config.yaml").read_text()
    assert train(straight, "--steps", "4", *windows) == 0
    assert losses(run) == pytest.approx(losses(straight), rel=1e-6)
    assert 0 <= json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["data_wait"] < 1
