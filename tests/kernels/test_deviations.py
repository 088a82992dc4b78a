"""The second pass's kernels compile; tests/scoring/test_trust_on_gpu.py holds them against the CPU's way."""

import pytest
import torch

from saevlm_fast.kernels import deviations_triton as kernels
from static_compile import TARGETS, Case, assert_no_spills


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(0, 3), (1, 1), (9, 300)], ids=str)
def test_centred_rows(shape, dtype, device):
    generator = torch.Generator().manual_seed(0)
    emb_NE = torch.randn(shape, generator=generator).to(device)
    scale_N, mean_E = (torch.rand(n, generator=generator, dtype=torch.float64).to(device) for n in shape)
    v_NE, along_N = kernels.launch_centred_rows(emb_NE, scale_N, mean_E, dtype)
    expected_NE = emb_NE.double() * scale_N[:, None] - mean_E
    torch.testing.assert_close(v_NE, expected_NE.to(dtype))
    torch.testing.assert_close(along_N, expected_NE @ mean_E, rtol=1e-12, atol=1e-12)


def static_cases(target: str) -> list[Case]:
    module = "saevlm_fast.kernels.deviations_triton"
    doubles = "acts scale mean along square low total level ms den powers change_sums changes weights lost weighted"
    signature = {f"{name}_ptr": "*fp64" for name in doubles.split()}
    signature |= {f"{name}_ptr": "*i64" for name in ("images", "order", "offsets", "above", "latents")}
    signature |= {f"{name}_ptr": "*fp32" for name in ("emb", "v", "products")}
    signature |= dict.fromkeys(("n_rows", "n_latents", "stride", "n_weights"), "i32") | {"d_emb": "i32:16"}
    latent = {"POWERS": 6, "INTERVALS": True, "BLOCK": 128}
    return [
        Case(module, "centred_rows_kernel", target, signature, {"BLOCK_N": 4, "BLOCK_E": 256}, num_warps=4),
        Case(module, "latent_deviations_kernel", target, signature, latent, num_warps=1),
        Case(module, "image_deviations_kernel", target, signature, {"BLOCK": 32}, num_warps=1),
    ]


def test_static_compile_without_spills():
    assert (kernels.ROWS_BLOCK_N, kernels.ROWS_BLOCK_E, kernels.ROWS_WARPS) == (4, 256, 4)
    chosen = kernels.LATENT_BLOCK, kernels.LATENT_WARPS, kernels.IMAGE_BLOCK, kernels.IMAGE_WARPS
    assert chosen == (128, 1, 32, 1)
    assert_no_spills([case for target in TARGETS for case in static_cases(target)])
