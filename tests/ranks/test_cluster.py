"""What jobs/submit.py refuses, and what it would submit."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import ENV, ROOT, TIMEOUT, forks
from helpers import refused as refused_here

SITE = """\
GPUS_PER_NODE=0; RANKS_PER_NODE=2; CPUS_PER_NODE=4; MEMORY=0; GPU=a100-40g; TIME=10; SAVE_SECONDS=20
IMAGES=/nowhere; VAE=/nowhere; REFERENCE=/nowhere; INCEPTION=/nowhere
"""


@pytest.fixture
def site(tmp_path):
    file = tmp_path / "site.sh"
    file.write_text(SITE)
    return file


@pytest.fixture
def good(latents, tmp_path):
    """A training job that can work."""
    flags = ["train", "--recipe", "digits", "--ds", "ds_configs/zero2_ep2.json", "--data", latents]
    return [*flags, "--set", f"data.vae={latents.parent / 'vae'}", "--out", tmp_path / "a run"]


def submit(site: Path, *arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, "jobs/submit.py", "--site", site, *arguments]
    return forks.run(list(map(str, command)), cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=TIMEOUT)


@pytest.fixture
def refused(site, capfd):
    """The one line that jobs/submit.py, in this process, says of what it refuses."""

    def refused(*arguments) -> str:
        line = refused_here(capfd, "jobs.submit", "--site", site, *arguments)
        return line.removeprefix("error: ").removesuffix("\n")

    return refused


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (["--nodes", 3], "3 x 2 = 6 ranks: global_batch_size 64 of recipe digits is not a multiple of the 6 ranks; "
                         "with 2 ranks a node it divides on 1, 2, 4, 8, 16"),
        (["--data", "/nowhere"], "no folder of shards /nowhere; python -m data_prep.encode_latents (or pack_pixels) "),
        (["--set", "data.vae=/nowhere/vae"], "there is no VAE /nowhere/vae: no folder, and no name of the hub such as "
                                             "stabilityai/sd-vae-ft-mse; give --set data.vae=NAME_or_DIR"),
        (["--nodes", 0], "--nodes 0: it should be at least 1"),
        (["--spare", -1], "--spare -1: it should be at least 0"),
        (["--recipe", "digit"], "no recipe named 'digit'; did you mean digits?"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_not_submitted(good, refused, tmp_path, change, line):
    assert refused(*good, *change).startswith(line)
    assert not (tmp_path / "a run").exists()


def test_a_vae_that_the_hub_does_not_give_is_not_submitted(good, site):
    done = submit(site, *good, "--set", "data.vae=some/vae")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "error: there is no VAE some/vae: no folder and not in the hub's cache here, and the hub cannot be asked "
        "(OfflineModeIsEnabled); give --set data.vae=NAME_or_DIR\n"
    )


def test_what_does_not_fit_is_not_submitted(site, tmp_path):
    """30 blocks of 16 experts, all on each of two 40 GB GPUs: 3.1e9 x 2 bytes of weights, 4 of gradients' sums, ..."""
    site.write_text(SITE.replace("GPUS_PER_NODE=0", "GPUS_PER_NODE=2"))
    flags = ["train", "--recipe", "dsmoe_3b_e16", "--ds", "ds_configs/zero1_ep1.json"]
    done = submit(site, *flags, "--data", tmp_path, "--out", tmp_path / "run")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: dsmoe_3b_e16 on 2 ranks does not fit a a100-40g: it would hold ")
    assert done.stderr.endswith(
        "of 40.0 GB; use more nodes, a --ds file of a higher ZeRO stage, or a smaller --set max_micro_batch_size\n"
    )


def test_two_checkpoints_must_have_room(good, refused, tmp_path):
    """A file system of 64 MB in memory, which the digits' checkpoints of 45 MB fill."""
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "none", small], capture_output=True).returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        line = refused(*good, "--out", small / "runs/run", "--dry-run")
    finally:
        subprocess.run(["umount", small], check=True)
    assert line == (
        f"no room for 2 checkpoints of 44.9 MB in {small}/runs/run: 67.1 MB are free there; make room, or give "
        "another --out"
    )


def test_a_dry_run_prints_what_would_be_submitted(good, latents, site, tmp_path):
    flags = ["--nodes", 2, "--spare", 1, "--time", "1:00", "--dry-run", "--allow-change", "optimizer.lr"]
    done = submit(site, *good, *flags, "--", "--resume", "never")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    for line in (
        "#SBATCH --job-name=train-digits",
        "#SBATCH --nodes=3",
        "#SBATCH --cpus-per-task=4",
        "#SBATCH --time=1:00",
        "#SBATCH --signal=B:USR1@20",
        "export SPARE_NODES=1",
        f"export SITE={site}",
        f"set -- --ds ds_configs/zero2_ep2.json --recipe digits --data {latents} --out '{tmp_path}/a run' "
        f"--resume auto --set data.vae={latents.parent}/vae --allow-change optimizer.lr --resume never",
        'train "$@"',
    ):
        assert lines.count(line) == 1, line
    assert not any(line.startswith("#SBATCH --gpus-per-node") for line in lines)
    assert subprocess.run(["bash", "-n"], input=done.stdout, text=True).returncode == 0
    assert not (tmp_path / "a run").exists()


def test_without_slurm_nothing_is_submitted(good, refused, tmp_path, monkeypatch):
    """A PATH that leads to bash and env alone."""
    (tmp_path / "bin").mkdir()
    for name in ("bash", "env"):
        (tmp_path / "bin" / name).symlink_to(shutil.which(name) or f"/usr/bin/{name}")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert refused(*good) == "there is no sbatch here: run this on a login node of the cluster, or see --dry-run"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("GPUS_PER_NODE=8\n", "does not set RANKS_PER_NODE; jobs/slurm/site.sh says what it means"),
        (SITE.replace("CPUS_PER_NODE=4", "CPUS_PER_NODE=many"), "CPUS_PER_NODE is 'many'; it should be a whole number"),
        ("if\n", "cannot be read by bash: "),
    ],
)
def test_a_wrong_site_is_told_of(good, site, refused, text, line):
    site.write_text(text)
    assert line in refused(*good)
