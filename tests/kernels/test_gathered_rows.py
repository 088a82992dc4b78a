"""The kernel of a training batch gives torch's own bits."""

import pytest
import torch

from static_compile import TARGETS, Case, assert_no_spills

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n_rows", "d_in"), [(7, 3), (5, 1024), (4, 1500), (6, 2048)])
def test_rows_are_those_that_torch_gives(device, dtype, n_rows, d_in):
    from saevlm_fast.kernels.gathered_rows_triton import launch_gathered_rows

    torch.manual_seed(d_in)
    x_ND = (torch.randn(n_rows, d_in) * 10.0 ** torch.randint(-6, 5, (n_rows, d_in))).to(dtype).to(device)
    rows_B, divisor = torch.randint(n_rows, (9,), device=device), 17.3
    out_BD = torch.full((9, d_in), torch.nan, device=device)
    assert launch_gathered_rows(x_ND, rows_B, divisor, out_BD) is out_BD
    expected_BD = torch.div(x_ND[rows_B].float(), torch.full((1,), divisor, device=device))
    torch.testing.assert_close(out_BD, expected_BD, rtol=0, atol=0)


def test_static_compile_without_spills():
    from saevlm_fast.kernels.gathered_rows_triton import BLOCK_D, NUM_WARPS

    module, name = "saevlm_fast.kernels.gathered_rows_triton", "gathered_rows_kernel"
    given = {"rows_ptr": "*i64", "out_ptr": "*fp32", "divisor": "fp32", "d_in": "i32:16"}
    assert_no_spills(
        [
            Case(module, name, target, {"x_ptr": e} | given, {"BLOCK_D": BLOCK_D}, NUM_WARPS)
            for target in TARGETS
            for e in ("*fp32", "*fp16")
        ]
    )
