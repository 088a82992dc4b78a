"""The table of docs/formats.md, made by reading, comparing and writing again every configuration of every format.

python tests/helpers/format_table.py, where tests/helpers is on the path, writes it anew.
"""

import tempfile
from pathlib import Path

import torch

import plain_forward
from foreign_files import TOLERANCE, Made, assert_close, assert_same, rows
from foreign_language import ALL
from foreign_trainers import TRAINERS
from saevlm_fast.formats import export
from saevlm_fast.formats.registry import FORMATS, detect, read
from saevlm_fast.formats.source import Source

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "formats.md"
BEGIN, END = "<!-- table: tests/helpers/format_table.py -->", "<!-- end of table -->"
# Format -> the file of its interop test, and the library that it needs.
REAL = {
    "saelens": ("test_sae_lens.py", "sae-lens"),
    "sparsify": ("test_sparsify.py", "eai-sparsify"),
    "dictionary_learning": ("test_dictionary_learning.py", "dictionary-learning"),
    "saev": ("test_saev.py", "saev 0.1.0 (its later files: from its code)"),
    "llamascopium": ("test_llamascopium.py", "llamascopium"),
    "overcomplete": ("test_overcomplete.py", "overcomplete"),
    "visaebench": ("test_visaebench.py", "visaebench"),
    "clip_scope": ("test_clipscope.py", "clipscope"),
}
HEAD = (
    "| format | configurations | detected | loaded | equal to its own forward | compared with | exported | round trip |"
)


def table() -> str:
    """All of it; a cell that counts says how many of the configurations do."""
    made = [*TRAINERS.values(), *ALL.values()]
    by_format = {each.name: [make for make in made if make(torch.float32).format == each.name] for each in FORMATS}
    lines = [HEAD, "|---" * HEAD.count(" | ") + "|---|"]
    for name, several in by_format.items():
        if several:
            lines.append(_row(name, [_tried(make(torch.float32)) for make in several]))
    return "\n".join(lines)


def _row(name: str, tried: list[dict[str, bool]]) -> str:
    def count(key: str) -> str:
        good = sum(each[key] for each in tried)
        return "all" if good == len(tried) else f"{good}"

    file, library = REAL.get(name, ("", ""))
    real = bool(file) and (ROOT / "tests" / "formats" / "interop" / file).is_file()
    compared = f"{library}, and its code" if real else "its code or description"
    exported = name in export.WRITERS
    cells = [f"`{name}`", str(len(tried)), count("detected"), count("loaded"), count("equal"), compared]
    return f"| {' | '.join([*cells, 'yes' if exported else 'no', count('again')])} |"


def _tried(made: Made) -> dict[str, bool]:
    """Of one configuration: detected, loaded, equal, and the same after it was written as ours and read again."""
    with tempfile.TemporaryDirectory() as folder:
        path = made.write(Path(folder) / "in")
        found = dict.fromkeys(("detected", "loaded", "equal", "again"), False)
        found["detected"] = detect(Source(path, assume=made.assume)).name == made.format
        plain = read(path, assume=made.assume)
        found["loaded"] = True
        assert_same(plain, made, torch.float32)
        found["equal"] = True
        to = made.format if made.format in export.WRITERS and _can(plain, made.format) else "saelens"
        (Path(folder) / "out").mkdir()
        export.write(plain, Path(folder) / "out", to, lossy=True)
        x_BD = rows(d=plain.d_in)
        again = plain_forward.forward(read(Path(folder) / "out"), x_BD)
        assert_close(again, plain_forward.forward(plain, x_BD), TOLERANCE[torch.float32])
        found["again"] = True
    return found


def _can(plain, to: str) -> bool:
    try:
        export.check(plain, to, lossy=True)
    except ValueError:
        return False
    return True


def page_with(text: str) -> str:
    """docs/formats.md with another table."""
    page = PAGE.read_text(encoding="utf-8")
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    PAGE.write_text(page_with(table()), encoding="utf-8")
