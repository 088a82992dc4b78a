"""The bench scripts that are not pytest benches: they run, report what is missing, and their JSON becomes tables."""

import contextlib
import io
import json
import multiprocessing
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import pytest

from bench.training import whole_run
from saevlm_fast.kernels.cpu_loops import numba_is_here

ROOT = Path(__file__).resolve().parents[2]


def two_cores():
    return numba_is_here() and hasattr(os, "sched_getaffinity") and len(os.sched_getaffinity(0)) > 1


def start_script(name, *arguments):
    """In this process, since importing torch anew costs seconds: exit code, stdout, stderr."""
    module, stdout, stderr = import_module(f"bench.{name}"), io.StringIO(), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(stdout),
        contextlib.redirect_stderr(stderr),
    ):
        patch.setattr(sys, "argv", [name, *map(str, arguments)])
        code = 0
        try:
            module.main()
        except SystemExit as end:
            code = end.code or 0
    return subprocess.CompletedProcess(name, code, stdout.getvalue(), stderr.getvalue())


def run_script(name, *arguments):
    done = start_script(name, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_script_is_a_module_to_run():
    command = [sys.executable, "-m", "bench.report", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={"PATH": "/usr/bin:/bin"})
    assert (done.returncode, "--markdown" in done.stdout) == (0, True), done.stderr


@pytest.fixture(scope="module")
def peer_results(tmp_path_factory):
    """Of processes that are forks of one that has torch, and not of this one: they know its end by their pipes'."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["bench.training.bench_peers"])
    path = tmp_path_factory.mktemp("peers") / "peers.json"
    small = ("--d-in", 16, "--d-sae", 64, "--rows", 8, "--k", 4, "--rounds", 2, "--turn-seconds", 0.01)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(multiprocessing, "get_context", lambda method: context)
        run_script("training.bench_peers", "--output", path, *small, "--peers", "sparsify")
    return path


def test_ours_and_the_floor_are_timed_side_by_side(peer_results):
    timed = json.loads(peer_results.read_text())["benchmarks"]
    results = {one["extra_info"]["impl"]: one for one in timed}
    assert set(results) == {"sparsify", "saevlm-fast", "encoder GEMM"}
    assert len({one["extra_info"]["operation"] for one in timed}) == 3, "without --architectures, all that peers have"
    ours = results["saevlm-fast"]
    assert len(ours["stats"]["data"]) >= 2
    assert ours["extra_info"]["this_over_encoder_gemm"] > 0
    assert ours["extra_info"]["peak_bytes"] > 0


def test_a_peer_has_a_speed_or_a_reason(peer_results):
    peer = next(
        one for one in json.loads(peer_results.read_text())["benchmarks"] if one["extra_info"]["impl"] == "sparsify"
    )
    assert (peer["stats"] is None) == ("failed" in peer["extra_info"])


def result(impl, operation, n_images, median, **info):
    info |= {"operation": operation, "case": f"N={n_images}", "impl": impl, "dtype": "float64 sums", "device": "cpu"}
    return {"stats": {"median": median}, "extra_info": info | {"shape": {"N": n_images}, "peak_bytes": 2**30}}


def test_markdown_tables(peer_results, tmp_path):
    scores = tmp_path / "scores.json"
    scores.write_text(json.dumps({"benchmarks": [
        result("streamed", "score by number of images", 2000, 0.25),
        result("double_loop", "score by number of images", 2000, 0.5, seconds_of_all=1234.0),
    ]}))  # fmt: skip
    run_script("report", peer_results, scores, "--markdown", tmp_path / "tables.md")
    text = (tmp_path / "tables.md").read_text()
    assert "| topk | 64 | 8 | saevlm-fast" in text
    assert "| 2,000 | 0.25 s, 1.00 GiB | 1,200 s (extrapolated) |" in text
    assert "sparsify: no clip" in text


def test_what_is_merged_is_read_again(tmp_path):
    kernels = [
        {"kernel": "product_kernel", "us": 811.0, "launches": 1.0},
        {"kernel": "fill", "us": 2.0, "launches": 3.0},
    ]
    files = {
        "steps": {
            "benchmarks": [result("captured", "topk training step", 8, 0.0022, kernels=kernels, kernels_us=813.0)]
        },
        "harvest": {
            "settings": {"tower": "large", "dtype": "bfloat16", "batch_size": "64"},
            "forward": {"images_per_second": {"in memory": 1000.0}},
            "harvests": [{"workers": 8, "images_per_second": {"long run": 950.0}}],
            "device": "H200",
            "commit": "abc",
        },
    }
    for name, content in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    run_script("report", *(tmp_path / f"{name}.json" for name in files), "--merge", tmp_path / "all.json")
    run_script("report", tmp_path / "all.json", "--markdown", tmp_path / "tables.md")
    text = (tmp_path / "tables.md").read_text()
    assert "topk training step, N=8: 2.200 ms a replay, of which 0.813 ms in 4 kernels." in text
    assert "| product_kernel | 811.0 | 1 |" in text
    assert "| large | bfloat16 | 64 | 8 | 950 | 1,000 | 95 % | H200 | abc |" in text


@pytest.mark.parametrize(
    "content",
    ["no", "[1]", '{"benchmarks": 3}', '{"benchmarks": [{}]}', '{"step_share_of_loop": 1}', '{"benchmarks": []}'],
)
def test_a_report_of_nothing_keeps_what_is_there(content, tmp_path):
    (tmp_path / "f.json").write_text(content)
    (tmp_path / "t.md").write_text("<!-- bench/report.py writes what follows -->\ntables\n")
    done = start_script("report", tmp_path / "f.json", "--markdown", tmp_path / "t.md")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "tables" in (tmp_path / "t.md").read_text()


def test_a_folder_is_no_output_file(tmp_path):
    done = start_script("training.bench_peers", "--output", tmp_path)
    assert done.returncode == 2
    assert f"{tmp_path} is a directory, must be a file" in done.stderr


def test_text_table_has_every_result(peer_results):
    text = run_script("report", peer_results)
    assert all(name in text for name in ("sparsify", "saevlm-fast", "encoder GEMM"))


def test_whole_run_adds_up(tmp_path, monkeypatch):
    """Where nothing is taken for a pause: on a busy machine what looks for them may itself be held up."""
    monkeypatch.setattr(whole_run, "pauses", lambda: contextlib.nullcontext([]))
    run_script("training.whole_run", "--output", tmp_path / "run.json", "--n-rows", 500, "--d-in", 16, "--d-sae", 64,
               "--k", 4, "--batch-size", 32, "--steps", 20, "--page-cache", 1)  # fmt: skip
    measured = json.loads((tmp_path / "run.json").read_text())
    seconds = measured["seconds"]
    assert 0 < seconds["step"] < seconds["loop"] < seconds["total"]
    assert seconds["data"] >= 0
    assert 0 < measured["step_share_of_run"] <= measured["step_share_of_loop"] <= 1


def test_whole_harvest_adds_up(tmp_path):
    run_script("harvesting.whole_harvest", "--output", tmp_path / "harvest.json", "--tower", "tiny", "--images", 24,
               "--batch-size", 4, "--dtype", "float32", "--workers", 0, 1, "--processes", 1, "--ready-batches", 1,
               "--seconds", 0.01)  # fmt: skip
    measured = json.loads((tmp_path / "harvest.json").read_text())
    assert measured["forward"]["images_per_second"].keys() == {
        "forward on batches in the device's memory",
        "forward on ready batches in the host's memory",
    }
    assert [harvest["workers"] for harvest in measured["harvests"]] == [0, 1]
    for harvest in measured["harvests"]:
        assert [run["images"] for run in harvest["runs"]] == [8, 24]
        for run in harvest["runs"]:
            assert 0 < run["parts"]["loop"] < run["seconds"]
            assert 0 < run["waiting_for_the_first_batch"] + run["waiting_for_the_others"] < run["parts"]["loop"]


@pytest.mark.skipif(not numba_is_here(), reason="no numba on this machine")
def test_a_step_is_timed_by_how_far_cores_are(monkeypatch, tmp_path):
    """The first turn is far, during the second they are moved, the others are near."""
    from bench.training import near_and_far

    distances = iter([170e-9, 170e-9, 26e-9, 26e-9, 26e-9])
    monkeypatch.setattr(near_and_far, "seconds_between_cores", lambda: next(distances))
    monkeypatch.setattr(near_and_far, "SIZES", {256: (32, 64)})
    timed = near_and_far.turns("topk", 256, 4, warm_up=1, n_turns=4)
    assert [turn["cores"] for turn in timed] == ["far", None, "near", "near"]
    near, far = near_and_far.results("topk", 256, 4, timed)
    assert (near["name"], far["stats"]["rounds"]) == ("topk training step[d_sae 256, k 4, near]", 1)
    ratios = [turn["step"] / turn["gemm"] for turn in timed[2:]]
    assert near["extra_info"]["this_over_encoder_gemm"] == median(ratios)
    assert near["extra_info"]["shape"] == {"B": 64, "d_in": 32, "d_sae": 256, "k": 4}
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1, 2}, raising=False)
    refused = start_script("training.near_and_far", "--output", tmp_path / "f.json")
    assert (refused.returncode, "3 cores and " in refused.stderr) == (2, True)
    (tmp_path / "f.json").write_text(json.dumps({"benchmarks": [near, far]}))
    assert "d_sae 256, k 4, far" in run_script("report", tmp_path / "f.json")


@pytest.mark.skipif(not two_cores(), reason="not two cores of a Linux with numba")
def test_a_byte_takes_its_time_from_core_to_core(monkeypatch):
    """And every thread may use all cores afterwards. What may not be chosen is told, and nobody waits."""
    from bench.helpers import cores
    from bench.helpers.cores import seconds_between_cores, where

    before = os.sched_getaffinity(0)
    assert seconds_between_cores() > 1e-9
    assert os.sched_getaffinity(0) == before
    choose, (here, there) = os.sched_setaffinity, sorted(before)[:2]
    for refused in (here, there):
        refuse = lambda process, cores, refused=refused: 1 / 0 if cores == {refused} else choose(process, cores)  # noqa: E731
        with monkeypatch.context() as patch:
            patch.setattr(os, "sched_setaffinity", refuse)
            with pytest.raises(ZeroDivisionError):
                seconds_between_cores()
    times = iter([0.0])
    with monkeypatch.context() as patch:
        patch.setattr(cores, "time", SimpleNamespace(perf_counter=lambda: next(times)))
        with pytest.raises(StopIteration):  # as by Ctrl-C, while the other waits
            seconds_between_cores()
    assert os.sched_getaffinity(0) == before
    assert [where(seconds) for seconds in (26e-9, 80e-9, 170e-9)] == ["near", "between", "far"]
