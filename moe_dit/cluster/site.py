"""What a site decides: jobs/slurm/site.sh, read by bash itself."""

import os
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from moe_dit.runtime.errors import InputError
from moe_dit.runtime.wording import printable

NUMBERS = ("GPUS_PER_NODE", "RANKS_PER_NODE", "CPUS_PER_NODE", "SAVE_SECONDS")
TEXTS = ("MEMORY", "GPU", "TIME", "IMAGES", "VAE", "REFERENCE", "INCEPTION")
DEFAULT = Path("jobs/slurm/site.sh")
MOST_SAVE_SECONDS = 65535  # that sbatch's --signal takes
# All variables that it sets, exported or not; what it prints itself goes elsewhere. As in jobs/slurm/job.sh, what it
# reads (modules, conda) may touch variables that are not set.
SCRIPT = 'set -eo pipefail; set -a; source "$0" >&2; env -0'


@dataclass(frozen=True)
class Site:
    """A node, the time a job may take, and where things are.

    Attributes:
        file: that says so.
        gpus: of a node; 0 where ranks compute on CPUs.
        ranks: of a node: as many as GPUs, where there are some.
        cpus: cores of a node.
        save_seconds: before a job's limit in which it saves.
        memory: of a node, as sbatch's --mem takes it; 0: all.
        gpu: a kind of :data:`moe_dit.plan.GPUS`.
        time: a job may take, as sbatch's --time.
        images, vae, reference, inception: defaults of the flags of these names.
        sbatch: environment variables for sbatch (SBATCH_ACCOUNT, ...).
    """

    file: Path
    gpus: int
    ranks: int
    cpus: int
    save_seconds: int
    memory: str
    gpu: str
    time: str
    images: str
    vae: str
    reference: str
    inception: str
    sbatch: Mapping[str, str]


def read_site(file: Path) -> Site:
    """Read a site's file.

    Raises:
        InputError: it is missing, bash cannot read it, or a value is missing or no number.
    """
    if not os.path.isfile(file):
        raise InputError(f"there is no {file}; give --site FILE, such as a changed copy of {DEFAULT}")
    command = ["bash", "-c", SCRIPT, str(file.resolve())]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="surrogateescape")
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        raise InputError(f"{file} cannot be read by bash: {printable(last)}")
    values = dict(line.split("=", 1) for line in done.stdout.split("\0") if "=" in line)
    for name in (*NUMBERS, *TEXTS):
        if name not in values:
            raise InputError(f"{file} does not set {name}; {DEFAULT} says what it means")
    for name in NUMBERS:
        least = 0 if name in ("GPUS_PER_NODE", "SAVE_SECONDS") else 1
        if not re.fullmatch("[0-9]{1,9}", values[name]) or int(values[name]) < least:
            raise InputError(f"{file}: {name} is {values[name]!r}; it should be a whole number of at least {least}")
    gpus, ranks, cpus, save_seconds = (int(values[name]) for name in NUMBERS)
    if save_seconds > MOST_SAVE_SECONDS:
        raise InputError(f"{file}: SAVE_SECONDS is {save_seconds}; SLURM takes at most {MOST_SAVE_SECONDS}")
    return Site(
        file=file,
        gpus=gpus,
        ranks=gpus or ranks,
        cpus=cpus,
        save_seconds=save_seconds,
        **{name.lower(): values[name] for name in TEXTS},
        sbatch={k: v for k, v in values.items() if k.startswith("SBATCH_")},
    )
