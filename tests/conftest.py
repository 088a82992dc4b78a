"""One mode a process: with a GPU the kernels are compiled, without one they run in Triton's interpreter.

Triton reads TRITON_INTERPRET when it is first imported, so it is set here, before anything imports triton.
"""

import os
import sys

import pytest
import torch
from hypothesis import HealthCheck, settings

from quick_interpreter import quicken_interpreter

GPU = torch.cuda.is_available()
if not GPU:
    assert "triton" not in sys.modules, "triton was imported before conftest.py could choose the interpreter"
    os.environ["TRITON_INTERPRET"] = "1"
    quicken_interpreter()
# Test shapes are tiny: a second thread only spins, and on a busy machine it makes the suite several times slower.
torch.set_num_threads(1)
# A machine may stand still for longer than any deadline of an example: what hangs is ended by pytest-timeout.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the Triton kernels run in this process: the GPU, or the CPU through the interpreter."""
    return torch.device("cuda" if GPU else "cpu")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    skip = pytest.mark.skip(reason="no GPU on this machine")
    minutes = pytest.mark.skip(reason="starts processes with torchrun, minutes long: pytest -m distributed")
    for item in items:
        if item.get_closest_marker("gpu") and not GPU:
            item.add_marker(skip)
        if item.get_closest_marker("distributed") and "distributed" not in config.option.markexpr:
            item.add_marker(minutes)


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Of `-n auto`: one a core, as far as memory goes (a process takes up to 3 GiB); one where there is a GPU."""
    if GPU:
        return 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(1, min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2, memory >> 32, 8))
