"""saevlm-fast train."""

import json
import tomllib

from command import run
from saevlm_fast.sae import SparseAutoencoder


def test_resuming_says_that_there_was_nothing_to_continue(data, tmp_path):
    assert "no checkpoint yet: starting at step 0" in run(
        "train", "--activations", data / "activations.npy", "--output", tmp_path / "run", "--resume",
        "--steps", 3, "--batch-size", 8, "--expansion", 2, "--k", 2,
    )  # fmt: skip


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
