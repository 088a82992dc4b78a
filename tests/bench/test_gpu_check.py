"""bench/gpu_check.sh without a GPU: which steps it runs in which order, what fails it; and a GPU's goals in a table."""

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from bench.goals import GOALS, goal_rows

ROOT = Path(__file__).parents[2]
# Answers as a machine of one GPU would; a step's command is written down, and fails where a file of its name lies.
PYTHON = """#!/usr/bin/env bash
case "$1" in
-) echo fake-gpu ;;
-c) echo 1 ;;
*) echo "$*" >>"$NOTES/commands"; [ ! -e "$NOTES/fails" ] || ! grep -qf "$NOTES/fails" <<<"$*" ;;
esac
"""
STEPS = (
    "profile_6144 profile_16384 profile_65536 train_long train_dead train_host peers_65536 peers_16384 peers_6144 "
    "scores pairs harvest other_steps train_eager bench"
).split()


@pytest.fixture
def check(tmp_path):
    """check(*steps, **environment): exit status and lines of the summary, each less its time."""
    (tmp_path / "python").write_text(PYTHON)
    (tmp_path / "python").chmod(0o755)
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / "a.whl").touch()

    def run(*steps, **more):
        known = {"PYTHON": tmp_path / "python", "NOTES": tmp_path, "OUT": tmp_path / "out"} | more
        environment = os.environ | {name: str(value) for name, value in known.items()}
        command = ["bash", str(ROOT / "bench" / "gpu_check.sh"), *steps]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        return done.returncode, (tmp_path / "out" / "summary.txt").read_text().splitlines()

    return run


def test_all_steps_in_their_order(check, tmp_path):
    status, lines = check(PEERS=tmp_path / "wheels")
    assert status == 0
    with tarfile.open(tmp_path / "out" / "logs.tar.gz") as kept:
        assert {f"logs/{name}.log" for name in STEPS} <= set(kept.getnames())
    names = [line.split(":")[0] for line in lines]
    assert names[0] == names[-1] == "gpu_check"
    assert sorted(names[1:6]) == ["commands", "demo", "gpu_tests", "kernel_tests", "ranks"], "side by side"
    assert names[6:-1] == STEPS
    commands = (tmp_path / "commands").read_text()
    assert "pip install" in commands
    assert "--time-limit=35" in commands, "of 60 s for pairs"


def test_what_fails_or_does_not_exist_or_finds_no_time_is_told(check, tmp_path):
    (tmp_path / "fails").write_text("whole_harvest\npip\n")
    status, lines = check("harvest", "scores", "nothing", PEERS=tmp_path / "wheels")
    assert status == 1
    assert "peers: their wheels were not installed" in lines
    assert any(line.startswith("harvest: exit status 1") for line in lines)
    assert any(line.startswith("scores: exit status 0") for line in lines)
    assert "nothing: there is no such step" in lines
    assert lines[-1] == "gpu_check: FAILED: harvest nothing "
    status, lines = check("scores", LIMIT=4)
    assert (status, lines[1]) == (1, "peers: not run, PEERS names no folder of wheels")
    assert lines[2] == "scores: not run, no time is left"


def refusal(*arguments, **more):
    """Exit status and what is said; the process sees no OUT but that given."""
    environment = {name: value for name, value in os.environ.items() if name != "OUT"} | more
    command = ["bash", str(ROOT / "bench" / "gpu_check.sh"), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def test_an_interpreter_without_torch_is_named(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('no torch here')\n")
    (tmp_path / "python").write_text(f'#!/usr/bin/env bash\nPYTHONPATH={tmp_path} exec {sys.executable} "$@"\n')
    (tmp_path / "python").chmod(0o755)
    status, said = refusal(PYTHON=str(tmp_path / "python"), OUT=str(tmp_path / "out"))
    assert status == 2
    assert "cannot import torch (no torch here); PYTHON names another interpreter" in said
    assert "Traceback" not in said
    assert not (tmp_path / "out").exists()


def test_combine_writes_nothing_where_something_is_missing(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "summary.txt").write_text("gpu_check: chip\n")
    out = tmp_path / "out"
    assert refusal("combine", str(tmp_path / "a")) == (2, "combine: OUT names no folder\n")
    missing = f"combine: there is no {tmp_path}/a/bench.json, and no measurement in {tmp_path}/a/logs.tar.gz\n"
    assert refusal("combine", str(tmp_path / "a"), OUT=str(out)) == (2, missing)
    assert not out.exists()


def test_of_a_call_that_was_ended_the_measurements_are_there(tmp_path):
    """What lies in logs.tar.gz after each step is what `combine` takes where no bench.json was written."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "summary.txt").write_text("gpu_check: chip\n")
    (tmp_path / "json").mkdir()
    found = result("topk training step", "d_sae 16384", "captured", 0.8, shape={"B": 1}) | {"name": "a step"}
    (tmp_path / "json" / "profile.json").write_text(json.dumps({"benchmarks": [found]}))
    with tarfile.open(tmp_path / "a" / "logs.tar.gz", "w:gz") as kept:
        kept.add(tmp_path / "json", "json")
    status, said = refusal("combine", str(tmp_path / "a"), OUT=str(tmp_path / "out"), PYTHON=sys.executable)
    assert status == 0, said
    assert json.loads((tmp_path / "out" / "bench.json").read_text())["benchmarks"][0]["name"] == "a step"


def result(operation, case, impl, ms, **more):
    info = {"operation": operation, "case": case, "impl": impl, "dtype": "float32", "device": "chip"} | more
    return {"stats": {"median": ms / 1e3}, "extra_info": info}


def test_goals_beside_what_was_measured():
    step = "topk training step", "d_sae 16384"
    results = [
        result(*step, "captured", 1.5),  # of a call before
        result(*step, "captured", 0.8),
        result("matryoshka training step", "d_sae 16384", "captured", 1.04),
        result(*step, "sparsify", 5.0, this_over_ours=5.04, dtype="bfloat16", duties="many"),
        result("topk encode", "d_sae 65536", "captured", 0.9, dtype="bfloat16"),
        result("pair sums of raw neurons, rbf", "N=10000, K=1024", "pairwise", 0.0, failed="wrong"),
    ]
    run = {"device": "chip", "settings": {"d_sae": "16384"}, "steps_per_second": 437.0, "eager_share": 1.0}
    on_host = run | {"eager_share": 0.001, "settings": {"d_sae": "16384", "data_on": "host"}}
    dying = [on_host | {"settings": {"d_sae": "16384", "data_on": "auto", "concepts": n}} for n in ("None", "2048")]
    assert goal_rows([], dying) == [], "train_dead's latents die: it has no goal"
    living = run | {"steps_per_second": 950.0, "eager_share": 0.001}
    living |= {"settings": {"d_sae": "16384", "concepts": "16384"}}
    runs = [living, run, on_host, *dying]
    rows = {row[0]: row[1:] for row in goal_rows(results, runs)}
    assert len(rows) == len(GOALS)
    assert rows["TopK step, 16,384 latents"] == ["<= 0.9 ms", "0.8 ms", "yes"]
    assert rows["matryoshka step over TopK's, 16,384 latents"] == ["<= 1.25x", "1.3x", "no"]
    assert rows["TopK step of sparsify over ours, 16,384 latents"] == [">= 5x", "5.04x", "yes"]
    assert rows["train at 16,384 latents"] == [">= 900 steps/s", "950 steps/s", "yes"]
    assert rows["TopK encode, 65,536 latents"] == ["<= 1.05 ms", "", "not measured"], "bfloat16 is another way"
    assert rows["all pairs, rbf, N=10000, K=1024"][2] == "not measured", "it failed"
    assert sum(row[2] != "not measured" for row in rows.values()) == 4
    assert goal_rows([result(*step, "captured", 0.8, device="cpu")], []) == []
