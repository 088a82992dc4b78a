"""Pair sums for any similarity: CPU path and Triton kernels against the pair-by-pair float64 definition."""

import pytest
import torch
from launches import counted_launches

from saevlm_fast.kernels import pairwise_similarity, reference
from saevlm_fast.kernels.common import SIMILARITIES
from saevlm_fast.kernels.pairwise_similarity import (
    all_pairs_sums,
    distinct_pair_products,
    pairwise_gram_sums,
    pairwise_sums,
    prepare_embeddings,
)
from sparse_codes import group_by_latent
from static_compile import TARGETS, Case, assert_no_spills

SHAPES = [(1, 1, 1), (2, 1, 3), (67, 37, 19), (129, 5, 40), (64, 33, 16)]


@pytest.fixture
def poison():
    """torch.empty comes filled with NaN, so that an element nobody writes is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def make_data(n_images: int, n_latents: int, d_emb: int, seed: int = 0):
    """Non-negative activations, a third of them non-zero, with a dead, a single, a dominated and a full latent."""
    generator = torch.Generator().manual_seed(seed)
    r_NK = torch.rand(n_images, n_latents, generator=generator, dtype=torch.float64)
    r_NK *= torch.rand(n_images, n_latents, generator=generator) < 0.3
    if n_latents > 4 and n_images > 2:
        r_NK[:, 0] = 0
        r_NK[:, 1] = torch.arange(n_images) == 1
        r_NK[:, 2] = 0
        r_NK[0, 2], r_NK[n_images - 1, 2] = 1.0, 1e-6
        r_NK[:, 3] = torch.rand(n_images, generator=generator)
        r_NK[n_images // 2, 4] = 1e6
    return r_NK, torch.randn(n_images, d_emb, generator=generator, dtype=torch.float64)


def assert_sums(actual, truth, tolerance: float) -> None:
    """num to a share of den (the score's own error; den's scale stands in for it under dot), den relatively."""
    (num, den), (num_truth, den_truth) = actual, truth
    assert num.dtype == den.dtype == torch.float64
    some = den_truth > 0
    torch.testing.assert_close(num[some] / den_truth[some], num_truth[some] / den_truth[some], rtol=0, atol=tolerance)
    torch.testing.assert_close(den, den_truth, rtol=tolerance, atol=0)
    assert (num[~some] == 0).all()


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cpu_against_reference(shape, similarity, monkeypatch):
    # Small blocks, so that these shapes meet several tiles, latent panels, batches and heavy segments.
    monkeypatch.setattr(pairwise_similarity, "_CPU_IMAGE_BLOCK", 50)
    monkeypatch.setitem(pairwise_similarity._PAIR_BLOCK, "cpu", 30)
    monkeypatch.setattr(pairwise_similarity, "_LATENT_BLOCK", 7)
    monkeypatch.setattr(pairwise_similarity, "_CPU_BATCH_ELEMENTS", 5000)
    monkeypatch.setattr(pairwise_similarity, "_CPU_SEGMENT_BLOCKS", (4, 12))
    monkeypatch.setattr(pairwise_similarity, "_CPU_RUN", 5)
    r_NK, emb_NE = make_data(*shape)
    truth = reference.pairwise_sums(r_NK, emb_NE, similarity)
    assert_sums(pairwise_sums(r_NK, emb_NE, similarity), truth, 1e-12)
    assert_sums(pairwise_gram_sums(*group_by_latent(r_NK), emb_NE, similarity), truth, 1e-12)


def test_tiles_of_a_latent_on_many_images_stay_small(monkeypatch):
    sides, tile = [], pairwise_similarity._rbf_tile
    monkeypatch.setattr(pairwise_similarity, "_CPU_SEGMENT_BLOCKS", (10, 30))
    monkeypatch.setattr(pairwise_similarity, "_rbf_tile", lambda *args: sides.append(args[0].shape[1]) or tile(*args))
    r_NK, emb_NE = torch.rand(1000, 1) + 0.1, torch.randn(1000, 2)
    assert_sums(
        pairwise_gram_sums(*group_by_latent(r_NK), emb_NE, "rbf"),
        reference.pairwise_sums(r_NK.double(), emb_NE.double(), "rbf"),
        1e-12,
    )
    assert max(sides) == 30


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_cpu_neurons_of_any_condition(similarity, monkeypatch):
    """Latents that one image dominates more and more: the closed form, beyond some point blocks, never a lost digit."""
    monkeypatch.setitem(pairwise_similarity._PAIR_BLOCK, "cpu", 7)
    generator = torch.Generator().manual_seed(3)
    r_NK = torch.rand(40, 36, generator=generator, dtype=torch.float64)
    r_NK[torch.arange(36), torch.arange(36)] = 10.0 ** torch.arange(36, dtype=torch.float64)
    emb_NE = torch.randn(40, 6, generator=generator, dtype=torch.float64)
    emb_NE[7] *= 1e5  # dominates every latent under dot
    truth = reference.pairwise_sums(r_NK, emb_NE, similarity)
    assert_sums(pairwise_sums(r_NK, emb_NE, similarity), truth, 1e-9 if similarity == "dot" else 1e-12)  # of 1e4


def test_cpu_closed_form_is_for_those_that_no_image_dominates(monkeypatch):
    """Neither dead neurons nor even ones take the slower way; one image's worth of activation does, overflow too."""
    taken, blocks = [], pairwise_similarity.inner_product_blocks
    monkeypatch.setattr(
        pairwise_similarity, "inner_product_blocks", lambda r_NK, e: taken.append(r_NK.shape[1]) or blocks(r_NK, e)
    )
    r_NK, emb_NE = torch.rand(50, 4, dtype=torch.float64) + 0.1, torch.rand(50, 3, dtype=torch.float64)
    r_NK[:, 1] = 0.0
    pairwise_sums(r_NK, emb_NE)
    assert not taken
    r_NK[0, 2], r_NK[1:, 3], r_NK[0, 3] = 1e9, 1e-100, 1e200
    sums = pairwise_sums(r_NK, emb_NE)
    assert taken == [2]
    assert_sums(sums, reference.pairwise_sums(r_NK, emb_NE, "cosine"), 1e-12)


def test_embeddings_of_no_dimension_have_no_inner_product():
    num_K, den_K = pairwise_sums(torch.ones(4, 3), torch.ones(4, 0), "dot")
    assert num_K.tolist() == [0.0] * 3
    assert den_K.tolist() == [6.0] * 3


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_blockwise_kernel_against_reference(shape, similarity, device, poison):
    from saevlm_fast.kernels.pairwise_similarity_triton import DenseTiles, launch_pairwise_num

    tiles = DenseTiles(32, 16, 16, 2)

    r_NK, emb_NE = (t.to(device) for t in make_data(*shape))
    gamma = 0.3
    num_truth, den_truth = reference.pairwise_sums(r_NK, emb_NE, similarity, gamma)
    prepared = prepare_embeddings(emb_NE, similarity, torch.float64)
    # Latents that one image dominates are not for this kernel; a buffer for two tiles' parts, so that groups are met.
    even = pairwise_similarity.well_conditioned(r_NK.sum(0), r_NK.square().sum(0)) | (den_truth == 0)
    r_NK, num_truth, den_truth = r_NK[:, even], num_truth[even], den_truth[even]
    num = launch_pairwise_num(r_NK, *prepared, similarity, gamma, tiles, parts_bytes=8 * shape[1])
    assert_sums((num, den_truth), (num_truth, den_truth), 1e-5 if similarity == "dot" else 3e-6)


@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_halves(dtype, by_row, device, poison):
    from saevlm_fast.kernels.pairwise_similarity_triton import halves

    x_NC = torch.randn(19, 301, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x_NC *= 10.0 ** torch.linspace(-30, 30, 301)
    x_NC[3], x_NC[:, 7] = 0, 0
    x_NC = x_NC.to(device, dtype).T.contiguous() if by_row else x_NC.to(device, dtype)
    high, low, scale = halves(x_NC, by_row)
    scale = scale[:, None] if by_row else scale
    scaled_NC = x_NC.double() * scale
    largest = scaled_NC.abs().amax(int(by_row))
    assert ((largest == 0) | ((largest >= 2**7) & (largest < 2**8))).all()
    error_NC = (high.double() + low.double() - scaled_NC).abs()
    assert (error_NC <= 2.0**-22 * scaled_NC.abs() + 2.0**-25).all()


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_fast_sums_of_any_condition(similarity, device, poison):
    """A scale of 1e-30, latents of one image, dominated ones: by the panels where float16 would lose the others."""
    r_NK, emb_NE = (t.to(device) for t in make_data(129, 6, 40))
    r_NK *= 10.0 ** torch.arange(-30, 30, 10, device=device)
    r_NK = r_NK.float()
    truth = reference.pairwise_sums(r_NK.double(), emb_NE, similarity, 0.3)
    prepared = prepare_embeddings(emb_NE, similarity, torch.float64)
    sums = all_pairs_sums(r_NK, *prepared, similarity, 0.3, fast=True)
    assert_sums((sums[0], truth[1]), truth, 1e-5 if similarity == "dot" else 3e-6)
    torch.testing.assert_close(sums[1], truth[1], rtol=1e-12, atol=0)


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gram_kernel_against_reference(shape, similarity, device, poison):
    from saevlm_fast.kernels.pairwise_similarity_triton import launch_gram_sums

    r_NK, emb_NE = (t.to(device) for t in make_data(*shape))
    gamma = 0.3
    num_truth, den_truth = reference.pairwise_sums(r_NK, emb_NE, similarity, gamma)
    prepared = prepare_embeddings(emb_NE, similarity, torch.float32)
    num, den = launch_gram_sums(*group_by_latent(r_NK), *prepared, similarity, gamma)
    assert_sums((num, den_truth), (num_truth, den_truth), 3e-6)
    torch.testing.assert_close(den, den_truth, rtol=1e-12, atol=0)


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float64_panels_against_reference(shape, similarity, device, poison):
    """Panels and stretches of columns small enough that these shapes meet several, and their remainders."""
    from saevlm_fast.kernels.pairwise_float64_triton import launch_panel_num

    r_NK, emb_NE = (t.to(device) for t in make_data(*shape))
    truth = reference.pairwise_sums(r_NK, emb_NE, similarity, 0.3)
    prepared = prepare_embeddings(emb_NE, similarity, torch.float64)
    num = launch_panel_num(r_NK, *prepared, similarity, 0.3, images=50, columns=33)
    assert_sums((num, truth[1]), truth, 1e-12)


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(0, 3), (1, 1), (67, 300)], ids=str)
def test_prepared_embeddings_by_the_kernel(shape, dtype, similarity, device, poison):
    from saevlm_fast.kernels.pairwise_float64_triton import launch_prepare

    generator = torch.Generator().manual_seed(0)
    emb_NE = (torch.randn(shape, generator=generator) + 2).to(dtype)
    emb_NE[3:4] = 0.0
    for result in (torch.float32, torch.float64):
        expected = prepare_embeddings(emb_NE, similarity, result)
        close = {"rtol": 1e-5, "atol": 1e-6} if result == torch.float32 else {"rtol": 1e-13, "atol": 1e-14}
        for ours, theirs in zip(launch_prepare(emb_NE.to(device), similarity, result), expected):
            torch.testing.assert_close(ours.cpu(), theirs, **close, equal_nan=True)


@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_column_sums_and_closed_form(shape, dtype, low, device, poison):
    from saevlm_fast.kernels import pairwise_float64_triton as kernels

    r_NK, emb_NE = (t.to(device) for t in make_data(*shape))
    r_NK, sqnorm_N = r_NK.clamp_max(1e3).to(dtype), emb_NE.square().sum(1)
    low_K = r_NK[-1].double() - 0.25 if low else None
    wide_NK = r_NK.double() - low_K if low else r_NK.double()
    actual_NK, parts = kernels.launch_column_sums(r_NK, sqnorm_N, low_K, least_rows=16)
    assert torch.equal(actual_NK, wide_NK)
    sums_KE = wide_NK.T @ emb_NE
    (total_K, den_K, self_K, num_K), dominated_K = kernels.launch_closed_form(parts, sums_KE)
    close = {"rtol": 1e-12, "atol": 1e-12 if low else 0}
    torch.testing.assert_close(total_K, wide_NK.sum(0), **close)
    torch.testing.assert_close(den_K, distinct_pair_products(wide_NK[None])[0], **close)
    torch.testing.assert_close(kernels.pair_weights(parts), den_K, **close)
    torch.testing.assert_close(self_K, sqnorm_N @ wide_NK, **close)
    square_K = sqnorm_N @ wide_NK.square()
    torch.testing.assert_close(num_K, (sums_KE.square().sum(1) - square_K) / 2, rtol=1e-9, atol=1e-9)
    norm_K = sqnorm_N.sqrt() @ wide_NK
    if not low:
        assert torch.equal(dominated_K, ~pairwise_similarity.well_conditioned(norm_K, square_K) & (square_K > 0))


@pytest.mark.skipif(torch.cuda.is_available(), reason="launches are counted in the interpreter")
def test_inner_products_are_three_launches(monkeypatch):
    """And a copy, on a GPU, of which neurons one image dominates."""
    r_NK, emb_NE = make_data(20, 5, 7)
    r_NK, sqnorm_N = r_NK.clamp(1, 2), emb_NE.square().sum(1)
    truth = pairwise_sums(r_NK, emb_NE, "dot")
    monkeypatch.setattr(pairwise_similarity, "on_gpu", lambda _: True)
    with counted_launches() as counts:
        actual = pairwise_similarity.by_blocks(
            r_NK, lambda r_Nk: pairwise_similarity.inner_product_sums(r_Nk, emb_NE, sqnorm_N)[1:3]
        )
    assert sum(counts.values()) == 3, counts
    assert_sums(actual, truth, 1e-12)


def test_triton_repeats_bit_for_bit(device):
    from saevlm_fast.kernels.pairwise_similarity_triton import launch_gram_sums, launch_pairwise_num

    r_NK, emb_NE = (t.to(device) for t in make_data(140, 9, 24))
    prepared = prepare_embeddings(emb_NE, "cosine", torch.float64)
    runs = [launch_pairwise_num(r_NK, *prepared, "cosine", 1.0) for _ in range(2)]
    assert torch.equal(*runs)
    prepared = prepare_embeddings(emb_NE, "cosine", torch.float32)
    runs = [launch_gram_sums(*group_by_latent(r_NK), *prepared, "cosine", 1.0) for _ in range(2)]
    assert torch.equal(runs[0][0], runs[1][0])
    assert torch.equal(runs[0][1], runs[1][1])


def test_fold_does_not_cancel():
    x_BL = torch.tensor([[1.0, 1e-20, 0.0, 1e-20, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(
        distinct_pair_products(x_BL), torch.tensor([2e-20], dtype=torch.float64), rtol=1e-15, atol=0
    )
    x_BL = torch.rand(3, 11, dtype=torch.float64)
    closed_B = (x_BL.sum(1).square() - x_BL.square().sum(1)) / 2
    torch.testing.assert_close(distinct_pair_products(x_BL), closed_B)


def test_padding_after_the_last_offset_is_ignored(device):
    r_NK, emb_NE = make_data(30, 6, 8)
    acts_M, images_M, offsets_S1 = group_by_latent(r_NK)
    padded = torch.nn.functional.pad(acts_M, (0, 9), value=7.0), torch.nn.functional.pad(images_M, (0, 9))
    truth = reference.pairwise_sums(r_NK, emb_NE, "cosine")
    assert_sums(pairwise_gram_sums(*padded, offsets_S1, emb_NE), truth, 1e-12)
    arguments = [t.to(device) for t in (*padded, offsets_S1, emb_NE)]
    prepared = prepare_embeddings(arguments[3], "cosine", torch.float32)
    from saevlm_fast.kernels.pairwise_similarity_triton import launch_gram_sums

    num, den = launch_gram_sums(*arguments[:3], *prepared, "cosine", 1.0)
    assert_sums((num.cpu(), truth[1]), truth, 3e-6)
    torch.testing.assert_close(den.cpu(), truth[1], rtol=1e-12, atol=0)


@pytest.mark.parametrize(("n_images", "n_latents"), [(0, 3), (4, 0), (0, 0)])
def test_empty(n_images, n_latents, device):
    from saevlm_fast.kernels.pairwise_similarity_triton import launch_gram_sums, launch_pairwise_num

    r_NK, emb_NE = torch.rand(n_images, n_latents), torch.randn(n_images, 5)
    nothing = torch.zeros(n_latents, dtype=torch.float64)
    for sums in (*pairwise_sums(r_NK, emb_NE), *pairwise_gram_sums(*group_by_latent(r_NK), emb_NE)):
        assert torch.equal(sums, nothing)
    prepared = prepare_embeddings(emb_NE.to(device), "cosine", torch.float64)
    assert torch.equal(launch_pairwise_num(r_NK.to(device).double(), *prepared, "cosine", 1.0).cpu(), nothing)
    for fast in (False, True):
        sums = all_pairs_sums(r_NK.to(device), *prepared, "cosine", 1.0, fast)
        assert all(torch.equal(t.cpu(), nothing) for t in sums)
    prepared = prepare_embeddings(emb_NE.to(device), "cosine", torch.float32)
    num, den = launch_gram_sums(*(t.to(device) for t in group_by_latent(r_NK)), *prepared, "cosine", 1.0)
    assert torch.equal(num.cpu(), nothing)
    assert torch.equal(den.cpu(), nothing)


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_nan_reaches_the_sums_of_the_kernels(similarity, fast, device):
    r_NK, emb_NE = (t.to(device) for t in make_data(12, 5, 4))
    emb_NE[3] = float("nan")
    prepared = prepare_embeddings(emb_NE, similarity, torch.float64)
    assert all_pairs_sums(r_NK, *prepared, similarity, 0.3, fast)[0].isnan().all()


def test_zero_and_nan_rows_reach_the_sums():
    r_NK, emb_NE = make_data(12, 5, 4)
    emb_NE[3] = 0
    nan_K = r_NK[3] > 0
    assert pairwise_sums(r_NK, emb_NE)[0].isnan().all()  # 0 * NaN: dense code cannot tell who did not fire
    num_S = pairwise_gram_sums(*group_by_latent(r_NK), emb_NE)[0]
    several_S = (r_NK > 0).sum(0) > 1
    assert torch.equal(num_S.isnan(), nan_K & several_S)


def test_opcheck():
    r_NK, emb_NE = make_data(9, 6, 4)
    torch.library.opcheck(torch.ops.saevlm_fast.pairwise_sums.default, (r_NK, emb_NE, "cosine", 1.0, False))
    arguments = (*group_by_latent(r_NK), emb_NE, "rbf", 0.5)
    torch.library.opcheck(torch.ops.saevlm_fast.pairwise_gram_sums.default, arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"similarity": "cosin"}, "'cosin' is not one of cosine, dot, rbf"),
        ({"gamma": -1.0, "similarity": "rbf"}, "gamma: -1.0"),
        ({"emb_NE": torch.zeros(4, 2)}, r"\(4, 2\)"),
    ],
)
def test_errors(change, message):
    arguments = {"r_NK": torch.ones(3, 2), "emb_NE": torch.ones(3, 2)} | change
    with pytest.raises(ValueError, match=message):
        pairwise_sums(**arguments)


def static_cases(target: str) -> list[Case]:
    module = "saevlm_fast.kernels.pairwise_similarity_triton"
    precision = "ieee" if target == "gfx942" else "tf32x3"
    gram_tile = {"SIMILARITY": "rbf", "BLOCK_N": 64, "BLOCK_E": 16, "PRECISION": precision}
    n, k, e, stages = (128, 128, 64, 2) if target == "sm_90" else (64, 32, 32, 2)
    tile = {"SIMILARITY": "rbf", "BLOCK_N": n, "BLOCK_K": k, "BLOCK_E": e}
    images = {"emb_ptr": "*fp32", "sqnorm_ptr": "*fp32", "d_emb": "i32:16", "gamma": "fp32"}
    dense = {f"{name}_ptr": "*fp16" for name in ("r_high", "r_low", "emb_high", "emb_low")} | images
    dense |= {"unscale_ptr": "*fp32", "tile_i_ptr": "*i64", "tile_j_ptr": "*i64", "parts_ptr": "*fp32"}
    dense |= {"n_images": "i32", "n_latents": "i32:16", "first_tile": "i32"}
    codes = {"acts_ptr": "*fp64", "offsets_ptr": "*i64", "block_offsets_ptr": "*i64", "num_parts_ptr": "*fp64"}
    gram = codes | images | {"images_ptr": "*i64", "block_latents_ptr": "*i64", "n_latents": "i32:16"}
    finish = codes | {"num_ptr": "*fp64", "den_ptr": "*fp64"}
    split = dense | {"x_ptr": "*fp32", "scale_ptr": "*fp64", "high_ptr": "*fp16", "low_ptr": "*fp16"}
    split |= {"n_rows": "i32", "n_columns": "i32:16"}
    return [
        Case(module, "halves_kernel", target, split, {"BY_ROW": False, "BLOCK_N": 8, "BLOCK": 256}, num_warps=4),
        Case(module, "pairwise_num_kernel", target, dense, tile, num_warps=8, num_stages=stages),
        Case(module, "gram_kernel", target, gram, gram_tile, num_warps=4),
        Case(module, "gram_finish_kernel", target, finish, {"BLOCK": 32}, num_warps=4),
    ]


def float64_static_cases(target: str) -> list[Case]:
    module = "saevlm_fast.kernels.pairwise_float64_triton"
    doubles = (
        "out",
        "total",
        "den",
        "self",
        "num",
        "mean",
        "wide",
        "low",
        "sqnorm",
        "parts",
        "s",
        "sqnorm_i",
        "sqnorm_j",
        "gamma",
        "weighted",
        "sums",
    )
    signature = {f"{name}_ptr": "*fp64" for name in doubles}
    signature |= {name: "i32" for name in ("n_images", "n_parts", "rows", "n_i", "n_j", "first_j")}
    signature |= {"n_latents": "i32:16", "d_emb": "i32:16", "dominated_ptr": "*i1"}
    columns = {"SHIFTED": True, "WIDEN": True, "BLOCK_K": 128, "UNROLL": 8}
    panel = {"SIMILARITY": "rbf", "BLOCK_I": 8, "BLOCK_J": 256}
    weigh, closed = {"ROWS": 32, "BLOCK_I": 8, "BLOCK_K": 128}, {"PARTS": 64, "BLOCK_K": 8, "BLOCK_E": 128}
    prepare = [{"SIMILARITY": name, "BLOCK_N": 4, "BLOCK_E": 256} for name in ("cosine", "rbf")]
    return [
        *(Case(module, "prepare_kernel", target, signature | {"emb_ptr": "*fp32"}, each) for each in prepare),
        Case(module, "column_sums_kernel", target, signature | {"r_ptr": "*fp32"}, columns, num_warps=2),
        Case(module, "closed_form_kernel", target, signature, closed, num_warps=4),
        Case(module, "panel_similarity_kernel", target, signature, panel, num_warps=4),
        Case(module, "weigh_panel_kernel", target, signature | {"r_ptr": "*fp64"}, weigh, num_warps=4),
    ]


def test_float64_static_compile_without_spills():
    from saevlm_fast.kernels import pairwise_float64_triton as kernels

    assert (kernels.PREPARE_BLOCK_N, kernels.PREPARE_BLOCK_E) == (4, 256)
    assert (kernels.COLUMN_BLOCK_K, kernels.COLUMN_UNROLL, kernels.COLUMN_WARPS) == (128, 8, 2)
    assert (kernels.CLOSED_BLOCK_K, kernels.CLOSED_BLOCK_E, kernels.COLUMN_PARTS) == (8, 128, 64)
    assert (kernels.PANEL_BLOCK_I, kernels.PANEL_BLOCK_J) == (8, 256)
    assert (kernels.WEIGH_ROWS, kernels.WEIGH_BLOCK_I, kernels.WEIGH_BLOCK_K, kernels.NUM_WARPS) == (32, 8, 128, 4)
    assert_no_spills([case for target in TARGETS for case in float64_static_cases(target)])


def test_static_compile_without_spills():
    from saevlm_fast.kernels import pairwise_similarity_triton as kernels

    chosen = (kernels.GRAM_BLOCK_N, kernels.GRAM_BLOCK_E, kernels.FINISH_BLOCK)
    assert (*chosen, kernels.DENSE_WARPS, kernels.GRAM_WARPS, kernels.NUM_STAGES) == (64, 16, 32, 8, 4, 2)
    assert_no_spills([case for target in TARGETS for case in static_cases(target)])


@pytest.mark.gpu
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_gpu_real_shapes(similarity):
    """5000 images (four panels), 768 raw neurons, some dominated, DINOv2-B embeddings; and 6144 latents at k = 20."""
    generator = torch.Generator().manual_seed(0)
    emb_NE = torch.randn(5000, 768, generator=generator)
    dense_NK = torch.rand(5000, 768, generator=generator)
    dense_NK[:, 0], dense_NK[1300, 1:4] = 0, 1e9
    truth = pairwise_sums(dense_NK, emb_NE, similarity)
    for fast, tolerance in ((False, 1e-12), (True, 3e-6 if similarity == "rbf" else 1e-12)):
        actual = [sums.cpu() for sums in pairwise_sums(dense_NK.cuda(), emb_NE.cuda(), similarity, fast=fast)]
        assert_sums((actual[0], truth[1]), truth, 1e3 * tolerance if similarity == "dot" else tolerance)
        torch.testing.assert_close(actual[1], truth[1], rtol=1e-12, atol=0)
    latents = torch.randint(0, 6144, (5000, 20), generator=generator)
    sparse_NS = torch.zeros(5000, 6144).scatter_(1, latents, torch.rand(5000, 20, generator=generator) + 0.1)
    codes = group_by_latent(sparse_NS)
    truth = pairwise_gram_sums(*codes, emb_NE, similarity)
    actual = [sums.cpu() for sums in pairwise_gram_sums(*(t.cuda() for t in codes), emb_NE.cuda(), similarity)]
    assert_sums((actual[0], truth[1]), truth, 1e-4 if similarity == "dot" else 1e-6)
    torch.testing.assert_close(actual[1], truth[1], rtol=1e-12, atol=0)
