"""Reading at size, by processes beside the rank, and of shards that change while a run reads them."""

import json
import os
import shutil
import sys
from dataclasses import replace

import numpy as np
import psutil
import pytest

from helpers import ENV, ROOT, TIMEOUT, forks, kill, losses, start_training, wait_for_step
from helpers.small_shards import DIGITS, flip, sequence, write_latents
from moe_dit.data import batches
from moe_dit.data.index import ensure_index, index_name, record_type
from moe_dit.manifest import Manifest, read_manifest
from moe_dit.runtime.errors import InputError
from moe_dit.runtime.ranks import World

SMALL = ["model.depth=2", "model.hidden_size=32", "model.num_heads=2", "model.moe.expert_width=16"]
SMALL = [word for change in [*SMALL, "global_batch_size=16"] for word in ("--set", change)]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """23 samples in five shards of different sizes."""
    return write_latents(tmp_path_factory.mktemp("small") / "shards")


@pytest.mark.parametrize(
    ("window_gb", "shares"),
    [(None, [(3, 1), (1, 2)]), (4e-5, [(2, 2), (1, "auto")])],
    ids=["full", "windows"],
)
def test_reading_processes_change_no_sequence(small, window_gb, shares):
    whole = sequence(small, 1, 4, window_gb=window_gb)
    for size, workers in shares:
        assert sequence(small, size, 4, window_gb=window_gb, workers=workers) == whole


def test_what_a_reading_process_meets_is_one_line(small, tmp_path):
    shards = shutil.copytree(small, tmp_path / "shards")
    manifest = read_manifest(shards)
    flip(shards / "part-2.tar", int(ensure_index(manifest)[10]["latent.npy"]["offset"]) + 140)
    recipe = replace(DIGITS, steps=2, global_batch_size=12, data=replace(DIGITS.data, workers=1))
    with pytest.raises(InputError, match="is damaged") as caught:
        list(batches(recipe, manifest, 12, 0, World()))
    said = str(caught.value)
    assert "\n" not in said and "Traceback" not in said and str(shards) in said


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
    done = forks.run(
        [sys.executable, "-c", code],
        input=json.dumps(values),
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=ENV | {"PYTHONPATH": str(ROOT)},
    )
    assert float(done.stdout) < 60, done.stderr


def test_a_shard_deleted_while_training_is_one_line(latents, tmp_path):
    shards, run = shutil.copytree(latents, tmp_path / "shards"), tmp_path / "run"
    process = start_training(1, "zero1_ep1", shards, run, "--steps", "2000", *SMALL)
    try:
        wait_for_step(run, 3, process)
        (shards / "shard-000000.tar").unlink()
        assert process.wait(TIMEOUT) == 2
    finally:
        kill(process)
    errors = [line for line in (tmp_path / "run.log").read_text().splitlines() if "rror" in line]
    assert len(errors) == 1 and "shard-000000.tar was deleted or replaced" in errors[0]


def test_workers_end_with_a_rank_that_is_killed(latents, tmp_path):
    flags = ["--steps", "100000", *SMALL, "--set", "data.workers=2"]
    process = start_training(1, "zero1_ep1", latents, tmp_path / "run", *flags)
    try:
        wait_for_step(tmp_path / "run", 2, process)
        workers = psutil.Process(process.pid).children(recursive=True)
        assert len(workers) >= 3
        os.kill(process.pid, 9)
        process.wait()
        _, alive = psutil.wait_procs(workers, timeout=TIMEOUT)
        assert not [worker for worker in alive if worker.status() != psutil.STATUS_ZOMBIE]
    finally:
        kill(process)


def test_the_order_of_a_run_is_kept(latents, tmp_path):
    """A run goes on in the order that it began with, whatever the recipe says now."""
    run, straight = tmp_path / "run", tmp_path / "straight"

    def train(out, *flags):
        return start_training(1, "zero1_ep1", latents, out, *SMALL, "--set", "checkpoint.every=2", *flags).wait(TIMEOUT)

    windows = ("--set", "data.window_gb=0.0001")
    assert train(run, "--steps", "2", *windows) == 0
    assert train(run, "--steps", "4", "--set", "data.window_gb=2") == 2
    assert "was trained with data.window_gb 0.0001, not 2.0" in (tmp_path / "run.log").read_text()
    assert train(run, "--steps", "4") == 0
    assert "window_gb: 0.0001" in (run / "config.yaml").read_text()
    assert train(straight, "--steps", "4", *windows) == 0
    assert losses(run) == pytest.approx(losses(straight), rel=1e-6)
    assert 0 <= json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["data_wait"] < 1
