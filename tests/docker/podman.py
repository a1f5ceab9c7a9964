"""podman with a storage of its own, and a base for the images where no registry of images can be reached."""

from __future__ import annotations

import ast
import configparser
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from urllib.parse import urlparse

ROOT = Path(__file__).parents[2]
BASE = "docker.io/library/python:3.11.13-slim-bookworm"  # of cpu.Dockerfile
STAND_IN_BASE = "localhost/nvidia-stand-in:1"
_PULL_TIMEOUT_S = 60
_OF_INDEXES = ("cert", "default-timeout", "extra-index-url", "find-links", "index-url", "trusted-host")

# runc, files and small limits work without systemd, with every kind of cgroups, and for a root that is not allowed
# everything.
_CONTAINERS_CONF = """
[containers]
default_ulimits = ["nofile=4096:4096", "nproc=4096:4096"]
log_driver = "k8s-file"
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
[network]
network_config_dir = "{folder}/networks"
"""
_STORAGE_CONF = """
[storage]
driver = "{driver}"
graphroot = "{folder}/storage"
runroot = "{folder}/run"
"""


def why_not() -> str | None:
    """One sentence why images cannot be built here; None if they can."""
    if os.geteuid() != 0:
        return "Images are built and run as root here, and this is another user."
    missing = [name for name in ("podman", "podman-compose", "runc", "debootstrap") if shutil.which(name) is None]
    if missing:
        return (
            f"There is no {' and no '.join(missing)}. On Debian: apt-get install podman podman-compose runc "
            "debootstrap netavark aardvark-dns."
        )
    return None


class Podman:
    """Images, containers, volumes and networks in a temporary folder, which `stop` removes."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="dynmoe-podman-", dir=os.environ.get("TMPDIR")))
        (self.folder / "containers.conf").write_text(_CONTAINERS_CONF.format(folder=self.folder))
        own = {
            "CONTAINERS_CONF": f"{self.folder}/containers.conf",
            "CONTAINERS_STORAGE_CONF": f"{self.folder}/storage.conf",
            # podman would have systemd look after the health of containers.
            "DISABLE_HC_SYSTEMD": "true",
        }
        self._environment = {**os.environ, **own}
        for driver in ("overlay", "vfs"):
            (self.folder / "storage.conf").write_text(_STORAGE_CONF.format(folder=self.folder, driver=driver))
            if self.try_("info").returncode == 0:
                break

    def try_(self, *words: str, timeout_s: float = 300) -> subprocess.CompletedProcess[str]:
        """What became of a command of podman."""
        return self._run("podman", *words, timeout_s=timeout_s)

    def __call__(self, *words: str, timeout_s: float = 300) -> str:
        """What a command of podman says, which must not fail."""
        return self._ended_well(*words, timeout_s=timeout_s).stdout

    def compose(self, *words: str, timeout_s: float = 600) -> subprocess.CompletedProcess[str]:
        """What became of a command of podman-compose with our file."""
        return self._run("podman-compose", "-f", f"{ROOT / 'docker/compose.yaml'}", *words, timeout_s=timeout_s)

    def have_base(self) -> str:
        """Have the base of the CPU image: from its registry, or made of Debian's packages. Returns which."""
        try:
            if self.try_("pull", BASE, timeout_s=_PULL_TIMEOUT_S).returncode == 0:
                return "registry"
        except subprocess.TimeoutExpired:
            pass  # a registry that does not answer cannot be reached either: the base is made here
        root = self.folder / "root"
        options = ("--variant=minbase", "--include=python3,python3-venv,python3-pip,ca-certificates")
        made = self._run("debootstrap", *options, "bookworm", f"{root}", timeout_s=900)
        assert made.returncode == 0, made.stdout[-4000:]
        (root / "usr/local/bin/python").symlink_to("/usr/bin/python3")
        shutil.rmtree(root / "var/cache/apt/archives")
        archive = self.folder / "root.tar"
        self._run("tar", "-C", f"{root}", "-cf", f"{archive}", ".", timeout_s=300)
        shutil.rmtree(root)
        self("import", "--change", "ENV=PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin", f"{archive}", BASE)
        archive.unlink()
        return "debootstrap"

    def build(self, file: Path, tag: str, *words: str, timeout_s: float = 1800) -> str:
        """What a build from the repository says."""
        own = ("--isolation=chroot", "--network=host", "--format=docker", "--pull=never", *self._pip_settings())
        done = self._ended_well("build", *own, "-f", f"{file}", "-t", tag, *words, f"{ROOT}", timeout_s=timeout_s)
        return done.stdout + done.stderr

    def volume(self, name: str) -> Path:
        """Where a volume's files are."""
        return Path(self("volume", "inspect", "--format", "{{.Mountpoint}}", name).strip())

    def stop(self) -> None:
        """End and remove everything."""
        for words in (
            "rm --all --force --time 0",
            "volume prune --force",
            "network prune --force",
            "rmi --all --force",
        ):
            self.try_(*words.split())
        self._run("umount", f"{self.folder}/storage/overlay", timeout_s=30)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _ended_well(self, *words: str, timeout_s: float) -> subprocess.CompletedProcess[str]:
        done = self.try_(*words, timeout_s=timeout_s)
        assert done.returncode == 0, (words, done.stdout[-4000:], done.stderr[-4000:])
        return done

    def _pip_settings(self) -> list[str]:
        """Options that let pip find in a build what it finds here. Of them the image keeps empty mount points only."""
        settings, mounts = configparser.RawConfigParser(), {f"{self.folder}/pip.conf": "/etc/pip.conf"}
        settings["global"] = {}
        told = self._run(sys.executable, "-m", "pip", "config", "list", timeout_s=60).stdout
        # What comes from the environment (:env:) last: it prevails.
        for line in sorted(told.splitlines(), reverse=True):
            key, _, value = line.partition("=")
            name, words = key.rpartition(".")[2], str(ast.literal_eval(value)).split()
            if name not in _OF_INDEXES:
                continue
            for number, word in enumerate(words):
                path = Path(urlparse(word).path)
                if word.startswith("http") or not path.is_absolute() or not path.exists():
                    continue
                # An index of files points to its siblings.
                seen = path.parent if word.startswith("file:") else path
                mounts[f"{seen}"] = words[number] = "/run/pip/cert" if name == "cert" else f"{seen}"
                if word.startswith("file:"):
                    words[number] = word
            settings["global"][name] = " ".join(words)
        with (self.folder / "pip.conf").open("w") as file:
            settings.write(file)
        return [word for here, there in mounts.items() for word in ("--volume", f"{here}:{there}:ro")]

    def _run(self, *words: str, timeout_s: float) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            words, cwd=ROOT, env=self._environment, capture_output=True, text=True, timeout=timeout_s, check=False
        )
