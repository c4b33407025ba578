"""A real SLURM of two nodes on one machine, from Debian's slurm-wlm and munge: slurmctld, and two slurmd.

    with Slurm(folder) as slurm:
        job = slurm.sbatch("--nodes=2", "job.sbatch")
        assert slurm.wait(job) == "COMPLETED"

As a command, `python tests/tools/slurm.py FOLDER` starts one, says what reaches it, and ends it when told to.
"""

import getpass
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from helpers import TIMEOUT, free_port

NODES = ("n1", "n2")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue", "sinfo")
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"

CONFIG = """\
ClusterName=test
SlurmctldHost=localhost
SlurmctldPort={ports[0]}
FirstJobId={first}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=1,sched_interval=2,bf_interval=2,requeue_setup_env_fail
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
SlurmdParameters=config_overrides
SlurmdTimeout=60
KillWait=30
OverTimeLimit=0
InactiveLimit=0
MinJobAge=3600
ReturnToService=2
SwitchType=switch/none
MpiDefault=none
JobCompType=jobcomp/none
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
NodeName=n1 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[1]} CPUs=8
NodeName=n2 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[2]} CPUs=8
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> list[str]:
    """The programs that this machine lacks."""
    return [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]


class Slurm:
    """A cluster of the nodes n1 and n2, while the block lasts.

    Args:
        folder: for its files; its path must be short, for a socket lies in it.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_"))}
        self.env |= {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": PATH}
        self._daemons: dict[str, subprocess.Popen] = {}

    def __enter__(self) -> "Slurm":
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in ("state", *(f"spool.{node}" for node in NODES), "munge"):
            (self.folder / name).mkdir(exist_ok=True)
        ports = [free_port() for _ in range(3)]
        user = getpass.getuser()
        first = 1 + 97 * os.getpid() % 10_000  # jobs listen where their number says: another cluster's have others
        (self.folder / "slurm.conf").write_text(CONFIG.format(folder=self.folder, ports=ports, user=user, first=first))
        (self.folder / "cgroup.conf").write_text("")
        key = self.folder / "munge" / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        munge = {"key-file": key, "pid-file": self.folder / "munge.pid", "seed-file": self.folder / "munge" / "seed"}
        munge |= {"socket": self.folder / "munge.socket", "log-file": self.folder / "munge" / "log"}
        options = [f"--{name}={path}" for name, path in munge.items()]
        try:
            # --force: the key lies in a folder that others may write to.
            self._start("munged", ["munged", "--foreground", "--force", "--num-threads=2", *options])
            self._until(lambda: (self.folder / "munge.socket").exists(), "munged")
            self._start("slurmctld", ["slurmctld", "-D"])
            for node in NODES:
                self.start_node(node)
            self._until(lambda: self.run("sinfo", "-h", "-o", "%T").split() == ["idle"], "two idle nodes")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if "slurmctld" in self._daemons:
            subprocess.run(["scancel", "--user", getpass.getuser()], env=self.env, timeout=30, check=False)
            subprocess.run(["scancel", "--signal=KILL", "--full", "-u", getpass.getuser()], env=self.env, check=False)
            with suppress(AssertionError):
                self._until(lambda: not self.run("squeue", "--noheader"), "end of all jobs", 20)
        for daemon in reversed(self._daemons.values()):
            daemon.terminate()
        for daemon in self._daemons.values():
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()

    def _start(self, name: str, command: list[str]) -> None:
        with open(self.folder / f"{name}.out", "a") as out:
            self._daemons[name] = subprocess.Popen(
                command, env=self.env, stdout=out, stderr=out, stdin=subprocess.DEVNULL, start_new_session=True
            )

    def _until(self, true, what: str, timeout: float = TIMEOUT) -> None:
        deadline = time.monotonic() + timeout
        while not true():
            if time.monotonic() > deadline:
                logs = "\n".join(path.read_text()[-2000:] for path in self.folder.glob("*.out"))
                raise AssertionError(f"no {what} after {timeout} s; {logs}")
            time.sleep(0.2)

    def start_node(self, node: str) -> None:
        """Start a node's slurmd (again)."""
        self._start(node, ["slurmd", "-D", "-N", node])

    def kill_node(self, node: str) -> None:
        """SIGKILL to a node's slurmd; what it had started goes on, as on a node whose slurmd crashed."""
        self._daemons[node].kill()
        self._daemons[node].wait()

    def until_node(self, node: str, state: str, timeout: float = TIMEOUT) -> None:
        """Wait until SLURM takes a node to be DOWN, IDLE, ..., whatever else it says of it."""
        self._until(
            lambda: state in self.run("scontrol", "show", "node", node, "-o").split(" State=")[1].split()[0],
            f"{state} {node}",
            timeout,
        )

    def run(self, *command: str) -> str:
        """A command of SLURM's; gives what it prints, whatever its status."""
        return subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=TIMEOUT).stdout

    def sbatch(self, *arguments: str, cwd: Path, env: dict[str, str] | None = None) -> str:
        """Submit a job; gives its number."""
        done = subprocess.run(
            ["sbatch", "--parsable", *arguments], env=self.env | (env or {}), cwd=cwd, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip().split(";")[0]

    def show(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says of a job."""
        words = self.run("scontrol", "show", "job", "-o", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def minutes(self, job: str) -> int:
        """How long a job has been running, whole minutes."""
        hours, minutes, _ = self.show(job)["RunTime"].split(":")
        return 60 * int(hours) + int(minutes)

    def state(self, job: str) -> str:
        """PENDING, RUNNING, COMPLETED, ..."""
        return self.show(job).get("JobState", "")

    def wait(self, job: str, timeout: float = 900, states: tuple[str, ...] = ()) -> str:
        """Wait until a job has ended (or is in one of ``states``); gives its state."""
        over = states or ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
        self._until(lambda: self.state(job) in over, f"job {job} in {over}", timeout)
        return self.state(job)


if __name__ == "__main__":
    folder = Path(sys.argv[1]).resolve()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    with Slurm(folder) as slurm:
        print(f"export SLURM_CONF={slurm.env['SLURM_CONF']} PATH=$PATH:/usr/sbin:/sbin", flush=True)
        with suppress(KeyboardInterrupt):
            signal.pause()
