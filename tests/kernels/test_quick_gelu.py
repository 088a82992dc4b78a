"""QuickGELU's kernel: rounding by rounding what torch's three operations give."""

import pytest
import torch

from static_compile import TARGETS, Case, assert_no_spills

HALVES = [torch.bfloat16, torch.float16]


def every_number(dtype, device="cpu"):
    return torch.arange(-(1 << 15), 1 << 15, device=device).to(torch.int16).view(dtype)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
def test_every_number_within_a_rounding(device, dtype):
    """The interpreter rounds to bfloat16 in a way of its own, which shows where the gate is nearly shut."""
    from saevlm_fast.kernels.quick_gelu_triton import launch_quick_gelu

    half = torch.bfloat16 if dtype == torch.float32 else dtype
    x = every_number(half).to(dtype).to(device)
    found, expected = launch_quick_gelu(x).cpu(), (x * torch.sigmoid(1.702 * x)).cpu()
    rtol = max(4 * torch.finfo(dtype).eps, 2e-5)  # a chip's exp is no closer in float32
    atol = 2e-3 if dtype == torch.bfloat16 else torch.finfo(half).tiny
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol, equal_nan=True)


@pytest.mark.parametrize("shape", [(0,), (1,), (3, 5, 7), (1023,), (1025,)])
def test_shapes(device, shape):
    from saevlm_fast.kernels.quick_gelu_triton import launch_quick_gelu

    x = torch.randn(shape, device=device)
    torch.testing.assert_close(launch_quick_gelu(x), x * torch.sigmoid(1.702 * x))


def test_static_compile_without_spills():
    from saevlm_fast.kernels.quick_gelu_triton import BLOCK, NUM_WARPS

    module, name = "saevlm_fast.kernels.quick_gelu_triton", "quick_gelu_kernel"
    assert_no_spills(
        [
            Case(module, name, target, {"x_ptr": e, "out_ptr": e, "n_elements": "i32"}, {"BLOCK": BLOCK}, NUM_WARPS)
            for target in TARGETS
            for e in ("*bf16", "*fp16")
        ]
    )


@pytest.mark.gpu
def test_every_bfloat16_on_a_gpu_has_the_same_bits():
    from saevlm_fast.kernels.quick_gelu_triton import launch_quick_gelu

    x = every_number(torch.bfloat16, "cuda")
    assert torch.equal(launch_quick_gelu(x).view(torch.int16), (x * torch.sigmoid(1.702 * x)).view(torch.int16))


def test_a_kernel_that_does_not_compile_is_named() -> None:
    """And the worker that met it goes on."""
    module, signature = "saevlm_fast.kernels.quick_gelu_triton", {"x_ptr": "*fp32"}
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"(?s)has no attribute 'none'.*none\{\} w4 s2 sm_80 does not compile"):
            assert_no_spills([Case(module, "none", "sm_80", signature)])
