"""Text for terminals, and whose line a warning is of."""

import linecache
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import saevlm_fast
from saevlm_fast.errors import Doubt, doubt, printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("cat é 猫 🚋 :train: C:\\x", "cat é 猫 🚋 :train: C:\\x"),
        ("\x1b[31mred\x07", "\\x1b[31mred\\x07"),
        ("a\nb\r\tc\x7f\x9b", "a\\x0ab\\x0d\\x09c\\x7f\\x9b"),
        ("\u202egnp\u2028", "\\u202egnp\\u2028"),
        (os.fsdecode(b"\xff.jpg"), "\\xff.jpg"),
        ("\ud800\U000e0001", "\\ud800\\U000e0001"),
    ],
)
def test_what_a_terminal_would_obey_is_written_out(text: str, shown: str) -> None:
    assert printable(text) == shown


@given(st.text(st.characters()))
def test_any_text_becomes_one_printable_line(text: str) -> None:
    assert printable(text).isprintable()
    assert printable(printable(text)) == printable(text)
    printable(text).encode()


def test_a_warning_is_of_the_users_line():
    """Whoever of ours, or a decorator of ours, stands in between; also of a thread that has no line of a user."""
    ours = {"doubt": doubt, "__name__": "saevlm_fast.somewhere"}
    exec("def warn(n):\n    doubt('x') if n == 0 else warn(n - 1)", ours)
    for n in (0, 3):
        with pytest.warns(Doubt) as warned:
            ours["warn"](n)
        (each,) = warned
        assert (each.filename, linecache.getline(each.filename, each.lineno).strip()) == (__file__, 'ours["warn"](n)')
    with ThreadPoolExecutor(1) as pool, pytest.warns(Doubt):
        pool.submit(ours["warn"], 1).result()


def test_nothing_warns_but_by_one_rule():
    """stacklevel is wrong as soon as a call stands in between."""
    package = Path(saevlm_fast.__file__).parent
    modules = [*package.rglob("*.py"), *(package / "kernels").glob("*.py")]  # which is a link
    files = [file for file in modules if "warnings.warn(" in file.read_text(encoding="utf-8")]
    assert files == [package / "errors.py"]
