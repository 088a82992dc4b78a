"""What the pages tell readers to type and where they point: Python runs, commands have their options, names are there.

`<!-- needs weights -->` before a block says that it loads weights that are not in the box: it is compiled only.
"""

import ast
import functools
import re
import shlex
import tomllib
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer.main

import saevlm_fast as sf
from command import ROOT, run
from saevlm_fast.cli.command_line import arguments
from saevlm_fast.cli.config_file import read_config
from saevlm_fast.cli.names import COMMANDS, flag_of
from saevlm_fast.cli.options import app
from saevlm_fast.settings import settings_of

SITE = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "docs/index.md", ROOT / "docs/quickstart.md", *(ROOT / "docs/how-to").glob("*.md")]
ROOT_PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
WEIGHTS = "<!-- needs weights -->"
PROGRAM = "saevlm-fast"


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


class Block(NamedTuple):
    """A fenced block: its language, its text, the line of the page before it, whether weights are needed to run it."""

    language: str
    text: str
    line: int
    needs_weights: bool


@functools.cache
def blocks(page: Path) -> tuple[Block, ...]:
    found: list[Block] = []
    inside: list[str] | None = None
    mark = False
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        fence = re.match(r" *```(\w*)", line)
        if fence and inside is None:
            inside, language, start = [], fence[1], number
        elif fence and inside is not None:
            found.append(Block(language, "\n".join(inside) + "\n", start, mark))
            inside, mark = None, False
        elif inside is not None:
            inside.append(line)
        elif line.strip():
            mark = line.strip() == WEIGHTS
    return tuple(found)


def blocks_of(page: Path, *languages: str) -> list[Block]:
    return [block for block in blocks(page) if block.language in languages]


@functools.cache
def inline_code(page: Path) -> tuple[str, ...]:
    """What stands between backticks outside of blocks."""
    text = re.sub(r"^ *```.*?^ *```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return tuple(re.findall(r"`([^`\n]+)`", text))


# Python ---------------------------------------------------------------------------------------------------------------

WITH_PYTHON = [page for page in PAGES if blocks_of(page, "python")]


@pytest.mark.parametrize("page", WITH_PYTHON, ids=named)
def test_python_names_are_there(page: Path) -> None:
    for block in blocks_of(page, "python"):
        for node in ast.walk(ast.parse(block.text)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "sf":
                assert node.attr in sf.__all__, f"{named(page)}:{block.line + node.lineno}: sf.{node.attr}"
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("saevlm_fast"):
                module = import_module(str(node.module))
                assert all(hasattr(module, alias.name) for alias in node.names), f"{named(page)}: {node.module}"


@pytest.mark.parametrize("page", WITH_PYTHON, ids=named)
def test_python_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of a page one after the other, as a reader would in one session."""
    monkeypatch.chdir(tmp_path)
    session: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks_of(page, "python"):
        code = compile("\n" * block.line + block.text, named(page), "exec")
        if not block.needs_weights:
            exec(code, session)


def test_every_page_of_the_list_shows_python() -> None:
    assert {named(page) for page in WITH_PYTHON} >= {"README.md", "docs/quickstart.md", "docs/how-to/python.md"}


# Commands -------------------------------------------------------------------------------------------------------------


def arguments_of(text: str) -> list[list[str]]:
    """The arguments of every saevlm-fast in some shell text."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        for part in line.split(" && "):
            words = shlex.split(part, comments=True)
            if "torchrun" in words:  # torchrun ... -m saevlm_fast.cli ...
                words = [PROGRAM, *words[words.index("saevlm_fast.cli") + 1 :]]
            if words and Path(words[0]).name == PROGRAM:
                found.append(words[1:])
    return found


def commands_of(page: Path) -> list[list[str]]:
    """The arguments of every saevlm-fast in the blocks and in the text of a page."""
    texts = [block.text for block in blocks_of(page, "bash", "sh", "text")]
    starts = (f"{PROGRAM} ", *(f"{name} -" for name in COMMANDS))
    inline = [code for code in inline_code(page) if code.startswith(starts)]
    texts += [code if code.startswith(PROGRAM) else f"{PROGRAM} {code} ..." for code in inline]
    return [words for text in texts for words in arguments_of(text)]


def check_command(words: list[str]) -> None:
    """Options exist and have values of their kind; those that are needed are given, unless ... stands for them."""
    group: Any = typer.main.get_command(app)
    if words[0].startswith("-"):
        assert words[0] in {name for each in group.params for name in each.opts}, words
        return
    assert words[0] in COMMANDS, words
    context = group.commands[words[0]].make_context(words[0], [word for word in words[1:] if word != "..."])
    given: dict[str, Any] = {
        name: list(value) if isinstance(value, tuple) else value for name, value in context.params.items()
    }
    shortened = "..." in words or not any(word.startswith("-") for word in words)  # `saevlm-fast train` in the text
    if not shortened and (given["config"] is None or Path(given["config"]).exists()):
        arguments(words[0], COMMANDS[words[0]].options, given)


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_commands_have_their_options(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for block in blocks_of(page, "toml"):
        Path("run.toml").write_text(block.text)
    for words in commands_of(page):
        check_command(words)


@pytest.mark.parametrize("page", SITE, ids=named)
def test_options_in_the_text_exist(page: Path) -> None:
    """`--this` alone between backticks is an option of some command."""
    group: Any = typer.main.get_command(app)
    flags = {name for command in group.commands.values() for each in command.params for name in each.opts}
    flags |= {flag_of(name, known) for each in COMMANDS.values() for name, known in settings_of(each.options).items()}
    flags |= {name for each in group.params for name in each.opts} | {"--help", "--large"}  # --large is of the benches
    for code in inline_code(page):
        if code.startswith("--"):
            assert {word for word in code.split() if word.startswith("--")} <= flags, code


USAGE_ERROR: Any = typer.BadParameter.__base__  # which is click's, or that of typer's own copy of click


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ("train --stepz 3", USAGE_ERROR),
        ("train --steps many", ValueError),
        ("steer --model hf:tiny-llava", ValueError),
        ("tain --steps 3", AssertionError),
        ("--versio", AssertionError),
    ],
)
def test_a_wrong_command_is_found(wrong: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        check_command(wrong.split())


def test_the_small_commands_of_the_quickstart_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = ROOT / "docs/quickstart.md"
    (block,) = (each for each in blocks_of(page, "bash") if "saevlm-fast synthetic" in each.text)
    commands = arguments_of(block.text)
    assert [words[0] for words in commands] == ["synthetic", "train", "ms-score", "inspect"]
    for words in commands:
        assert run(*words)
    assert "dry run" in run("train", "--dry-run"), "on the scenes of the box"
    assert not Path("runs").exists()


@pytest.mark.parametrize("page", [page for page in SITE if blocks_of(page, "toml")], ids=named)
def test_settings_files_are_read(page: Path, tmp_path: Path) -> None:
    for block in blocks_of(page, "toml"):
        assert tomllib.loads(block.text)
        file = tmp_path / "run.toml"
        file.write_text(block.text)
        assert read_config(file, "train", COMMANDS["train"].options)


# Names, files and links -----------------------------------------------------------------------------------------------

FOLDERS = ("saevlm_fast/", "kernels/", "bench/", "tests/", "docs/")


def test_the_readme_is_short() -> None:
    """Who wants more reads on in docs."""
    assert len((ROOT / "README.md").read_text().splitlines()) < 150


@pytest.mark.parametrize("page", [*SITE, ROOT / "README.md", ROOT / "CONTRIBUTING.md"], ids=named)
def test_files_and_modules_in_the_text_are_there(page: Path) -> None:
    for code in inline_code(page):
        if any(sign in code for sign in "<>{} "):
            continue
        if code.startswith(FOLDERS):
            assert list(ROOT.glob(code.rstrip("/"))), f"{named(page)}: {code}"
        elif re.fullmatch(r"[a-z_/]+\.py", code):
            assert list(ROOT.glob(f"kernels/{code}")) or list(ROOT.glob(f"saevlm_fast/**/{code}")), code
        elif re.fullmatch(r"saevlm_fast(\.\w+)+", code):
            lookup(code)


def lookup(dotted: str) -> Any:
    """A module, or a name in one, or an attribute of that."""
    parts = dotted.split(".")
    for n in range(len(parts), 0, -1):
        try:
            found = import_module(".".join(parts[:n]))
        except ModuleNotFoundError:
            continue
        return functools.reduce(getattr, parts[n:], found)
    raise AssertionError(dotted)


def test_functions_of_the_kernels_page_are_where_it_says() -> None:
    for line in (ROOT / "docs/kernels.md").read_text(encoding="utf-8").splitlines():
        if row := re.match(r"\| (?:\[\d\]\(.*?\)|) *\| `(\w+)` \| (.*) \|$", line):
            module = import_module(f"saevlm_fast.kernels.{row[1]}")
            for name in re.findall(r"`(\w+)`", row[2]):
                assert getattr(module, name).__module__ == module.__name__, f"{row[1]}.{name}"


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", ROOT_PAGES, ids=named)
def test_links_of_the_pages_outside_the_site(page: Path) -> None:
    """mkdocs sees to the others."""
    for target in re.findall(r"\]\(([^)#\s]*)(?:#[^)\s]*)?\)", page.read_text(encoding="utf-8")):
        assert "://" in target or not target or (page.parent / target).exists(), target
    for target, anchor in re.findall(r"\]\(([^)#\s:]*\.md)#([^)\s]*)\)", page.read_text(encoding="utf-8")):
        assert anchor in anchors(page.parent / target), f"{target}#{anchor}"


# The API pages --------------------------------------------------------------------------------------------------------


def test_the_overview_has_every_public_name_and_its_page_has_its_module() -> None:
    text = (ROOT / "docs/api/index.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| (.+?) \| \[.*\]\((\w+\.md)#(\S+)\) \|$", text, flags=re.MULTILINE)
    assert [name for name, *_ in rows] == sorted(set(sf.__all__) - {"__version__"}, key=str.lower)
    for name, line, page, dotted in rows:
        assert lookup(dotted) is getattr(sf, name)
        assert len(line) < 90
        module = dotted.rpartition(".")[0]
        assert f"::: {module}\n" in (ROOT / "docs/api" / page).read_text(encoding="utf-8") + "\n", module


def test_every_page_is_in_the_navigation() -> None:
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2]
    assert {str(page.relative_to(ROOT / "docs")) for page in SITE} == set(re.findall(r"[\w/-]+\.md", nav))
