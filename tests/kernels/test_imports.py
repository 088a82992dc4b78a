"""kernels/ has one direction: common, then the ops; no circle, lazy imports included; Triton only for a GPU tensor."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FILES = {path.stem: path for path in (ROOT / "kernels").glob("*.py")}


def imported(path: Path) -> set[str]:
    """Files of kernels/ that this one imports, at the top or inside a function."""
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom) and node.level]
    return {name for node in nodes for name in ([node.module] if node.module else [alias.name for alias in node.names])}


def test_no_circle_and_no_kernel_imports_its_op():
    graph = {name: imported(path) for name, path in FILES.items()}
    assert set().union(*graph.values()) <= set(FILES)
    TopologicalSorter(graph).prepare()  # CycleError otherwise
    assert graph["common"] == set()
    for name in graph:
        if name.endswith("_triton"):
            assert {needed for needed in graph[name] if not needed.endswith("_triton")} <= {"common"}, name
        if name.endswith("_numba"):
            assert {needed for needed in graph[name] if not needed.endswith("_numba")} <= {"common", "cpu_loops"}, name


def test_a_cpu_user_loads_no_kernel():
    ops = [name for name in sorted(FILES) if not name.endswith(("_triton", "_numba"))]
    code = "import sys, torch\n" + "".join(f"import saevlm_fast.kernels.{name}\n" for name in ops)
    code += """
assert "numba" not in sys.modules, "which takes 0.2 s, for small work and for a GPU in vain"
from saevlm_fast.kernels.sparse_decode import sparse_decode
from saevlm_fast.kernels.topk_encode import topk_encode
x, W, b, zeros = torch.randn(5, 7), torch.randn(7, 70), torch.zeros(70), torch.zeros(7)
sparse_decode(*topk_encode(x, W, b, zeros, 3), None, W.T.contiguous(), zeros)
assert "triton" not in sys.modules
assert not [name for name in sys.modules if name.startswith("saevlm_fast") and name.endswith("_triton")]
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
