"""saevlm-fast train."""

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
