"""`import saevlm_fast as sf`: what it gives, what it costs, and what a misspelt name is told."""

import ast
import doctest
import inspect
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

import saevlm_fast as sf
from command import ROOT

FUNCTIONS = [name for name in sf.__all__ if inspect.isfunction(getattr(sf, name))]


def in_a_fresh_process(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.mark.parametrize("name", sf.__all__)
def test_every_public_name_is_there_and_documented(name):
    value = getattr(sf, name)
    if name == "__version__":
        return
    doc = inspect.getdoc(value)
    assert doc, f"{name} has no docstring"
    assert not doc.startswith(f"{name}("), "a dataclass without a docstring has its signature for one"
    assert value.__module__.startswith("saevlm_fast.")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_public_function_says_what_it_raises(name):
    doc = inspect.getdoc(getattr(sf, name)) or ""
    if name not in ("add", "clamp", "scale", "zero"):  # whose Edit says it
        assert "Raises:" in doc, name


def test_type_checkers_see_the_names_that_python_imports():
    tree = ast.parse(Path(sf.__file__).read_text(encoding="utf-8"))
    (seen,) = [node for node in tree.body if isinstance(node, ast.If)]
    imported = {
        node.module.removeprefix("saevlm_fast."): tuple(alias.name for alias in node.names)
        for node in seen.body
        if isinstance(node, ast.ImportFrom) and node.module
    }
    assert imported == sf._HOMES
    assert {name for names in imported.values() for name in names} | {"__version__"} == set(sf.__all__)


def test_no_module_hides_a_public_name():
    """`import saevlm_fast.score` would replace sf.score by the module, for the whole process."""
    package = Path(sf.__file__).parent
    modules = {path.stem for path in package.glob("*.py")} | {path.name for path in package.iterdir() if path.is_dir()}
    assert not modules & set(sf.__all__)


def test_the_import_is_quick_and_imports_no_torch():
    """0.05 s where it was measured. Its own time: what others do, and a slow disk, do not count."""
    code = """if True:
        import sys, time
        start = time.process_time()
        import saevlm_fast
        seconds = time.process_time() - start
        heavy = {"torch", "transformers", "numpy", "pyarrow", "typer", "rich"} & set(sys.modules)
        print(seconds, heavy)"""
    seconds, heavy = in_a_fresh_process(code).split(maxsplit=1)
    assert heavy == "set()"
    assert float(seconds) < 1


def test_dir_lists_what_is_not_imported_yet():
    code = "import saevlm_fast as sf; print('train' in vars(sf), set(sf.__all__) <= set(dir(sf)))"
    assert in_a_fresh_process(code) == "False True"


def test_a_star_import_gives_all_of_it():
    code = "from saevlm_fast import *; import saevlm_fast as sf; print(set(sf.__all__) <= set(globals()))"
    assert in_a_fresh_process(code) == "True"


def test_a_misspelt_name_is_told_the_near_one():
    with pytest.raises(
        AttributeError, match=r"saevlm_fast has no 'SparseAutoencodr'; did you mean 'SparseAutoencoder'"
    ):
        _ = sf.SparseAutoencodr
    with pytest.raises(AttributeError, match=r"saevlm_fast has no 'qqq'$"):
        _ = sf.qqq
    with pytest.raises(ImportError):
        from saevlm_fast import trian  # noqa: F401
    assert not hasattr(sf, "__wrapped__"), "what others ask every module for"


def test_submodules_are_imported_as_ever():
    assert import_module("saevlm_fast.training.run").train is sf.train
    assert in_a_fresh_process("import saevlm_fast.data.rows as rows; print(rows.Activations.__name__)") == "Activations"


def test_the_example_of_the_docstring_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    failed, tried = doctest.testmod(sf)
    assert tried > 5
    assert not failed
    assert not list(tmp_path.iterdir()), "nothing is written"
