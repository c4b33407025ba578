"""Every shard against the manifest: is it there, whole, unchanged, and complete?"""

from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.shards import sha256
from moe_dit.data import ShardReader
from moe_dit.data.index import incomplete, index_name, open_index, scan_shard
from moe_dit.manifest import Manifest, read_manifest
from moe_dit.runtime.command import Parser, run
from moe_dit.runtime.errors import InputError
from moe_dit.runtime.progress import task

EXAMPLES = """\
  python -m data_prep.verify shards
"""

SHOWN = 5  # problems named in the error line


def check_shard(manifest: Manifest, record: dict[str, Any], index: np.ndarray | None) -> str | None:
    """What is wrong with a shard, naming it, or None.

    Args:
        manifest: of the folder.
        record: the manifest's of this shard.
        index: the index's records of this shard; None where there is no index.
    """
    folder, kind = manifest.folder, manifest.kind
    name = record["name"]
    path = folder / name
    try:
        size = path.stat().st_size
        if size != record["bytes"]:
            return f"{name} has {size} bytes instead of {record['bytes']}"
        if sha256(path) != record["sha256"]:
            return f"{name} has other content than was written (SHA-256 differs)"
        found, keys = scan_shard(path, kind)
    except InputError as error:
        return f"{name}: {error}"
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"
    if len(keys) != record["samples"]:
        return f"{name} has {len(keys)} samples instead of {record['samples']}"
    problem = incomplete(found, keys, kind)
    if problem:
        return f"{name}: {problem}"
    if found["label"].max() >= len(manifest.classes):
        return f"{name} has a label {found['label'].max()}, but there are {len(manifest.classes)} classes"
    if index is not None and not np.array_equal(found, index):
        return f"{name} is not what the index says; delete {index_name(manifest.shards)}, and it is made again"
    return None


def verify(folder: Path) -> tuple[int, int]:
    """Check a shards folder; gives (shards, samples), or raises an InputError that names what is off."""
    manifest = read_manifest(folder, check_sizes=False)
    records = manifest.shards
    index = open_index(manifest)
    starts = [0, *accumulate(record["samples"] for record in records)]
    parts = [None if index is None else index[starts[i] : starts[i + 1]] for i in range(len(records))]
    extra = {path.name for path in folder.glob("*.tar")} - {record["name"] for record in records}
    problems = [f"{name} is not in the manifest" for name in sorted(extra)]
    # Hashing leaves Python's lock, so threads do overlap.
    with ThreadPoolExecutor(4) as pool, task("checking shards", len(records)) as progress:
        for problem in pool.map(lambda record, part: check_shard(manifest, record, part), records, parts):
            problems += [problem] if problem else []
            progress.advance()
    if problems:
        more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise InputError(f"{folder}: {'; '.join(problems[:SHOWN])}{more}; delete the folder and make it again")
    ShardReader(manifest).read(np.array(starts[:-1]), np.zeros(len(records), bool))  # a sample of each, decoded
    return len(records), manifest.samples


def main() -> None:
    parser = Parser("Check every shard of a folder against its manifest.", EXAMPLES)
    parser.add_argument("shards", type=Path, metavar="SHARDS", help="a folder with manifest.json")
    args = parser.parse_args()
    shards, samples = verify(args.shards)
    print(f"{shards} shards, {samples} samples: all good")


if __name__ == "__main__":
    run(main)
