"""Disks that fail: a library between a program and the C library, by which chosen calls on chosen files go wrong."""

import errno
import functools
import shutil
import subprocess
from pathlib import Path

import pytest

from helpers import once

OPERATIONS = ("open", "write", "fsync", "rename", "unlink", "mkdir")
ERRORS = ("EIO", "ENOSPC", "EDQUOT", "EROFS")

SOURCE = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <fnmatch.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

static __thread int inside;
static int found;

/* Whether this call fails: FAULT_OPERATIONS and FAULT_FILES say which do, FAULT_TIMES how often (0: always),
   FAULT_WHILE names a folder that must have a file of the operation's name, FAULT_LOG a file that gets a byte for each
   failure. It sets errno. */
static int fails(const char *operation, const char *path) {
  const char *operations = getenv("FAULT_OPERATIONS"), *files = getenv("FAULT_FILES"), *then = getenv("FAULT_WHILE");
  if (inside || !operations || !files || !strstr(operations, operation) || fnmatch(files, path, 0)) return 0;
  inside = 1;
  char now[4096];
  snprintf(now, sizeof now, "%s/%s", then ? then : "", operation);
  int times = atoi(getenv("FAULT_TIMES")), fault = !then || !access(now, F_OK);
  if (fault && times) fault = __sync_fetch_and_add(&found, 1) < times;
  if (fault) {
    int log = open(getenv("FAULT_LOG"), O_WRONLY | O_APPEND | O_CREAT, 0666);
    if (log >= 0 && write(log, "x", 1) == 1) close(log);
    errno = atoi(getenv("FAULT_ERROR"));
  }
  inside = 0;
  return fault;
}

static const char *opened(int descriptor, char *path) {
  char link[64];
  snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
  ssize_t length = readlink(link, path, 4095);
  path[length < 0 ? 0 : length] = 0;
  return path;
}

static const char *at(int folder, const char *name, char *path) {
  if (*name == '/' || folder == AT_FDCWD) return name;
  size_t length = strlen(opened(folder, path));
  snprintf(path + length, 4096, "/%s", name);
  return path;
}

#define NEXT(name, ...) ((int (*)(__VA_ARGS__))dlsym(RTLD_NEXT, #name))
#define OPEN(name) \
  int name(const char *path, int flags, ...) { \
    va_list list; va_start(list, flags); int mode = va_arg(list, int); va_end(list); \
    return fails("open", path) ? -1 : NEXT(name, const char *, int, int)(path, flags, mode); \
  }
OPEN(open)
OPEN(open64)
#define SYNC(name) \
  int name(int descriptor) { \
    char path[4096]; \
    return fails("fsync", opened(descriptor, path)) ? -1 : NEXT(name, int)(descriptor); \
  }
SYNC(fsync)
SYNC(fdatasync)
ssize_t write(int descriptor, const void *data, size_t size) {
  char path[4096];
  if (!inside && fails("write", opened(descriptor, path))) return -1;
  return ((ssize_t (*)(int, const void *, size_t))dlsym(RTLD_NEXT, "write"))(descriptor, data, size);
}
int rename(const char *from, const char *to) {
  return fails("rename", to) ? -1 : NEXT(rename, const char *, const char *)(from, to);
}
int unlink(const char *path) { return fails("unlink", path) ? -1 : NEXT(unlink, const char *)(path); }
int unlinkat(int folder, const char *name, int flags) {
  char path[8192];
  return fails("unlink", at(folder, name, path)) ? -1 : NEXT(unlinkat, int, const char *, int)(folder, name, flags);
}
int rmdir(const char *path) { return fails("unlink", path) ? -1 : NEXT(rmdir, const char *)(path); }
int mkdir(const char *path, mode_t mode) {
  return fails("mkdir", path) ? -1 : NEXT(mkdir, const char *, mode_t)(path, mode);
}
"""


@functools.cache
def library(shared: Path) -> Path:
    """The library, for LD_PRELOAD; made once for all test processes."""
    if shutil.which("gcc") is None:
        pytest.skip("disks that fail are made with gcc")

    def make(folder: Path) -> None:
        (folder / "faults.c").write_text(SOURCE)
        subprocess.run(
            ["gcc", "-shared", "-fPIC", "-O1", "-o", "faults.so", "faults.c", "-ldl"], check=True, cwd=folder
        )

    return once(shared, "faults", make) / "faults.so"


def fault(operations: str, files: str, log: Path, error: str = "EIO", times: int = 0) -> dict[str, str]:
    """The environment in which calls fail.

    Args:
        operations: words of :data:`OPERATIONS`.
        files: a pattern of their paths; "*" stands for any text.
        log: a file that gets a byte for each failure.
        error: what the operating system says.
        times: how many calls fail, the first ones; 0 for all.
    """
    known = {"OPERATIONS": operations, "FILES": files, "LOG": str(log), "ERROR": str(getattr(errno, error))}
    return {f"FAULT_{name}": value for name, value in (known | {"TIMES": str(times)}).items()}
