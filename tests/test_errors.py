"""Text for terminals, and whose line a warning is of."""

import gc
import linecache
import os
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import sleep

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
    """Whoever of ours, or a decorator of ours, stands in between."""
    ours = {"doubt": doubt, "__name__": "saevlm_fast.somewhere"}
    exec("def warn(n):\n    doubt('x') if n == 0 else warn(n - 1)", ours)
    for n in (0, 3):
        with pytest.warns(Doubt) as warned:
            ours["warn"](n)
        (each,) = warned
        assert (each.filename, linecache.getline(each.filename, each.lineno).strip()) == (__file__, 'ours["warn"](n)')


@pytest.mark.parametrize("inner", [False, True])
def test_a_warning_of_a_pools_thread_is_of_the_line_that_waits_for_it(inner):
    """Whether the pool is the user's, who has it call us, or ours."""
    ours = {"doubt": doubt, "__name__": "saevlm_fast.somewhere", "Pool": ThreadPoolExecutor, "sleep": sleep}
    exec("def warn(n):\n    sleep(0.1)\n    doubt('x')", ours)
    exec("def begin():\n    with Pool(1) as pool:\n        list(pool.map(warn, [1]))", ours)
    with ThreadPoolExecutor(1) as pool, pytest.warns(Doubt) as warned:
        ours["begin"]() if inner else list(pool.map(ours["warn"], [1]))
    (each,) = warned
    line = linecache.getline(each.filename, each.lineno).strip()
    assert (each.filename, line.startswith('ours["begin"]()')) == (__file__, True)


def test_a_warning_of_a_thread_where_the_user_has_a_line_is_of_that():
    ours = {"doubt": doubt, "__name__": "saevlm_fast.somewhere"}
    exec("def warn():\n    doubt('x')", ours)

    def of_user():
        ours["warn"]()

    with ThreadPoolExecutor(1) as pool, pytest.warns(Doubt) as warned:
        pool.submit(of_user).result()
    assert linecache.getline(warned[0].filename, warned[0].lineno).strip() == 'ours["warn"]()'


def test_a_warning_keeps_nothing_of_who_is_warned():
    """Frames in a circle would keep it until the next collection."""

    def warned():
        held = Held()
        with warnings.catch_warnings(action="ignore"):
            doubt("x")
        return weakref.ref(held)

    gc.disable()
    try:
        assert warned()() is None
    finally:
        gc.enable()


class Held:
    pass


def test_nothing_warns_but_by_one_rule():
    """stacklevel is wrong as soon as a call stands in between."""
    package = Path(saevlm_fast.__file__).parent
    modules = [*package.rglob("*.py"), *(package / "kernels").glob("*.py")]  # which is a link
    files = [file for file in modules if "warnings.warn" in file.read_text(encoding="utf-8")]
    assert files == [package / "errors.py"]
