"""The commands as a user meets them: what they print, what they write, and how they refuse."""

import csv
import json
import os
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from command import ROOT, run
from saevlm_fast import __version__
from saevlm_fast.kernels import reference
from saevlm_fast.sae import SparseAutoencoder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    directory = tmp_path_factory.mktemp("data")
    text = run("synthetic", directory, "--rows", 3000, "--d-in", 32, "--d-embedding", 16, "--concepts", 60)
    assert "activations.npy" in text
    assert "embeddings.npy" in text
    return directory


@pytest.fixture(scope="module")
def sae(data, tmp_path_factory):
    output = tmp_path_factory.mktemp("sae") / "run"
    text = run("train", "--activations", data / "activations.npy", "--output", output, "--expansion", 4, "--k", 4,
               "--steps", 300, "--batch-size", 256, "--lr", "3e-3")  # fmt: skip
    for word in ("32 -> 128", "loss", "it/s", "ev", "l0", "dead", "explained_variance", f"wrote {output}"):
        assert word in text
    return output


def score(data, *arguments):
    return run(
        "ms-score", "--activations", data / "activations.npy", "--embeddings", data / "embeddings.npy", *arguments
    )


def test_version_and_shim():
    assert run("--version").strip() == __version__
    done = subprocess.run([sys.executable, "cli.py", "--version"], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == __version__


def test_a_real_process_ends_with_exit_code_2_and_no_traceback(tmp_path):
    command = [sys.executable, "-m", "saevlm_fast.cli", "train", "--activations", "no.npy", "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: no.npy: no such file")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("command", ["train", "ms-score", "synthetic"])
def test_help(command):
    assert "--help" in run(command, "--help")


@pytest.mark.parametrize(
    ("command", "default"),
    [("train", "[default: steps / 20, but"), ("harvest", "[default: cls]"), ("ms-score", "[default: 1 / E]")],
)
def test_help_shows_defaults_that_are_words(command, default, monkeypatch):
    """rich takes what stands in brackets for markup and drops it."""
    monkeypatch.setenv("COLUMNS", "300")
    assert default in run(command, "--help")


def test_resuming_says_that_there_was_nothing_to_continue(data, tmp_path):
    assert "no checkpoint yet: starting at step 0" in run(
        "train", "--activations", data / "activations.npy", "--output", tmp_path / "run", "--resume",
        "--steps", 3, "--batch-size", 8, "--expansion", 2, "--k", 2,
    )  # fmt: skip


def test_asking_for_help_does_not_cost_the_import_of_torch():
    command = [sys.executable, "-X", "importtime", "-m", "saevlm_fast.cli", "train", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    assert "| torch\n" not in done.stderr.replace("  ", "")


def test_scores_of_an_sae_match_the_definition(data, sae, tmp_path):
    text = score(data, "--sae", sae, "--output", tmp_path / "s.parquet")
    for word in ("mean +- std", "best", "quantile", "dead", "worst latents"):
        assert word in text
    table = pq.read_table(tmp_path / "s.parquet").to_pydict()
    assert list(table) == ["latent", "ms", "status", "n_active", "max_activation"]
    x, e = (torch.from_numpy(np.load(data / f"{name}.npy")) for name in ("activations", "embeddings"))
    with torch.no_grad():
        dense = SparseAutoencoder.from_pretrained(sae).encode(x).dense().double()
    expected = reference.monosemanticity(dense, e.double())
    torch.testing.assert_close(
        torch.tensor(table["ms"], dtype=torch.float64), expected, equal_nan=True, atol=1e-9, rtol=0
    )
    assert table["n_active"] == (dense > 0).sum(0).tolist()


def test_one_image_has_no_best_latents(tmp_path):
    np.save(tmp_path / "one.npy", np.ones((1, 4), np.float32))
    files = "--activations", tmp_path / "one.npy", "--embeddings", tmp_path / "one.npy"
    text = run("ms-score", *files, "--raw", "--output", tmp_path / "s.csv")
    assert "no latent has a defined score (1 images)" in text
    assert "best latents" not in text


def test_sae_latents_score_above_raw_neurons(data, sae, tmp_path):
    score(data, "--sae", sae, "--output", tmp_path / "sae.csv")
    score(data, "--raw", "--output", tmp_path / "raw.csv")
    means = []
    for name in ("sae.csv", "raw.csv"):
        with open(tmp_path / name) as file:
            means.append(np.mean([float(row["ms"]) for row in csv.DictReader(file) if row["status"] == "defined"]))
    assert means[0] > means[1] + 0.1


@pytest.mark.parametrize("similarity", ["dot", "rbf"])
def test_other_similarities(data, sae, tmp_path, similarity):
    score(data, "--sae", sae, "--output", tmp_path / "s.json", "--similarity", similarity)
    document = json.loads((tmp_path / "s.json").read_text())
    assert document["metadata"]["similarity"] == similarity
    assert len(document["latents"]) == 128


def test_matryoshka_with_groups(data, tmp_path):
    run("train", "--activations", data / "activations.npy", "--output", tmp_path / "m", "--d-sae", 100, "--k", 4,
        "--architecture", "matryoshka", "--groups", "0.1,0.4,0.5", "--steps", 5, "--batch-size", 64)  # fmt: skip
    assert SparseAutoencoder.from_pretrained(tmp_path / "m").config.group_sizes == (10, 40, 50)


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
        bad("too large", [*TRAIN, "--d-sae", "100000000000"], "memory"),
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
        bad("no sae", [*SCORE, "--output", "{tmp}/s.csv", "--sae", "{tmp}"], "no such file"),
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


def test_usage_errors_are_exit_code_2_too():
    assert "No such option" in run("train", "--activation", "x", "--output", "y", code=2)


def test_a_reader_that_has_gone_does_not_stop_the_work(tmp_path):
    """As `saevlm-fast ... | head -1` does to a long run."""
    reader, writer = os.pipe()
    os.close(reader)
    words = [sys.executable, "-m", "saevlm_fast.cli", "synthetic", str(tmp_path / "data"), "--rows", "50"]
    done = subprocess.run(words, stdout=writer, stderr=subprocess.PIPE, cwd=ROOT, timeout=120)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")
    assert (tmp_path / "data" / "embeddings.npy").is_file()
