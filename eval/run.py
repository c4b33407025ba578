"""Sample a model and score the samples in one go, on any number of ranks, without writing the images."""

import os
import shutil
import tempfile
from datetime import timedelta
from pathlib import Path
from typing import Any

from eval.protocols import PROTOCOLS
from eval.reference import check_reference
from eval.sample import add_sampling_arguments, sample
from eval.score import add_scoring_arguments, check_out, conclude, read_scores, score
from moe_dit.runtime import ranks
from moe_dit.runtime.command import Parser, run
from moe_dit.runtime.files import explained
from moe_dit.runtime.ranks import from_rank_0

EXAMPLES = """\
  python -m eval.run --model MODEL --reference imagenet/train --inception FILE.pth --out scores.json
  torchrun --nproc_per_node 8 -m eval.run --model MODEL --reference FILE.npz --inception download --cfg-scale 1.5
  python -m eval.run --model MODEL --reference data/digits_images --num 2000 --samples SAMPLES

Under torchrun and deepspeed write -n, not --num: they would take it for a flag of their own.
"""


def main() -> None:
    parser = Parser(__doc__, EXAMPLES)
    add_sampling_arguments(parser, default_num=50_000)
    add = parser.add_argument
    add_scoring_arguments(parser)
    add("--samples", type=Path, metavar="SAMPLES", help="keep the features here, so that a stopped run continues")
    add("--out", type=Path, metavar="FILE.json", help="default SAMPLES/metrics.json, or nowhere without --samples")
    args = parser.parse_args()
    world = ranks.start(timedelta(hours=12))

    out = args.out or (args.samples / "metrics.json" if args.samples else None)

    protocol = PROTOCOLS[args.protocol]

    def prepare() -> tuple[Path, Any]:
        # The samples folder itself may still have to be made.
        if out is not None and (args.out or os.path.isdir(args.samples)):
            check_out(out)
        check_reference(args.reference, args.inception, protocol)
        other = None if args.against is None else read_scores(args.against)
        if args.samples:
            return args.samples, other
        # Beside the result, where all nodes can reach it: /tmp is each node's own.
        beside = args.out.absolute().parent if args.out else Path.cwd()
        with explained(f"into {beside}"):
            return Path(tempfile.mkdtemp(prefix=".samples-", dir=beside)), other

    samples, other = from_rank_0(prepare)
    try:
        sample(args, samples, "features")
        result = score(samples, args.reference, args.inception, protocol, args.dinov2)
        conclude(result, other, str(args.against), out)
    finally:
        if world.rank == 0 and args.samples is None:
            shutil.rmtree(samples, ignore_errors=True)


if __name__ == "__main__":
    run(main)
