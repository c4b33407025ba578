"""Export a checkpoint: python jobs/export.py RUN_or_CHECKPOINT --weights ema --out MODEL."""

from pathlib import Path

from moe_dit.export import export_checkpoint
from moe_dit.runtime.command import Parser, run
from moe_dit.runtime.progress import say

EXAMPLES = """\
  python jobs/export.py runs/dsmoe_s_e16 --weights ema --out models/dsmoe_s_e16
  python jobs/export.py runs/dsmoe_s_e16/checkpoints/step_00400000 --weights model --out models/step_400000"""


def main() -> None:
    parser = Parser("Turn a checkpoint into a folder that loads without DeepSpeed.", EXAMPLES)
    parser.add_argument("source", metavar="RUN_or_CHECKPOINT", type=Path)
    parser.add_argument("--weights", choices=["ema", "ema2", "model"], default="ema", help="default: %(default)s")
    parser.add_argument("--out", required=True, metavar="MODEL", type=Path, help="folder to write")
    args = parser.parse_args()
    export_checkpoint(args.source, args.weights, args.out)
    say(f"exported the {args.weights} weights of {args.source} to {args.out}")


if __name__ == "__main__":
    run(main)
