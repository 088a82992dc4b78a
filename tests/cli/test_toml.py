"""The text of settings.toml, read back by tomllib."""

import math
import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from saevlm_fast.cli.toml import toml_text

texts = st.text(st.characters(exclude_categories=["Cs"]))
plain = texts | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False)
values = st.recursive(plain | st.lists(plain), lambda inner: st.dictionaries(texts, inner, max_size=4), max_leaves=12)


@given(document=st.dictionaries(texts, values, max_size=5))
def test_is_read_back_as_it_was(document):
    assert tomllib.loads(toml_text(document)) == document


def test_looks_as_people_write_it():
    document = {"train": {"lr": 1e-5, "groups": [0.5, 0.5], "output": 'a "b"\\c'}, "made": {"versions": {"x-y": "1"}}}
    text = '[train]\nlr = 1e-05\ngroups = [0.5, 0.5]\noutput = "a \\"b\\"\\\\c"\n\n[made.versions]\nx-y = "1"\n'
    assert toml_text(document) == text
    assert math.isnan(tomllib.loads(toml_text({"x": math.nan}))["x"])


def test_another_kind_is_refused():
    with pytest.raises(TypeError, match="None is nothing"):
        toml_text({"x": None})
