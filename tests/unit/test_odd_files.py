"""What is no plain file, or holds what nobody writes, under the name of each file that is read: one line, no harm."""

import os
import socket
import tempfile
import time
from multiprocessing import current_process
from multiprocessing.connection import Listener
from pathlib import Path

import pytest

from data_prep.shards import _prepare
from data_prep.sources import open_source
from eval.atlas_file import load_atlas
from eval.features import load_fitted
from eval.images import ImageFile, image_size, read_image
from eval.reference import is_statistics, load_statistics
from eval.report import _config, _starts, data_uri, read_metrics
from eval.sample_folder import read_settings
from eval.score import read_scores
from helpers import refused
from helpers.forks import ROOT
from helpers.older_run import OLD, SHARDS
from moe_dit import load_recipe
from moe_dit.build import load_settings
from moe_dit.checkpoint_files import read_description
from moe_dit.data.index import scan_shard
from moe_dit.data.pixels import load_image
from moe_dit.events import events
from moe_dit.lineage import choose, newest
from moe_dit.manifest import read_manifest
from moe_dit.parallel.deepspeed_config import load_parallelism
from moe_dit.reference.files import import_checkpoint
from moe_dit.runtime.command import Parser
from moe_dit.runtime.errors import InputError
from moe_dit.runtime.processes import shorten_sockets
from moe_dit.runtime.reading import open_file, parse_json, parse_yaml, read_json
from moe_dit.schema import divisors
from moe_dit.status import read_status
from moe_dit.store import cache
from moe_dit.watch import read_run

RUN = OLD / "run"


def bomb(levels=10):
    """YAML of 400 bytes that stands for 9^levels ones."""
    lines = ["a0: &a0 [1,1,1,1,1,1,1,1,1]"]
    lines += [f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]" for i in range(1, levels)]
    return "\n".join(lines).encode()


def of_bytes(content):
    return lambda path: path.write_bytes(content)


def a_socket(path):
    here = os.getcwd()
    os.chdir(path.parent)  # a socket's path is short
    try:
        with socket.socket(socket.AF_UNIX) as opened:
            opened.bind(path.name)
    finally:
        os.chdir(here)


def closed(path):
    path.write_bytes(b"{}")
    path.chmod(0)


ODD = {
    "a named pipe": os.mkfifo,
    "a socket": a_socket,
    "a folder": os.mkdir,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a loop of links": lambda path: path.symlink_to(path.name),
    "a link to nothing": lambda path: path.symlink_to("nothing"),
    "lists in lists": of_bytes(b"[" * 100_000),
    "objects in objects": of_bytes(b'{"x":' * 100_000),
    "a long integer": of_bytes(b'{"step": 1' + b"0" * 400 + b"}"),
    "a longer integer": of_bytes(b'{"step": 1' + b"0" * 5000 + b"}"),
    "no number": of_bytes(b'{"time": NaN, "what": "done"}'),
    "aliases": of_bytes(bomb()),
    "an alias of itself": of_bytes(b"a: &a [*a]"),
    "a date that there is not": of_bytes(b"day: 2024-99-99"),
    "Latin-1": of_bytes(b'{"name": "caf\xe9"}'),
    "zero bytes": of_bytes(bytes(2000)),
    "nothing": of_bytes(b""),
}


def run_of(path):
    """What watches a run reads of it, whichever of its files is odd."""
    (path.parent / "run.yaml").touch()
    read_run(path.parent, time.time())


# Each by the file that it reads.
READERS = {
    "mine.yaml": lambda path: load_recipe(str(path)),
    "ds.json": lambda path: load_parallelism(str(path), load_recipe("digits"), 1),
    "manifest.json": lambda path: read_manifest(path.parent),
    "config.json": lambda path: load_settings(path.parent),
    "settings.json": lambda path: read_settings(path.parent),
    ".settings.json": lambda path: _prepare(path.parent, {}),
    "scores.json": read_scores,
    "statistics.npz": lambda path: [is_statistics(path), load_statistics(path)],
    "atlas.npz": load_atlas,
    "fitted.pt": load_fitted,
    "weights.pt": lambda path: import_checkpoint(path, load_recipe("digits"), "ema", path.parent / "model"),
    "shard.tar": lambda path: scan_shard(path, "latents"),
    "images.tar": lambda path: open_source(str(path)),
    "images.parquet": lambda path: open_source(str(path)),
    "a.png": lambda path: load_image(path, 8),
    "b.png": lambda path: read_image(ImageFile(path, None)),
    "c.png": lambda path: image_size(ImageFile(path, None)),
    "d.png": data_uri,
    "state.json": lambda path: read_description(path.parent),
    "step_00000001/state.json": lambda path: newest(path.parents[1]),
    "checkpoints/latest": lambda path: choose(path.parents[1]),
    "history.json": lambda path: choose(path.parent),
    "status.json": lambda path: [read_status(path.parent), run_of(path)],
    "events.jsonl": lambda path: [list(events(path.parent)), run_of(path)],
    "config.yaml": lambda path: [_config(path.parent), run_of(path)],
    "memory.json": run_of,
    "ranks.json": run_of,
    "starts.json": lambda path: _starts(path.parent),
    "metrics.jsonl": lambda path: [read_metrics(path.parent), run_of(path)],
}


@pytest.mark.parametrize("name", READERS)
def test_an_odd_file_is_one_line_or_no_harm(tmp_path, name):
    """Nothing is waited for: a pipe that nobody writes, a device that never ends, values of which there are 10^9."""
    for odd, make in ODD.items():
        path = tmp_path / odd / name
        path.parent.mkdir(parents=True)
        make(path)
        try:
            READERS[name](path)
        except InputError as error:
            assert str(tmp_path) in str(error) and "\n" not in str(error) and len(str(error)) < 1000, (odd, str(error))


@pytest.mark.parametrize("odd", ["a named pipe", "a socket", "a folder", "a device"])
def test_what_is_no_file_is_said(tmp_path, odd):
    path = tmp_path / "file"
    ODD[odd](path)
    with pytest.raises(OSError, match=f"It is {odd}, not a file"):
        open_file(path)


def test_json_is_utf8_with_or_without_its_mark(tmp_path):
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"name": "caf\xc3\xa9", "most": 18446744073709551615}')
    assert read_json(tmp_path / "a.json") == {"name": "café", "most": 2**64 - 1}
    with pytest.raises(ValueError, match="integer of 20 digits"):
        parse_json(b"18446744073709551616")
    with pytest.raises(ValueError, match="it holds -Infinity, which is no number of JSON"):
        parse_json(b"[-Infinity]")
    with pytest.raises(ValueError, match="infinite as float64"):
        parse_json(b"1e999")


def test_a_key_that_stands_twice_is_no_choice():
    with pytest.raises(ValueError, match=r"^the key 'lr' stands twice, the second time in line 3$"):
        parse_yaml("lr: 1\nbetas: [1, 2]\nlr: 2")
    assert parse_yaml("a: &a {x: 1}\nb: {<<: *a, x: 2}") == {"a": {"x": 1}, "b": {"x": 2}}


def test_yaml_may_repeat_itself_a_little(tmp_path):
    assert parse_yaml("a: &a {x: 1}\nb: *a\nc:\n  <<: *a\n  y: 2") == {
        "a": {"x": 1},
        "b": {"x": 1},
        "c": {"x": 1, "y": 2},
    }
    with pytest.raises(ValueError, match="stands for more than 100000 values"):
        parse_yaml(bomb(6).decode())
    with pytest.raises(ValueError, match="the integer in line 2 has more than 64 bits"):
        parse_yaml("a: 1\nb: 0x" + "f" * 17)


def test_a_file_of_terabytes_is_not_read(tmp_path):
    for name, reader in READERS.items():
        if name.endswith((".yaml", ".json")) and "/" not in name and name not in ("config.yaml", "starts.json"):
            path = tmp_path / name
            path.touch()
            os.truncate(path, 2**40)
            try:
                reader(path)
            except InputError as error:
                assert "\n" not in str(error)
            path.unlink()


# --- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["steps", "global_batch_size", "model.depth", "looks.samples", "checkpoint.every"])
@pytest.mark.parametrize("value", ["9223372036854775808", "1" + "0" * 400, "0x" + "f" * 5000, "2147483648"])
def test_a_count_without_end_is_refused(key, value):
    with pytest.raises(InputError, match=f"^--set {key}="):
        load_recipe("digits", [f"{key}={value}"])


@pytest.mark.parametrize(
    "key",
    [
        *("optimizer.lr", "optimizer.weight_decay", "flow.time_mean", "flow.noise_scale", "ema.decay", "balance.rate"),
        *("sampling.cfg_scale", "data.latent_shift", "data.cache_gb", "model.mlp_ratio", "model.moe.routed_scale"),
    ],
)
@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf", "1e999"])
def test_a_number_that_is_not_finite_is_refused(key, value):
    with pytest.raises(InputError, match=f"{key} is"):
        load_recipe("digits", [f"{key}={value}"])


def test_a_key_of_another_alphabet_is_told_from_ours():
    with pytest.raises(InputError, match=r"unknown key m\u043edel \('m\\u043edel'\); did you mean model\?"):
        load_recipe("digits", ["m\u043edel.depth=2"])


def test_the_largest_batch_is_divided_at_once():
    assert divisors(12) == [1, 2, 3, 4, 6, 12] and divisors(49) == [1, 7, 49] and divisors(1) == [1]
    assert divisors(2**31 - 1) == [1, 2**31 - 1]
    recipe = load_recipe("digits", ["global_batch_size=2147483647"])
    assert load_parallelism("ds_configs/zero1_ep1.json", recipe, 1).accumulation == 2**31 - 1


# --- the command line -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (["--scale", "nan"], "scale: 'nan' should be a finite number"),
        (["--scale", "1", "inf"], "scale: 'inf' should be a finite number"),
        (["--count", "1" + "0" * 30], "count: '1000000000000000000000000000000' should be at most 9007199254740992"),
        (["--out", "a\0b"], r"out: 'a\\x00b' should not hold a zero byte"),
        (["--out", "x" * 256], "is longer than a path may be"),
        (["--out", "x/" * 2049], "is longer than a path may be"),
    ],
)
def test_an_argument_that_nothing_can_be_is_one_line(given, line):
    parser = Parser("", "")
    parser.add_argument("--scale", type=float, nargs="+")
    parser.add_argument("--count", type=int)
    parser.add_argument("--out", type=Path)
    with pytest.raises(InputError, match=line):
        parser.parse_args(given)


TRAIN = ["jobs/train.py", "--ds", "ds_configs/zero1_ep1.json", "--recipe", "digits"]
FILE = ROOT / "README.md"
# Places that are a file where a folder is meant, or the other way round; {} is an empty folder.
MISPLACED = [
    [*TRAIN, "--data", FILE],
    [*TRAIN, "--data", SHARDS, "--out", FILE],
    [*TRAIN, "--data", SHARDS, "--out", FILE / "run"],
    [*TRAIN, "--data", SHARDS, "--out", "{}/run", "--ds", "ds_configs"],
    [*TRAIN, "--data", SHARDS, "--out", "{}/run", "--recipe", "{}/a.yaml"],
    ["jobs/plan.py", "--ds", "ds_configs"],
    ["jobs/plan.py", "--ds", FILE / "x.json"],
    ["jobs/export.py", FILE, "--out", "{}/model"],
    ["jobs/export.py", RUN, "--out", FILE],
    ["jobs/export.py", RUN, "--out", FILE / "model"],
    ["jobs/import_reference.py", "--recipe", "digits", "{}", "--weights", "ema", "--out", "{}/model"],
    ["jobs/import_reference.py", "--recipe", "digits", FILE / "x", "--weights", "ema", "--out", "{}/model"],
    ["jobs/upcycle.py", FILE, "--recipe", "jitmoe_b_16_e16", "--out", "{}/model"],
    ["jobs/watch.py", FILE],
    ["jobs/watch.py", FILE / "run"],
    ["data_prep.pack_pixels", "--images", FILE, "--out", "{}/shards"],
    ["data_prep.pack_pixels", "--images", FILE / "x", "--out", "{}/shards"],
    ["data_prep.encode_latents", "--images", FILE, "--vae", FILE, "--out", "{}/shards"],
    ["data_prep.encode_latents", "--images", "{}", "--vae", f"{FILE}/vae", "--out", "{}/shards"],
    ["data_prep.verify", FILE],
    ["data_prep.verify", FILE / "shards"],
    ["data_prep.index", FILE],
    ["data_prep.bench", FILE],
    ["eval.sample", "--model", FILE, "-n", "4", "--out", "{}/samples"],
    ["eval.sample", "--model", FILE / "model", "-n", "4", "--out", "{}/samples"],
    ["eval.score", FILE, "--reference", FILE],
    ["eval.score", FILE / "samples", "--reference", FILE],
    ["eval.reference", FILE, "--out", "{}/statistics.npz"],
    ["eval.reference", FILE / "images", "--out", "{}/statistics.npz"],
    ["eval.sweep", "--model", FILE, "--reference", FILE, "--out", "{}/sweep"],
    ["eval.report", "--run", FILE, "--out", "{}/report.html"],
    ["eval.report", "--run", RUN, "--samples", FILE, "--out", "{}/report.html"],
    ["eval.report", "--run", RUN, "--scores", "{}", "--out", "{}/report.html"],
    ["eval.report", "--run", RUN, "--out", FILE / "report.html"],
    ["eval.atlas", "--model", FILE, "--data", SHARDS, "--out", "{}/atlas.npz"],
]


@pytest.mark.parametrize("command", MISPLACED, ids=lambda command: " ".join(map(str, command)).replace(str(ROOT), ""))
def test_a_file_where_a_folder_is_meant_is_one_line(command, tmp_path, capfd):
    (tmp_path / "a.yaml").mkdir()
    given = [str(part).replace("{}", str(tmp_path)) for part in command]
    refused(capfd, *given, harmless=tmp_path)


# --- the machine ------------------------------------------------------------------------------------------------------


def test_sockets_have_short_paths_however_long_the_folder_of_temporary_files_is(tmp_path, monkeypatch):
    """Of a Unix socket's path the kernel takes 107 bytes."""
    long = tmp_path / ("scratch_of_a_job_" * 6)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    monkeypatch.delitem(current_process()._config, "tempdir", raising=False)
    shorten_sockets()
    Listener(family="AF_UNIX").close()
    assert tempfile.gettempdir() == str(long)


def test_a_user_without_a_home_keeps_files_beside_temporary_ones(tmp_path, monkeypatch):
    monkeypatch.delenv("MOE_DIT_CACHE", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as where there is no HOME and no such user
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = tmp_path / f"moe-dit-{os.getuid()}"
    assert cache() == folder and folder.stat().st_mode & 0o777 == 0o700
    other = tmp_path / f"moe-dit-{os.getuid() + 1}"
    folder.rename(other)
    monkeypatch.setattr(os, "getuid", lambda: int(other.name[8:]))
    with pytest.raises(InputError, match=f"{other.name} is another user's"):
        cache()
