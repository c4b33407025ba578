"""Upcycle a dense model: python jobs/upcycle.py DENSE_MODEL --recipe NAME --out MODEL."""

from pathlib import Path

from moe_dit.recipe_file import load_recipe
from moe_dit.runtime.command import Parser, run
from moe_dit.runtime.progress import say

EXAMPLES = """\
  python jobs/upcycle.py models/jit_b_16 --recipe jitmoe_b_16_e16 --set model.depth=12 --out models/upcycled
and then, to train it:
  deepspeed jobs/train.py --ds ds_configs/zero2_ep8.json --recipe models/upcycled/recipe.yaml \\
      --set initial_weights=models/upcycled --set balance.rate=0.001 --out runs/upcycled"""


def main() -> None:
    parser = Parser("Turn a dense model into a mixture of experts that computes the same function.", EXAMPLES)
    parser.add_argument("dense", metavar="DENSE_MODEL", type=Path, help="model folder, as jobs/export.py writes it")
    parser.add_argument("--recipe", required=True, metavar="NAME or FILE.yaml", help="the mixture's recipe")
    parser.add_argument("--set", action="append", default=[], metavar="section.key=value", help="change a recipe key")
    parser.add_argument("--out", required=True, metavar="MODEL", type=Path, help="folder to write")
    args = parser.parse_args()
    recipe = load_recipe(args.recipe, args.set)

    from moe_dit.upcycle import upcycle_model  # torch takes seconds to import: bad flags should not wait for it

    upcycle_model(args.dense, recipe, args.out)
    say(f"upcycled {args.dense} to {args.out}; --set initial_weights={args.out} begins a run from it")


if __name__ == "__main__":
    run(main)
