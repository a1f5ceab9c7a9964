"""What signals ask of a rank: a checkpoint and an end, or an end at once."""

from __future__ import annotations

import signal
import threading
from types import FrameType


class StopRequests:
    """The signals that this process has received.

    SIGTERM and SIGUSR1 ask for a common checkpoint and an end. They are only remembered: acting inside a handler would
    take one rank out of a collective. SIGINT raises KeyboardInterrupt, once, so that a run can end in order: Ctrl-C
    comes to a rank twice, as SIGINT from the front end and as SIGTERM from the launcher.
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

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        # Remembered rather than set to SIG_IGN, about which Python complains when the second signal is already here.
        if not self._is_interrupted:
            self._is_interrupted = True
            raise KeyboardInterrupt

    def _terminate(self, number: int, frame: FrameType | None) -> None:
        self._num_terminations += 1
        self._asked.set()
