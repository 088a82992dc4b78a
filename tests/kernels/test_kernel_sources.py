"""What the interpreter takes and the compiler refuses, as far as it can be read from the kernels' sources."""

import ast
from pathlib import Path

import pytest

import saevlm_fast.kernels.common

SOURCES = sorted(Path(saevlm_fast.kernels.common.__file__).parent.glob("*_triton.py"))


def kept_general(kernel: ast.FunctionDef, constants: dict[str, ast.expr]) -> set[str] | None:
    """Arguments that @triton.jit(do_not_specialize=...) names; None: it is no kernel."""
    for decorator in kernel.decorator_list:
        if ast.unparse(decorator) == "triton.jit":
            return set()
        if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "triton.jit":
            given = next((each.value for each in decorator.keywords if each.arg == "do_not_specialize"), None)
            given = constants[given.id] if isinstance(given, ast.Name) else given
            return set(ast.literal_eval(given)) if given else set()
    return None


def faults(source: str) -> list[str]:
    """Arguments with `.to`: an integer that is 1 is specialised to Python's 1, which has no such method.

    Of kernels that are launched, whose names end so; what others are given by them has a type of its own.
    """
    module, found = ast.parse(source), []
    assigned = [node for node in module.body if isinstance(node, ast.Assign)]
    constants = {target.id: node.value for node in assigned for target in node.targets if isinstance(target, ast.Name)}
    kernels = [node for node in module.body if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel")]
    for kernel in kernels:
        general = kept_general(kernel, constants)
        if general is None:
            continue
        special = {each.arg for each in kernel.args.args if not each.arg.endswith("_ptr")} - general
        changed = [node for node in ast.walk(kernel) if isinstance(node, ast.Attribute) and node.attr == "to"]
        names = [node.value for node in changed if isinstance(node.value, ast.Name)]
        found += [f"{kernel.name}: {name.id}.to, line {name.lineno}" for name in names if name.id in special]
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_no_specialised_integer_is_taken_for_a_tensor(path):
    assert faults(path.read_text()) == []


def test_it_would_be_seen():
    source = "@triton.jit\ndef some_kernel(a_ptr, n):\n    return n.to(tl.int64)\n"
    assert faults(source) == ["some_kernel: n.to, line 3"]
    assert faults(source.replace("triton.jit", 'triton.jit(do_not_specialize=["n"])')) == []
