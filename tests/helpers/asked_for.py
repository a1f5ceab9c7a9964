"""Tests that need what few machines have: `make test` skips them, and a target of their own fails with a sentence."""

from __future__ import annotations

from collections.abc import Callable

import pytest


def exit_where_asked_for(config: pytest.Config, mark: str, why_not: Callable[[], str | None]) -> None:
    """End a run of pytest for the tests of one mark (`-m MARK`) where none of them can run.

    why_not: the sentence that says what is missing, None where nothing is. Raises: pytest.exit.Exception with it.
    """
    if config.option.markexpr == mark and (reason := why_not()):
        pytest.exit(reason, returncode=1)
