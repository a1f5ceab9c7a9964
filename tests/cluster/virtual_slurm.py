"""Slurm with two virtual nodes on this machine, all of it below one temporary folder."""

from __future__ import annotations

import contextlib
import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "sinfo", "scancel")
_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"

# cred_expire: a requeued job waits for twice as long, which is two minutes with Slurm's default.
_CONF = """
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=cred_expire=5,socket={folder}/munge/socket
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_min_interval=0,batch_sched_delay=0,sched_interval=2,bf_interval=2
ReturnToService=2
JobRequeue=1
KillWait=30
SlurmctldTimeout=60
SlurmdTimeout=60
MinJobAge=600
SlurmctldPort={ports[0]}
FirstJobId={first_job}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
NodeName=n1 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 RealMemory=2000
NodeName=n2 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 RealMemory=2000
PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
"""


def why_not() -> str | None:
    """One sentence why there can be no such cluster here; None where it can be started."""
    if os.geteuid() != 0:
        return "Slurm's daemons are started as root, and this is another user."
    missing = [name for name in PROGRAMS if shutil.which(name, path=_PATH) is None]
    if missing:
        return f"There is no {' and no '.join(missing)}. On Debian: apt-get install slurm-wlm munge."
    return None


class VirtualSlurm:
    """The daemons, and what a test asks of them. `environment` is for every command of Slurm."""

    def __init__(self) -> None:
        # Not below pytest's folder, which nobody but root may enter: munged is another user's.
        self.folder = Path(tempfile.mkdtemp(prefix="dynmoe-slurm-"))
        self.folder.chmod(0o755)
        for name in ("state", "spool-n1", "spool-n2"):
            (self.folder / name).mkdir()
        conf = self.folder / "slurm.conf"
        # Jobs of another cluster like this one, beside it, would meet at the same ports if they had the same numbers.
        first_job = 1 + os.getpid() % 9000
        conf.write_text(_CONF.format(folder=self.folder, ports=_free_ports(3), first_job=first_job))
        self.environment = {**os.environ, "SLURM_CONF": f"{conf}", "PATH": _PATH}
        for name in [name for name in self.environment if name.startswith("SLURM_") and name != "SLURM_CONF"]:
            del self.environment[name]

    def start(self) -> None:
        """Start munged, slurmctld and two slurmd, and wait until both nodes are idle."""
        self._start_munge()
        self.call("slurmctld", "-c", "-f", f"{self.folder}/slurm.conf")
        for node in ("n1", "n2"):
            self.call("slurmd", "-N", node, "-f", f"{self.folder}/slurm.conf")
        self.wait_for(
            lambda: self.call("sinfo", "-h", "-N", "-t", "idle", "-o", "%N", check=False).split() == ["n1", "n2"]
        )

    def stop(self) -> None:
        """End all jobs and the daemons, and remove the folder."""
        pids = [int(file.read_text()) for file in (*self.folder.glob("*.pid"), *self.folder.glob("munge/pid"))]
        self.call("scancel", "-u", "root", check=False)
        self.call("scontrol", "shutdown", check=False)
        end = time.monotonic() + 20
        munged = self.folder / "munge" / "pid"
        if munged.exists():
            os.kill(int(munged.read_text()), signal.SIGTERM)
        while any(map(_runs, pids)) and time.monotonic() < end:
            time.sleep(0.1)
        # A step whose controller is gone tries for ever to report its end.
        for pid in self._left_over():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(self.folder, ignore_errors=True)

    def call(self, *command: str, check: bool = True) -> str:
        """What a command of Slurm says."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60)
        assert not check or done.returncode == 0, (command, done.stderr)
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        """What `scontrol show job` says of a job or of one of an array, by name."""
        said = self.call("scontrol", "-o", "show", "job", number, check=False).splitlines()
        return dict(re.findall(r"(\S+?)=(\S*)", said[0])) if said else {}

    def wait_for_restart(self, number: str, timeout_s: float = 900) -> None:
        """Wait until a job has been requeued, for the first time."""
        self.wait_for(lambda: self.job(number).get("Restarts") == "1" or self._has_ended(number), timeout_s)
        assert self.job(number)["Restarts"] == "1", "it has ended"

    def wait_for_end(self, number: str, timeout_s: float = 900) -> str:
        """Wait until a job has ended for good; its state."""
        self.wait_for(lambda: self._has_ended(number), timeout_s)
        return self.job(number)["JobState"]

    def wait_for(self, condition: object, timeout_s: float = 60) -> None:
        """Wait until `condition()` is true."""
        assert callable(condition)
        end = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < end, f"{timeout_s} s have passed; {self.call('squeue', check=False)}"
            time.sleep(0.2)

    def _has_ended(self, number: str) -> bool:
        return self.job(number).get("JobState") in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")

    def _left_over(self) -> list[int]:
        """Processes that were started with this cluster's configuration."""
        ours = f"SLURM_CONF={self.folder}/slurm.conf".encode()
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if ours in (folder / "environ").read_bytes().split(b"\0"):
                    found.append(int(folder.name))
        return found

    def _start_munge(self) -> None:
        """With a key, a socket and a log of its own: another munged of this machine is left alone."""
        folder = self.folder / "munge"
        folder.mkdir(mode=0o755)
        (folder / "key").write_bytes(os.urandom(1024))
        (folder / "key").chmod(0o400)
        user = pwd.getpwnam("munge")
        for path in (folder, folder / "key"):
            os.chown(path, user.pw_uid, user.pw_gid)
        own = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        options = [f"--{option}={folder / name}" for option, name in own.items()]
        as_munge = ["setpriv", "--reuid", "munge", "--regid", "munge", "--clear-groups"]
        self.call(*as_munge, "munged", *options)
        self.wait_for(lambda: (folder / "socket").exists())


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
