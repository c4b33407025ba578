"""A remote folder of shards to a local one, whole and checked, by any number of ranks; goes on after a stop."""

from pathlib import Path

from moe_dit.data.index import index_name
from moe_dit.manifest import MANIFEST, read_manifest
from moe_dit.runtime import ranks
from moe_dit.runtime.command import Parser, run
from moe_dit.runtime.errors import InputError
from moe_dit.runtime.files import discard, explained, write_bytes
from moe_dit.runtime.progress import say, task
from moe_dit.store import RemoteFolder, is_remote

EXAMPLES = """\
  python -m data_prep.fetch https://data.example.org/imagenet256_latents --out data/imagenet256_latents
  srun python -m data_prep.fetch s3://bucket/imagenet256_pixels --out /local/imagenet256_pixels
"""


def main() -> None:
    parser = Parser("Fetches a remote folder of shards; what is there already is kept.", EXAMPLES)
    parser.add_argument("url", metavar="URL", help="of a folder of shards: https, s3, gs, or what else fsspec knows")
    parser.add_argument("--out", type=Path, required=True, metavar="SHARDS", help="folder to fill")
    args = parser.parse_args()
    if not is_remote(args.url):
        raise InputError(f"{args.url} is no URL; a local folder needs no fetching")
    ranks.start()
    manifest = ranks.agreed(lambda: read_manifest(args.url))
    remote = RemoteFolder(args.url, args.out)
    mine = ranks.world().share(len(manifest.shards))

    def fetch() -> None:
        with task("fetching shards", len(mine)) as progress:
            for i in mine:
                shard = manifest.shards[i]
                remote.fetch(shard["name"], shard["bytes"], shard["sha256"])
                progress.advance()

    def finish() -> None:  # the manifest last: a folder that has one is complete
        with explained(str(args.out)):
            for name in (index_name(manifest.shards), MANIFEST):
                try:
                    write_bytes(args.out / name, remote.read(name))
                except FileNotFoundError:
                    continue  # an index is made when it is needed
            for lock in args.out.glob(".*.tar.lock"):
                discard(lock)

    ranks.agreed(fetch)
    ranks.from_rank_0(finish)
    say(f"{args.out}: {len(manifest.shards)} shards, {manifest.samples} samples")


if __name__ == "__main__":
    run(main)
