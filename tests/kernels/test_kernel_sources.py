"""What the interpreter takes and the compiler refuses, as far as it can be read from the kernels' sources."""

import ast
from pathlib import Path

import pytest

import saevlm_fast.kernels.common

SOURCES = sorted(Path(saevlm_fast.kernels.common.__file__).parent.glob("*_triton.py"))


def kept_general(kernel: ast.FunctionDef) -> set[str] | None:
    """Arguments that @triton.jit(do_not_specialize=...) names; None: it is no kernel."""
    for decorator in kernel.decorator_list:
        text = ast.unparse(decorator)
        if text == "triton.jit":
            return set()
        if text.startswith("triton.jit("):
            assert isinstance(decorator, ast.Call)
            given = {each.arg: each.value for each in decorator.keywords}
            return set(ast.literal_eval(given["do_not_specialize"])) if "do_not_specialize" in given else set()
    return None


def faults(source: str) -> list[str]:
    """Arguments with `.to`: an integer that is 1 is specialised to Python's 1, which has no such method.

    Of kernels that are launched, whose names end so; what others are given by them has a type of its own.
    """
    found = []
    for kernel in ast.walk(ast.parse(source)):
        if not isinstance(kernel, ast.FunctionDef) or not kernel.name.endswith("_kernel"):
            continue
        general = kept_general(kernel)
        if general is None:
            continue
        special = {each.arg for each in kernel.args.args if not each.arg.endswith("_ptr")} - general
        for node in ast.walk(kernel):
            if isinstance(node, ast.Attribute) and node.attr == "to" and isinstance(node.value, ast.Name):
                if node.value.id in special:
                    found.append(f"{kernel.name}: {node.value.id}.to, line {node.lineno}")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_no_specialised_integer_is_taken_for_a_tensor(path):
    assert faults(path.read_text()) == []


def test_it_would_be_seen():
    source = "@triton.jit\ndef some_kernel(a_ptr, n):\n    return n.to(tl.int64)\n"
    assert faults(source) == ["some_kernel: n.to, line 3"]
    assert faults(source.replace("triton.jit", 'triton.jit(do_not_specialize=["n"])')) == []
