"""What an install without extras brings is all that the code imports without asking."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Distributions whose module has another name; every other distribution's has its own, with _ for -.
MODULES = {"open_clip_torch": "open_clip", "pyyaml": "yaml", "pillow": "PIL", "scikit-learn": "sklearn"}


def modules(requirements: list[str]) -> set[str]:
    names = [re.split(r"[\s\[<>=;]", requirement)[0] for requirement in requirements]
    return {MODULES.get(name, name.replace("-", "_")) for name in names}


CORE = modules(PROJECT["dependencies"])
EXTRAS = {
    module
    for extra, wanted in PROJECT["optional-dependencies"].items()
    if extra not in ("test", "interop", "peers")
    for module in modules(wanted)
} - CORE


def is_guard(node: ast.AST) -> bool:
    """A try whose handler names ImportError or what it comes from."""
    return isinstance(node, ast.Try) and any(
        re.search(r"ImportError|ModuleNotFoundError|Exception", ast.unparse(handler.type))
        for handler in node.handlers
        if handler.type
    )


def imports(tree: ast.AST, asked: bool = False):
    """(module, line, whether the import may fail and is answered) of a file, imports of its own package left out."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name.split(".")[0], node.lineno, asked) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield str(node.module).split(".")[0], node.lineno, asked
        elif is_guard(node):
            yield from imports(ast.Module(node.body, []), True)  # type: ignore[attr-defined]
            yield from imports(ast.Module([*node.handlers, *node.orelse, *node.finalbody], []), asked)  # type: ignore
        elif not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)):
            yield from imports(node, asked)


def faults(source: str) -> list[str]:
    own = {*sys.stdlib_module_names, "saevlm_fast", "bench"}
    return [
        f"line {line}: {module}"
        for module, line, asked in imports(ast.parse(source))
        if module not in own | CORE and not (asked and module in EXTRAS)
    ]


FILES = sorted((ROOT / "saevlm_fast").rglob("*.py")) + sorted((ROOT / "kernels").glob("*.py"))


def test_every_import_is_a_core_dependency_or_answered_when_its_extra_is_missing():
    found = {str(path.relative_to(ROOT)): faults(path.read_text()) for path in FILES}
    assert {name: lines for name, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    "source",
    [
        "import wandb",
        "def f():\n    from wandb import sdk",
        "try:\n    import unheard_of\nexcept ImportError:\n    pass",
    ],
)
def test_a_planted_import_is_found(source):
    assert faults(source)


def test_an_answered_import_of_an_extra_is_none():
    assert not faults("try:\n    import wandb\nexcept ImportError:\n    pass")
