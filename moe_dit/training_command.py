"""The training command's line, for jobs/train.py and for what submits and supervises it."""

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import ValidationError

from moe_dit.continuing import Named
from moe_dit.recipe import Recipe
from moe_dit.recipe_file import DEFAULT_RECIPE, load_recipe
from moe_dit.runtime.command import Parser
from moe_dit.runtime.errors import InputError
from moe_dit.runtime.wording import shortened
from moe_dit.schema import MOST

EXAMPLES = """\
  deepspeed jobs/train.py --ds ds_configs/zero2_ep8.json
  deepspeed --num_gpus 2 jobs/train.py --ds ds_configs/zero2_ep2.json --recipe digits --data data/digits_latents
  torchrun --nproc_per_node 8 jobs/train.py --ds ds_configs/zero2_ep8.json --recipe dsmoe_b_e16 --set optimizer.lr=2e-4
The same command continues a run that was stopped."""


@dataclass(frozen=True)
class Training:
    """What the training command was asked for."""

    ds: str
    recipe_name: str  # or a .yaml file
    changes: Sequence[str]  # section.key=value
    data: str | None
    out: Path | None
    resume: str
    steps: int | None
    allowed: Sequence[str] = ()  # keys and sections that may change where a run goes on

    @property
    def named(self) -> Named:
        """The keys of the recipe that it names."""
        given = [change.partition("=")[0].strip() for change in self.changes]
        return Named([*given, *([] if self.steps is None else ["steps"])], self.allowed)

    def recipe(self) -> Recipe:
        """The recipe that it means; InputError where there is none such."""
        recipe = load_recipe(self.recipe_name, self.changes)
        self.named.check(recipe)
        steps = recipe.steps if self.steps is None else self.steps
        path = recipe.data.path if self.data is None else self.data
        try:
            return replace(recipe, steps=steps, data=replace(recipe.data, path=path))
        except ValidationError as error:
            raise InputError(f"--data {shortened(path)}: {error.errors()[0]['msg']}") from None

    def run(self, recipe: Recipe) -> Path:
        """The run's folder."""
        return self.out or Path(f"runs/{recipe.name}")


def add_arguments(parser: argparse.ArgumentParser, ds: str | None = None) -> None:
    """What is trained, how and where to; ``ds`` is the default of --ds, which has none otherwise."""
    default = "" if ds is None else f" (default: {ds})"
    about = f"DeepSpeed JSON: how the work is spread{default}"
    parser.add_argument("--ds", required=ds is None, default=ds, metavar="FILE", help=about)
    parser.add_argument("--recipe", default=DEFAULT_RECIPE, help="name or .yaml file (default: %(default)s)")
    parser.add_argument("--data", metavar="SHARDS", help="folder of shards (default: the recipe's own)")
    parser.add_argument("--out", type=Path, metavar="RUN", help="folder for the results (default: runs/RECIPE)")
    resume = "auto, never, or a checkpoint to begin from if RUN has none of its own (default: auto)"
    parser.add_argument("--resume", default="auto", help=resume)
    parser.add_argument("--steps", type=int, metavar="N", help="train until step N (default: the recipe's)")
    parser.add_argument("--set", action="append", default=[], metavar="section.key=value", help="change a recipe key")
    change = (
        "key or section of the recipe, data or micro_batch_size, that may differ from what the run was trained with"
    )
    parser.add_argument("--allow-change", action="append", default=[], metavar="KEY", help=change)


def training(args: argparse.Namespace) -> Training:
    """The values of :func:`add_arguments`; InputError where they cannot be."""
    if args.steps is not None and not 1 <= args.steps <= MOST:
        raise InputError(f"--steps {args.steps}: it should be 1 to {MOST}")
    if args.out is not None:
        there = next(place for place in (args.out, *args.out.absolute().parents) if os.path.lexists(place))
        if not os.path.isdir(there):
            raise InputError(f"--out {args.out}: {there} is not a folder; give another --out")
    return Training(args.ds, args.recipe, args.set, args.data, args.out, args.resume, args.steps, args.allow_change)


def parse_training(arguments: Sequence[str] | None = None) -> Training:
    """Read the training command's line: ``arguments``, or this process's own."""
    parser = Parser("Train a recipe with DeepSpeed, on GPUs or CPU ranks.", EXAMPLES)
    add_arguments(parser)
    parser.add_argument("--local_rank", type=int, help="given by the deepspeed launcher; not used")
    return training(parser.parse_args(arguments))
