"""What each GPU will hold and send: python jobs/plan.py --recipe NAME --ds FILE --gpus N [--gpu h100-80g]."""

from dataclasses import replace

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from moe_dit.parallel.deepspeed_config import load_parallelism
from moe_dit.recipe_file import DEFAULT_RECIPE, load_recipe, names
from moe_dit.runtime.command import Parser, run
from moe_dit.runtime.errors import InputError

EXAMPLES = """\
  python jobs/plan.py --recipe dsmoe_3b_e16 --ds ds_configs/zero2_ep8.json --gpus 8
  python jobs/plan.py --recipe dsmoe_l_e16 --ds ds_configs/zero1_ep1.json --gpus 1 --gpu a100-40g
  python jobs/plan.py --recipe dsmoe_3b_e16 --ds ds_configs/zero2_ep8.json --gpus 512 --simulate --rank 511
  python jobs/plan.py --table --ds ds_configs/zero2_ep8.json      every recipe on 8, 16, 64 and 512 GPUs (minutes)"""
TABLE_GPUS = (8, 16, 64, 512)
WITHOUT_EXPERTS = "ds_configs/zero1_ep1.json"  # for the table's networks whose experts ranks cannot share


def main() -> None:
    parser = Parser("What each GPU will hold and send, and whether it fits, without training.", EXAMPLES)
    parser.add_argument("--recipe", default=DEFAULT_RECIPE, help="name or .yaml file (default: %(default)s)")
    parser.add_argument("--ds", required=True, metavar="FILE", help="DeepSpeed JSON")
    parser.add_argument("--gpus", type=int, default=8, metavar="N", help="default: %(default)s")
    parser.add_argument("--gpu", default="h100-80g", help="default: %(default)s")
    parser.add_argument("--set", action="append", default=[], metavar="section.key=value", help="change a recipe key")
    parser.add_argument("--table", action="store_true", help="every recipe that comes with the project, as Markdown")
    parser.add_argument("--simulate", action="store_true", help="be one of the ranks for a step, without the others")
    parser.add_argument("--rank", type=int, metavar="R", help="which one (default: 0)")
    args = parser.parse_args()

    from moe_dit.plan import GPUS

    if args.gpu not in GPUS:
        raise InputError(f"--gpu {args.gpu}: choose one of {', '.join(GPUS)}")
    if args.gpus < 1:
        raise InputError(f"--gpus {args.gpus}: it should be at least 1")
    if args.rank is not None and not args.simulate:
        raise InputError("--rank says which rank --simulate is; give both or neither")
    if args.table and args.simulate:
        raise InputError("--table and --simulate: give one of them")
    if args.simulate:
        print_simulation(args)
    elif args.table:
        print_table(args.ds, args.gpu)
    else:
        print_plan(args)


def _size(n: float) -> str:
    """Bytes for people: powers of 1000."""
    return decimal(round(n))


def print_plan(args) -> None:
    from moe_dit.plan import GPUS, best_mode, images_per_second, make_plan, measure_activations, step_seconds

    recipe = load_recipe(args.recipe, args.set)
    parallelism = load_parallelism(args.ds, recipe, args.gpus)
    plan = make_plan(recipe, parallelism, recipe.in_bf16("cuda"), measure_activations(recipe))
    batch = f"{parallelism.world_size} x {parallelism.micro_batch_size} x {parallelism.accumulation}"
    title = f"{recipe.name} on {args.gpus} x {args.gpu}, ZeRO {parallelism.zero_stage}, EP {parallelism.ep_size}"
    holds = Table("each GPU holds", "bytes", "", title=f"{title}, batch {batch}", title_justify="left")
    for key in ("weights", "gradients", "master", "state"):
        holds.add_row(key, f"{getattr(plan, key):,}", _size(getattr(plan, key)))
    for mode, size in plan.activations.items():
        fits = "fits" if plan.total(mode) <= GPUS[args.gpu].memory else "does not fit"
        label = f"activations, checkpointing {mode}"
        holds.add_row(label, f"{size:,.0f}", f"{_size(size)}; in all {_size(plan.total(mode))}, {fits}")
    sends = Table("each step it sends", "bytes", "")
    for kind, size in plan.sends.items():
        sends.add_row(kind, f"{size:,.0f}", _size(size))
    notes = {
        "products": f"{plan.flops / 1e9:,.0f} GFLOP an image, with attention's",
        "pointwise": "all else of the network",
        "optimizer": "from the gradients to the averages",
        "launches": f"about {plan.launches:,.0f} kernels, beside the GPU's work",
        "waits": "of the host for the GPU",
        "overlapped": "traffic beside the network",
        "traffic": "that is waited for",
        "step": f"{images_per_second(plan, args.gpu, parallelism):,.0f} images/s in all",
    }
    takes = Table("each step takes, an estimate, not measured", "ms", "")
    for part, seconds in step_seconds(plan, args.gpu, parallelism).items():
        takes.add_row(part, f"{seconds * 1e3:,.2f}", notes.get(part, ""))
    console = Console(width=110, highlight=False)
    for table in (holds, sends, takes):
        console.print(table)
    best = best_mode(plan, args.gpu)
    if best is None:
        console.print(
            f"does not fit a {args.gpu}: try more GPUs, a higher ZeRO stage or a smaller max_micro_batch_size"
        )
    else:
        console.print(f"fits a {args.gpu} with activation_checkpointing: {best}")


def print_simulation(args) -> None:
    """What a simulated rank was seen to hold and send, beside the plan."""
    from moe_dit.plan import make_plan
    from moe_dit.simulate import simulate

    recipe = load_recipe(args.recipe, args.set)
    bf16 = recipe.in_bf16("cuda")
    parallelism = load_parallelism(args.ds, recipe, args.gpus)
    rank = args.rank or 0
    seen = simulate(replace(recipe, precision="bf16" if bf16 else "fp32", compile="none"), parallelism, rank)
    plan = make_plan(recipe, parallelism, bf16)
    batch = f"{parallelism.world_size} x {parallelism.micro_batch_size} x {parallelism.accumulation}"
    title = f"{recipe.name}, rank {rank} of {args.gpus}, ZeRO {parallelism.zero_stage}, EP {parallelism.ep_size}"
    holds = Table("holds", "bytes", "planned", title=f"{title}, batch {batch}", title_justify="left")
    for key, size in seen.held.items():
        holds.add_row(key, f"{size:,}", f"{getattr(plan, key):,}")
    step = Table("each step it sends", "ranks", "calls", "bytes", "planned, of this kind")
    for (kind, ranks), calls in sorted(seen.step.calls.items()):
        planned = f"{plan.sends[kind]:,.0f}" if kind in plan.sends else ""
        step.add_row(kind, f"{ranks}", f"{calls}", f"{seen.step.sent[kind, ranks]:,}", planned)
    begins = Table("before the first step", "ranks", "calls", "bytes")
    for (kind, ranks), calls in sorted(seen.beginning.calls.items()):
        begins.add_row(kind, f"{ranks}", f"{calls}", f"{seen.beginning.sent[kind, ranks]:,}")
    console = Console(width=110, highlight=False)
    for table in (holds, begins, step):
        console.print(table)
    sizes = ", ".join(map(str, seen.groups))
    console.print(f"groups: {seen.made} made, a call each; this rank is in {len(seen.groups)}, of {sizes} ranks")
    console.print(f"memory of this process, at most: {_size(seen.memory)}")


def print_table(ds: str, gpu: str) -> None:
    from moe_dit.plan import best_mode, images_per_second, make_plan, measure_activations

    print("| recipe | GPUs | weights | gradients | master | state | activations | in all | images/s |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name in names():
        if name.startswith("digits"):
            continue  # for CPUs
        recipe = load_recipe(name)
        kept = measure_activations(recipe)
        for gpus in TABLE_GPUS:
            file = ds if recipe.token_choice is not None else WITHOUT_EXPERTS
            parallelism = load_parallelism(file, recipe, gpus)
            plan = make_plan(recipe, parallelism, kept=kept)
            mode = best_mode(plan, gpu)
            parts = [_size(getattr(plan, key)) for key in ("weights", "gradients", "master", "state")]
            activations = f"{_size(plan.activations[mode])} ({mode})" if mode else "too large"
            whole = _size(plan.total(mode)) if mode else "-"
            speed = f"{images_per_second(plan, gpu, parallelism):,.0f}"
            print(f"| {name} | {gpus} | {' | '.join(parts)} | {activations} | {whole} | {speed} |", flush=True)


if __name__ == "__main__":
    run(main)
