"""A real SLURM cluster of two nodes on this machine, in a folder of its own: brought up, and taken down again."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from launch.slurm.commands import parse_fields
from tests.ports import free_port

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "scancel")
NODES = ("n0", "n1")
CPUS = 4  # of a node, whatever the machine has: processes share what there is

_CONFIG = """
ClusterName=pretrain
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=2,batch_sched_delay=0,sched_min_interval=0
SlurmdParameters=config_overrides
JobRequeue=1
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout=12
MessageTimeout=10
KillWait={kill_wait_seconds}
MinJobAge=600
InactiveLimit=0
Waittime=0
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
NodeName=n0 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs={cpus} RealMemory=64000 State=UNKNOWN
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs={cpus} RealMemory=64000 State=UNKNOWN
PartitionName=main Nodes=n0,n1 Default=YES MaxTime=60 State=UP OverSubscribe=NO
PartitionName=lab Nodes=n0,n1 AllowAccounts=vision MaxTime=60 State=UP OverSubscribe=NO
"""


def why_not() -> str | None:
    """Why there can be no cluster here; None: there can."""
    missing = [program for program in PROGRAMS if _found(program) is None]
    if missing:
        return f"SLURM tests need {', '.join(missing)}: Debian's packages slurm-wlm and munge"
    if os.geteuid() != 0:
        return "SLURM tests need root: slurmctld and slurmd start jobs as other users"
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode:
        return "SLURM tests need to mount folders: a container's root has to be given CAP_SYS_ADMIN"
    return None


def _found(program: str) -> str | None:
    return shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


@dataclass
class SlurmCluster:
    """What runs, and how to speak to it."""

    folder: Path
    daemons: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SUBMITIT_"))}
        return {**kept, "PATH": path, "SLURM_CONF": str(self.folder / "slurm.conf")}

    @contextmanager
    def spoken_to(self) -> Iterator[None]:
        """SLURM's commands of this process are for this cluster."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SLURM_CONF", self.environment["SLURM_CONF"])
            yield

    def run(self, *words: str, check: bool = True) -> str:
        """Output of a SLURM command."""
        done = subprocess.run(words, env=self.environment, capture_output=True, text=True, timeout=120)
        assert not check or done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def job(self, job_id: str) -> Mapping[str, str]:
        """What `scontrol show job` says, by field."""
        return parse_fields(self.run("scontrol", "show", "job", "-o", job_id))

    def start_slurmd(self, node: str, hidden: Path | None = None) -> None:
        """On a machine of its own, as far as `hidden` goes: that folder is there, and empty."""
        command = ("slurmd", "-D", "-N", node)
        if hidden is not None:
            script = 'mount -t tmpfs none "$0" && exec "$@"'
            command = ("unshare", "--mount", "sh", "-c", script, str(hidden), str(_found("slurmd")), *command[1:])
        self._start(node, *command)

    @contextmanager
    def not_shared(self, node: str, hidden: Path) -> Iterator[None]:
        """A node that does not see a folder."""
        self._restart_slurmd(node, hidden)
        try:
            yield
        finally:
            self._restart_slurmd(node)

    def restore(self) -> None:
        """No job, and all nodes in service: nothing to do after a test that ended well."""
        lost = [node for node in NODES if node not in self.daemons]
        if not lost and not self.run("squeue", "--noheader", "--format=%A"):
            return
        self.run("scancel", "--user=root", check=False)
        for node in lost:
            self.start_slurmd(node)
        self.run("scontrol", "update", f"NodeName={','.join(NODES)}", "State=RESUME", check=False)
        _until(self._idle, 180, "the nodes did not come up again")

    def _restart_slurmd(self, node: str, hidden: Path | None = None) -> None:
        self.lose(node)
        self.start_slurmd(node, hidden)
        _until(self._idle, 180, f"{node} did not come up again")

    def lose(self, node: str) -> None:
        """With all that runs there, as when a machine loses power; back in service once another slurmd reports.

        Marked down, as SLURM would go on calling it idle until it noticed.
        """
        daemon = self.daemons.pop(node)
        for pid in _descendants(daemon.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        daemon.wait()
        self.run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=lost")

    def _start(self, name: str, program: str, *words: str) -> None:
        command = [_found(program) or program, *words]
        with (self.folder / f"{name}.out").open("ab") as log:
            self.daemons[name] = subprocess.Popen(
                command, env=self.environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
            )

    def up(self) -> None:
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        files = {"key-file": key, "socket": self.folder / "munge.socket"}
        files |= {f"{kind}-file": self.folder / f"munge.{kind}" for kind in ("pid", "log", "seed")}
        self._start("munged", "munged", "--foreground", "--force", *(f"--{k}={v}" for k, v in files.items()))
        _until(lambda: files["socket"].exists(), 20, "munged made no socket")
        self._start("slurmctld", "slurmctld", "-D")
        for node in NODES:
            self.start_slurmd(node)
        _until(self._idle, 180, "the nodes did not come up")

    def _idle(self) -> bool:
        words = ("--noheader", "--Node", "--partition=main", "--format=%T")
        return self.run("sinfo", *words, check=False).split() == ["idle"] * len(NODES)

    def down(self) -> None:
        self.run("scancel", "--user=root", check=False)
        for daemon in self.daemons.values():
            for pid in _descendants(daemon.pid):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            daemon.wait()


@contextmanager
def slurm_cluster(kill_wait_seconds: int = 15) -> Iterator[SlurmCluster]:
    """Two nodes named n0 and n1, one partition named main."""
    # Not below TMPDIR, which may be long: a socket's path has 107 bytes at most.
    with tempfile.TemporaryDirectory(prefix="slurm-", dir="/tmp") as folder:
        cluster = _configured(Path(folder), kill_wait_seconds)
        try:
            cluster.up()
            yield cluster
        finally:
            cluster.down()


def _configured(folder: Path, kill_wait_seconds: int) -> SlurmCluster:
    for name in ("state", *(f"spool.{node}" for node in NODES)):
        (folder / name).mkdir()
    folder.chmod(0o755)
    host = socket.gethostname().split(".")[0]
    text = _CONFIG.format(
        host=host, folder=folder, ports=[free_port() for _ in range(3)], cpus=CPUS, kill_wait_seconds=kill_wait_seconds
    )
    (folder / "slurm.conf").write_text(text)
    return SlurmCluster(folder)


def _descendants(pid: int) -> list[int]:
    """A process and all that it started, as far as it can be seen."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with suppress(OSError):
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(entry.name))
    found, todo = [], [pid]
    while todo:
        found.append(todo.pop())
        todo += children.get(found[-1], [])
    return found


def _until(condition: object, seconds: float, problem: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        if time.monotonic() > deadline:
            raise AssertionError(problem)
        time.sleep(0.1)
