"""Every command on a GPU, on small inputs."""

import pytest
import torch

from command import run
from saevlm_fast.results import found as results
from small_world import CALLS, build_world, words

# demo: its dry run takes steps of its own sizes.
ON_THE_HOST = ("doctor", "human-agreement")  # facts alone, and a dozen numbers
COMMANDS = [name for name, call in CALLS.items() if "--device" in call and name != "demo"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return build_world(tmp_path_factory.mktemp("gpu") / "world")


@pytest.mark.gpu
@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_on_a_gpu_does_what_it_does_on_a_cpu(name, world, tmp_path, monkeypatch):
    monkeypatch.chdir(world)
    output = CALLS[name].get("--output")
    figures = {}
    for device in ("cpu", "cuda"):
        call = words(name, device=device)
        if output is not None:
            call[call.index(output)] = str(tmp_path / device / output)
            (tmp_path / device).mkdir()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.max_memory_allocated()
        assert run(*call)
        if device == "cuda" and name not in ON_THE_HOST:
            assert torch.cuda.max_memory_allocated() > before, "it was not there"
        if output is not None:
            path = tmp_path / device / output
            assert path.exists()
            found = results.find(path)
            figures[device] = list(numbers_of(results.describe(found)["figures"])) if found else []
    if figures:
        assert figures["cuda"] == pytest.approx(figures["cpu"], rel=1e-2, abs=1e-3, nan_ok=True)


def numbers_of(figures):
    """Those in it, in its order."""
    if isinstance(figures, dict):
        figures = list(figures.values())
    for each in figures if isinstance(figures, list) else [figures]:
        if isinstance(each, dict | list):
            yield from numbers_of(each)
        elif isinstance(each, int | float):
            yield each
