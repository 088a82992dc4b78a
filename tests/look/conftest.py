"""The pages of an SAE whose latents were planted by hand."""

import re
from pathlib import Path

import pytest
from planted_scenes import plant

from command import run


@pytest.fixture(scope="session")
def planted(tmp_path_factory) -> Path:
    """photos, store, embeddings, sae: helpers/planted_scenes.py."""
    root = tmp_path_factory.mktemp("planted")
    plant(root)
    return root


@pytest.fixture(scope="session")
def report(planted, tmp_path_factory) -> Path:
    """The pages."""
    output = tmp_path_factory.mktemp("report") / "pages"
    words = ("--sae", planted / "sae", "--activations", planted / "store", "--embeddings", planted / "embeddings")
    text = run("report", *words, "--output", output, "--device", "cpu")
    assert re.search(r"16 latents, \d+ images, .* MB; open ", text)
    return output
