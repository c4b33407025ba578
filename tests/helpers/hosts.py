"""Two hosts on one machine: network namespaces that a virtual cable joins, 10.9.0.1 and 10.9.0.2.

What makes them needs root and `ip` (Debian's iproute2); :func:`cannot` says where they cannot be made.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from helpers.forks import ENV, ROOT, kill

ADDRESSES = ("10.9.0.1", "10.9.0.2")
NAMES = "/run/netns"  # where ip keeps them
PORT = 29400  # each pair of hosts has a network of its own
_IP = shutil.which("ip", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin") or "ip"


def _ip(*words: str) -> None:
    subprocess.run([_IP, *words], check=True, capture_output=True, text=True)


def cannot() -> str:
    """Why two hosts cannot be made here; "" where they can."""
    try:
        with two_hosts("try"):
            return ""
    except FileNotFoundError:
        return "there is no ip here (Debian: iproute2)"
    except subprocess.CalledProcessError as error:
        return f"network namespaces cannot be made here: {error.stderr.strip() or error}"


class Hosts:
    """Two hosts; 0 and 1 in what follows."""

    def __init__(self, names: tuple[str, str]):
        self.names = names
        self.started: list[subprocess.Popen] = []

    def link(self, host: int, state: str) -> None:
        """Set a host's end of the cable "up" or "down"; the other one then has no carrier."""
        _ip("-n", self.names[host], "link", "set", "wire", state)

    def deaf(self, host: int, deaf: bool = True) -> None:
        """What a host sends to the other vanishes (the address of another card), while it hears all; or no more so."""
        other = ADDRESSES[1 - host]
        if deaf:
            _ip("-n", self.names[host], "neigh", "replace", other, "lladdr", "02:00:00:00:00:99", "dev", "wire")
        else:
            _ip("-n", self.names[host], "neigh", "del", other, "dev", "wire")

    def start(self, host: int, command: list[str], log: Path, **env: str) -> subprocess.Popen:
        """A process on a host that calls itself host0 or host1; output goes to a file."""
        named = ["unshare", "--uts", "sh", "-c", f'hostname host{host}; exec "$@"', "sh"]
        with open(log, "a") as out:
            how = {"cwd": ROOT, "env": ENV | env, "stdout": out, "stderr": out, "start_new_session": True}
            process = subprocess.Popen([_IP, "netns", "exec", self.names[host], *named, *command], **how)
        self.started.append(process)
        return process

    def torchrun(self, host: int, command: list[str], log: Path, store: int = 0, **env: str) -> subprocess.Popen:
        """torchrun with a rank on a host, which goes on without the other; ``store``: the host of the rendezvous."""
        conf = f"is_host={str(host == store).lower()},last_call_timeout=4,join_timeout=60,read_timeout=240"
        flags = ["--nnodes=1:2", "--nproc-per-node=1", "--max-restarts=3", "--rdzv-backend=c10d", "--rdzv-id=two"]
        flags += [f"--rdzv-endpoint={ADDRESSES[store]}:{PORT}", f"--rdzv-conf={conf}"]
        flags += [f"--local-addr={ADDRESSES[host]}"]
        env = {"GLOO_SOCKET_IFNAME": "wire"} | env
        return self.start(host, [sys.executable, "-m", "torch.distributed.run", *flags, *command], log, **env)

    def processes(self, host: int) -> list[int]:
        """What runs on a host."""
        found = subprocess.run([_IP, "netns", "pids", self.names[host]], check=True, capture_output=True, text=True)
        return list(map(int, found.stdout.split()))

    def kill(self, host: int) -> None:
        """SIGKILL to all that runs on a host."""
        for number in self.processes(host):
            with suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)


def _remove_left() -> None:
    """Remove the hosts of processes that were killed."""
    for name in os.listdir(NAMES) if os.path.isdir(NAMES) else []:
        if (found := re.fullmatch(r"moe-dit-(\d+)-.*", name)) and not os.path.exists(f"/proc/{found[1]}"):
            with suppress(subprocess.CalledProcessError):  # another process removes it too
                Hosts((name, name)).kill(0)
                _ip("netns", "del", name)


@contextmanager
def two_hosts(name: str) -> Iterator[Hosts]:
    """Two hosts, which are gone with all that runs on them when the block ends.

    Args:
        name: of the pair, another for each of this process's.

    Raises:
        FileNotFoundError, subprocess.CalledProcessError: they cannot be made here.
    """
    _remove_left()
    hosts = Hosts((f"moe-dit-{os.getpid()}-{name}-0", f"moe-dit-{os.getpid()}-{name}-1"))
    made = []
    try:
        for host in hosts.names:
            _ip("netns", "add", host)
            made.append(host)
        first, second = hosts.names
        _ip("-n", first, "link", "add", "wire", "type", "veth", "peer", "name", "wire", "netns", second)
        for host, address in zip(hosts.names, ADDRESSES, strict=True):
            _ip("-n", host, "address", "add", f"{address}/24", "dev", "wire")
            _ip("-n", host, "link", "set", "lo", "up")
            _ip("-n", host, "link", "set", "wire", "up")
        yield hosts
    finally:
        for number in range(len(made)):
            hosts.kill(number)
        for process in hosts.started:
            kill(process)
        for host in made:
            subprocess.run([_IP, "netns", "del", host], capture_output=True)
