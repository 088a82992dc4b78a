"""The trusted score's kernels beside the CPU's way, on a GPU or through the interpreter."""

import pytest
import torch
from test_trust import NAMES, close, make_data, two_passes

from saevlm_fast.scoring import intake, monosemanticity, null, second_pass, sums


@pytest.mark.parametrize(("similarity", "always"), [("cosine", True), ("dot", False)])
def test_kernels_find_what_the_cpu_does(similarity, always, device, monkeypatch):
    """On a GPU; elsewhere in the interpreter. Twice the same bits. always: of latents that fire on every image too."""
    acts_NS, emb_NE = make_data()
    if not always:
        acts_NS[5] = 0.0
    weights_SW = torch.rand(len(NAMES), 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = two_passes(acts_NS, emb_NE, weights_SW, (10, 23), similarity=similarity, block_rows=25)
    if device.type == "cpu":
        for module in (intake, monosemanticity, null, second_pass, sums):
            monkeypatch.setattr(module, "on_gpu", lambda _: True)
    acts_NS, emb_NE = acts_NS.to(device), emb_NE.to(device)
    options = {"similarity": similarity, "block_rows": 25, "device": device}
    found, again = (two_passes(acts_NS, emb_NE, weights_SW, (10, 23), **options) for _ in range(2))
    for name in ("n_eff_S", "half_ms_2S", "se_S", "mean_changes_N", "null_mean_changes_N", "weighted_NW", "null_sd_S"):
        close(getattr(found, name), getattr(expected, name), 1e-9)
        assert torch.equal(getattr(found, name).nan_to_num(9), getattr(again, name).nan_to_num(9))
    close(found.p_S, expected.p_S, 1e-6)
