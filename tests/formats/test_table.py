"""docs/formats.md says what the tests find."""

from format_table import HEAD, PAGE, REAL, ROOT, page_with, table

from saevlm_fast.formats.export import WRITERS
from saevlm_fast.formats.registry import FORMATS
from saevlm_fast.formats.source import ASSUMPTIONS


def test_the_table_is_what_is_found():
    made = table()
    assert PAGE.read_text(encoding="utf-8") == page_with(made), "run python tests/helpers/format_table.py"
    rows = [line for line in made.splitlines() if line.startswith("| `")]
    assert {row.split("`")[1] for row in rows} >= {each.name for each in FORMATS} - {"safetensors"}
    assert all(row.split("|")[3:6] == [" all ", " all ", " all "] for row in rows)
    assert HEAD in made


def test_the_page_names_every_assumption_and_every_export():
    page = PAGE.read_text(encoding="utf-8")
    assert not [name for name in (*ASSUMPTIONS, *WRITERS) if f"`{name}`" not in page]


def test_every_interop_test_has_its_library():
    here = {path.name for path in (ROOT / "tests" / "formats" / "interop").glob("test_*.py")} - {"test_push.py"}
    assert here == {file for file, _ in REAL.values()}
