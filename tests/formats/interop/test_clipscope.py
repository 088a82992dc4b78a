"""CLIP-Scope's TopKSAE, its checkpoint saved and its own forward."""

import pytest
import torch

from foreign_files import D, Made, S, assert_same

clipscope = pytest.importorskip("clipscope.sae")
pytestmark = pytest.mark.interop


@pytest.mark.parametrize("k", [1, 4])
def test_equal_to_its_own_forward(tmp_path, k):
    torch.manual_seed(k)
    theirs = clipscope.TopKSAE(k=k, n_features=S, d_in=D, device="cpu")
    value = {"k": k, "n_features": S, "d_in": D, "model_state_dict": theirs.state_dict()}

    def forward(x_BD):
        out = theirs.double().forward_verbose(x_BD)
        return out["latent"].detach(), out["reconstruction"].detach()

    made = Made("clip_scope", {"11_resid/1200013184.pt": value}, forward, open="11_resid/1200013184.pt")
    plain = made.read(tmp_path)
    assert_same(plain, made, torch.float32)
    assert plain.metadata["layer"] == 11
