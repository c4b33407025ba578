"""Class folders to pixel shards: centre crops as PNG."""

import io
from functools import partial

from data_prep.images import load_image
from data_prep.shards import add_arguments, check_arguments, write_shards
from moe_dit.runtime.command import Parser, run

EXAMPLES = """\
  python -m data_prep.pack_pixels --images imagenet/train --out shards
  python -m data_prep.pack_pixels --images imagenet/train --out shards --size 512 --workers 16
  srun python -m data_prep.pack_pixels --images imagenet/train --out shards

The same command again continues after a stop, with any number of ranks.
"""


def read_png(path: str, size: int) -> bytes:
    """An image file as a centre crop of ``size`` x ``size``, as the bytes of an RGB PNG file."""
    file = io.BytesIO()
    load_image(path, size).save(file, "PNG")
    return file.getvalue()


def main() -> None:
    parser = Parser("Pack class folders of images into pixel shards; continues after a stop.", EXAMPLES)
    add_arguments(parser)
    args = parser.parse_args()
    check_arguments(args)
    write_shards(
        args,
        partial(read_png, size=args.size),
        lambda samples: [{"png": png} for png in samples],
        kind="pixels",
        sample_shape=[3, args.size, args.size],
        batch=32,
    )


if __name__ == "__main__":
    run(main)
