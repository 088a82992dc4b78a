"""Every command on a GPU, on small inputs."""

import pytest

from command import run
from small_world import CALLS, build_world, words

# demo: its dry run takes steps of its own sizes.
COMMANDS = [name for name, call in CALLS.items() if "--device" in call and name != "demo"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return build_world(tmp_path_factory.mktemp("gpu") / "world")


@pytest.mark.gpu
@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_on_a_gpu_does_what_it_does_on_a_cpu(name, world, tmp_path, monkeypatch):
    monkeypatch.chdir(world)
    output = CALLS[name].get("--output")
    said = {}
    for device in ("cpu", "cuda"):
        call = words(name, device=device)
        if output is not None:
            call[call.index(output)] = str(tmp_path / device / output)
            (tmp_path / device).mkdir()
        said[device] = run(*call)
        assert output is None or (tmp_path / device / output).exists()
    assert len(said["cuda"].splitlines()) == pytest.approx(len(said["cpu"].splitlines()), abs=3)
