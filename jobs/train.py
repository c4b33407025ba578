"""Train a recipe: deepspeed [--num_gpus N] jobs/train.py --ds FILE [--recipe NAME] [--data SHARDS] [--out RUN]."""

from dataclasses import replace
from pathlib import Path

from moe_dit.recipe import Recipe
from moe_dit.recipe_file import DEFAULT_RECIPE, load_recipe
from moe_dit.runtime import ranks
from moe_dit.runtime.command import Parser, run
from moe_dit.runtime.errors import InputError
from moe_dit.train import train

EXAMPLES = """\
  deepspeed jobs/train.py --ds ds_configs/zero2_ep8.json
  deepspeed --num_gpus 2 jobs/train.py --ds ds_configs/zero2_ep2.json --recipe digits --data data/digits_latents
  torchrun --nproc_per_node 8 jobs/train.py --ds ds_configs/zero2_ep8.json --recipe dsmoe_b_e16 --set optimizer.lr=2e-4
The same command continues a run that was stopped."""


def main() -> None:
    parser = Parser("Train a recipe with DeepSpeed, on GPUs or CPU ranks.", EXAMPLES)
    parser.add_argument("--ds", required=True, metavar="FILE", help="DeepSpeed JSON: how the work is spread")
    parser.add_argument("--recipe", default=DEFAULT_RECIPE, help="name or .yaml file (default: %(default)s)")
    parser.add_argument("--data", metavar="SHARDS", help="folder of shards (default: the recipe's own)")
    parser.add_argument("--out", metavar="RUN", help="folder for the results (default: runs/RECIPE)")
    resume = "auto, never, or a checkpoint to begin from if RUN has none of its own (default: auto)"
    parser.add_argument("--resume", default="auto", help=resume)
    parser.add_argument("--steps", type=int, metavar="N", help="train until step N (default: the recipe's)")
    parser.add_argument("--set", action="append", default=[], metavar="section.key=value", help="change a recipe key")
    parser.add_argument("--local_rank", type=int, help="given by the deepspeed launcher; not used")
    args = parser.parse_args()
    if args.steps is not None and args.steps < 1:
        raise InputError(f"--steps {args.steps}: it should be at least 1")
    ranks.start()

    def read_recipe() -> Recipe:
        recipe = load_recipe(args.recipe, args.set)
        steps = recipe.steps if args.steps is None else args.steps
        path = recipe.data.path if args.data is None else args.data
        return replace(recipe, steps=steps, data=replace(recipe.data, path=path))

    recipe = ranks.agreed(read_recipe)
    train(recipe, args.ds, Path(args.out or f"runs/{recipe.name}"), args.resume)


if __name__ == "__main__":
    run(main)
