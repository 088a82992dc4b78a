"""A latent in a notebook."""

import numpy as np
import pytest
import torch
from planted_scenes import COLOUR, HOSTILE, N, patch_shares

import saevlm_fast as sf
from saevlm_fast.box.scenes import COLOURS, Scenes


@pytest.mark.parametrize("batch_rows", [100, 4096])
def test_a_latent_draws_itself_with_its_patches(planted, batch_rows):
    rows, sae = sf.open_activations(planted / "store"), sf.SparseAutoencoder.from_pretrained(planted / "sae")
    shown = sf.show(3, rows, sae, n=5, batch_rows=batch_rows)
    share = patch_shares(Scenes(0, "test").batch(0, N))[..., COLOURS.index(COLOUR)].view(N, 8, 8)
    assert shown.heat is not None
    assert tuple(shown.heat.shape) == (5, 8, 8)
    assert shown.acts.tolist() == sorted(shown.acts.tolist(), reverse=True)
    for image_id, heat in zip(shown.ids, shown.heat):
        truth = share[N - 1 if HOSTILE in image_id else int(image_id[2:6])]
        assert float(heat[truth == 0].sum()) == 0
        assert float(heat[truth > 0.3].min()) > 0
    text = shown._repr_html_()
    assert text.count("<img src=") == 5
    assert shown.image.size == (5 * 132, 128)
    plain = sf.show(3, rows, sae, n=5, heat=False)
    differs = np.asarray(shown.pictures[0]).astype(int) - np.asarray(plain.pictures[0])
    lit = torch.from_numpy(np.abs(differs).max(2).reshape(8, 16, 8, 16).max((1, 3))) > 8
    assert torch.equal(lit, shown.heat[0] > 0)


def test_names_are_escaped_and_what_is_missing_is_said(planted):
    rows, sae = sf.open_activations(planted / "store"), sf.SparseAutoencoder.from_pretrained(planted / "sae")
    shown = sf.show(5, rows, sae, n=N, images=str(planted / "store"))
    assert "images are missing" in shown.note
    assert "onerror" in "".join(shown.ids)
    assert "<img src=x" not in shown._repr_html_()
    with pytest.raises(ValueError, match="latent: 16 is not within 0 to 15"):
        sf.show(16, rows, sae)
