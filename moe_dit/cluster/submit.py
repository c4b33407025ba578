"""Jobs for SLURM: what they need is checked, a template is filled in, and sbatch gets it."""

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import huggingface_hub
from rich.filesize import decimal

from moe_dit.checkpoint_files import tensors_of
from moe_dit.cluster.site import Site
from moe_dit.cluster.sizes import check_nodes
from moe_dit.data import check_manifest
from moe_dit.lineage import named_by_latest
from moe_dit.manifest import read_manifest
from moe_dit.parallel.deepspeed_config import load_parallelism
from moe_dit.plan import GPUS, best_mode, make_plan, measure_activations
from moe_dit.recipe import Recipe
from moe_dit.recipe_file import load_recipe
from moe_dit.runtime.errors import InputError
from moe_dit.store import is_remote

TEMPLATES = Path("jobs/slurm")
CHECKPOINTS = 2  # that there must be room for: a new one is complete before an old one goes

# --- what is checked --------------------------------------------------------------------------------------------------


def check_training(recipe: Recipe, ds: str, run: Path, nodes: int, site: Site, shards_later: bool) -> None:
    """Whether a training job can work.

    Args:
        recipe: to train; its data.path is the shards.
        ds: the DeepSpeed JSON.
        run: folder for the results.
        nodes: that the run is to use.
        site: where it is to run.
        shards_later: another job makes the shards first.

    Raises:
        InputError: it does not divide by its ranks, does not fit its GPUs, or lacks shards, a VAE, or room.
    """
    check_nodes(recipe, ds, nodes, site.ranks)
    if site.gpus:
        check_fits(recipe, ds, nodes * site.ranks, site)
    if not shards_later:
        manifest = read_manifest(recipe.data.path, cache_gb=recipe.data.cache_gb)
        check_manifest(manifest, recipe)
        vae = recipe.data.vae or manifest.vae
        if recipe.data.kind == "latents" and vae is not None:
            check_vae(vae, "give --set data.vae=NAME_or_DIR")
    check_room(recipe, run)


def check_fits(recipe: Recipe, ds: str, ranks: int, site: Site) -> None:
    """Raise InputError where the recipe does not fit the site's GPUs, by jobs/plan.py's reckoning."""
    if site.gpu not in GPUS:
        raise InputError(f"{site.file}: GPU is {site.gpu!r}; choose one of {', '.join(GPUS)}")
    plan = make_plan(recipe, load_parallelism(ds, recipe, ranks), recipe.in_bf16("cuda"), measure_activations(recipe))
    mode = recipe.activation_checkpointing
    memory = GPUS[site.gpu].memory
    if plan.total(mode) <= memory:
        return
    best = best_mode(plan, site.gpu)
    cure = (
        "use more nodes, a --ds file of a higher ZeRO stage, or a smaller --set max_micro_batch_size"
        if best is None
        else f"it would with --set activation_checkpointing={best}"
    )
    raise InputError(
        f"{recipe.name} on {ranks} ranks does not fit a {site.gpu}: it would hold "
        f"{decimal(round(plan.total(mode)))} of {decimal(round(memory))}; {cure}"
    )


def check_vae(vae: str, cure: str) -> None:
    """Raise InputError where a VAE is neither a folder nor on the hub: its cache here, or itself."""
    if os.path.isdir(vae):
        return
    repository = re.fullmatch(r"([\w-][\w.-]*/[\w.-]+)(/[\w./-]+)?", vae)
    why = "no folder, and no name of the hub such as stabilityai/sd-vae-ft-mse"
    if repository:
        config = f"{(repository[2] or '').strip('/')}/config.json".lstrip("/")
        if isinstance(huggingface_hub.try_to_load_from_cache(repository[1], config), str):
            return
        try:
            if huggingface_hub.file_exists(repository[1], config):
                return
            why = "no folder, and the hub has none of this name"
        except Exception as error:  # offline, whatever the network made of it
            why = f"no folder and not in the hub's cache here, and the hub cannot be asked ({type(error).__name__})"
    raise InputError(f"there is no VAE {vae}: {why}; {cure}")


def check_decoder(recipe: Recipe, run: Path, encodes: str | None) -> None:
    """Raise InputError where the VAE that decodes a run's samples is not there.

    Args:
        recipe: as asked for.
        run: its config.yaml says what its shards were encoded with, once it has begun.
        encodes: the VAE of a job before this one that makes the shards.
    """
    config = run / "config.yaml"
    data = (load_recipe(str(config)) if os.path.isfile(config) else recipe).data
    vae = recipe.data.vae or data.vae or encodes
    if data.kind == "latents" and vae is not None:
        check_vae(
            vae, "give --set data.vae=NAME_or_DIR to the training job, or behind -- to this one --vae NAME_or_DIR"
        )


def checkpoint_bytes(recipe: Recipe) -> int:
    """What a checkpoint of a recipe takes on disk, but for its index: all is float32."""
    return 4 * sum(size.numel() for size in tensors_of(recipe).values())


def check_room(recipe: Recipe, run: Path) -> None:
    """Raise InputError where the disk that a run lies on has no room for two checkpoints."""
    there = next(folder for folder in (run.absolute(), *run.absolute().parents) if os.path.exists(folder))
    needed = CHECKPOINTS * checkpoint_bytes(recipe)
    free = shutil.disk_usage(there).free
    if free < needed:
        raise InputError(
            f"no room for {CHECKPOINTS} checkpoints of {decimal(needed // CHECKPOINTS)} in {run}: {decimal(free)} are "
            "free there; make room, or give another --out"
        )


def check_there(path: str, what: str, flag: str) -> None:
    """Raise InputError where something that a job reads is not there; a URL is taken as it is."""
    if not is_remote(path) and not os.path.exists(path):
        raise InputError(f"there is no {what} {path}; give {flag}, or set it in the site's file")


def check_run(run: Path) -> None:
    """Raise InputError where a run has nothing to evaluate."""
    if not named_by_latest(run / "checkpoints"):
        raise InputError(f"{run} has no checkpoint to evaluate; give the --out of a run that has saved")


# --- what is submitted ------------------------------------------------------------------------------------------------


def fill(
    template: str, options: Mapping[str, str | None], arguments: Sequence[str], environment: Mapping[str, str]
) -> str:
    """A job script with its values and arguments filled in.

    Args:
        template: text of a script of jobs/slurm.
        options: sbatch's, without dashes; None removes one. What the template lacks is added.
        arguments: what else would stand behind the script on sbatch's command line.
        environment: variables that the script sets.
    """
    lines, left = [], dict(options)
    for line in template.splitlines():
        option = re.match(r"#SBATCH --([\w-]+)", line)
        if option and option[1] in left:
            value = left.pop(option[1])
            if value is not None:
                lines.append(f"#SBATCH --{option[1]}={value}")
        else:
            lines.append(line)
    last = max(i for i, line in enumerate(lines) if line.startswith("#SBATCH"))
    added = [f"#SBATCH --{key}={value}" for key, value in left.items() if value is not None]
    added += ["", f"set -- {shlex.join(arguments)}"]
    added += [f"export {name}={shlex.quote(value)}" for name, value in environment.items()]
    return "\n".join([*lines[: last + 1], *added, *lines[last + 1 :]]) + "\n"


def options_for(site: Site, name: str, nodes: int, time: str | None) -> dict[str, str | None]:
    """sbatch's options for a job of a name on so many nodes of a site."""
    return {
        "job-name": name,
        "nodes": str(nodes),
        "gpus-per-node": str(site.gpus) if site.gpus else None,
        "cpus-per-task": str(site.cpus),
        "mem": site.memory,
        "time": time or site.time,
        "signal": f"B:USR1@{site.save_seconds}",
    }


def submit(script: str, site: Site, after: str | None = None) -> str:
    """Give a filled-in script to sbatch; gives the job's number.

    Args:
        script: its text.
        site: for what sbatch itself is told (account, partition).
        after: number of a job that must have succeeded before.

    Raises:
        InputError: there is no sbatch, or it refuses.
    """
    command = ["sbatch", "--parsable"]
    if after is not None:
        # Where the job before fails this one could never begin.
        command += [f"--dependency=afterok:{after}", "--kill-on-invalid-dep=yes"]
    try:
        done = subprocess.run(command, input=script, env=os.environ | site.sbatch, capture_output=True, text=True)
    except FileNotFoundError:
        raise InputError("there is no sbatch here: run this on a login node of the cluster, or see --dry-run") from None
    if done.returncode:
        raise InputError(f"sbatch refuses: {done.stderr.strip()}")
    return done.stdout.strip().split(";")[0]
