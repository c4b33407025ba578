"""Scores over ways to sample and checkpoints of a run: a table and a plot, cell by cell, continuing after a stop.

Every cell has the same noise and labels by seed, so that cells differ by what they are swept over alone. Networks, the
real images' features and the VAE are loaded once. A cell that is done is a file in OUT/cells; the same command again,
or one with more values, computes the others.
"""

import hashlib
import itertools
import math
import os
import statistics
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from data_prep.autoencoder import hash_weights
from eval import metrics, score
from eval.features import Extractor, Features
from eval.generate import Sampling, generate, image_size, labels_for, load_decoder, resolve
from eval.protocols import PROTOCOLS, Protocol
from eval.reference import Reference, labels_in
from eval.sample import batches_of, usual_batch
from eval.sample_folder import model_fingerprint
from moe_dit.build import build_model, to_compute
from moe_dit.checkpoint_files import Pruned
from moe_dit.classes import model_classes
from moe_dit.export import checkpoint_classes, checkpoint_model, checkpoint_recipe, export_recipe, load_export
from moe_dit.recipe import Recipe
from moe_dit.runtime import ranks
from moe_dit.runtime.command import Parser, run
from moe_dit.runtime.errors import InputError
from moe_dit.runtime.files import explained, new_file, write_json, write_text
from moe_dit.runtime.lock import lock_folder
from moe_dit.runtime.progress import say, task
from moe_dit.runtime.reading import read_bytes, read_json
from moe_dit.sampler import METHODS

EXAMPLES = """\
  python -m eval.sweep --model runs/digits --reference data/digits_images -n 2000 --cfg-scale 1 1.5 2 3 --out sweep
  torchrun --nproc_per_node 8 -m eval.sweep --model runs/dsmoe_s_e16 --checkpoints 300000 400000 --weights ema model \\
      --cfg-scale 1 1.25 1.5 --reference imagenet256.npz --inception FILE.pth -n 10000 --out sweep
  python -m eval.sweep --model MODEL --steps 25 50 100 --method euler heun --cfg-interval 0 1 --cfg-interval 0.1 1 \\
      --seeds 0 1 2 --reference imagenet256.npz --inception FILE.pth -n 10000 --out sweep
"""
SETTINGS = "sweep.json"
FORMAT = "moe-dit-sweep-1"


@dataclass(frozen=True)
class Variant:
    """Weights that are sampled: a model folder, or a checkpoint of a run with one of its averages."""

    name: str
    path: Path
    weights: str | None  # None: a model folder

    def recipe(self) -> Recipe:
        return export_recipe(self.path) if self.weights is None else checkpoint_recipe(self.path, self.weights)[1]

    def classes(self) -> list[str] | None:
        """The names of its classes, where they are known."""
        return model_classes(self.path) if self.weights is None else checkpoint_classes(self.path)

    def load(self) -> tuple[Any, Recipe]:
        if self.weights is None:
            return load_export(self.path)
        checkpoint, recipe = checkpoint_recipe(self.path, self.weights)
        return checkpoint_model(checkpoint, recipe, self.weights), recipe


@dataclass(frozen=True)
class Cell:
    """One way to sample one variant."""

    variant: str
    sampling: Sampling

    @property
    def group(self) -> str:
        """What seeds of the same cell share."""
        low, high = self.sampling.cfg_interval
        return (
            f"{self.variant} s={self.sampling.cfg_scale:g} t={low:g}..{high:g} {self.sampling.method} "
            f"{self.sampling.steps}"
        )

    @property
    def file(self) -> str:
        return f"{self.group.replace(' ', '_').replace('=', '')}_seed{self.sampling.seed}.json"


def variants(model: Path, checkpoints: list[str] | None, weights: list[str]) -> list[Variant]:
    """What --model, --checkpoints and --weights name.

    Raises:
        InputError: there is no such checkpoint.
    """
    if os.path.exists(model / "config.json"):
        if checkpoints:
            raise InputError(f"--checkpoints are of a run; {model} is an exported model")
        return [Variant(model.absolute().name, model, None)]
    folder = model / "checkpoints"
    if checkpoints:
        there = {int(path.name[5:]): path for path in folder.glob("step_*") if path.name[5:].isdigit()}
        wanted = sorted(there) if checkpoints == ["all"] else checkpoints
        if not wanted:
            raise InputError(f"{model} has no checkpoints; give a run that saved some, or an exported model")
        for step in wanted:
            if not str(step).isdigit() or int(step) not in there:
                known = ", ".join(map(str, sorted(there))) or "none"
                raise InputError(f"--checkpoints {step}: {model} has those of steps {known}")
        paths = [there[int(step)] for step in wanted]
    else:
        paths = [checkpoint_recipe(model, weights[0])[0]]
    found = [Variant(f"{path.name}_{kind}", path, kind) for path in paths for kind in weights]
    return found


def cells(args: Namespace, variant: Variant, recipe: Recipe) -> Iterator[Cell]:
    """The cells of a variant, in the order of the flags."""
    for scale, interval, method, steps, seed in itertools.product(
        args.cfg_scale or [None], args.cfg_interval or [None], args.method or [None], args.steps or [None], args.seeds
    ):
        one = Namespace(**vars(args) | {"cfg_scale": scale, "cfg_interval": interval, "method": method, "steps": steps})
        one.seed = seed
        yield Cell(variant.name, resolve(one, recipe))


# --- the work ---------------------------------------------------------------------------------------------------------


def sample_features(
    model: Any, recipe: Recipe, sampling: Sampling, vae: Any, extractor: Extractor, protocol: Protocol, args: Namespace
) -> Features | None:
    """The features of a cell's samples, by all ranks; on rank 0, None elsewhere."""
    world, device = ranks.world(), extractor.device
    batch = args.batch or usual_batch(args.num, device, model.couples_samples)
    batches = batches_of(args.num, batch, model.couples_samples)
    found = {}
    with task("sampling", args.num, unit="images") as progress:
        for k in world.share(len(batches)):
            kept = int((batches[k] < args.num).sum())
            images = generate(model, recipe, sampling, vae, batches[k].to(device), protocol.rounded)
            found[k] = extractor(images[:kept])
            progress.advance(min(args.num - progress.done, batch * world.size))
    everyone = ranks.gathered(found)
    if everyone is None:
        return None
    whole = [arrays for _, arrays in sorted((k, arrays) for part in everyone for k, arrays in part.items())]
    arrays = {name: torch.cat([part[name] for part in whole]) for name in whole[0]}
    return Features(arrays, labels_for(torch.arange(args.num), sampling, recipe.model.num_classes))


def sweep(args: Namespace) -> None:
    """Compute the cells that are missing; every rank calls it."""
    protocol = PROTOCOLS[args.protocol]
    device = ranks.device()

    def look() -> Any:
        found = variants(args.model, args.checkpoints, args.weights)
        recipes = [variant.recipe() for variant in found]
        plan = [list(cells(args, variant, recipe)) for variant, recipe in zip(found, recipes, strict=True)]
        return found, plan, recipes[0]

    found, plan, recipe = ranks.from_rank_0(look)
    reference = Reference(args.reference, args.inception, protocol)
    theirs, fitted = reference.images.classes, args.inception is None
    places = ranks.from_rank_0(
        lambda: [labels_in(args.reference, variant.classes(), theirs, fitted) for variant in found]
    )
    held = ranks.on_rank_0(lambda: lock_folder(args.out, "another sweep"))
    sampling = plan[0][0].sampling
    vae = ranks.first_on_rank_0(lambda: load_decoder(sampling, recipe))
    size = image_size(recipe, vae)
    extractor = reference.extractor(args.dinov2, size, device)
    others: dict[str, Any] = {"labels": sampling.labels, "vae_sha256": hash_weights(vae) if vae is not None else None}
    coupled = build_model(recipe, device="meta").couples_samples
    others |= {"batch": args.batch or usual_batch(args.num, device, coupled)} if coupled else {}
    ranks.from_rank_0(lambda: _open(args, others, extractor, protocol, found))
    truth: Any = reference.survey(extractor, size)
    vae = vae.to(device) if vae is not None else None
    folder = args.out / "cells"
    every = [cell for part in plan for cell in part]
    pruned: list[Cell] = []
    for variant, mine, among in zip(found, plan, places, strict=True):
        there = ranks.from_rank_0(lambda: {path.name for path in folder.iterdir()})
        missing = [cell for cell in mine if cell.file not in there]
        if not missing:
            continue
        try:
            model, recipe = ranks.agreed(variant.load)
        except Pruned as error:  # on every rank alike
            if len(pruned) + len(missing) == len(every):
                raise
            say(f"{error}; going on without it")
            pruned += missing
            continue
        model = to_compute(model, recipe, device)
        for cell in missing:
            say(f"{every.index(cell) + 1} of {len(every)}: {cell.group}, seed {cell.sampling.seed}")
            made = sample_features(model, recipe, cell.sampling, vae, extractor, protocol, args)

            def finish(cell: Cell = cell, made: Any = made, among: Any = among) -> None:
                result = score.compute(made, truth, extractor, protocol, among)
                whole = {"cell": cell.group, "variant": cell.variant} | result | {"sampling": vars(cell.sampling)}
                with explained(str(folder)):
                    write_json(folder / cell.file, whole | {"reference": str(args.reference)}, indent=2)

            ranks.from_rank_0(finish)
    ranks.from_rank_0(lambda: present(args.out, [cell for cell in every if cell not in pruned]))
    if held is not None:
        held.close()


def _open(
    args: Namespace, others: dict[str, Any], extractor: Extractor, protocol: Protocol, found: list[Variant]
) -> None:
    """Make the sweep's folder, or check that it continues the one that is there; ``others``: what else must agree."""
    settings = {
        "format": FORMAT,
        "num": args.num,
        "protocol": protocol.name,
        "reference": str(args.reference),
        "networks": extractor.identity,
        **others,
        "model": str(args.model),
        "weights_sha256": {variant.name: _fingerprint(variant) for variant in found},
    }
    file = args.out / SETTINGS
    try:
        before = read_json(file)
        before["weights_sha256"].items()
    except FileNotFoundError:
        before = None
        if os.path.exists(args.out) and (not os.path.isdir(args.out) or any(args.out.glob("[!.]*"))):
            raise InputError(f"{args.out} is taken: it is no sweep; give another --out") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{file} is damaged; sweep into another --out") from None
    if before is not None:
        known = before["weights_sha256"]
        settings["weights_sha256"] = known | settings["weights_sha256"]
        changed = [
            key for key in settings if key not in ("weights_sha256", "model") and before.get(key) != settings[key]
        ]
        changed += [name for name, digest in known.items() if settings["weights_sha256"][name] != digest]
        if changed:
            told = "; ".join(f"{key} was {before.get(key, 'otherwise')}" for key in changed)
            raise InputError(f"{args.out} holds a sweep made otherwise: {told}; give another --out")
    with explained(str(args.out)):
        (args.out / "cells").mkdir(parents=True, exist_ok=True)
        write_json(file, settings, indent=2)


def _fingerprint(variant: Variant) -> str:
    """Tells weights from others: a model folder's content, a checkpoint's description."""
    if variant.weights is None:
        return model_fingerprint(variant.path)
    digest = hashlib.sha256()
    for file in sorted(path for path in variant.path.rglob("*") if os.path.isfile(path)):
        status = file.stat()
        digest.update(f"{file.relative_to(variant.path)} {status.st_size}\n".encode())
        if status.st_size < 1 << 20:
            digest.update(read_bytes(file))
    return digest.hexdigest()


# --- the table and the plot -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """The scores of a cell over its seeds.

    Attributes:
        fid: mean over seeds.
        error: its standard error: of one seed by its samples, of several by their spread too.
        near: whether it does not differ from the best row's.
    """

    cell: Cell
    fid: float
    error: float
    scores: dict[str, float]
    seeds: int
    best: bool = False
    near: bool = False


def rows(folder: Path, every: list[Cell]) -> list[Row]:
    """The cells' rows, in their order, the lowest FID marked as best."""
    groups: dict[str, list[tuple[Cell, dict[str, Any]]]] = {}
    for cell in every:
        file = folder / "cells" / cell.file
        try:
            result = read_json(file)
            result["fid"] + result["fid_std_error"]
        except (OSError, ValueError, KeyError, TypeError):
            raise InputError(f"{file} is damaged; remove it, and the same command makes it anew") from None
        groups.setdefault(cell.group, []).append((cell, result))
    found = []
    for members in groups.values():
        results = [result for _, result in members]
        fids = [result["fid"] for result in results]
        error = math.sqrt(sum(result["fid_std_error"] ** 2 for result in results)) / len(results)
        if len(results) > 1:
            error = max(error, statistics.stdev(fids) / len(results) ** 0.5)
        scores = {
            name: statistics.mean(result[name] for result in results)
            for name in TITLES
            if all(isinstance(result.get(name), float) for result in results)
        }
        found.append(Row(members[0][0], statistics.mean(fids), error, scores, len(results)))
    best = min(found, key=lambda row: row.fid)
    wide = metrics.CONFIDENT
    return [
        replace(
            row,
            best=row is best,
            near=row is not best and row.fid - best.fid <= wide * math.hypot(row.error, best.error),
        )
        for row in found
    ]


TITLES = {
    "fid_infinity": "FID, infinite",
    "fd_dinov2": "FDD",
    "sfid": "sFID",
    "inception_score": "IS",
    "precision": "precision",
    "recall": "recall",
    "label_agreement": "labels agreed",
}


def present(folder: Path, every: list[Cell]) -> None:
    """Print the table; write it as table.md, and FID over guidance as fid.svg."""
    found = rows(folder, every)
    names = [name for name in TITLES if any(name in row.scores for row in found)]
    head = [
        "weights",
        "guidance",
        "interval",
        "sampler",
        "steps",
        "seeds",
        "FID, 95%",
        *(TITLES[name] for name in names),
    ]
    table = Table(*head)
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in found:
        sampling = row.cell.sampling
        mark = " (best)" if row.best else " (no different)" if row.near else ""
        low, high = sampling.cfg_interval
        cells_ = [row.cell.variant, f"{sampling.cfg_scale:g}", f"{low:g} to {high:g}", sampling.method]
        cells_ += [str(sampling.steps), str(row.seeds)]
        cells_ += [f"{row.fid:.4g} ± {metrics.CONFIDENT * row.error:.2g}{mark}"]
        cells_ += [f"{row.scores[name]:.4g}" if name in row.scores else "" for name in names]
        table.add_row(*cells_, style="bold" if row.best else None)
        lines.append("| " + " | ".join(cells_) + " |")
    console = Console()
    if console.is_terminal:
        console.print(table)
    else:
        print("\n".join(lines))
    with explained(str(folder)):
        write_text(folder / "table.md", "\n".join(lines) + "\n")
        draw(found, folder / "fid.svg")
    say(f"table and plot in {folder}")


def draw(found: list[Row], file: Path) -> None:
    """FID over guidance with 95% intervals, a line for everything else that differs; the best is ringed."""
    from matplotlib.figure import Figure

    figure = Figure((8, 4.5), layout="constrained")
    axes = figure.subplots()
    lines: dict[tuple[Any, ...], list[Row]] = {}
    for row in found:
        sampling = row.cell.sampling
        key = (row.cell.variant, sampling.method, sampling.steps, sampling.cfg_interval)
        lines.setdefault(key, []).append(row)
    differing = [len({key[i] for key in lines}) > 1 for i in range(4)]
    for key, members in lines.items():
        members = sorted(members, key=lambda row: row.cell.sampling.cfg_scale)
        words = [key[0], key[1], f"{key[2]} steps", f"t {key[3][0]:g} to {key[3][1]:g}"]
        label = ", ".join(word for word, shown in zip(words, differing, strict=True) if shown) or key[0]
        wide = [metrics.CONFIDENT * row.error for row in members]
        x, y = [row.cell.sampling.cfg_scale for row in members], [row.fid for row in members]
        axes.errorbar(x, y, yerr=wide, label=label, marker="o", capsize=3, linewidth=1.5)
    best = next(row for row in found if row.best)
    axes.scatter([best.cell.sampling.cfg_scale], [best.fid], s=250, facecolors="none", edgecolors="black", zorder=3)
    axes.set_xlabel("guidance scale")
    axes.set_ylabel("FID (95% intervals)")
    axes.grid(alpha=0.3)
    axes.legend()
    with new_file(file) as out:
        figure.savefig(out, format="svg")


def main() -> None:
    parser = Parser(__doc__ or "", EXAMPLES)
    add = parser.add_argument
    add("--model", type=Path, required=True, metavar="MODEL_or_RUN", help="an exported model, or a run")
    add("--checkpoints", nargs="+", metavar="STEP", help="steps of the run's checkpoints, or all (its newest)")
    add("--weights", nargs="+", choices=("ema", "ema2", "model"), default=["ema"], help="of checkpoints (ema)")
    add("-n", "--num", type=int, default=10_000, metavar="N", help="samples of a cell (10000)")
    add("--cfg-scale", type=float, nargs="+", metavar="S", help="guidance scales (the recipe's)")
    add("--cfg-interval", type=float, nargs=2, action="append", metavar=("LO", "HI"), help="may be given several times")
    add("--steps", type=int, nargs="+", metavar="N", help="integration steps (the recipe's)")
    add("--method", nargs="+", choices=METHODS, help="integrators (the recipe's)")
    add("--seeds", type=int, nargs="+", default=[0], metavar="N", help="of noise and labels; several give a spread (0)")
    add("--labels", choices=("balanced", "random"), help="sample i has class i mod classes, or a random one")
    add("--vae", metavar="NAME_or_DIR", help="VAE that decodes latents")
    add("--batch", type=int, metavar="N", help="samples computed at once on a rank")
    add("--inception", metavar="FILE.pth", help="Inception V3 weights, or the word download; else a fitted classifier")
    add("--out", type=Path, required=True, metavar="SWEEP", help="folder of the sweep")
    add("--local_rank", "--local-rank", type=int, help="given by the deepspeed launcher; not used")
    score.add_scoring_arguments(parser, against=False)
    args = parser.parse_args()
    if not score.FEWEST <= args.num <= 10_000_000:
        raise InputError(f"--num is {args.num}; it should be {score.FEWEST} to 10,000,000")
    ranks.start(timedelta(hours=12))  # nobody gives up on the slowest
    sweep(args)


if __name__ == "__main__":
    run(main)
