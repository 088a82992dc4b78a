"""The real sae-lens loads what push lays out on the Hub: SAE.from_pretrained(repo, sae_id), from its own cache."""

import pytest
import torch

from command import run
from hub_server import hub_server
from saevlm_fast.config import SAEConfig
from saevlm_fast.formats.hub import resolve
from saevlm_fast.sae import SparseAutoencoder

sae_lens = pytest.importorskip("sae_lens")
pytestmark = pytest.mark.interop


@pytest.mark.parametrize("architecture", ["topk", "batch_topk", "matryoshka", "relu", "jumprelu"])
def test_sae_lens_loads_what_was_pushed(architecture, tmp_path, monkeypatch):
    from huggingface_hub import constants

    k = None if architecture in ("relu", "jumprelu") else 4
    groups = (16, 32) if architecture == "matryoshka" else ()
    sae = SparseAutoencoder(SAEConfig(8, 48, k, architecture, (16, 32) if groups else ()))
    with torch.no_grad():
        sae.b_dec.uniform_(-1, 1)
        sae.b_enc.normal_(std=0.1)
        sae.threshold.fill_(0.3)
    sae.save_pretrained(tmp_path / "sae")
    with hub_server(tmp_path / "cache") as hub:
        run("push", tmp_path / "sae", "me/saes", "--sae-id", "deep/layer_3")
        resolve("hf:me/saes/deep/layer_3")
        n = len(hub.log)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        theirs = sae_lens.SAE.from_pretrained("me/saes", "deep/layer_3")
        ours = SparseAutoencoder.from_pretrained("hf:me/saes/deep/layer_3")
        assert len(hub.log) == n, "the cache served both"
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        online = sae_lens.SAE.from_pretrained("me/saes", "deep/layer_3", force_download=True)
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        latents = theirs.encode(x)
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours(x), online(x), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours.encode(x).dense(), latents, rtol=1e-5, atol=1e-5)
    assert (latents > 0).sum() > 30


def test_the_list_of_releases_of_the_real_sae_lens():
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    from saevlm_fast.formats.places import sae_lens_release

    directory = get_pretrained_saes_directory()
    for release in [*directory][::17]:
        sae_id, path = next(iter(directory[release].saes_map.items()))
        found = sae_lens_release(f"saelens:{release}/{sae_id}")
        assert found.repo == directory[release].repo_id
        assert (found.sae_id or ".") == path.strip("/")
