"""What `make test-cluster`, `make test-browser` and `make test-docker` do where nothing they need is installed."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace

import pytest

from tests.browser import conftest as of_browser
from tests.cluster import conftest as of_cluster
from tests.docker import conftest as of_docker


@pytest.mark.parametrize(("mark", "its"), [("browser", of_browser), ("cluster", of_cluster), ("docker", of_docker)])
def test_absence_is_a_failure_only_where_these_tests_are_asked_for(
    mark: str, its: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def collect(expression: str) -> None:
        its.pytest_collection_modifyitems(SimpleNamespace(option=SimpleNamespace(markexpr=expression)))

    monkeypatch.setattr(its, "why_not", lambda: "There is no such thing.")
    for other in ("", "not cluster and not docker", f"not {mark}"):
        collect(other)
    with pytest.raises(pytest.exit.Exception, match=r"There is no such thing\.") as left:
        collect(mark)
    assert left.value.returncode == 1
    monkeypatch.setattr(its, "why_not", lambda: None)
    collect(mark)
