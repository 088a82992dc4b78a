"""Every command on a GPU, on small inputs."""

from functools import cache

import pytest
import torch
from result_numbers import numbers_in

from command import run
from small_world import CALLS, build_world, words

# demo: its dry run takes steps of its own sizes.
ON_THE_HOST = ("doctor", "human-agreement")  # facts alone, and a dozen numbers
COMMANDS = [name for name, call in CALLS.items() if "--device" in call and name != "demo"]


SECOND = pytest.param("cuda:1", marks=pytest.mark.skipif("torch.cuda.device_count() < 2", reason="one GPU"))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return build_world(tmp_path_factory.mktemp("gpu") / "world")


@pytest.fixture(scope="module")
def figures_of(world, tmp_path_factory):
    """(command, device) -> its numbers, each once."""

    @cache
    def of(name, device):
        output, call = CALLS[name].get("--output"), words(name, device=device)
        path = tmp_path_factory.mktemp(name) / str(output)
        if output is not None:
            call[call.index(output)] = str(path)
        assert run(*call)
        if output is None:
            return []
        assert path.exists()
        return numbers_in(path)

    return of


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cuda", SECOND])
@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_on_a_gpu_does_what_it_does_on_a_cpu(name, device, world, figures_of, monkeypatch):
    monkeypatch.chdir(world)
    expected = figures_of(name, "cpu")
    for each in range(torch.cuda.device_count()):
        torch.cuda.reset_peak_memory_stats(each)
    before = [torch.cuda.max_memory_allocated(each) for each in range(torch.cuda.device_count())]
    found = figures_of(name, device)
    used = [torch.cuda.max_memory_allocated(each) > held for each, held in enumerate(before)]
    if name not in ON_THE_HOST:
        assert used == [each == (torch.device(device).index or 0) for each in range(len(used))], "where it was"
    assert found == pytest.approx(expected, rel=1e-2, abs=1e-3, nan_ok=True)
