"""Whose a run folder is: one job writes at a time, also on a file system that many machines share.

The owner is a process, rank 0 of a job, and is named in a file of the folder, whose time of change is its heartbeat.
Clocks of machines are not compared: who wants the folder watches whether the file changes.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import psutil

from dynmoe_ds.errors import LaunchError

logger = logging.getLogger(__name__)

OWNER_FILE = "owner.json"

BEAT_S = 10.0
"""How often an owner touches its file."""

STALE_S = 60.0
"""How long a file must lie untouched, before the eyes of who wants the folder, until its owner counts as gone."""

_LOOK_S = 2.0
# Between taking a folder over and believing it: another one that wants it may have looked at the same time.
_SETTLE_S = 1.0
# What psutil's start times, which follow the machine's clock, may differ by.
_SAME_START_S = 2.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Owner:
    """A process that writes into a run folder, or did.

    pid_space: the boot of a machine, and the container on it, within which pids tell processes apart; None where the
    system does not say. since: when it took the folder, for people. job: Slurm's, with the number of its restarts.
    """

    host: str
    pid_space: str | None
    pid: int
    started_s: float
    since: str
    job: str | None
    restarts: int

    def is_same_process(self, other: Owner) -> bool:
        """Whether both are one process."""
        own, others = ((one.host, one.pid_space, one.pid) for one in (self, other))
        return own == others and self._started_with(other.started_s)

    def is_earlier_start_of(self, other: Owner) -> bool:
        """Whether Slurm has started the job of `other`, of which this is a process, anew: it ends a job before that."""
        return self.job is not None and self.job == other.job and self.restarts < other.restarts

    def is_running(self, seen_from: Owner) -> bool | None:
        """Whether the process is there; None where that cannot be seen: on another machine, or of another user."""
        if self.pid_space is None or self.pid_space != seen_from.pid_space:
            return None
        if not psutil.pid_exists(self.pid):
            return False
        try:
            process = psutil.Process(self.pid)
            return process.status() != psutil.STATUS_ZOMBIE and self._started_with(process.create_time())
        except psutil.Error:
            return None

    def __str__(self) -> str:
        job = "" if self.job is None else f" (Slurm job {self.job})"
        return f"process {self.pid} on {self.host}{job} since {self.since}"

    def _started_with(self, started_s: float) -> bool:
        return abs(self.started_s - started_s) < _SAME_START_S


class _Sight(NamedTuple):
    """The file as it was at one look. owner: None for one that is being written, or was cut off."""

    owner: Owner | None
    changed_ns: int


class RunOwnership:
    """This process as the owner of a run folder, from when `try_take` returns True until `release`.

    A thread touches the file every `BEAT_S`, whatever training is busy with. If it finds another owner there, this
    process was held up for so long that it counted as gone: it ends at once, before it writes again.
    """

    def __init__(self, run_dir: str | Path) -> None:
        self.path = Path(run_dir) / OWNER_FILE
        self._own = _this_process(os.environ)
        self._watched: _Sight | None = None
        self._num_looks = 0
        self._released = threading.Event()
        self._thread: threading.Thread | None = None
        self._made_folder = False

    def try_take(self) -> bool:
        """Take the folder, which is made if need be; False after a short while where one must look again.

        Raises: LaunchError if another process has the folder, or if nothing can be written there.
        """
        if not self.path.parent.exists():
            self._made_folder = True
            _make(self.path.parent)
        if self._watched is not None or not self._create():
            sight = _look(self.path)
            if sight is None and self._watched is not None:
                # It lived until now, so what was found out about the folder before may not be true any more.
                raise in_use(self.path.parent, self._watched.owner)
            if sight is None or not self._may_take_over(sight) or not self._take_over(sight):
                return False
        self._thread = threading.Thread(target=self._beat, name="run folder's owner", daemon=True)
        self._thread.start()
        return True

    def release(self) -> None:
        """Leave the folder to others, and none behind that was made for nothing. Calling it twice does nothing."""
        if self._thread is None or self._released.is_set():
            return
        self._released.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            if self._is_own(_look(self.path)):
                self.path.unlink()
            if self._made_folder:
                self.path.parent.rmdir()  # only if it is empty

    def _create(self) -> bool:
        """Whether there was no owner."""
        try:
            with open(self.path, "x", encoding="utf-8") as file:
                file.write(self._text())
        except FileExistsError:
            return False
        except OSError as error:
            raise _cannot_write(self.path.parent, error) from error
        return True

    def _may_take_over(self, sight: _Sight) -> bool:
        """Whether the owner at sight is gone; False if that is not known yet. Raises: LaunchError if it is not gone."""
        owner = sight.owner
        if owner is not None:
            if owner.is_same_process(self._own):
                return True
            is_running = owner.is_running(self._own)
            if owner.is_earlier_start_of(self._own) or is_running is False:
                logger.info("%s was of %s, which has ended: taking it over.", self.path.parent, owner)
                return True
            if is_running:
                raise in_use(self.path.parent, owner)
        if self._watched is None:
            self._watched = sight
            logger.info(
                "%s is of %s. Waiting for up to %g s for a sign of life of it.", self.path.parent, _name(owner), STALE_S
            )
        if sight != self._watched:
            raise in_use(self.path.parent, owner)
        if self._num_looks * _LOOK_S >= STALE_S:
            logger.warning("There was no sign of life of %s for %g s: taking the folder over.", _name(owner), STALE_S)
            return True
        self._num_looks += 1
        time.sleep(_LOOK_S)
        return False

    def _take_over(self, sight: _Sight) -> bool:
        """Put this process in the place of the owner at sight; False if somebody else did so at the same time."""
        aside = self.path.with_name(f"{OWNER_FILE}.{secrets.token_hex(8)}")
        try:
            aside.write_text(self._text(), encoding="utf-8")
            if _look(self.path) == sight:
                aside.replace(self.path)
        except OSError as error:
            raise _cannot_write(self.path.parent, error) from error
        finally:
            aside.unlink(missing_ok=True)
        time.sleep(_SETTLE_S)
        return self._is_own(_look(self.path))

    def _beat(self) -> None:
        while not self._released.wait(BEAT_S):
            # A file system may be away for a moment, and who removes the file wants to let others in.
            with contextlib.suppress(OSError), open(self.path, "r+b") as file:
                owner = _sight_of(file.fileno()).owner
                if owner is not None and not owner.is_same_process(self._own):
                    logger.error(
                        "%s is of %s now. This process gave no sign of life for %g s, or its %s was removed: it ends "
                        "here and writes nothing more.", self.path.parent, owner, STALE_S, OWNER_FILE
                    )  # fmt: skip
                    os._exit(1)
                os.utime(file.fileno())  # of the file that was read, even if another has taken its place since

    def _is_own(self, sight: _Sight | None) -> bool:
        return sight is not None and sight.owner is not None and sight.owner.is_same_process(self._own)

    def _text(self) -> str:
        return json.dumps(asdict(self._own), indent=2) + "\n"


def refuse_if_in_use(run_dir: str | Path) -> None:
    """For who is about to start ranks: whether their run folder is surely another's, known within 1.5 heartbeats.

    Raises: LaunchError if it is. What is not known by then, the ranks find out.
    """
    path, own = Path(run_dir) / OWNER_FILE, _this_process(os.environ)
    sight, end = _look(path), time.monotonic() + 1.5 * BEAT_S
    if sight is None or sight.owner is None:
        return
    is_running = sight.owner.is_running(own)
    while is_running is None and time.monotonic() < end:
        time.sleep(_LOOK_S)
        now = _look(path)
        if now is None:
            return
        is_running = True if now != sight else None
    if is_running:
        raise in_use(path.parent, sight.owner)


def in_use(run_dir: Path, owner: Owner | None) -> LaunchError:
    """The error of who may not have the folder."""
    return LaunchError(
        f"run_dir {f'{run_dir}'!r} is in use by {_name(owner)}. Wait for its end, stop it, or use another run_dir. "
        f"(That process writes a sign of life into {OWNER_FILE} there.)"
    )


def _name(owner: Owner | None) -> str:
    return "another process" if owner is None else f"{owner}"


def _this_process(environment: Mapping[str, str]) -> Owner:
    process = psutil.Process()
    return Owner(
        host=socket.gethostname(),
        pid_space=_pid_space(),
        pid=process.pid,
        started_s=process.create_time(),
        since=datetime.now().astimezone().isoformat(sep=" ", timespec="seconds"),
        job=environment.get("SLURM_JOB_ID"),
        restarts=int(environment.get("SLURM_RESTART_COUNT", "0")),
    )


def _pid_space() -> str | None:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _look(path: Path) -> _Sight | None:
    """The file as it is now, or nothing. Opened anew each time, upon which NFS asks its server."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _cannot_write(path.parent, error) from error
    try:
        return _sight_of(descriptor)
    finally:
        os.close(descriptor)


def _sight_of(descriptor: int) -> _Sight:
    status = os.fstat(descriptor)
    try:
        owner = Owner(**json.loads(os.read(descriptor, 1 << 16)))
    except (ValueError, TypeError):
        owner = None
    return _Sight(owner, status.st_mtime_ns)


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _cannot_write(folder, error) from error


def _cannot_write(folder: Path, error: OSError) -> LaunchError:
    return LaunchError(
        f"run_dir {f'{folder}'!r} cannot be used: {error.strerror} ({error.filename}). Choose another run_dir, or make "
        "it writable."
    )
