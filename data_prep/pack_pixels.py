"""Images to pixel shards: centre crops as PNG."""

import io
from functools import partial

import numpy as np

from data_prep.shards import add_arguments, begun_with, check_arguments, join, write_shards
from moe_dit.data import stored_png
from moe_dit.data.pixels import load_image
from moe_dit.runtime.command import Parser, run
from moe_dit.runtime.ranks import from_rank_0

EXAMPLES = """\
  python -m data_prep.pack_pixels --images imagenet/train --out shards
  python -m data_prep.pack_pixels --images imagenet/train --out shards --size 512 --workers 16
  srun python -m data_prep.pack_pixels --images imagenet/train --out shards

The same command again continues after a stop, with any number of ranks.
"""


def read_png(file: str | bytes, size: int, level: int) -> bytes:
    """An image file as a centre crop of ``size`` x ``size``, as the bytes of an RGB PNG file.

    Args:
        level: of compression, 1 to 9; 0: :mod:`moe_dit.data.stored_png`.
    """
    image = load_image(file, size)
    if level == 0:
        return stored_png.encode(np.asarray(image))
    out = io.BytesIO()
    image.save(out, "PNG", compress_level=level)
    return out.getvalue()


def main() -> None:
    parser = Parser("Pack images into pixel shards; continues after a stop.", EXAMPLES)
    add_arguments(parser)
    parser.add_argument(
        "--png-level",
        type=int,
        choices=range(10),
        metavar="0-9",
        help="compression; 0, the default: none, which is read ten times as fast (ImageNet at 256 pixels: 250 GB; "
        "level 6: 164 GB)",
    )
    args = parser.parse_args()
    check_arguments(args)
    join()
    level = args.png_level
    if level is None:
        level = from_rank_0(lambda: begun_with(args.out, "png_level", 0))
    write_shards(
        args,
        partial(read_png, size=args.size, level=level),
        list,
        lambda png: {"png": png},
        kind="pixels",
        sample_shape=[3, args.size, args.size],
        batch=32,
        settings={"png_level": level},
    )


if __name__ == "__main__":
    run(main)
