"""Jobs for SLURM: what they need is checked, a template is filled in, and sbatch gets it."""

import math
import os
import re
import shlex
import shutil
import subprocess
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path

import huggingface_hub
from rich.filesize import decimal

from moe_dit.checkpoint_files import tensors_of
from moe_dit.cluster.site import Site
from moe_dit.cluster.sizes import check_nodes
from moe_dit.data import check_manifest
from moe_dit.lineage import find_checkpoint
from moe_dit.manifest import read_manifest
from moe_dit.parallel.deepspeed_config import load_parallelism
from moe_dit.plan import GPUS, best_mode, make_plan, measure_activations
from moe_dit.recipe import Recipe
from moe_dit.recipe_file import load_recipe
from moe_dit.runtime import hub
from moe_dit.runtime.errors import InputError
from moe_dit.runtime.files import explained
from moe_dit.store import is_remote

TEMPLATES = Path("jobs/slurm")
OUTPUT = "%x-%j.out"  # where a template's log goes
CHECKPOINTS = 2  # that there must be room for: a new one is complete before an old one goes
# More than it saves in that a job must have: SLURM may tell it a minute early, and ranks take a while to a first step.
START_SECONDS = 180
# sbatch takes these rather than what a script says, and a script says what was checked.
OVERRULED = ("SBATCH_TIMELIMIT", "SBATCH_SIGNAL", "SBATCH_OUTPUT", "SBATCH_JOB_NAME")
LIMIT = re.compile(
    r"(?:(?P<d>\d{1,9})-(?P<dh>\d{1,9})(?::(?P<dm>\d{1,9})(?::(?P<ds>\d{1,9}))?)?"
    r"|(?:(?P<h>\d{1,9}):(?=\d+:))?(?P<m>\d{1,9})(?::(?P<s>\d{1,9}))?)",
    re.ASCII,
)

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
            why = f"no folder, and {hub.refusal(error, config) or f'the hub cannot be asked ({type(error).__name__})'}"
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


def check_run(run: Path) -> Path:
    """The checkpoint of a run that is evaluated, in RUN/checkpoints; InputError where there is none."""
    checkpoint = find_checkpoint(run)
    if checkpoint is None or checkpoint.parent != run / "checkpoints":
        raise InputError(f"{run} has no checkpoint to evaluate; give the --out of a run that has saved")
    return checkpoint


def seconds_of(limit: str) -> float:
    """A time limit as sbatch's --time takes it, in seconds, which SLURM rounds up to minutes; inf: no limit."""
    if limit.lower() in ("unlimited", "infinite", "-1"):
        return math.inf
    found = LIMIT.fullmatch(limit)
    if found is None:
        raise InputError(
            f"--time {limit!r}: it should be minutes, minutes:seconds, hours:minutes:seconds, days-hours, "
            "days-hours:minutes, days-hours:minutes:seconds or UNLIMITED"
        )
    of = {key: int(value or 0) for key, value in found.groupdict().items()}
    seconds = of["d"] * 86400 + (of["dh"] + of["h"]) * 3600 + (of["dm"] + of["m"]) * 60 + of["ds"] + of["s"]
    return 60 * -(-seconds // 60) or math.inf


def check_time(limit: str, site: Site) -> None:
    """Raise InputError where a job of such a limit would save and be queued again before it has done a step."""
    least = site.save_seconds + START_SECONDS
    if seconds_of(limit) < least:
        raise InputError(
            f"--time {limit}: a job is told to save {site.save_seconds} s before its limit (SAVE_SECONDS of "
            f"{site.file}), and would be queued again for ever without a step; give at least {-(-least // 60)} minutes"
        )


def log_folder(pattern: str, job: str) -> Path:
    """The folder of a job's log, which SLURM does not make: without it a job fails and says nothing.

    Args:
        pattern: as sbatch's --output.
        job: its name.

    Raises:
        InputError: it is not known before the job has a number, or the log would be a folder.
    """
    folder, name = os.path.split(pattern)
    if "\\" in pattern:
        raise InputError(f"--output {pattern!r}: SLURM does not take a backslash as it is; leave it out")
    known = {"%": "%", "x": job}
    if unknown := [found for found in re.findall("%(.?)", folder) if found not in known]:
        raise InputError(
            f"--output {pattern!r}: a folder's name cannot have %{unknown[0]} in it, for the folder must be there "
            "before the job is; put that into the file's name"
        )
    if name in ("", ".", "..") or os.path.isdir(pattern):
        raise InputError(
            f"--output {pattern!r} is a folder; give a file's name, such as {os.path.join(pattern, OUTPUT)}"
        )
    return Path(re.sub("%(.)", lambda found: known[found[1]], folder) or ".")


def make_log_folder(folder: Path, dry_run: bool = False) -> None:
    """Make a folder for logs where it is not there, or see whether it could be; InputError where none can be there."""
    if dry_run:
        there = next(place for place in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(place))
        if not there.is_dir():
            raise InputError(f"cannot write the log's folder {folder}: {there} is not a folder; give another --output")
        folder = there
    with explained(f"the log's folder {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"cannot write the log's folder {folder}: it belongs to somebody else; give another --output")


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

    Raises:
        InputError: a value would not stand on one line of the script.
    """
    values = [(f"--{key}", value) for key, value in options.items() if value is not None]
    for name, text in (*values, *(("argument", word) for word in arguments), *environment.items()):
        # Control characters, what ends a line, and bytes that are no UTF-8.
        if any(unicodedata.category(letter) in ("Cc", "Zl", "Zp", "Cs") for letter in text):
            raise InputError(
                f"{name} {text!r}: a job script cannot hold a line break, another control character or what is no "
                "UTF-8; give it another name"
            )
    lines, left = [], dict(options)
    for line in template.splitlines():
        option = re.match(r"#SBATCH --([\w-]+)", line)
        if option and option[1] in left:
            value = left.pop(option[1])
            if value is not None:
                lines.append(f"#SBATCH --{option[1]}={_for_sbatch(value)}")
        else:
            lines.append(line)
    last = max(i for i, line in enumerate(lines) if line.startswith("#SBATCH"))
    added = [f"#SBATCH --{key}={_for_sbatch(value)}" for key, value in left.items() if value is not None]
    added += ["", f"set -- {shlex.join(arguments)}"]
    added += [f"export {name}={shlex.quote(value)}" for name, value in environment.items()]
    return "\n".join([*lines[: last + 1], *added, *lines[last + 1 :]]) + "\n"


def _for_sbatch(value: str) -> str:
    """A value as sbatch reads it from a script's line, where blanks and # end one."""
    escaped = re.sub(r'(["\\])', r"\\\1", value)
    return value if re.fullmatch(r"[\w@%+=:,./-]+", value, re.ASCII) else f'"{escaped}"'


def options_for(site: Site, name: str, nodes: int, time: str, output: str | None) -> dict[str, str | None]:
    """sbatch's options for a job of a name on so many nodes of a site."""
    return {
        "job-name": name,
        "nodes": str(nodes),
        "gpus-per-node": str(site.gpus) if site.gpus else None,
        "cpus-per-task": str(site.cpus),
        "mem": site.memory,
        "time": time,
        "signal": f"B:USR1@{site.save_seconds}",
    } | ({} if output is None else {"output": output})


def submit(script: str, site: Site, after: str | None = None) -> str:
    """Give a filled-in script to sbatch; gives the job's number.

    Args:
        script: its text.
        site: for what sbatch itself is told (account, partition), but for what the script says.
        after: number of a job that must have succeeded before.

    Raises:
        InputError: there is no sbatch, or it refuses.
    """
    command = ["sbatch", "--parsable"]
    environment = {key: value for key, value in (os.environ | site.sbatch).items() if key not in OVERRULED}
    if after is not None:
        # Where the job before fails this one could never begin.
        command += [f"--dependency=afterok:{after}", "--kill-on-invalid-dep=yes"]
    try:
        done = subprocess.run(command, input=script, env=environment, capture_output=True, encoding="utf-8")
    except FileNotFoundError:
        raise InputError("there is no sbatch here: run this on a login node of the cluster, or see --dry-run") from None
    if done.returncode:
        raise InputError(f"sbatch refuses: {' '.join(done.stderr.split())}")
    return done.stdout.strip().split(";")[0]
