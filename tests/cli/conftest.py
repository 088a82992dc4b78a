"""Data that commands are tried on, and an SAE of them."""

import pytest

from command import run


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    directory = tmp_path_factory.mktemp("data")
    text = run("synthetic", directory, "--rows", 3000, "--d-in", 32, "--d-embedding", 16, "--concepts", 60)
    assert "activations.npy" in text
    assert "embeddings.npy" in text
    return directory


@pytest.fixture(scope="session")
def sae(data, tmp_path_factory):
    output = tmp_path_factory.mktemp("sae") / "run"
    text = run("train", "--activations", data / "activations.npy", "--output", output, "--expansion", 4, "--k", 4,
               "--steps", 300, "--batch-size", 256, "--lr", "3e-3")  # fmt: skip
    for word in ("32 -> 128", "loss", "it/s", "ev", "l0", "dead", "explained_variance", f"wrote {output}"):
        assert word in text
    return output
