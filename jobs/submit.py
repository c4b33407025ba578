"""Submit jobs to SLURM after checking that they can work: python jobs/submit.py JOB [--recipe NAME] [--nodes N]."""

import argparse
import re
import sys
from pathlib import Path

from moe_dit.cluster.site import DEFAULT, Site, read_site
from moe_dit.recipe import Recipe
from moe_dit.runtime.command import Parser, run
from moe_dit.runtime.errors import InputError
from moe_dit.runtime.progress import console
from moe_dit.training_command import Training, add_arguments, training

EXAMPLES = """\
  python jobs/submit.py train --recipe dsmoe_b_e16 --nodes 2
  python jobs/submit.py train --recipe dsmoe_l_e16 --nodes 4 --spare 1 --set optimizer.lr=2e-4 --dry-run
  python jobs/submit.py encode --images data/imagenet/train --recipe dsmoe_b_e16
  python jobs/submit.py evaluate --recipe dsmoe_b_e16 -- --cfg-scale 1.5
  python jobs/submit.py chain --recipe dsmoe_b_e16 --nodes 2      encodes, then trains, then evaluates
What stands behind -- goes to the job's own command (of a chain: the last one's)."""
JOBS = ("encode", "train", "evaluate", "chain")


def main() -> None:
    parser = Parser(__doc__ or "", EXAMPLES)
    parser.add_argument(
        "job", choices=JOBS, metavar="JOB", help="encode, train, evaluate, or chain: all three in order"
    )
    add_arguments(parser, ds="ds_configs/zero2_ep8.json")
    add = parser.add_argument
    add("--nodes", type=int, default=1, metavar="N", help="that the job computes on (default: 1)")
    add("--spare", type=int, default=0, metavar="N", help="train: nodes more, that take the place of lost ones")
    add("--time", help="that a job may take, as sbatch's --time (default: the site's)")
    add("--images", metavar="DIR", help="encode: folder of images (default: the site's)")
    add("--vae", metavar="NAME_or_DIR", help="encode: the VAE (default: the site's)")
    add("--size", type=int, default=256, metavar="N", help="encode: of the images (default: 256)")
    add("--reference", metavar="FILE.npz/SHARDS/DIR", help="evaluate: real images (default: the site's)")
    add("--inception", metavar="FILE.pth", help="evaluate: the weights, download, or none (default: the site's)")
    add("--protocol", help="evaluate: (default: diffmoe for latents, jit for pixels)")
    add("--site", type=Path, default=DEFAULT, metavar="FILE", help="what the site decides (default: %(default)s)")
    add("--output", metavar="PATTERN", help="of the log, as sbatch's --output (default: %%x-%%j.out)")
    add("--after", metavar="JOBID", help="begin when this job has succeeded")
    add("--dry-run", action="store_true", help="check, and print the scripts instead of submitting them")
    words = sys.argv[1:]
    cut = words.index("--") if "--" in words else len(words)
    args = parser.parse_args(words[:cut])
    args.further = words[cut + 1 :]
    for flag in ("nodes", "spare", "size"):
        least = 0 if flag == "spare" else 1
        if getattr(args, flag) < least:
            raise InputError(f"--{flag} {getattr(args, flag)}: it should be at least {least}")

    for flag, value in vars(args).items():
        if flag != "time" and isinstance(value, str | Path) and str(value).startswith("-"):
            raise InputError(f"--{flag} {value}: the job would take this for a flag; write ./{value}")
    if args.after is not None and not re.fullmatch(r"\d+(_\d+)?", args.after, re.ASCII):
        raise InputError(f"--after {args.after!r}: it should be a job's number")
    site = read_site(args.site)
    asked = training(args)
    recipe = asked.recipe()
    jobs = ("encode", "train", "evaluate") if args.job == "chain" else (args.job,)
    scripts = {job: prepare(job, args, asked, recipe, site, jobs) for job in jobs}
    after = args.after
    for job, script in scripts.items():
        if args.dry_run:
            print(script)
            continue
        from moe_dit.cluster.submit import submit

        before, after = after, submit(script, site, after)
        console.print(f"{job}: job {after}{f', when {before} has succeeded' if before else ''}", markup=False)


def prepare(
    job: str, args: argparse.Namespace, asked: Training, recipe: Recipe, site: Site, jobs: tuple[str, ...]
) -> str:
    """Check one job of those that are submitted together, and fill in its script."""
    from moe_dit.cluster import submit

    folder = asked.run(recipe)
    nodes = args.nodes
    if job == "encode":
        arguments = encode(args, recipe, site)
    elif job == "train":
        submit.check_training(recipe, asked.ds, folder, nodes, site, shards_later="encode" in jobs)
        nodes += args.spare
        arguments = ["--ds", asked.ds, "--recipe", asked.recipe_name, "--data", recipe.data.path, "--out", str(folder)]
        arguments += ["--resume", asked.resume, *([] if asked.steps is None else ["--steps", str(asked.steps)])]
        arguments += [word for change in asked.changes for word in ("--set", change)]
        arguments += [word for key in asked.allowed for word in ("--allow-change", key)]
    else:
        if "train" not in jobs:
            submit.check_run(folder)
        submit.check_decoder(recipe, folder, args.vae or site.vae if "encode" in jobs else None)
        arguments = evaluate(args, recipe, site, folder)
    time = site.sbatch.get("SBATCH_TIMELIMIT", site.time) if args.time is None else args.time
    submit.check_time(time, site)
    output = site.sbatch.get("SBATCH_OUTPUT") if args.output is None else args.output
    name = f"{job}-{recipe.name}"
    log = submit.log_folder(submit.OUTPUT if output is None else output, name)
    options = submit.options_for(site, name, nodes, time, output)
    template = (submit.TEMPLATES / f"{job}.sbatch").read_text()
    further = args.further if job == jobs[-1] else []
    environment = {} if args.site == DEFAULT else {"SITE": str(args.site.resolve())}
    if nodes > args.nodes:
        environment["SPARE_NODES"] = str(args.spare)
    script = submit.fill(template, options, [*arguments, *further], environment)
    submit.make_log_folder(log, args.dry_run)
    return script


def encode(args: argparse.Namespace, recipe: Recipe, site: Site) -> list[str]:
    """The arguments of an encoding job."""
    from moe_dit.cluster.submit import check_there, check_vae

    images, vae = args.images or site.images, args.vae or site.vae
    check_there(images, "folder of images", "--images")
    arguments = ["--images", images, "--size", str(args.size), "--out", recipe.data.path]
    if recipe.data.kind == "latents":
        check_vae(vae, "give --vae")
        arguments += ["--vae", vae]
    return arguments


def evaluate(args: argparse.Namespace, recipe: Recipe, site: Site, folder: Path) -> list[str]:
    """The arguments of an evaluating job."""
    from moe_dit.cluster.submit import check_there

    reference, inception = args.reference or site.reference, args.inception or site.inception
    check_there(reference, "reference", "--reference")
    protocol = args.protocol or ("diffmoe" if recipe.data.kind == "latents" else "jit")
    arguments = [str(folder), "--reference", reference, "--protocol", protocol]
    if inception and inception != "none":
        if inception != "download":
            check_there(inception, "file of Inception weights", "--inception")
        arguments += ["--inception", inception]
    return arguments


if __name__ == "__main__":
    run(main)
