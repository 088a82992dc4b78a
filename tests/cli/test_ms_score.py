"""saevlm-fast ms-score."""

import csv
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from command import run
from saevlm_fast.cli import terminal
from saevlm_fast.cli.terminal import Bar
from saevlm_fast.data.writing import ActivationWriter
from saevlm_fast.kernels import reference
from saevlm_fast.sae import SparseAutoencoder


def score(data, *arguments):
    return run(
        "ms-score", "--activations", data / "activations.npy", "--embeddings", data / "embeddings.npy", *arguments
    )


def test_best_and_worst_latents_fit_the_terminal(data, sae, tmp_path, monkeypatch):
    monkeypatch.setattr(terminal.out, "width", 80)
    text = score(data, "--sae", sae, "--output", tmp_path / "s.parquet")
    shown = text[text.index("best latents") : text.index("no untrained SAE")].splitlines()
    assert len(shown) > 4
    assert max(map(len, shown)) <= 80


def test_scores_of_an_sae_match_the_definition(data, sae, tmp_path):
    text = score(data, "--sae", sae, "--output", tmp_path / "s.parquet")
    for word in ("mean +- std", "best", "quantile", "dead", "worst latents"):
        assert word in text
    table = pq.read_table(tmp_path / "s.parquet").to_pydict()
    best = text.split("best latents on 10 images or more (images it fires on)  ")[1].split()
    assert best[1:3] == [f"{table['ms'][int(best[0][:-1])]:.3f}", f"({table['n_active'][int(best[0][:-1])]:,})"]
    plain = ["latent", "ms", "status", "n_active", "max_activation"]
    more = ["corrected", "n_eff", "se", "ms_low", "ms_high", "null_sd", "z", "p", "above_null"]
    assert list(table) == plain + more
    score(data, "--sae", sae, "--output", tmp_path / "one.parquet", "--one-pass")
    once = pq.read_table(tmp_path / "one.parquet").to_pydict()
    assert list(once) == plain
    np.testing.assert_allclose(once["ms"], table["ms"], rtol=0, atol=1e-12)
    x, e = (torch.from_numpy(np.load(data / f"{name}.npy")) for name in ("activations", "embeddings"))
    with torch.no_grad():
        dense = SparseAutoencoder.from_pretrained(sae).encode(x).dense().double()
    expected = reference.monosemanticity(dense, e.double())
    torch.testing.assert_close(
        torch.tensor(table["ms"], dtype=torch.float64), expected, equal_nan=True, atol=1e-9, rtol=0
    )
    assert table["n_active"] == (dense > 0).sum(0).tolist()


@pytest.mark.parametrize(
    "more",
    [
        ("--pool", "max"),
        ("--pool", "mean", "--one-pass"),
        ("--pool", "max", "--controls", 2),
        ("--pool", "max", "--variant", "visaebench"),
        ("--variant", "patch"),
        ("--variant", "patch", "--one-pass"),
    ],
)
def test_the_bar_counts_images_and_ends_full(sae, tmp_path, monkeypatch, more):
    """Of a store with three rows an image."""
    x_BD, e_BE = torch.randn(90, 32), torch.randn(90, 6)
    items = {"image": [f"{i // 3}" for i in range(90)], "token": [0, 1, 2] * 30}
    for name, rows in (("x", x_BD), ("patches", e_BE)):
        with ActivationWriter(tmp_path / name, rows.shape[1], torch.float32, {}, 40) as writer:
            writer.append(rows, items)
    np.save(tmp_path / "e.npy", e_BE[:30].numpy())
    seen = []

    class Watched(Bar):
        def update(self, done, *more):
            seen.append((done, self.total))
            super().update(done, *more)

    monkeypatch.setattr("saevlm_fast.cli.ms_score.Bar", Watched)
    embeddings = tmp_path / ("patches" if "patch" in more else "e.npy")
    files = "--sae", sae, "--activations", tmp_path / "x", "--embeddings", embeddings
    run("ms-score", *files, "--output", tmp_path / "s.parquet", "--batch-size", 12, *more)
    done = [number for number, _ in seen]
    assert done == sorted(done)
    assert seen[-1][0] == seen[-1][1]
    assert done[-1] == 30 * {"--controls": 6, "--one-pass": 1}.get(more[2] if len(more) > 2 else "", 2)


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


def test_an_sae_that_cannot_hold_its_scores_is_told_of_as_such(data, tmp_path):
    words = "ms-score", "--activations", data / "activations.npy", "--embeddings", data / "embeddings.npy", "--sae"
    assert f"error: sae: {tmp_path}/none: no such file or folder" in run(*words, tmp_path / "none", code=2)
    (tmp_path / "sae.pt").write_bytes(b"")
    assert f"error: output: needed with an SAE that is a file, {tmp_path}/sae.pt" in run(
        *words, tmp_path / "sae.pt", code=2
    )


@pytest.mark.parametrize("similarity", ["dot", "rbf"])
def test_other_similarities(data, sae, tmp_path, similarity):
    score(data, "--sae", sae, "--output", tmp_path / "s.json", "--similarity", similarity)
    document = json.loads((tmp_path / "s.json").read_text())
    assert document["metadata"]["similarity"] == similarity
    assert len(document["latents"]) == 128
