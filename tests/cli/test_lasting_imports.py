"""What is imported in a `lasting_imports` block is searched for garbage neither then nor later."""

from __future__ import annotations

import gc

import pytest

from dynmoe_ds.cli.lasting_imports import lasting_imports


def is_searched(value: object) -> bool:
    """Whether a collection of garbage looks at it: what is frozen is not among `gc.get_objects()`."""
    return any(one is value for one in gc.get_objects())


def test_what_is_made_inside_is_not_searched_and_what_comes_later_is() -> None:
    with lasting_imports():
        assert not gc.isenabled()
        imported = [["module"]]
        assert is_searched(imported)
    assert gc.isenabled() and not is_searched(imported)
    later = [["batch"]]
    assert is_searched(later)


def test_collections_go_on_after_a_failed_import() -> None:
    with pytest.raises(ImportError), lasting_imports():
        raise ImportError("no such module")
    assert gc.isenabled()


def test_who_has_turned_collections_off_keeps_that() -> None:
    gc.disable()
    try:
        with lasting_imports():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
