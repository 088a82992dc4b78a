"""The result of a score by the kernel: against status_of and a division."""

import pytest
import torch

from saevlm_fast.kernels.score_result_triton import score_result
from saevlm_fast.scoring.sums import STATUSES, status_of
from static_compile import TARGETS, Case, assert_no_spills


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("n_latents", [0, 300])
def test_against_torch(n_latents, sparse, device):
    generator = torch.Generator().manual_seed(0)
    num_S, den_S = torch.rand(2, n_latents, generator=generator, dtype=torch.float64)
    low_S, high_S = torch.randint(-1, 2, (2, n_latents), generator=generator).double()
    den_S[5:9] = 0.0
    active_S, at_low_S = torch.randint(0, 4, (2, n_latents), generator=generator)
    at_low_S += 7  # of ten images: three to none are above
    above_S = torch.where((low_S > 0) | (not sparse), 10 - at_low_S, active_S)
    expected_S = status_of(low_S, high_S, above_S)
    inputs = (t.to(device) for t in (num_S, den_S, low_S, high_S, active_S, at_low_S))
    ms_S, highest_S, n_active_S, status_S = score_result(*inputs, 10, sparse, STATUSES)
    assert torch.equal(status_S, expected_S)
    assert torch.equal(highest_S, high_S)
    assert torch.equal(n_active_S, active_S)
    ms_truth_S = (num_S / den_S).masked_fill(expected_S != STATUSES.index("defined"), torch.nan)
    torch.testing.assert_close(ms_S, ms_truth_S, rtol=1e-15, atol=0, equal_nan=True)
    if n_latents:
        assert len(expected_S.unique()) == len(STATUSES)


def test_static_compile_without_spills():
    from saevlm_fast.kernels import score_result_triton as kernels

    assert (kernels.BLOCK, kernels.NUM_WARPS) == (256, 4)
    signature = {f"{name}_ptr": "*fp64" for name in ("num", "den", "low", "high", "ms", "new_high")}
    signature |= {f"{name}_ptr": "*i64" for name in ("active", "at_low", "new_active")} | {"status_ptr": "*i8"}
    signature |= {"n_images": "i32", "n_latents": "i32"}
    more = {name.upper(): number for number, name in enumerate(STATUSES)} | {"SPARSE": True, "BLOCK": 256}
    module = "saevlm_fast.kernels.score_result_triton"
    assert_no_spills([Case(module, "score_result_kernel", target, signature, more) for target in TARGETS])
