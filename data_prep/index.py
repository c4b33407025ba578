"""The sample index of shards that lack one, and a manifest where there is none: how foreign WebDataset shards train.

Foreign shards are tar files of a folder whose samples have ``.cls`` (a class number) and either ``.latent.npy`` (and
``.latent_flip.npy``, the mirror image's, if training is to flip) or an image of one size.
"""

import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_prep.classes import label, read_names
from data_prep.shards import sha256
from moe_dit.data import tar
from moe_dit.data.index import IMAGE_EXTENSIONS, ensure_index, incomplete, scan_shard, write_index
from moe_dit.manifest import FORMAT, MANIFEST, Manifest, read_manifest
from moe_dit.runtime.command import Parser, run
from moe_dit.runtime.errors import InputError
from moe_dit.runtime.files import explained, write_json
from moe_dit.runtime.progress import say, task
from moe_dit.runtime.reading import open_file
from moe_dit.store import is_remote

EXAMPLES = """\
  python -m data_prep.index data/imagenet256_latents
  python -m data_prep.index data/foreign_latents --scale 0.18215 --vae stabilityai/sd-vae-ft-mse
  python -m data_prep.index data/foreign_pixels --classes imagenet_classes.txt
"""


def kind_of(path: Path) -> str:
    """What a foreign shard holds, by its first sample."""
    found = members_of_first(path)
    for extension in found:
        if extension == "latent.npy":
            return "latents"
        if extension in IMAGE_EXTENSIONS:
            return "pixels"
    dotted = any(extension.rpartition(".")[2] in IMAGE_EXTENSIONS for extension in found if "." in extension)
    hint = " (a sample's name ends at its first dot)" if dotted else ""
    raise InputError(
        f"shard {path}: the first sample has {', '.join([*found][:5]) or 'no files'}{hint}; expected .cls and "
        f"either .latent.npy or an image ({', '.join(IMAGE_EXTENSIONS)})"
    )


def members_of_first(path: Path) -> dict[str, bytes]:
    """The files of a shard's first sample, by extension; none of one without samples."""
    found: dict[str, bytes] = {}
    first = None
    try:
        with open_file(path) as file:
            for member in tar.members(file):
                first = member.key if first is None else first
                if member.key == first:  # plain tar may put them anywhere
                    file.seek(member.offset)
                    wanted = member.extension == "latent.npy" or member.extension in IMAGE_EXTENSIONS
                    found[member.extension] = file.read(member.size) if wanted else b""
    except (OSError, ValueError, OverflowError, MemoryError) as error:  # sizes of a damaged header are any numbers
        raise InputError(f"shard {path} cannot be read: {error}") from None
    return found


def sample_shape(path: Path, kind: str) -> list[int]:
    """The shape of a shard's first sample."""
    members = members_of_first(path)
    try:
        if kind == "latents":
            shape = np.load(io.BytesIO(members["latent.npy"])).shape
        else:
            data = next(data for extension, data in members.items() if extension in IMAGE_EXTENSIONS)
            width, height = Image.open(io.BytesIO(data)).size
            shape = (3, height, width)
    except Exception as error:  # decoders raise whatever they meet
        raise InputError(f"shard {path}: the first sample cannot be read: {error}") from None
    if len(shape) != 3:
        raise InputError(f"shard {path}: the first sample has shape {list(shape)}; expected [channels, height, width]")
    return list(shape)


def scan_foreign(paths: list[Path], kind: str) -> Iterator[tuple[np.ndarray, dict[str, Any]]]:
    """Each shard's index records and its record for the manifest."""
    with task("indexing shards", len(paths)) as progress:
        for path in paths:
            part, keys = scan_shard(path, kind)
            if not keys:
                raise InputError(f"shard {path} holds no samples; remove it from the folder, or make it again")
            problem = incomplete(part, keys, kind)
            if problem:
                raise InputError(f"shard {path}: {problem}")
            yield (
                part,
                {
                    "name": path.name,
                    "samples": len(part),
                    "bytes": path.stat().st_size,
                    "sha256": sha256(path),
                },
            )
            progress.advance()


def adopt(folder: Path, names: list[str] | None, vae: str | None, scale: float | None, shift: float, means: bool):
    """Write the manifest and the index of a folder of foreign shards."""
    paths = sorted(folder.glob("*.tar"))
    if not paths:
        raise InputError(f"{folder} holds no .tar files and no {MANIFEST}")
    kind = kind_of(paths[0])
    shape = sample_shape(paths[0], kind)
    if kind == "latents" and not means and shape[0] % 2:
        raise InputError(f"{folder}: latents have {shape[0]} channels, which are no moments; give --means")
    parts, records = zip(*scan_foreign(paths, kind), strict=True)
    found = label(sorted({int(number) for part in parts for number in part["label"]}), str(folder), names)
    say(f"{folder}: {len(found.classes)} classes, told by .cls files; {found.order}")
    values: dict[str, Any] = {
        "kind": kind,
        "samples": sum(map(len, parts)),
        "classes": found.classes,
        "sample_shape": shape,
        "scale": scale,
        "shards": list(records),
        "shift": shift,
        "posterior": kind == "latents" and not means,
        "vae": vae,
    }
    manifest = Manifest(folder, **values)
    with explained(str(folder)):
        write_index(folder, manifest, parts)
        write_json(folder / MANIFEST, {"format": FORMAT, "size": None, "source": "foreign shards"} | values)


def main() -> None:
    parser = Parser("Makes the sample index of a folder of shards, and a manifest if it has none.", EXAMPLES)
    add = parser.add_argument
    add("shards", metavar="SHARDS", help="a folder of .tar files; or the URL of shards that have a manifest")
    add("--classes", type=Path, metavar="FILE", help="foreign shards: class names, one a line (the numbers)")
    add("--vae", metavar="NAME_or_DIR", help="foreign latents: what encoded them")
    add("--scale", type=float, help="foreign latents: 1 / their standard deviation (else data.latent_scale says it)")
    add("--shift", type=float, default=0.0, help="foreign latents: their mean (0)")
    add("--means", action="store_true", help="foreign latents: latents themselves, not mean and log variance")
    args = parser.parse_args()
    folder = Path(args.shards)
    if not is_remote(args.shards) and not os.path.isdir(folder):
        raise InputError(f"no folder of shards {folder}")
    if args.scale is not None and not 0 < args.scale < float("inf"):
        raise InputError(f"--scale {args.scale}: it should be above 0")
    if not is_remote(args.shards) and not os.path.exists(folder / MANIFEST):
        names = read_names(args.classes)
        adopt(folder, names, args.vae, args.scale, args.shift, args.means)
    manifest = read_manifest(args.shards)
    index = ensure_index(manifest)
    size = index.nbytes / 1e6
    print(f"{args.shards}: {len(manifest.shards)} shards, {len(index)} samples, {size:.1f} MB of index")
    print(f"{index.filename}")


if __name__ == "__main__":
    run(main)
