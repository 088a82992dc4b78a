"""Scaled rows and sums of them: CPU path and Triton kernels against plain float64."""

import pytest
import torch

from saevlm_fast.kernels import scaled_rows as ops
from static_compile import TARGETS, Case, assert_no_spills

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0, 3), (1, 1), (300, 257), (17, 5)], ids=str)
def test_against_float64(shape, dtype, device, monkeypatch):
    from saevlm_fast.kernels import scaled_rows_triton as kernels

    monkeypatch.setattr(ops, "_CPU_ROWS", 7)
    generator = torch.Generator().manual_seed(0)
    emb_NE = torch.randn(shape, generator=generator).to(dtype)
    scale_N = torch.rand(shape[0], generator=generator, dtype=torch.float64)
    scaled_NE, close = emb_NE.double() * scale_N[:, None], {"rtol": 1e-14, "atol": 1e-14}
    assert torch.equal(ops.scaled_rows(emb_NE, scale_N), scaled_NE)
    assert torch.equal(ops.scaled_rows(emb_NE, None), emb_NE.double())
    on_device = emb_NE.to(device), scale_N.to(device)
    for sums_E in (ops.scaled_sum(emb_NE, scale_N), kernels.launch_scaled_sum(*on_device).cpu()):
        torch.testing.assert_close(sums_E, scaled_NE.sum(0), **close)
    for sqnorm_N in (ops.squared_norms(emb_NE), kernels.launch_squared_norms(on_device[0]).cpu()):
        torch.testing.assert_close(sqnorm_N, emb_NE.double().square().sum(1), **close)


def test_static_compile_without_spills():
    from saevlm_fast.kernels import scaled_rows_triton as kernels

    assert (kernels.BLOCK_N, kernels.BLOCK_E, kernels.SUM_ROWS, kernels.NUM_WARPS) == (4, 256, 256, 4)
    module = "saevlm_fast.kernels.scaled_rows_triton"
    signature = {f"{name}_ptr": "*fp64" for name in ("sqnorm", "scale", "parts")}
    signature |= {"emb_ptr": "*fp32", "n_rows": "i32", "d_emb": "i32:16"}
    tile = {"BLOCK_N": 4, "BLOCK_E": 256}
    assert_no_spills(
        [
            Case(module, name, target, signature, tile | more, num_warps=4)
            for target in TARGETS
            for name, more in (("squared_norms_kernel", {}), ("scaled_sum_kernel", {"ROWS": 256}))
        ]
    )
