"""Speed of the real training step beside the published code's loop: python jobs/bench.py --recipe NAME [--batch N]."""

import os
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from moe_dit.data import check_manifest
from moe_dit.manifest import read_manifest
from moe_dit.parallel.deepspeed_config import load_parallelism
from moe_dit.recipe import Recipe
from moe_dit.recipe_file import DEFAULT_RECIPE, load_recipe
from moe_dit.runtime import ranks
from moe_dit.runtime.command import Parser, run
from moe_dit.runtime.errors import InputError
from moe_dit.runtime.files import check_new_file, explained, new_file, write_json
from moe_dit.runtime.progress import say

EXAMPLES = """\
  python jobs/bench.py --recipe dsmoe_s_e16 --batch 16 --device cpu --json s_e16.json --plot s_e16.svg
  python jobs/bench.py --recipe dsmoe_b_e16 --device cuda
  python jobs/bench.py --recipe dsmoe_b_e16 --batch 4 --set model.depth=2      a part of what does not fit twice
  python jobs/bench.py --recipe dsmoe_l_e16 --against none                     ours alone
  torchrun --nproc_per_node 8 jobs/bench.py --recipe dsmoe_b_e16 --ds ds_configs/zero2_ep8.json
  python jobs/bench.py --recipe dsmoe_s_e16 --ds ds_configs/zero2_ep8.json --count       without a GPU"""
COUNTED_BATCH = 64
STEADY = 20  # steps that a GPU is given without waiting for each
CPU_BATCH = 16
KINDS = {"cpu": time.process_time, "wall": time.perf_counter}


def main() -> None:
    parser = Parser("Times a recipe's real training step, beside the same network as the published code computes it.",
                    EXAMPLES)  # fmt: skip
    parser.add_argument("--recipe", default=DEFAULT_RECIPE, help="name or .yaml file (default: %(default)s)")
    parser.add_argument("--batch", type=int, metavar="N", help="images of a rank's step (default: the recipe's "
                        f"max_micro_batch_size, on CPUs at most {CPU_BATCH})")  # fmt: skip
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: a GPU where there is one")
    parser.add_argument("--pairs", type=int, default=10, metavar="N", help="steps of each (default: %(default)s)")
    parser.add_argument("--threads", type=int, metavar="N", help="of a CPU rank (default: the cores, shared by ranks)")
    parser.add_argument("--against", choices=("published", "none"), default="published", help="what ours is timed "
                        "beside; none needs half the memory (default: %(default)s)")  # fmt: skip
    parser.add_argument("--clock", choices=tuple(KINDS), default="wall", help="cpu: seconds of the processor, where "
                        "others use the machine too (default: %(default)s)")  # fmt: skip
    parser.add_argument("--ds", default="ds_configs/zero1_ep1.json", metavar="FILE", help="default: %(default)s")
    parser.add_argument("--data", metavar="SHARDS", help="shards to read (default: noise, made for the bench)")
    parser.add_argument("--count", action="store_true", help="count what a GPU's step launches, waits for and touches, "
                        f"without one; of {COUNTED_BATCH} images, or --batch; eager: --set compile=none")  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was measured")
    parser.add_argument("--plot", type=Path, metavar="FILE.svg", help="draw the time by part")
    parser.add_argument("--set", action="append", default=[], metavar="section.key=value", help="change a recipe key")
    args = parser.parse_args()
    check(args)
    if args.count:
        show_counts(args)
        return
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # DeepSpeed and torch take a GPU where they see one
        os.environ["DS_ACCELERATOR"] = "cpu"
    if args.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch sees no GPU here; give --device cpu")
    ranks.start()
    recipe = ranks.agreed(lambda: read_recipe(args))
    parallelism = ranks.agreed(lambda: load_parallelism(args.ds, recipe, ranks.world().size))
    with tempfile.TemporaryDirectory() as scratch:
        # What follows imports DeepSpeed, which takes seconds: bad input should not have to wait for it.
        from moe_dit import bench
        from moe_dit.engine import start_ranks

        device = ranks.device()
        if args.threads:
            torch.set_num_threads(args.threads)
        start_ranks()
        if args.data:
            manifest = ranks.agreed(lambda: read_manifest(args.data))
            ranks.agreed(lambda: check_manifest(manifest, recipe))
        else:
            manifest = bench.made_up_shards(recipe, Path(scratch), 2 * recipe.global_batch_size)
        say(f"{recipe.name}: batch {recipe.global_batch_size} on {device.type}, {args.pairs} pairs of steps")
        clock = bench.Clock(device, KINDS[args.clock])
        steady = STEADY if device.type == "cuda" else 0
        result = bench.bench(recipe, parallelism, manifest, clock, args.pairs, args.against == "published", steady)
        result["clock"] = args.clock
    if ranks.world().rank == 0:
        show(result)
        if args.json:
            with explained(str(args.json)):
                write_json(args.json, result)
        if args.plot:
            draw(result, args.plot)


def check(args) -> None:
    """Bad flags, before anything is loaded."""
    for name in ("batch", "pairs", "threads"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise InputError(f"--{name} {value}: it should be at least 1")
    if args.plot and args.plot.suffix != ".svg":
        raise InputError(f"--plot {args.plot}: it should end in .svg")
    if args.clock == "cpu" and args.device == "cuda":
        raise InputError("--clock cpu: a GPU's work takes no time of the processor; leave --clock out")
    for file in (args.json, args.plot):
        if file is not None:
            check_new_file(file, lambda _: True)


def show_counts(args) -> None:
    """What a step of one micro-batch launches, waits for and touches on a GPU that is not there."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    recipe = load_recipe(args.recipe, args.set)
    samples = args.batch or COUNTED_BATCH
    ranks = recipe.token_choice.num_experts if recipe.token_choice is not None else 1  # every EP degree divides it
    recipe = replace(recipe, global_batch_size=samples * ranks, max_micro_batch_size=samples)
    parallelism = load_parallelism(args.ds, recipe, ranks)
    from moe_dit.counting import count

    ep, stage = parallelism.ep_size, parallelism.zero_stage
    compiled = recipe.compiled("cuda", stage) == "blocks"
    say("counting; compiling for it takes a minute or two")
    costs = count(recipe, ep, stage, compiled, samples)
    title = f"{recipe.name}, {samples} images, EP {ep}, ZeRO {stage}, {'compiled' if compiled else 'eager'}"
    table = Table("a step", title=title, title_justify="left")
    for name in ("launches", "host waits", "touched"):
        table.add_column(name, justify="right")
    for part, cost in costs.items():
        table.add_row(part, f"{cost.launches:,.0f}", f"{cost.synchronisations:,.0f}", f"{cost.bytes / 1e9:,.2f} GB")
    Console(width=110, highlight=False).print(table)
    if args.json:
        with explained(str(args.json)):
            write_json(args.json, {part: asdict(cost) for part, cost in costs.items()})


def read_recipe(args) -> Recipe:
    """The recipe with one micro-batch a step, and steps enough for the bench."""
    recipe = load_recipe(args.recipe, args.set)
    on_gpu = torch.cuda.is_available()
    batch = args.batch or (recipe.max_micro_batch_size if on_gpu else min(recipe.max_micro_batch_size, CPU_BATCH))
    return replace(
        recipe,
        global_batch_size=batch * ranks.world().size,
        max_micro_batch_size=batch,
        steps=max(recipe.steps, args.pairs + 100),
        data=replace(recipe.data, path=args.data or recipe.data.path),
    )


def show(result: dict[str, Any]) -> None:
    """The tables for people."""
    console = Console(width=110, highlight=False)
    names = [name for name in ("ours", "published") if name in result]
    title = (
        f"{result['recipe']}, batch {result['batch']}, {result['precision']}, {result['machine']}, "
        f"{result['threads']} threads"
    )
    table = Table("a step", *names, title=title, title_justify="left")

    def row(label: str, *cells: str) -> None:
        table.add_row(label, *cells)

    def each(label: str, value) -> None:
        row(label, *(value(result[name]) for name in names))

    each("median", lambda side: f"{side['seconds']['median'] * 1e3:,.1f} ms")
    each("middle half", lambda side: f"{side['seconds']['low'] * 1e3:,.1f} to {side['seconds']['high'] * 1e3:,.1f} ms")
    for part in result["ours"]["parts"]:
        each(f"  {part}", lambda side, part=part: f"{side['parts'][part] * 1e3:,.1f} ms")
    each("images/s", lambda side: f"{side['images_per_second']:,.2f}")
    each("GFLOP/s", lambda side: f"{side['flops_per_second'] / 1e9:,.0f}")
    each("of the matrix peak", lambda side: f"{side['share_of_peak']:.1%}")
    each("memory held", lambda side: decimal(side["memory_held"]))
    each("memory at its peak", lambda side: decimal(side["memory_peak"]))
    console.print(table)
    console.print(
        f"matrix peak {result['matrix_peak'] / 1e9:,.0f} GFLOP/s, {result['flops_per_image'] / 1e9:,.2f} an image"
    )
    if "speedup" in result:
        spread = result["speedup_spread"]
        console.print(
            f"ours is {result['speedup']:.2f} times as fast as the published form ({spread['low']:.2f} to "
            f"{spread['high']:.2f} in the middle half of the pairs)"
        )
    console.print(
        f"sampling {result['sampling_images_per_second']:,.3f} images/s at {result['sampling_evaluations']} "
        f"evaluations an image"
    )
    if "steady_seconds" in result:
        console.print(f"{result['steady_seconds'] * 1e3:,.1f} ms a step where none is waited for")
    if "all_to_all_bytes_per_second" in result:
        console.print(f"all-to-all {result['all_to_all_bytes_per_second'] / 1e9:,.2f} GB/s that a rank sends")


def draw(result: dict[str, Any], file: Path) -> None:
    """The time by part as bars, ours above the published form."""
    from matplotlib.figure import Figure

    names = [name for name in ("published", "ours") if name in result]
    figure = Figure((8, 1.4 + 0.5 * len(names)), layout="constrained")
    axes = figure.subplots()
    left = [0.0] * len(names)
    for part in result["ours"]["parts"]:
        widths = [result[name]["parts"][part] * 1e3 for name in names]
        axes.barh(names, widths, left=left, label=part)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.set_xlabel("ms a step")
    axes.set_title(f"{result['recipe']}, batch {result['batch']}, {result['machine']}", fontsize=10)
    axes.legend(ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.35), frameon=False)
    with explained(str(file)), new_file(file) as out:
        figure.savefig(out, format="svg")


if __name__ == "__main__":
    run(main)
