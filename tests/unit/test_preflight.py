"""The check before the first step: what is broken ends all with one line, what is slow is named, and neither hangs."""

import shutil
from dataclasses import replace

import pytest
import torch

from helpers.server import serving
from moe_dit import preflight
from moe_dit.manifest import read_manifest
from moe_dit.preflight import Found, slow, summary
from moe_dit.runtime.errors import InputError
from moe_dit.store import RemoteFolder

WELL = Found("cpu", 0.004, 2e9, 1e9, 3e9, 0.0)


def changed(rank: int, size: int = 4, **values: float) -> list[Found]:
    """What ranks found that differ in one thing of one rank."""
    return [Found(**vars(WELL) | (values if one == rank else {})) for one in range(size)]


@pytest.mark.parametrize(
    ("found", "hosts", "lines"),
    [
        (changed(1), "aabb", []),
        (changed(1, product=0.0119), "aabb", []),
        (changed(1, product=0.0121), "aabb", ["rank 1 (a) takes 12 ms for a product of matrices, others 4"]),
        (changed(1, size=3, product=0.5), "aab", []),
        (changed(2, link=1.1e9), "aaaa", []),
        (changed(2, link=0.9e9), "aaaa", ["the link from rank 1 (a) to rank 2 (a) carries 0.9 GB/s, others 3"]),
        (changed(0, link=0.1e9), "aaaa", ["the link from rank 3 (a) to rank 0 (a) carries 0.1 GB/s, others 3"]),
        # Links between nodes are no measure of those inside, nor are two of them one for each other.
        (changed(2, link=0.1e9), "aabb", []),
        (
            [*changed(4, 8, link=0.1e9)],
            "abcdefgh",
            ["the link from rank 3 (d) to rank 4 (e) carries 0.1 GB/s, others 3"],
        ),
        # On CPUs there are none inside a node.
        ([*changed(0, 6, link=0.0)[:1] * 5, WELL], "aaaaab", []),
        ([replace(WELL, link=0.0)] * 2 + [WELL] * 4, "aaabcd", []),
        (changed(3, clock=-1.5), "aabc", ["the clock of rank 3 (c) is 1.5 s behind rank 0's"]),
        (changed(3, clock=0.9), "aabc", []),
    ],
)
def test_what_is_slow(found, hosts, lines):
    assert slow(found, list(hosts)) == lines


def test_the_summary_is_of_the_slowest():
    found = [WELL, Found("cpu", 0.004, 1.2e9, 0.9e9, 3e9, -0.003)]
    assert (
        summary(found, ["a", "b"]) == "2 ranks on 2 nodes: all-reduce 1.2 GB/s, all-to-all 0.9 GB/s, clocks within 3 ms"
    )
    alone = [Found("cpu", 0.004, 1.2e9, 0.0, 3e9, 0.0)] * 2
    assert summary(alone, ["a", "a"]) == "2 ranks on 1 node: all-reduce 1.2 GB/s, clocks within 0 ms"


class Log:
    def write(self, text: str) -> None:
        self.text = text


def test_one_rank_looks_at_its_device_and_shards(latents, tmp_path, capsys):
    log = Log()
    preflight.check_shards(read_manifest(latents))
    preflight.check(tmp_path, torch.device("cpu"), None, log)
    assert log.text.startswith("check: Found(device='cpu, ") and capsys.readouterr().err == ""
    folder = tmp_path / "shards"
    shutil.copytree(latents, folder)
    manifest = read_manifest(folder)
    (folder / manifest.shards[0]["name"]).unlink()
    with pytest.raises(InputError, match=r"shard-000000.tar is gone"):
        preflight.check_shards(manifest)


def test_shards_behind_a_url_are_looked_at_on_their_server(latents, tmp_path):
    """Their first bytes: fetching whole ones is training's."""
    folder, cache = tmp_path / "shards", tmp_path / "cache"
    shutil.copytree(latents, folder)
    with serving(folder) as server:
        manifest = replace(read_manifest(folder), remote=RemoteFolder(server.url, cache, patience=2))
        preflight.read_some(manifest)
        assert server.requests.total() == 2 and not cache.exists()
        (folder / manifest.shards[-1]["name"]).unlink()
        with pytest.raises(InputError, match=r"shard-\d+.tar is missing on the server"):
            preflight.read_some(manifest)
