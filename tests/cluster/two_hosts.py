"""Two hosts on this machine: network namespaces with a cable between them, each with a name and an sshd of its own."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

_SBIN = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
_SSHD_FOLDER = Path("/run/sshd")  # which sshd wants, and Debian makes when it starts the service
NAMES = ("dynmoe-a", "dynmoe-b")
ADDRESSES = ("10.88.0.1", "10.88.0.2")

_SSHD_CONF = """
Port 2222
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/key.pub
PidFile none
StrictModes no
UsePAM no
PermitRootLogin yes
PasswordAuthentication no
"""
_SSH_CONF = """
Host {hosts}
  Port 2222
  User root
  IdentityFile {folder}/key
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
"""


def why_not(*programs: str) -> str | None:
    """One sentence why there can be no such hosts here, for tests that need `programs`, too; None if there can."""
    if os.geteuid() != 0:
        return "Network namespaces are made as root, and this is another user."
    missing = [name for name in ("ip", "unshare", *programs) if shutil.which(name, path=_SBIN) is None]
    if missing:
        return (
            f"There is no {' and no '.join(missing)}. On Debian: apt-get install iproute2 openssh-server "
            "openssh-client pdsh openmpi-bin."
        )
    namespace = f"dynmoe-{os.getpid()}"
    if _call("ip", "netns", "add", namespace, check=False).returncode:
        return "This machine does not let root make network namespaces."
    made = _call(*f"ip -n {namespace} link add eth0 type veth peer name eth1".split(), check=False)
    _call("ip", "netns", "del", namespace)
    return None if made.returncode == 0 else "This kernel makes no virtual network interfaces."


class TwoHosts:
    """The hosts. `hostfile` has one slot on each; `ssh_options` reach both from both."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="dynmoe-hosts-"))
        # Others may be there: of another run of the tests, or of a fixture that lasts for the whole of this one.
        self._spaces = tuple(f"{name}-{self.folder.name}" for name in NAMES)
        self._made_sshd_folder = False
        self.hostfile = self.folder / "hostfile"
        self.hostfile.write_text("".join(f"{name} slots=1\n" for name in NAMES))
        self.ssh_options = ("-F", f"{self.folder}/ssh_config")

    def start(self) -> None:
        """Make the namespaces and the cable, and start an sshd in each."""
        first, second = self._spaces
        for space in self._spaces:
            _call("ip", "netns", "add", space)
        # The same name on both, so that one GLOO_SOCKET_IFNAME fits.
        _call(*f"ip link add eth0 netns {first} type veth peer name eth0 netns {second}".split())
        for space, address in zip(self._spaces, ADDRESSES, strict=True):
            _call("ip", "-n", space, "addr", "add", f"{address}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                _call("ip", "-n", space, "link", "set", device, "up")
        known = "".join(f"{address} {name}\n" for name, address in zip(NAMES, ADDRESSES, strict=True))
        (self.folder / "hosts").write_text(f"127.0.0.1 localhost\n{known}")

    def start_sshd(self) -> None:
        """An sshd on each host."""
        for key in ("key", "host_key"):
            _call("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", f"{self.folder / key}")
        (self.folder / "sshd_config").write_text(_SSHD_CONF.format(folder=self.folder))
        (self.folder / "ssh_config").write_text(_SSH_CONF.format(folder=self.folder, hosts=" ".join(NAMES)))
        self._made_sshd_folder = not _SSHD_FOLDER.exists()
        _SSHD_FOLDER.mkdir(mode=0o755, exist_ok=True)
        sshd = shutil.which("sshd", path=_SBIN)
        for number in range(2):
            self.call(number, f"{sshd}", "-f", f"{self.folder}/sshd_config")
        self.wait_for(lambda: all(self.ssh(0, name).returncode == 0 for name in NAMES))

    def stop(self) -> None:
        """End all processes of the hosts and remove everything."""
        for number, space in enumerate(self._spaces):
            end = time.monotonic() + 10
            while (pids := self.pids(number)) and time.monotonic() < end:
                _kill(pids)
                time.sleep(0.1)
            _call("ip", "netns", "del", space, check=False)
        if self._made_sshd_folder:
            _SSHD_FOLDER.rmdir()
        shutil.rmtree(self.folder, ignore_errors=True)

    def words(self, number: int, *command: str) -> list[str]:
        """`command` as it is started on a host, with the host's name and list of names."""
        own = f"mount --bind {self.folder}/hosts /etc/hosts; hostname {NAMES[number]}; exec {shlex.join(command)}"
        return ["ip", "netns", "exec", self._spaces[number], "unshare", "--mount", "--uts", "sh", "-c", own]

    def call(self, number: int, *command: str) -> str:
        """What a command says on a host."""
        return _call(*self.words(number, *command)).stdout

    def ssh(self, number: int, name: str) -> subprocess.CompletedProcess[str]:
        """A connection from a host to another."""
        return _call(*self.words(number, "ssh", *self.ssh_options, name, "true"), check=False)

    def cut(self) -> None:
        """Pull the cable out."""
        _call("ip", "-n", self._spaces[0], "link", "set", "eth0", "down")

    def mend(self) -> None:
        """Put it in again."""
        _call("ip", "-n", self._spaces[0], "link", "set", "eth0", "up")

    def pids(self, number: int) -> list[int]:
        """The processes on a host."""
        return [int(pid) for pid in _call("ip", "netns", "pids", self._spaces[number], check=False).stdout.split()]

    def trainers(self, number: int) -> list[int]:
        """Those that train, and their launchers."""
        return list(self._trainers(number))

    def ranks(self, number: int) -> list[int]:
        """Those that train."""
        return [pid for pid, words in self._trainers(number).items() if "-m dynmoe_ds train" in " ".join(words)]

    def kill_trainers(self) -> None:
        """Those of both hosts, without a chance to tell anybody."""
        for number in range(2):
            _kill(self.trainers(number))

    def sent_bytes(self, number: int) -> int:
        """What has left a host through the cable."""
        path = "/sys/class/net/eth0/statistics/tx_bytes"
        return int(_call("ip", "netns", "exec", self._spaces[number], "cat", path).stdout)

    def wait_for(self, condition: object, timeout_s: float = 60) -> None:
        """Wait until `condition()` is true."""
        assert callable(condition)
        end = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < end, f"{timeout_s} s have passed"
            time.sleep(0.2)

    def _trainers(self, number: int) -> dict[int, list[str]]:
        words = {pid: _command_line(pid) for pid in self.pids(number)}
        return {pid: own for pid, own in words.items() if own[:1] == [sys.executable] and "train" in own}


def _kill(pids: list[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _call(*command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PATH": _SBIN}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert not check or done.returncode == 0, (command, done.stderr)
    return done


def _command_line(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    except OSError:
        return []
