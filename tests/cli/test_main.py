"""The program as a user meets it: version, help, start-up, and how it refuses."""

import os
import runpy
import subprocess
import sys

import numpy as np
import pytest

from command import ROOT, run
from saevlm_fast import __version__


def test_version_and_shim():
    assert run("--version").strip() == __version__
    done = subprocess.run([sys.executable, "cli.py", "--version"], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == __version__


def test_a_real_process_ends_with_exit_code_2_and_no_traceback(tmp_path):
    command = [sys.executable, "-m", "saevlm_fast.cli", "train", "--activations", "no.npy", "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: activations: no.npy: no such file")
    assert done.stderr.count("\n") == 1


def test_ctrl_c_after_the_work_does_not_undo_its_exit_code():
    """As Python ends, which takes a moment with torch. Somebody's script that goes on still has its Ctrl-C."""
    code = """
import atexit, os, signal, sys
atexit.register(os.kill, os.getpid(), signal.SIGINT)
def script():
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        print("ignored")
class AtTheEnd:
    def __del__(self, kill=os.kill, this=os.getpid(), number=signal.SIGINT):
        kill(this, number)
sys.at_the_end = AtTheEnd()
sys.argv = ["saevlm-fast", "--version"]
from saevlm_fast.cli import main
try:
    main()
except SystemExit as ended:
    script()
    raise
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, __version__, "")


def test_a_container_that_allows_rough_products_does_not_decide_for_a_command():
    """NVIDIA's allow TF32 for every product on a GPU, Amazon's bfloat16 on ARM, by what torch reads at its import."""
    code = """
import sys
sys.argv = ["saevlm-fast", "--version"]
from saevlm_fast.cli import main
try:
    main()
except SystemExit:
    import os, torch
    assert not [name for name in os.environ if "FPMATH" in name or "TF32" in name]
    print(torch.backends.cuda.matmul.fp32_precision, torch.get_float32_matmul_precision())
"""
    names = "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "DNNL_DEFAULT_FPMATH_MODE", "ONEDNN_DEFAULT_FPMATH_MODE"
    environment = os.environ | dict(zip(names, ("1", "BF16", "BF16")))
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=environment)
    _, precisions = done.stdout.strip().split("\n")
    assert precisions in ("none highest", "ieee highest")


@pytest.mark.parametrize("command", ["train", "ms-score", "synthetic"])
def test_help(command):
    assert "--help" in run(command, "--help")


@pytest.mark.parametrize(
    ("command", "default"),
    [
        ("train", "[default: steps / 20, but"),
        ("harvest", "[default: the forward's; codes float16]"),
        ("ms-score", "[default: 1 / E]"),
    ],
)
def test_help_shows_defaults_that_are_words(command, default, monkeypatch):
    """rich takes what stands in brackets for markup and drops it."""
    monkeypatch.setenv("COLUMNS", "300")
    assert default in run(command, "--help")


def test_asking_for_help_does_not_cost_the_import_of_torch():
    command = [sys.executable, "-X", "importtime", "-m", "saevlm_fast.cli", "train", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    assert "| torch\n" not in done.stderr.replace("  ", "")


def bad(name, arguments, message):
    return pytest.param(arguments, message, id=name)


TRAIN = ["train", "--activations", "{data}/activations.npy", "--output", "{tmp}/run", "--steps", "3"]
SCORE = ["ms-score", "--activations", "{data}/activations.npy", "--embeddings", "{data}/embeddings.npy"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        bad("missing data", ["train", "--activations", "{tmp}/no.npy", "--output", "{tmp}/run"], "no such file"),
        bad("empty data", ["train", "--activations", "{tmp}/empty.npy", "--output", "{tmp}/run"], "empty"),
        bad("pickle", ["train", "--activations", "{tmp}/pickle.pt", "--output", "{tmp}/run"], "pickle.pt"),
        bad("integers", ["train", "--activations", "{tmp}/int.npy", "--output", "{tmp}/run"], "int64"),
        bad("vector", ["train", "--activations", "{tmp}/vector.npy", "--output", "{tmp}/run"], "shape"),
        bad("nan", ["train", "--activations", "{tmp}/nan.npy", "--output", "{tmp}/run"], "row 7"),
        bad("k", [*TRAIN, "--k", "999", "--d-sae", "64"], "k: 999 must be between 1 and d_sae = 64"),
        bad("groups", [*TRAIN, "--architecture", "matryoshka", "--groups", "0.5,0.6"], "sum to 1.1, not to 1"),
        bad("groups of others", [*TRAIN, "--groups", "0.5,0.5"], "groups: [0.5, 0.5] are of matryoshka; the"),
        bad("groups text", [*TRAIN, "--architecture", "matryoshka", "--groups", "a,b"], "groups: 'a' is not a number"),
        bad("architecture", [*TRAIN, "--architecture", "gated"], "architecture: 'gated' is not one of"),
        bad("lr", [*TRAIN, "--lr", "fast"], "lr: 'fast' is not a number"),
        bad("lr 0", [*TRAIN, "--lr", "0"], "lr: 0.0 must be a positive number"),
        bad("device", [*TRAIN, "--device", "tpu"], "device: 'tpu'"),
        bad("no gpu", [*TRAIN, "--device", "cuda:7"], "device: 'cuda:7'"),
        bad("both sizes", [*TRAIN, "--d-sae", "64", "--expansion", "2"], "d_sae: give either"),
        bad("expansion", [*TRAIN, "--expansion", "-1"], "expansion: -1 must be positive"),
        bad("steps", [*TRAIN[:-1], "0"], "steps: 0 must be at least 1"),
        bad("output is a file", [*TRAIN[:4], "{tmp}/int.npy/x", "--steps", "3"], "int.npy is a file"),
            bad("too large", [*TRAIN, "--d-sae", "2000000000"], "memory"),
            bad("beyond the kernels", [*TRAIN, "--d-sae", "100000000000"], "d_sae: 100000000000 must be below 2^31"),
        bad("endless", [*TRAIN, "--dead-after", "9" * 23], "dead_after: 9"),
        bad("infinite", [*TRAIN, "--expansion", "inf"], "expansion: inf"),
        bad("batch of scores", [*SCORE, "--output", "{tmp}/s.csv", "--raw", "--batch-size", "0"], "batch_size: 0"),
        bad("nothing known", ["inspect", "{tmp}"], "nothing to inspect in it"),
        bad("resume and force", [*TRAIN, "--resume", "--force"], "exclude each other"),
        bad("file in the way", [*TRAIN[:4], "{tmp}/int.npy", "--steps", "3"], "int.npy"),
        bad("neither", [*SCORE, "--output", "{tmp}/s.csv"], "sae: give either --sae DIR or --raw"),
        bad("both", [*SCORE, "--output", "{tmp}/s.csv", "--raw", "--sae", "{sae}"], "sae: give either"),
        bad("suffix", [*SCORE, "--output", "{tmp}/s.xlsx", "--raw"], "output: "),
        bad("similarity", [*SCORE, "--output", "{tmp}/s.csv", "--raw", "--similarity", "l2"], "similarity: 'l2'"),
        bad("gamma", [*SCORE, "--output", "{tmp}/s.csv", "--raw", "--gamma", "1"], "gamma: 1.0 is of rbf"),
        bad("no sae", [*SCORE, "--output", "{tmp}/s.csv", "--sae", "{tmp}/none"], "no such file"),
        bad("rows", [*SCORE[:3], "--embeddings", "{tmp}/few.npy", "--output", "{tmp}/s.csv", "--raw"], "2999"),
        bad("width", ["ms-score", "--activations", "{tmp}/wide.npy", *SCORE[3:], "--output", "{tmp}/s.csv", "--sae",
                      "{sae}"], "33"),
        bad("zero embedding", [*SCORE[:3], "--embeddings", "{tmp}/zero.npy", "--output", "{tmp}/s.csv", "--raw"], "11"),
        bad("rows of synthetic", ["synthetic", "{tmp}/d", "--rows", "0"], "rows: 0 must be at least 1"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_exit_code_2(arguments, message, data, sae, tmp_path):
    x, e = np.load(data / "activations.npy"), np.load(data / "embeddings.npy")
    nan, zero = x.copy(), e.copy()
    nan[7, 3], zero[11] = np.nan, 0
    (tmp_path / "empty.npy").touch()
    (tmp_path / "pickle.pt").write_bytes(b"\x80\x04c__builtin__\neval\n.")
    for name, matrix in {"int": x.astype(np.int64), "vector": x[0], "nan": nan, "zero": zero, "few": e[:-1],
                         "wide": np.concatenate([x, x[:, :1]], 1)}.items():  # fmt: skip
        np.save(tmp_path / f"{name}.npy", matrix)
    before = sorted(p.name for p in tmp_path.iterdir())
    text = run(*(str(a).format(data=data, sae=sae, tmp=tmp_path) for a in arguments), code=2)
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, text
    assert message in errors[0]
    if arguments[0] == "ms-score":
        assert sorted(p.name for p in tmp_path.iterdir()) == before, "nothing half written"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["train", "--activation", "x"],
            "--activation: no such option; did you mean '--activations'? (saevlm-fast train --help lists all)",
        ),
        (["trian"], "no such command 'trian'; did you mean 'train'? (saevlm-fast --help lists all)"),
        (["train", "--steps"], "option '--steps' requires an argument"),
        (["train", "extra"], "got unexpected extra argument(s) (extra): all that train takes is given by an option"),
        (
            ["convert", "--sae", "x", "y"],
            "--sae: no such option; SOURCE stands without a name, as convert SOURCE OUTPUT",
        ),
        (["push", "--sae-idd", "x"], "--sae-idd: no such option; did you mean '--sae-id'?"),
        (["train", "--resume=3"], "'--resume' does not take a value"),
        (["train", "--steps", "x"], "steps: 'x' is not a whole number"),
        (["train", "--steps", "1" * 5000], f"steps: '{'1' * 59} is not a whole number"),
        (["train", "--steps", "1,5"], "steps: "),
        (["synthetic"], "output: needed; give OUTPUT, or output in the file of --config"),
    ],
)
def test_what_is_no_command_line_is_one_line_and_exit_code_2(words, message):
    text = run(*words, code=2)
    assert text.startswith("error: ")
    assert text.count("\n") == 1
    assert message in text


def test_without_words_the_commands_are_listed():
    text = run(code=2)
    assert "steering-score" in text
    assert "error: " not in text


def test_a_reader_that_has_gone_does_not_stop_the_work(tmp_path):
    """As `saevlm-fast ... | head -1` does to a long run."""
    reader, writer = os.pipe()
    os.close(reader)
    words = [sys.executable, "-m", "saevlm_fast.cli", "synthetic", str(tmp_path / "data"), "--rows", "50"]
    done = subprocess.run(words, stdout=writer, stderr=subprocess.PIPE, cwd=ROOT, timeout=120)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")
    assert (tmp_path / "data" / "embeddings.npy").is_file()


def test_a_screening_that_is_none_is_refused_at_once(monkeypatch):
    monkeypatch.setenv("SAEVLM_FAST_SCREENING", "nonsense")
    assert run("--version", code=2) == "error: SAEVLM_FAST_SCREENING: 'nonsense' is neither 0 nor 1\n"


def test_the_dtype_of_training_is_said_to_be_gone():
    assert "--dtype: is gone; steps are float32" in run("train", "--dtype", "bfloat16", code=2)


def test_a_device_that_is_not_here_is_refused_before_anything_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    np.save(tmp_path / "x.npy", np.eye(8, 4, dtype=np.float32))
    text = run("train", "--activations", tmp_path / "x.npy", "--output", tmp_path / "run", "--device", "cuda", code=2)
    assert text == "error: device: 'cuda' asked for, but torch sees no GPU\n"


def test_the_package_is_the_command(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["saevlm_fast", "--version"])
    with pytest.raises(SystemExit):
        runpy.run_module("saevlm_fast", run_name="__main__")
    assert capsys.readouterr().out.strip() == __version__
