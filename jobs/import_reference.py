"""Import a published checkpoint: python jobs/import_reference.py --recipe NAME FILE.pt --weights ema --out MODEL."""

from pathlib import Path

from moe_dit.recipe_file import load_recipe
from moe_dit.runtime.command import Parser, run
from moe_dit.runtime.progress import say

EXAMPLES = """\
  python jobs/import_reference.py --recipe dsmoe_b_e16 0700000.pt --weights ema --out models/dsmoe_b_e16
  python jobs/import_reference.py --recipe jit_b_16 checkpoint-last.pth --weights model_ema1 --out models/jit_b_16"""


def main() -> None:
    parser = Parser("Turn a checkpoint of the published code into a model folder.", EXAMPLES)
    parser.add_argument("file", metavar="FILE.pt", type=Path, help="as torch.save wrote it")
    parser.add_argument("--recipe", required=True, metavar="NAME or FILE.yaml", help="the recipe of that network")
    parser.add_argument(
        "--weights",
        required=True,
        choices=["ema", "model", "model_ema1", "model_ema2"],
        help="which of the file's weights; DSMoE and DiffMoE files hold ema and model, JiT files the others and model",
    )
    parser.add_argument("--out", required=True, metavar="MODEL", type=Path, help="folder to write")
    args = parser.parse_args()
    recipe = load_recipe(args.recipe)

    from moe_dit.reference.files import (
        import_checkpoint,  # torch takes seconds to import: bad flags should not wait for it
    )

    import_checkpoint(args.file, recipe, args.weights, args.out)
    say(f"imported {args.weights} of {args.file} to {args.out}")


if __name__ == "__main__":
    run(main)
