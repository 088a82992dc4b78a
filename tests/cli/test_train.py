"""saevlm-fast train."""

import json
import re
import tomllib

import numpy as np
import pytest
from PIL import Image

from command import run
from saevlm_fast.sae import SparseAutoencoder


def test_resuming_says_that_there_was_nothing_to_continue(data, tmp_path):
    assert "no checkpoint yet: starting at step 0" in run(
        "train", "--activations", data / "activations.npy", "--output", tmp_path / "run", "--resume",
        "--steps", 3, "--batch-size", 8, "--expansion", 2, "--k", 2,
    )  # fmt: skip


@pytest.mark.parametrize("more", [(), ("--k", "2,3"), ("--dry-run",)])
@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (np.ones((1, 8)), "has one row"),
        (np.ones((9000, 8)), "all 9,000 rows of .* are equal"),
        (np.zeros((9, 8)), "equal"),
    ],
)
def test_rows_that_teach_nothing_are_refused_before_anything_is_said(rows, message, more, tmp_path):
    np.save(tmp_path / "x.npy", rows.astype(np.float32))
    given = ("--activations", tmp_path / "x.npy", "--steps", 2, "--batch-size", 4, "--output", tmp_path / "out")
    text = " ".join(run("train", *given, *more, code=2).split())
    assert re.fullmatch(f"error: activations: .*{message}.*: there is nothing to learn", text)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ((), "images: one row of residual-1-cls in .*: there is nothing to learn"),
        (("--k", "2,3"), "images: one row of residual-1-cls in .*: there is nothing to learn"),
        (("--dry-run",), "images: one row of residual-1-cls in .*: there is nothing to learn"),
        (("--tokens", "patches", "--buffer", 3, "--batch-size", 4), "buffer: .*"),
        (("--tokens", "patches", "--k", 9999), "k: .*"),
    ],
)
def test_images_that_cannot_be_trained_on_are_refused_before_anything_is_said(more, message, tmp_path):
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "photos" / "one.png")
    given = ("--model", "hf:tiny-clip", "--images", tmp_path / "photos", "--layer", 1, "--device", "cpu", "--steps", 2)
    text = " ".join(run("train", *given, "--output", tmp_path / "out", *more, code=2).split())
    assert re.fullmatch(f"error: {message}", text)
    assert not (tmp_path / "out").exists()


def test_rows_of_which_one_differs_are_trained_on(tmp_path):
    rows = np.ones((9000, 8), np.float32)
    rows[-1] = 2
    np.save(tmp_path / "x.npy", rows)
    given = ("--activations", tmp_path / "x.npy", "--steps", 2, "--batch-size", 4)
    assert run("train", *given, "--output", tmp_path / "out", "--dry-run").startswith("dry run")


def test_matryoshka_with_groups(data, tmp_path):
    run("train", "--activations", data / "activations.npy", "--output", tmp_path / "m", "--d-sae", 100, "--k", 4,
        "--architecture", "matryoshka", "--groups", "0.1,0.4,0.5", "--steps", 5, "--batch-size", 64)  # fmt: skip
    assert SparseAutoencoder.from_pretrained(tmp_path / "m").config.group_sizes == (10, 40, 50)


def test_a_control_says_what_it_is_wherever_it_is_looked_at(data, tmp_path):
    sized = ["--activations", data / "activations.npy", "--expansion", 2, "--k", 2, "--steps", 3, "--batch-size", 8]
    output = tmp_path / "soft"
    more = ["--control", "soft-frozen", "--control-cosine", 0.9, "--mono-weight", 0.1]
    said = run("train", *sized, *more, "--mono-embeddings", data / "activations.npy", "--output", output)
    assert "control soft-frozen: batch_topk SAE" in said
    recorded = tomllib.loads((output / "settings.toml").read_text())["train"]
    assert (recorded["control"], recorded["control_cosine"], recorded["mono_weight"]) == ("soft-frozen", 0.9, 0.1)
    assert "**It is a control (soft-frozen): its decoder's rows were kept near" in (output / "README.md").read_text()
    assert "soft-frozen" in run("inspect", output)
    untrained = tmp_path / "untrained"
    assert "0 steps of 8" in run("train", *sized, "--control", "untrained", "--output", untrained)
    record = json.loads((untrained / "metrics.jsonl").read_text().splitlines()[-1])
    assert record["step"] == 0
    assert "eval/explained_variance" in record
