"""What the tests of this folder share."""

import pytest

from command import run
from saevlm_fast.config import SAEConfig
from saevlm_fast.sae import SparseAutoencoder

_PAIRS = ("harvest", "--model", "hf:tiny-llava", "--point", "language", "--layer", 1, "--workers", 0, "--device", "cpu")


@pytest.fixture(scope="session")
def pairs_of_the_box():
    """The command that harvests some scenes on the box's LLaVA, half of them with a wrong caption."""
    return (*_PAIRS, "--images", "scenes:test:24", "--wrong-captions", 0.5, "--prompt", "Describe the image.")


@pytest.fixture(scope="session")
def box(pairs_of_the_box, tmp_path_factory):
    """The command that reads their store with an SAE."""
    path = tmp_path_factory.mktemp("box")
    run(*pairs_of_the_box, "--output", path / "store")
    sae = SparseAutoencoder(SAEConfig(128, 64, 8, "topk"))
    sae.reset_parameters(0)
    sae.save_pretrained(path / "sae")
    return ("cross-modal", "--activations", path / "store", "--sae", path / "sae", "--device", "cpu")
