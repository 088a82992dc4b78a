"""The benches of bench/gpu_check.sh: a chip is lent for minutes, and must not be what finds their faults.

They run in the small, and their figures mean nothing. The step `bench` of the check is `pytest bench -k smoke` here.
"""

import json
import shlex
import sys

import pytest

from bench.harvesting import whole_harvest
from bench.scoring import scores_on_device
from bench.training import bench_peers, other_steps, profile_step, whole_run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif("pretended_gpu.install" not in sys.modules, reason="bash tests/on_pretended_gpu.sh"),
]
STEP = "--d-in 16 --d-sae 64 --rows 32"


@pytest.fixture
def results(monkeypatch, tmp_path):
    """A bench's command line to what it writes."""

    def run(bench, line):
        output = tmp_path / "results.json"
        monkeypatch.setattr(sys, "argv", [bench.__name__, "--output", str(output), *shlex.split(line)])
        code = None
        try:
            bench.main()
        except SystemExit as end:
            code = end.code
        found = json.loads(output.read_text())
        assert not code, found
        return found

    return run


def names(found):
    return {each["name"] for each in found["benchmarks"] if each["stats"]["rounds"]}


@pytest.mark.parametrize("kind", other_steps.KINDS)
def test_other_steps(results, monkeypatch, kind):
    monkeypatch.setattr(profile_step, "N_BATCHES", 2)
    monkeypatch.setattr(other_steps, "ROUNDS", 1)
    monkeypatch.setattr(other_steps, "STEPS", 2)
    profile_step.planted_batches.cache_clear()
    (found,) = results(other_steps, f"{STEP} --kinds '{kind}'")["benchmarks"]
    assert found["stats"]["rounds"], found["extra_info"]
    assert found["extra_info"]["impl"] == "captured"


def test_profile_of_a_step(results, monkeypatch):
    for name, size in {"N_BATCHES": 2, "ROUNDS": 1, "REPLAYS": 1, "PROFILED": 1}.items():
        monkeypatch.setattr(profile_step, name, size)
    monkeypatch.setattr(profile_step, "rates", dict)  # of a chip
    profile_step.planted_batches.cache_clear()
    found = results(profile_step, f"{STEP} --k 4 --steps 4 --architectures topk")
    assert len(names(found)) == 3


def test_scores(results, monkeypatch):
    for name, size in {"ROUNDS": 1, "SMALL": 40, "LARGE": 64, "MIDDLE": 100}.items():
        monkeypatch.setattr(scores_on_device, name, size)
    monkeypatch.setattr(scores_on_device, "first_pass_of_a_process", lambda: [1.0])  # at full size
    found = results(scores_on_device, "--images 150 --latents 96 --width 12")
    assert len(names(found)) == 1 + len(scores_on_device.PASSES)


def test_a_whole_run(results):
    line = "--device cuda --architecture topk --d-in 16 --d-sae 64 --k 4 --batch-size 32 --n-rows 400 --steps 6"
    assert results(whole_run, line)["steps_per_second"] > 0


def test_a_whole_harvest(results):
    found = results(whole_harvest, "--tower tiny --images 24 --batch-size 8 --workers 1 --seconds 0.05")
    assert found["harvests"][0]["runs"][-1]["images"] == 24


def test_ours_beside_a_product(results):
    line = "--device cuda --dtype bfloat16 --architectures topk --k 4 --rounds 1 --turn-seconds 0.01"
    assert len(names(results(bench_peers, f"{STEP} {line} --peers"))) == 2
