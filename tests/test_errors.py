"""The exception tree."""

import pickle

import pytest

from reembed.transforms import errors
from reembed.transforms.errors import ReembedError, StoreError, unwrap

KINDS = ReembedError.__subclasses__()


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_survives_pickling(kind: type[ReembedError]) -> None:
    copy = pickle.loads(pickle.dumps(kind("it is locked")))

    assert (type(copy), str(copy), copy.exit_code) == (kind, "it is locked", kind.exit_code)


@pytest.mark.parametrize("kind", KINDS)
def test_so_do_the_lines_below_its_message(kind: type[ReembedError]) -> None:
    copy = pickle.loads(pickle.dumps(kind("it is locked", "--table a", "--table b")))

    assert (str(copy), copy.details) == ("it is locked", ("--table a", "--table b"))
    assert unwrap(copy).details == copy.details  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_is_found_in_a_runners_traceback(kind: type[ReembedError]) -> None:
    text = (
        "Traceback (most recent call last):\n  File ...\nsqlite3.OperationalError: no\n\nDuring "
        f"handling ...\n{errors.__name__}.{kind.__name__}: a: b; c [while running 'Read']\n\nmore"
    )

    found = unwrap(RuntimeError(text))

    assert (type(found), str(found)) == (kind, "a: b; c")


@pytest.mark.parametrize(
    "text",
    ["", "ValueError: x", "StoreError: not ours", "other.errors.StoreError: not ours either"],
)
def test_another_programs_error_is_not_taken_for_ours(text: str) -> None:
    assert unwrap(RuntimeError(text)) is None


def test_every_error_has_a_line_in_the_tree_with_its_exit_code() -> None:
    lines = {
        line.split()[1]: line.split()[2] for line in str(errors.__doc__).splitlines() if "─" in line
    }

    assert lines == {kind.__name__: str(kind.exit_code) for kind in KINDS}


def test_the_store_error_means_a_store_that_is_unchanged() -> None:
    assert StoreError("x").exit_code == 1
