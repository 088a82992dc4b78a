"""One mode a process: with a GPU the kernels are compiled, without one they run in Triton's interpreter.

Triton reads TRITON_INTERPRET when it is first imported, so it is set here, before anything imports triton.
"""

import os
import re
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path
from zlib import crc32

import pytest
import torch
from hypothesis import HealthCheck, settings

from quick_interpreter import quicken_interpreter

GPU = torch.cuda.is_available()
if not GPU:
    assert "triton" not in sys.modules, "triton was imported before conftest.py could choose the interpreter"
    os.environ["TRITON_INTERPRET"] = "1"
    quicken_interpreter()
# What a terminal is like is the tests' to say, not that of whoever starts them.
for name in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
    os.environ.pop(name, None)
# Test shapes are tiny: a second thread only spins, and on a busy machine it makes the suite several times slower.
torch.set_num_threads(1)
# A machine may stand still for longer than any deadline of an example: what hangs is ended by pytest-timeout.
# The examples are the same in every run, or the suite would pass by chance; `pytest --hypothesis-profile search` draws
# others.
settings.register_profile("search", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("any machine", settings.get_profile("search"), derandomize=True)
settings.load_profile("any machine")
# Of processes that share the suite: what takes longest is begun first, or the others wait for it in the end.
LONGEST = (
    "tests/test_campaign.py", "tests/demo/test_demo.py", "tests/training/test_resumed_runs.py",
    "tests/test_what_a_notebook_gets_wrong.py", "tests/docs/test_examples.py", "tests/cli/test_evaluate.py",
    "tests/cli/test_evaluate_resumed.py", "tests/training/test_gpu_step.py", "tests/look/test_in_a_browser.py",
    "tests/kernels/test_topk_encode_cuda.py", "tests/kernels/test_topk_encode_cuda_compiles.py",
    "tests/training/test_run.py",
)  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    if "SAEVLM_FAST_CACHE" not in os.environ:
        # Not the user's, which may hold anything, or not be there to write to. Processes of pytest-xdist share it.
        os.environ["SAEVLM_FAST_CACHE"] = cache = tempfile.mkdtemp(prefix="saevlm-fast-tests-")
        config.add_cleanup(lambda: shutil.rmtree(cache, ignore_errors=True))
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False  # by number of tests: the order is `in_order`'s


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """What a test draws without a seed of its own does not depend on what this process has drawn before."""
    seed = crc32(item.nodeid.encode())
    torch.default_generator.manual_seed(seed)  # of the CPU; torch.manual_seed takes a millisecond where there is CUDA
    if GPU:
        torch.cuda.manual_seed_all(seed)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the Triton kernels run in this process: the GPU, or the CPU through the interpreter."""
    return torch.device("cuda" if GPU else "cpu")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):  # of pytest-xdist
        in_order(items)
    skip = pytest.mark.skip(reason="no GPU on this machine")
    minutes = pytest.mark.skip(reason="starts processes with torchrun, minutes long: pytest -m distributed")
    others = pytest.mark.skip(reason="imports other libraries: pytest -m interop")
    for item in items:
        if item.get_closest_marker("gpu") and not GPU:
            item.add_marker(skip)
        if item.get_closest_marker("distributed") and "distributed" not in config.option.markexpr:
            item.add_marker(minutes)
        if item.get_closest_marker("interop") and not asks_for_interop(config):
            item.add_marker(others)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Files of interop import the real libraries, some of which change torch for the whole process."""
    return True if collection_path.name == "interop" and not asks_for_interop(config) else None


def asks_for_interop(config: pytest.Config) -> bool:
    by_marker = re.search(r"(?<!not )\binterop\b", config.option.markexpr)
    return bool(by_marker) or any("formats/interop" in Path(arg).as_posix() for arg in config.args)


def in_order(items: list[pytest.Item]) -> None:
    """The longest files, then those of most tests."""
    files = [item.nodeid.partition("::")[0] for item in items]
    most, first = Counter(files), {file: i for i, file in enumerate(LONGEST)}
    items.sort(key=lambda item: (first.get(file := item.nodeid.partition("::")[0], len(first)), -most[file]))


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Of `-n auto`: one a core, as far as memory goes (a process takes up to 3 GiB); one where there is a GPU."""
    if GPU:
        return 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(1, min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2, memory >> 32, 8))
