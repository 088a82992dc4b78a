"""The range of every latent: CPU path and Triton kernel against dense activations."""

import pytest
import torch

from saevlm_fast.kernels.latent_range import latent_range
from static_compile import TARGETS, Case, assert_no_spills


def make_codes(n_images: int, n_latents: int):
    """Grouped codes and dense activations; latents that fire never, always, always with ties, now and then."""
    generator = torch.Generator().manual_seed(0)
    acts_NS = torch.rand(n_images, n_latents, generator=generator, dtype=torch.float64) + 0.1
    fires_NS = torch.rand(n_images, n_latents, generator=generator) < 0.4
    fires_NS[:, 0], fires_NS[:, 1:3] = False, True
    acts_NS[:, 2] = acts_NS[:, 2].round(decimals=1)
    acts_NS = acts_NS * fires_NS
    latents_M, images_M = torch.nonzero(acts_NS.T).unbind(1)
    offsets_S1 = torch.nn.functional.pad(fires_NS.sum(0).cumsum(0), (1, 0))
    return acts_NS.T[latents_M, images_M], offsets_S1, acts_NS


def by_kernel(acts_M, offsets_S1, n_images, device):
    from saevlm_fast.kernels.latent_range_triton import launch_latent_range

    return [t.cpu() for t in launch_latent_range(acts_M.to(device), offsets_S1.to(device), n_images)]


@pytest.mark.parametrize("way", ["cpu", "kernel"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n_images", [1, 2, 700])
def test_against_dense(n_images, dtype, way, device):
    acts_M, offsets_S1, acts_NS = make_codes(n_images, 6)
    acts_M, acts_NS = acts_M.to(dtype), acts_NS.to(dtype)
    padded_M = torch.nn.functional.pad(acts_M, (0, 3), value=9.0)
    if way == "cpu":
        low_S, high_S, n_low_S = latent_range(padded_M, offsets_S1, n_images)
    else:
        low_S, high_S, n_low_S = by_kernel(padded_M, offsets_S1, n_images, device)
    always_S = (acts_NS > 0).all(0)
    assert torch.equal(low_S, acts_NS.amin(0))
    assert torch.equal(high_S, acts_NS.amax(0))
    assert torch.equal(n_low_S, torch.where(always_S, (acts_NS == low_S).sum(0), 0))
    assert low_S.dtype == dtype


def test_no_latents_no_images(device):
    nothing, offsets_S1 = torch.empty(0), torch.zeros(4, dtype=torch.int64)
    for sums in (latent_range(nothing, offsets_S1, 0), by_kernel(nothing, offsets_S1, 0, device)):
        assert all(t.tolist() == [0] * 3 for t in sums)
    assert all(len(t) == 0 for t in by_kernel(nothing, offsets_S1[:1], 0, device))


def test_opcheck():
    acts_M, offsets_S1, _ = make_codes(20, 6)
    torch.library.opcheck(torch.ops.saevlm_fast.latent_range.default, (acts_M, offsets_S1, 20))


def test_errors():
    with pytest.raises(ValueError, match=r"acts_M: shape \(2, 2\)"):
        latent_range(torch.ones(2, 2), torch.tensor([0]), 1)
    with pytest.raises(ValueError, match=r"offsets_S1: shape \(0,\)"):
        latent_range(torch.ones(2), torch.empty(0, dtype=torch.int64), 1)


def test_static_compile_without_spills():
    from saevlm_fast.kernels import latent_range_triton as kernels

    assert (kernels.BLOCK, kernels.NUM_WARPS) == (128, 1)
    names = ("acts", "low", "high")
    signature = {f"{name}_ptr": "*fp64" for name in names} | {"offsets_ptr": "*i64", "n_low_ptr": "*i64"}
    signature |= {"n_images": "i32"}
    module = "saevlm_fast.kernels.latent_range_triton"
    assert_no_spills(
        [Case(module, "latent_range_kernel", target, signature, {"BLOCK": 128}, num_warps=1) for target in TARGETS]
    )
