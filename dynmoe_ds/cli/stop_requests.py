"""What signals ask of a rank: a checkpoint and an end, or an end at once."""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path
from types import FrameType

_FILE_EVERY_S = 1.0


class StopRequests:
    """The signals that this process has received.

    SIGTERM, SIGHUP and SIGUSR1 ask for a common checkpoint and an end. They are only remembered: acting inside a
    handler would take one rank out of a collective. SIGINT raises KeyboardInterrupt, once, so that a run can end in
    order: Ctrl-C comes to a rank twice, as SIGINT from the front end and as SIGTERM from the launcher.
    """

    def __init__(self) -> None:
        self._asked = threading.Event()
        self._num_terminations = 0
        self._is_interrupted = False

    def listen(self) -> None:
        """Set the handlers. Only in the main thread."""
        signal.signal(signal.SIGINT, self._interrupt)
        signal.signal(signal.SIGTERM, self._terminate)
        signal.signal(signal.SIGUSR1, lambda number, frame: self._asked.set())
        # By it torchrun stops its ranks when the connection goes through which it was started. `nohup` ignores it.
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            signal.signal(signal.SIGHUP, self._terminate)

    def listen_to_file(self, path: Path) -> None:
        """Ask for a checkpoint and an end as soon as there is a file `path`: signals do not travel between hosts."""
        threading.Thread(target=self._watch_file, args=(path,), name="stop file", daemon=True).start()

    def ask(self) -> None:
        """Ask for a checkpoint and an end, as the signals do."""
        self._asked.set()

    def is_asked(self) -> bool:
        """Whether a checkpoint and an end were asked for."""
        return self._asked.is_set()

    @property
    def num_terminations(self) -> int:
        """How many times SIGTERM has come, by which launchers stop the ranks that are left when one has failed."""
        return self._num_terminations

    def _watch_file(self, path: Path) -> None:
        while not path.exists():
            time.sleep(_FILE_EVERY_S)
        self._asked.set()

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        # Remembered rather than set to SIG_IGN, about which Python complains when the second signal is already here.
        if not self._is_interrupted:
            self._is_interrupted = True
            raise KeyboardInterrupt

    def _terminate(self, number: int, frame: FrameType | None) -> None:
        self._num_terminations += 1
        self._asked.set()
