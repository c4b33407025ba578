"""What happens on one rank and concerns all: errors told once, with rank and host; groups left in order."""

import os
import shutil
import socket
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from helpers import ENV, ROOT, STEPS, free_port, losses, run_ranks, run_scripts, state_of
from moe_dit.runtime.files import wait_until_seen
from moe_dit.runtime.joining import numbered

HOST = socket.gethostname()


def test_a_node_without_its_data_is_named(latents, tmp_path):
    """Shards that one rank finds and the other does not, as where a node has not mounted them."""
    folders = [tmp_path / "mounted", tmp_path / "not_mounted"]
    for folder in folders:
        folder.mkdir()
    shutil.copytree(latents, folders[0] / "shards")
    command = [sys.executable, str(ROOT / "jobs/train.py"), "--ds", str(ROOT / "ds_configs/zero2_ep2.json")]
    command += ["--recipe", "digits", "--data", "shards", "--out", str(tmp_path / "run")]
    first, second = run_ranks([command] * 2, folders)
    assert (first.returncode, second.returncode) == (2, 2)
    assert first.stderr.splitlines()[-1].startswith(f"error: rank 1 ({HOST}): no folder of shards shards")
    assert first.stderr.count("error: ") == 1 and second.stderr == ""
    assert not (tmp_path / "run").exists()


SAME = """
def fail():
    raise InputError("bad")
ranks.agreed(fail)
"""
DIFFERENT = """
def fail():
    if rank:
        raise InputError(f"bad {rank // 2}")
ranks.agreed(fail)
"""
OTHER = f"rank 1 ({HOST}): bad 0; and rank 2 ({HOST}): bad 1"


@pytest.mark.parametrize(
    ("body", "line"),
    [(SAME, "bad"), (DIFFERENT, OTHER), ("raise InputError('bad', everywhere=True)", "bad")],
    ids=["same", "different", "everywhere"],
)
def test_an_error_is_told_once(tmp_path, body, line):
    done = run_scripts(body, 3, tmp_path)
    assert "".join(rank.stderr for rank in done) == f"error: {line}\n"
    assert [rank.returncode for rank in done] == [2] * 3


def test_an_error_of_one_rank_alone_names_it(tmp_path):
    done = run_scripts("raise Stop('lost') if rank == 1 else SystemExit(0)", 2, tmp_path)
    assert done[1].stderr == f"error: rank 1 ({HOST}): lost\n" and done[1].returncode == 1
    assert done[0].stderr == "" and done[0].returncode == 0


@pytest.mark.parametrize("call", ["from_rank_0", "agreed"])
def test_whatever_fails_on_rank_0_ends_the_others(tmp_path, call):
    """Not an error that anybody foresaw: the traceback is rank 0's, and nobody waits for it."""
    done = run_scripts(f"ranks.{call}(lambda: open('/proc/self/mem/x') if rank == 0 else None)", 2, tmp_path)
    assert "NotADirectoryError" in done[0].stderr and f"on rank 0, host {HOST}" in done[0].stderr
    assert (done[0].returncode, done[1].returncode) == (1, 1)
    assert done[1].stderr == ""


SHIM = """\
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <sys/file.h>
static int refuse(int command) { return command == F_SETLK || command == F_SETLKW || command == F_OFD_SETLK; }
#define FORWARD(name) \\
  int name(int fd, int command, ...) { \\
    va_list list; va_start(list, command); void *argument = va_arg(list, void *); va_end(list); \\
    if (refuse(command)) { errno = ENOSYS; return -1; } \\
    return ((int (*)(int, int, ...))dlsym(RTLD_NEXT, #name))(fd, command, argument); \\
  }
FORWARD(fcntl)
FORWARD(fcntl64)
int flock(int fd, int operation) { errno = ENOSYS; return -1; }
"""


def shim(source: str, tmp_path: Path) -> dict[str, str]:
    """The environment variable that puts functions of C between a program and the C library."""
    if shutil.which("gcc") is None:
        pytest.skip("the other file system is made with gcc")
    (tmp_path / "shim.c").write_text(source)
    build = ["gcc", "-shared", "-fPIC", "-o", tmp_path / "shim.so", tmp_path / "shim.c", "-ldl"]
    subprocess.run(build, check=True)
    return {"LD_PRELOAD": str(tmp_path / "shim.so")}


@pytest.fixture
def no_locks(tmp_path):
    """The environment of a machine whose file systems know no locks, as Lustre mounted without flock."""
    return ENV | shim(SHIM, tmp_path)


def test_a_file_system_without_locks_is_told_of(latents, tmp_path, no_locks):
    command = [sys.executable, "jobs/train.py", "--ds", "ds_configs/zero1_ep1.json", "--recipe", "digits"]
    command += ["--data", str(latents), "--out", str(tmp_path / "run"), "--steps", "1"]
    done = subprocess.run(command, cwd=ROOT, env=no_locks, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("is on a file system without locks (Function not implemented)") == 1


LATE = """\
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
/* Each look at a name takes 2 ms, and the first LOOKS looks at what another rank made find nothing. */
static struct { char name[512]; int looks; } seen[4096];
static int hidden(const char *path) {
  const char *name = strrchr(path, '/'), *rank = getenv("RANK");
  if (!name || !rank || strncmp(path, getenv("LATE_FOLDER"), strlen(getenv("LATE_FOLDER")))) return 0;
  usleep(2000);
  size_t length = strlen(name);
  char own[32];
  snprintf(own, sizeof own, "/__%s_0.distcp", rank);
  int folder = !strncmp(name, "/.step_", 7) && length > 4 && !strcmp(name + length - 4, ".tmp") && strcmp(rank, "0");
  int file = strstr(path, "/.step_") && length > 7 && !strcmp(name + length - 7, ".distcp") && strcmp(name, own);
  if (!folder && !file) return 0;
  for (int i = 0; i < 4096; i++) {
    if (!*seen[i].name) strncpy(seen[i].name, path, sizeof seen[i].name - 1);
    if (strcmp(seen[i].name, path)) continue;
    if (seen[i].looks++ >= atoi(getenv("LATE_LOOKS"))) return 0;
    FILE *log = fopen(getenv("LATE_LOG"), "a");
    fprintf(log, "%s%s\\n", rank, folder ? " folder" : name);
    fclose(log);
    errno = ENOENT;
    return 1;
  }
  return 0;
}
int open64(const char *path, int flags, ...) {
  va_list list; va_start(list, flags); int mode = va_arg(list, int); va_end(list);
  return hidden(path) ? -1 : ((int (*)(const char *, int, ...))dlsym(RTLD_NEXT, "open64"))(path, flags, mode);
}
int stat64(const char *path, struct stat64 *found) {
  return hidden(path) ? -1 : ((int (*)(const char *, struct stat64 *))dlsym(RTLD_NEXT, "stat64"))(path, found);
}
"""


def test_what_another_node_wrote_may_be_seen_late(two_ranks, latents, tmp_path):
    """Saves where a rank's first looks at what another made find nothing."""
    run = tmp_path / "run"
    late = {"LATE_FOLDER": str(run), "LATE_LOG": str(tmp_path / "looks"), "LATE_LOOKS": "5"}
    command = [sys.executable, str(ROOT / "jobs/train.py"), "--ds", str(ROOT / "ds_configs/zero2_ep2.json")]
    command += ["--recipe", "digits", "--data", str(latents), "--out", str(run), "--set", "checkpoint.every=4"]
    command += ["--steps", str(STEPS)]
    done = run_ranks([command] * 2, [tmp_path] * 2, timeout=300, **shim(LATE, tmp_path), **late)
    assert [rank.returncode for rank in done] == [0, 0], "".join(rank.stderr for rank in done)
    # of each of three saves: rank 1's looks at the folder, and rank 0's at rank 1's file
    looks = Counter((tmp_path / "looks").read_text().splitlines())
    assert looks == {"1 folder": 15, "0/__1_0.distcp": 15}
    assert losses(run) == losses(two_ranks)
    for kind in ("weight", "exp_avg", "exp_avg_sq", "ema"):
        want = state_of(two_ranks, STEPS, kind)
        for name, value in state_of(run, STEPS, kind).items():
            assert torch.equal(value, want[name]), name


def test_what_is_never_seen_is_one_line(tmp_path):
    with pytest.raises(OSError, match=r"x was written by another rank, but after 0 s it is not there for this one"):
        wait_until_seen(tmp_path / "x", seconds=0)
    (tmp_path / "x").write_bytes(b"123")
    wait_until_seen(tmp_path / "x", 3, seconds=0)
    with pytest.raises(OSError, match=r"x was written by another rank, but after 0 s it has 3 bytes of 4 for this one"):
        wait_until_seen(tmp_path / "x", 4, seconds=0)


ENDING = """\
from moe_dit.engine import start_ranks
from moe_dit.runtime import command
from moe_dit.runtime.errors import InputError
def main():
    start_ranks()
    raise InputError("bad")
command.run(main)
"""


def test_bad_input_after_ranks_have_joined_never_aborts(tmp_path):
    """Three of eight such endings aborted (status -6) before commands left their group; four at a time make a load."""
    script = tmp_path / "ending.py"
    script.write_text(ENDING)
    env = ENV | {"PYTHONPATH": str(ROOT)}

    def end(_) -> tuple[int, str]:
        done = subprocess.run([sys.executable, str(script)], env=env, capture_output=True, text=True, timeout=120)
        return done.returncode, done.stderr

    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(end, range(int(os.environ.get("ENDINGS", "16"))))) == {(2, "error: bad\n")}


# --- joining ----------------------------------------------------------------------------------------------------------

JOINING = [sys.executable, "-c", "from moe_dit.runtime import command, ranks; command.run(lambda: ranks.start() and 0)"]


def join(ranks: list[int], size: int, tmp_path: Path, **env: str) -> list[subprocess.CompletedProcess]:
    """Some ranks of a group that only joins; the others never come."""
    common = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    common |= {"MOE_DIT_JOIN_SECONDS": "8", "PYTHONPATH": str(ROOT)} | env

    def one(rank: int) -> subprocess.CompletedProcess:
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        return subprocess.run(JOINING, env=ENV | common | own, capture_output=True, text=True, timeout=120)

    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(one, ranks))


def test_a_rank_that_never_comes_is_named(tmp_path):
    done = join([0, 1, 2], 4, tmp_path)
    assert [rank.returncode for rank in done] == [1, 1, 1]
    line = f"error: rank 3 did not join within 8 s; there came ranks 0 to 2 ({HOST})\n"
    assert "".join(rank.stderr for rank in done) == line


def test_a_node_that_never_comes_is_named_as_slurm_names_it(tmp_path):
    """Two tasks on this host, as SLURM says too, and two on another that do not start."""
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f"#!/bin/sh\necho {HOST}\necho n2\n")
    scontrol.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    slurm = {"SLURM_STEP_NODELIST": "x", "SLURM_STEP_TASKS_PER_NODE": "2(x2)", "PATH": path}
    done = join([0, 1], 4, tmp_path, **slurm)
    assert "".join(rank.stderr for rank in done) == "error: ranks 2, 3 did not join within 8 s (node n2)\n"


def test_without_rank_0_one_rank_of_a_node_says_where_it_should_be(tmp_path):
    port = str(free_port())
    done = join([1, 2], 3, tmp_path, MOE_DIT_JOIN_SECONDS="1", MASTER_PORT=port)
    line = f"error: rank 1 ({HOST}): rank 0 is not to be found at 127.0.0.1:{port}, tried for 1 s\n"
    assert "".join(rank.stderr for rank in done) == line
    assert [rank.returncode for rank in done] == [1, 1]


def test_how_long_ranks_wait_is_checked(tmp_path):
    (done,) = join([0], 2, tmp_path, MOE_DIT_JOIN_SECONDS="soon")
    assert done.returncode == 2
    assert done.stderr == "error: MOE_DIT_JOIN_SECONDS is 'soon'; it should be a number of seconds\n"


RESTARTED = """\
import os, torch
from moe_dit.runtime import command, ranks
def main():
    ranks.start()
    seen = torch.ones(1)
    torch.distributed.all_reduce(seen)
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os._exit(3)
    print("sum", seen.item(), ranks.hosts())
command.run(main)
"""


def test_ranks_that_torchrun_restarts_meet_anew(tmp_path):
    """Its store outlives them, with all that the first ones left there."""
    script = tmp_path / "script.py"
    script.write_text(RESTARTED)
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--max-restarts", "1", "--monitor-interval=0.1"]
    command = [sys.executable, *torchrun, "--master_port", str(free_port()), str(script)]
    env = ENV | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"sum 2.0 ['{HOST}', '{HOST}']"] * 2


@pytest.mark.parametrize(
    ("ranks", "text"),
    [([3], "rank 3"), ([0, 1], "ranks 0, 1"), ([0, 1, 2, 5, 8, 9, 10], "ranks 0 to 2, 5, 8 to 10")],
)
def test_ranks_for_people(ranks, text):
    assert numbered(ranks) == text
