"""Every shard against the manifest: is it there, whole, unchanged, and complete?"""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from data_prep.shards import read_keys, sha256
from moe_dit.manifest import read_manifest
from moe_dit.runtime.command import Parser, run
from moe_dit.runtime.errors import InputError
from moe_dit.runtime.progress import task

EXAMPLES = """\
  python -m data_prep.verify shards
"""

SHOWN = 5  # problems named in the error line


def check_shard(folder: Path, record: dict[str, Any], kind: str) -> str | None:
    """What is wrong with a shard, naming it, or None. ``record`` is the manifest's."""
    name = record["name"]
    path = folder / name
    try:
        size = path.stat().st_size
        if size != record["bytes"]:
            return f"{name} has {size} bytes instead of {record['bytes']}"
        if sha256(path) != record["sha256"]:
            return f"{name} has other content than was written (SHA-256 differs)"
        keys = read_keys(path, kind)
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"
    except ValueError as error:
        return f"{name}: {error}"
    if len(keys) != record["samples"]:
        return f"{name} has {len(keys)} samples instead of {record['samples']}"
    return None


def verify(folder: Path) -> tuple[int, int]:
    """Check a shards folder; gives (shards, samples), or raises an InputError that names what is off."""
    manifest = read_manifest(folder, check_sizes=False)
    records = manifest.shards
    extra = {path.name for path in folder.glob("*.tar")} - {record["name"] for record in records}
    problems = [f"{name} is not in the manifest" for name in sorted(extra)]
    # Hashing leaves Python's lock, so threads do overlap.
    with ThreadPoolExecutor(4) as pool, task("checking shards", len(records)) as progress:
        for problem in pool.map(lambda record: check_shard(folder, record, manifest.kind), records):
            problems += [problem] if problem else []
            progress.advance()
    if problems:
        more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise InputError(f"{folder}: {'; '.join(problems[:SHOWN])}{more}; delete the folder and make it again")
    return len(records), manifest.samples


def main() -> None:
    parser = Parser("Check every shard of a folder against its manifest.", EXAMPLES)
    parser.add_argument("shards", type=Path, metavar="SHARDS", help="a folder with manifest.json")
    args = parser.parse_args()
    shards, samples = verify(args.shards)
    print(f"{shards} shards, {samples} samples: all good")


if __name__ == "__main__":
    run(main)
