"""File systems that behave otherwise: a library between the program and the C library, so true interpreters."""

import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from helpers import ENV, ROOT, TIMEOUT, free_port, losses, small, state_of
from helpers.small import flags_of
from helpers.tasks import environments

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


def test_a_file_system_without_locks_is_told_of(tmp_path, no_locks):
    command = [sys.executable, "jobs/train.py", *flags_of(tmp_path / "run"), "--steps=1"]
    done = subprocess.run(command, cwd=ROOT, env=no_locks, capture_output=True, text=True, timeout=TIMEOUT)
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


def test_what_another_node_wrote_may_be_seen_late(shared, tmp_path):
    """Saves where a rank's first looks at what another made find nothing."""
    run, whole, log = tmp_path / "run", small.on_two_ranks(shared), tmp_path / "log"
    late = {"LATE_FOLDER": str(run), "LATE_LOG": str(tmp_path / "looks"), "LATE_LOOKS": "5"}
    late |= shim(LATE, tmp_path)
    command = [sys.executable, "jobs/train.py", *flags_of(run, "zero2_ep2"), "--steps=12", "--set=checkpoint.every=4"]
    each = [env | {"RANK": env["SLURM_PROCID"], "LOCAL_RANK": env["SLURM_LOCALID"], "WORLD_SIZE": "2"}
            for env in environments(2, str(free_port()), ENV | late)]  # fmt: skip
    with open(log, "w") as file:
        ranks = [subprocess.Popen(command, cwd=ROOT, env=env, stdout=file, stderr=file) for env in each]
    try:
        assert [rank.wait(TIMEOUT) for rank in ranks] == [0, 0], log.read_text()
    finally:
        for rank in ranks:
            rank.kill()
    # of each of three saves: rank 1's looks at the folder, and rank 0's at rank 1's file
    looks = Counter((tmp_path / "looks").read_text().splitlines())
    assert looks == {"1 folder": 15, "0/__1_0.distcp": 15}
    assert losses(run) == losses(whole)
    for kind in ("weight", "exp_avg", "exp_avg_sq", "ema"):
        want = state_of(whole, 12, kind, str(whole / "config.yaml"))
        for name, value in state_of(run, 12, kind, str(run / "config.yaml")).items():
            assert torch.equal(value, want[name]), name
