"""The checks of a device that bench/gpu_check.sh runs, on a CPU and small: they pass, write results, and can fail."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.scoring import scores_on_device
from bench.training import other_steps


def run(module, monkeypatch, path, *arguments):
    """(exit status, results)."""
    command = ["check", "--device", "cpu", "--output", str(path), *map(str, arguments)]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(SystemExit) as ended:
        module.main()
    return ended.value.code, json.loads(path.read_text())["benchmarks"]


SMALL_STEPS = ("--d-in", 8, "--d-sae", 24, "--rows", 16)


def test_other_steps_pass_and_are_written(monkeypatch, tmp_path):
    monkeypatch.setattr(other_steps, "ROUNDS", 1)
    monkeypatch.setattr(other_steps, "STEPS", 2)
    status, results = run(other_steps, monkeypatch, tmp_path / "steps.json", *SMALL_STEPS)
    assert status == 0
    assert [one["extra_info"]["operation"] for one in results] == [
        f"training step, {kind}" for kind in other_steps.KINDS
    ]
    assert all(one["stats"]["median"] > 0 for one in results)


def test_other_steps_fail_where_what_is_frozen_moves(monkeypatch, tmp_path):
    monkeypatch.setattr(other_steps, "ROUNDS", 1)
    monkeypatch.setattr(other_steps, "STEPS", 2)
    monkeypatch.setitem(other_steps.KINDS, "frozen-decoder", other_steps.Kind("topk", {}))
    kinds = "--kinds", "frozen-decoder", "frozen-encoder"
    status, results = run(other_steps, monkeypatch, tmp_path / "steps.json", *SMALL_STEPS, *kinds)
    assert status == 1
    assert results[0]["extra_info"]["failed"] == "frozen-decoder: W_dec has moved"
    assert "failed" not in results[1]["extra_info"]


def test_scores_agree_and_what_differs_fails(monkeypatch, tmp_path):
    monkeypatch.setattr(scores_on_device, "ROUNDS", 1)
    sizes = "--images", 90, "--latents", 64, "--width", 16
    status, results = run(scores_on_device, monkeypatch, tmp_path / "scores.json", *sizes)
    assert status == 0
    assert all(one["extra_info"]["images/s"] > 0 for one in results)
    wrong = scores_on_device.neurons

    def shifted(data):
        found, expected = wrong(data)
        return found, expected + 1e-3

    monkeypatch.setattr(scores_on_device, "PASSES", {"raw neurons": scores_on_device.Pass(shifted)})
    status, results = run(scores_on_device, monkeypatch, tmp_path / "scores.json", *sizes)
    assert status == 1
    assert "16 of 16 scores differ" in results[0]["extra_info"]["failed"]


def test_results_of_several_calls_are_put_together(tmp_path):
    result = {"name": "a", "stats": {"median": 0.002}, "extra_info": dict.fromkeys(("case", "dtype", "impl"), "x")}
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        result["extra_info"]["operation"] = f"of the {name}"
        (tmp_path / name / "bench.json").write_text(json.dumps({"benchmarks": [result], "runs": []}))
        (tmp_path / name / "summary.txt").write_text(f"{name}: passed\n")
    script = Path(__file__).parents[2] / "bench" / "gpu_check.sh"
    environment = os.environ | {"OUT": str(tmp_path / "all"), "PYTHON": sys.executable}
    command = ["bash", str(script), "combine", str(tmp_path / "first"), str(tmp_path / "second")]
    subprocess.run(command, env=environment, check=True)
    assert (tmp_path / "all" / "summary.txt").read_text() == "first: passed\nsecond: passed\n"
    tables = (tmp_path / "all" / "tables.md").read_text()
    assert "of the first" in tables
    assert "of the second" in tables
    for folders in ([], [str(tmp_path / "all")]):  # nothing to read, and what is written meanwhile
        refused = subprocess.run([*command[:3], *folders], env=environment, stdin=subprocess.DEVNULL, check=False)
        assert refused.returncode == 2
    assert (tmp_path / "all" / "summary.txt").read_text() == "first: passed\nsecond: passed\n"
