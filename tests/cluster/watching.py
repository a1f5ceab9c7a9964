"""Somebody who watches a run: `dynmoe watch` as a process, and its page asked for again and again."""

from __future__ import annotations

import html
import itertools
import re
import signal
import subprocess
import threading
import urllib.request
from pathlib import Path
from types import TracebackType

from tests.cluster.conftest import ROOT, dynmoe, environment

_ANSWER_S = 60
_STATE = re.compile(r'<p class="state ([^"]+)">(.*?)</p>')


class Watcher:
    """While it is entered it looks every second. told: each state that it has seen, a word and a sentence, in turn."""

    def __init__(self, run_dir: Path) -> None:
        self.told: list[tuple[str, str]] = []
        self._run_dir = run_dir
        self._is_over = threading.Event()
        self._failure: Exception | None = None

    def words(self) -> list[str]:
        """The words in turn. A busy machine may take so long to start a job again that it is silent meanwhile.

        Raises: what kept it from looking.
        """
        if self._failure is not None:
            raise self._failure
        return [word for word, _ in itertools.groupby(word for word, _ in self.told if word != "silent")]

    def said(self, word: str) -> list[str]:
        """The sentences for a word, in turn."""
        return [sentence for own, sentence in self.told if own == word]

    def __enter__(self) -> Watcher:
        self._process = subprocess.Popen(
            dynmoe("watch", f"{self._run_dir}", "--every", "2"),
            cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        try:
            assert self._process.stdout is not None
            match = re.search(r"http://\S+", line := self._process.stdout.readline())
            assert match is not None, line
            self._look(match[0])
            self._thread = threading.Thread(target=self._look_until_over, args=(match[0],), daemon=True)
            self._thread.start()
        except BaseException:
            self._kill()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_over.set()
        try:
            self._thread.join(_ANSWER_S)
            self._process.send_signal(signal.SIGINT)
            self._process.wait(30)
        finally:
            self._kill()
        if self._failure is not None and self._failure is not error:
            raise self._failure

    def _kill(self) -> None:
        self._process.kill()
        self._process.communicate()

    def _look_until_over(self, url: str) -> None:
        try:
            while not self._is_over.wait(1):
                self._look(url)
        except Exception as error:  # raised again where somebody hears it
            self._failure = error

    def _look(self, url: str) -> None:
        with urllib.request.urlopen(url, timeout=_ANSWER_S) as answer:
            page = answer.read().decode()
        match = _STATE.search(page)
        assert match is not None, page[:4000]
        seen = match[1], html.unescape(match[2])
        if seen not in self.told[-1:]:
            self.told.append(seen)
