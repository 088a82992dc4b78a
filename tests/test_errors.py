"""Text for terminals."""

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from saevlm_fast.errors import printable


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
