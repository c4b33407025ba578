"""What jobs/submit.py refuses, and what it would submit."""

import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import ENV, ROOT, TIMEOUT, forks
from helpers import refused as refused_here
from moe_dit.cluster.site import Site, read_site
from moe_dit.cluster.submit import submit as sbatch_of
from moe_dit.runtime.errors import InputError

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
        (["--time", 3], "--time 3: a job is told to save 20 s before its limit"),
        (["--output", "%j/log"], "--output '%j/log': a folder's name cannot have %j in it"),
        (["--output", "a\nb"], "--output 'a\\nb': a job script cannot hold a line break"),
        (["--out", "a\n#SBATCH --uid=0"], "argument 'a\\n#SBATCH --uid=0': a job script cannot hold a line break"),
        (["--out=-x"], "--out -x: the job would take this for a flag; write ./-x"),
        (["--after", "1,afterany:2"], "--after '1,afterany:2': it should be a job's number"),
        (["--set", "name=../victim"], "recipe digits: name is '../victim'; it should be letters"),
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
        "error: there is no VAE some/vae: no folder, and config.json is not in the hub's cache here, and "
        "HF_HUB_OFFLINE is set; fetch it where there is a network; give --set data.vae=NAME_or_DIR\n"
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
    flags = ["--nodes", 2, "--spare", 1, "--time", "1:00:00", "--output", tmp_path / "my logs/%x.out", "--dry-run"]
    flags += ["--allow-change", "optimizer.lr"]
    done = submit(site, *good, *flags, "--", "--resume", "never")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    for line in (
        "#SBATCH --job-name=train-digits",
        "#SBATCH --nodes=3",
        "#SBATCH --cpus-per-task=4",
        "#SBATCH --time=1:00:00",
        f'#SBATCH --output="{tmp_path}/my logs/%x.out"',
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
    assert not (tmp_path / "a run").exists() and not (tmp_path / "my logs").exists()


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


def read_site_of(folder, more: str) -> Site:
    """The site of a file that says CPUs, and more."""
    file = folder / "site.sh"
    file.write_text(f"{(ROOT / 'jobs/slurm/site.sh').read_text()}\nGPUS_PER_NODE=0\n{more}\n")
    return read_site(file)


def test_a_site_may_read_what_touches_variables_that_are_not_set(tmp_path):
    assert read_site_of(tmp_path, 'TIME=7; [ -n "$NOBODY_SETS_THIS" ] || CPUS_PER_NODE=3').cpus == 3


@pytest.mark.parametrize(
    ("more", "line"),
    [
        ("CPUS_PER_NODE=\u0663", "CPUS_PER_NODE is '\u0663'; it should be a whole number"),
        (f"RANKS_PER_NODE={'9' * 5000}", "it should be a whole number of at least 1"),
        ("SAVE_SECONDS=65536", "SAVE_SECONDS is 65536; SLURM takes at most 65535"),
    ],
)
def test_a_site_s_numbers_are_numbers_that_slurm_takes(tmp_path, more, line):
    with pytest.raises(InputError) as caught:
        read_site_of(tmp_path, more)
    assert line in str(caught.value)


def test_what_a_script_says_is_not_overruled_by_the_environment(tmp_path, monkeypatch):
    """A stand-in for sbatch that tells what it was given."""
    sbatch = tmp_path / "sbatch"
    sbatch.write_text('#!/bin/sh\necho "$SBATCH_TIMELIMIT,$SBATCH_SIGNAL,$SBATCH_PARTITION,$*"\n')
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    site = read_site_of(tmp_path, "export SBATCH_TIMELIMIT=1 SBATCH_SIGNAL=B:USR1@59 SBATCH_PARTITION='a b'")
    assert sbatch_of("", site, "7") == ",,a b,--parsable --dependency=afterok:7 --kill-on-invalid-dep=yes"


# --- the scripts, with stand-ins for SLURM's commands and for Python ------------------------------------------------

TOLD = '#!/bin/bash\necho "${0##*/} $*" >> "$LOG"\n'
STAND_INS = {
    "scontrol": "#!/bin/bash\n[ $2 = hostnames ] && echo n1 || echo NodeName=n1 NodeAddr=10.0.0.1 Port=1\n",
    "squeue": "#!/bin/bash\necho RUNNING\n",
    "scancel": "#!/bin/bash\n",
    "srun": TOLD
    + """while [[ ${1-} == -* ]]; do case $1 in --container-image=*) PATH=$INSIDE ;; esac; shift; done
exec "$@"
""",
}
PYTHON = {
    "python": TOLD + """case $* in
*" begin "*) printf '1\\n1\\nRUN\\n' ;; *" end "*) echo done ;;
*newest*) printf 'step_00000003\\n%s\\n' "${KNOWN_BY-a}" ;;
*jobs/export.py*) mkdir -p "${@: -1}" ;;
esac
""",
    "deepspeed": TOLD,
    "torchrun": TOLD,
}  # fmt: skip
NEEDED = (
    "bash",
    "cat",
    "date",
    "env",
    "grep",
    "head",
    "hostname",
    "mkdir",
    "paste",
    "rm",
    "sed",
    "sleep",
    "timeout",
    "true",
    "wc",
)


@pytest.fixture
def job(tmp_path):
    """Run a job's script on one node; gives its status, what it says, and what was called."""

    def job(script: str, *arguments, site: str = "", number: int = 1) -> tuple[int, str, list[str]]:
        for folder, programs in (("host", STAND_INS), ("python", PYTHON)):
            (tmp_path / folder).mkdir(exist_ok=True)
            for name, text in programs.items():
                (tmp_path / folder / name).write_text(text)
                (tmp_path / folder / name).chmod(0o755)
        for name in NEEDED:
            (tmp_path / "host" / name).symlink_to(shutil.which(name))
        (tmp_path / "site.sh").write_text(site or f"RANKS_PER_NODE=2\nenter() {{ PATH={tmp_path}/python:$PATH; }}\n")
        env = {"PATH": f"{tmp_path}/host", "LOG": f"{tmp_path}/log", "SITE": f"{tmp_path}/site.sh"}
        env |= {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": str(number), "SLURMD_NODENAME": "n1"}
        env |= {"SLURM_JOB_NODELIST": "n1", "SLURM_JOB_NUM_NODES": "1"}
        command = ["bash", f"jobs/slurm/{script}.sbatch", *map(str, arguments)]
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=TIMEOUT)
        log = tmp_path / "log"
        return done.returncode, done.stderr, log.read_text().splitlines() if log.exists() else []

    return job


@pytest.mark.parametrize(
    ("flags", "module", "shards"),
    [
        (["--out", "a b", "--vae", "v"], "data_prep.encode_latents", "a b"),
        (["--vae=v", "--out=a b"], "data_prep.encode_latents", "a b"),
        (["--out", "x", "--out=y", "--vae", "v"], "data_prep.encode_latents", "y"),
        (["--out=x", "--out", "y"], "data_prep.pack_pixels", "y"),
        (["--images", "my --vae images", "--out=y"], "data_prep.pack_pixels", "y"),
    ],
)
def test_what_was_encoded_is_verified_however_its_folder_was_given(job, flags, module, shards):
    status, said, called = job("encode", *flags)
    assert status == 0, said
    (encoded,) = (line for line in called if line.startswith("torchrun"))
    assert encoded.endswith(f" -m {module} {' '.join(flags)}")
    assert called[-1] == f"python -m data_prep.verify {shards}"


@pytest.mark.parametrize("flags", [["--images", "x"], ["--out="], ["--images", "x", "--out"], []])
def test_nothing_is_encoded_without_a_folder_for_it(job, flags):
    assert job("encode", *flags) == (2, "job 1: give --out SHARDS\n", [])


def test_python_may_be_only_where_srun_leads(job, tmp_path):
    """In a container, say; on the node itself there is none. `enter` reads what nobody has set, as conda's does."""
    site = 'RANKS_PER_NODE=2; enter() { [ -z "$NOBODY_SETS_THIS" ]; }\n'
    site += f"export INSIDE={tmp_path}/python:{tmp_path}/host; SRUN=(--container-image=x)"
    for script, arguments in (("train", []), ("evaluate", [tmp_path / "RUN"]), ("encode", ["--out", "x"])):
        for name in ("host", "python", "log"):
            shutil.rmtree(tmp_path / name, ignore_errors=True)
        (tmp_path / "log").unlink(missing_ok=True)
        status, said, called = job(script, *arguments, site=site)
        assert status == 0, said
        assert sum(line.startswith(("python", "torchrun", "deepspeed")) for line in called) == len(called) / 2
        assert all(line.startswith("srun --container-image=x ") for line in called[::2])


def test_a_port_that_another_program_has_is_not_taken(job):
    """Nor one of the jobs submitted around this one: they may be about to listen."""
    with socket.socket() as other:
        for number in range(5000, 6000):
            try:
                other.bind(("127.0.0.1", 20000 + number))
                break
            except OSError:
                continue
        other.listen()
        (launched,) = (line for line in job("train", number=number)[2] if line.startswith("deepspeed"))
    ports = [int(port) for port in re.findall(r"--master_port (\d+)", launched)]
    assert len(ports) == 1 and 20000 <= ports[0] < 30000 and abs(ports[0] - 20000 - number) > 100


def test_an_evaluation_asks_which_checkpoint_is_meant(job, tmp_path):
    run = tmp_path / "a run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints/latest").write_text("../../victim/secret\n")
    status, said, called = job("evaluate", run, "--protocol", "fidelity")
    assert status == 0, said
    assert called[0] == f"python -m moe_dit.cluster.newest {run}"
    model = f"{run}/exports/step_00000003"
    assert called[2] == f"python jobs/export.py {run}/checkpoints/step_00000003 --weights ema --out {model}"
    samples = f"{run}/samples/step_00000003"
    assert called[4].endswith(f" -m eval.run --model {model} --samples {samples} --protocol fidelity")
    assert "victim" not in "".join(called)


def test_what_is_evaluated_is_an_export_of_this_very_checkpoint(job, tmp_path):
    """After going back, one of the same name may be another; so may an export of which nothing says what it is of."""

    def exports(known_by: str) -> int:
        shutil.rmtree(tmp_path / "host", ignore_errors=True)
        (tmp_path / "log").unlink(missing_ok=True)
        site = f"export KNOWN_BY={known_by}; RANKS_PER_NODE=2; enter() {{ PATH={tmp_path}/python:$PATH; }}\n"
        status, said, called = job("evaluate", tmp_path / "run", site=site)
        assert status == 0, said
        return sum(line.startswith("python jobs/export.py") for line in called)

    (tmp_path / "run/exports/step_00000003").mkdir(parents=True)
    assert [exports(known_by) for known_by in ("a", "a", "b", "b", "a")] == [1, 0, 1, 0, 1]
