"""A type checker sees through the ops: public functions, and what custom_op makes of a function, keep their types."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
RIGHT = """
import torch
from saevlm_fast.kernels.sparse_decode import gather_dot_op, sparse_decode
from saevlm_fast.kernels.topk_encode import topk_encode

x = torch.zeros(2, 3)
acts, latents = topk_encode(x, x, x, x, 3)
decoded: torch.Tensor = sparse_decode(acts, latents, None, x, x)
dots: torch.Tensor = gather_dot_op(x, latents, latents, x)
"""
WRONG = """
from saevlm_fast.kernels.sparse_decode import gather_dot_op, sparse_decode
from saevlm_fast.kernels.topk_encode import topk_encode

topk_encode("not a tensor", 3)
sparse_decode(1, None, None, None, None)
number: int = gather_dot_op("not a tensor", 1, 2, 3)
"""
EXPECTED = [
    'Argument 1 to "topk_encode" has incompatible type "str"; expected "Tensor"',
    'Missing positional arguments "b_enc_S", "b_dec_D", "k" in call to "topk_encode"',
    'Argument 1 to "sparse_decode" has incompatible type "int"; expected "Tensor"',
    'Argument 1 to "__call__" of "Op" has incompatible type "str"; expected "Tensor"',
    'Incompatible types in assignment (expression has type "Tensor", variable has type "int")',
]


def test_mypy_checks_calls_into_the_kernels(tmp_path):
    pytest.importorskip("mypy", reason="mypy is not installed: pip install -e '.[test]'")
    snippets = tmp_path / "right.py", tmp_path / "wrong.py"
    for path, text in zip(snippets, (RIGHT, WRONG)):
        path.write_text(text)
    # This project's settings, so its cache: warm, this takes a second or two; cold, the time that torch takes.
    command = [sys.executable, "-m", "mypy", "--config-file", ROOT / "pyproject.toml", *snippets]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "right.py" not in done.stdout
    missing = [message for message in EXPECTED if message not in done.stdout]
    assert not missing, done.stdout
