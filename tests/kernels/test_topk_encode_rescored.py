"""Encoding with a bfloat16 product and a float32 choice: against the encoder that is float32 throughout."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saevlm_fast.kernels import reference
from saevlm_fast.kernels.topk_encode import batch_topk_encode, topk_encode
from saevlm_fast.kernels.topk_encode_rescored import (
    batch_topk_encode_rescored,
    n_candidates,
    topk_encode_rescored,
)
from test_topk_encode import assert_clear


def draw(n_rows: int, d_in: int, d_sae: int, seed: int = 0, dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(seed)
    x_BD, W_SD, b_enc_S, b_dec_D = (
        torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype)
        for size in ((n_rows, d_in), (d_sae, d_in), (d_sae,), (d_in,))
    )
    return x_BD, W_SD.T, 0.1 * b_enc_S, b_dec_D, W_SD.T.bfloat16()


def dense(acts, latents, row_offsets, d_sae: int) -> torch.Tensor:
    return reference.densify(acts, latents, row_offsets, d_sae)


def test_near_ties_that_bfloat16_reorders_are_put_right() -> None:
    x, W, b_enc, b_dec, low = draw(64, 48, 700)
    assert_clear(reference.preactivations(*(tensor.double() for tensor in (x, W, b_enc, b_dec))), 20, margin=1e-4)
    truth = dense(*topk_encode(x, W, b_enc, b_dec, 20), None, 700)
    acts, latents = topk_encode_rescored(x, W, b_enc, b_dec, low, 20)
    torch.testing.assert_close(dense(acts, latents, None, 700), truth)
    assert bool((latents.diff(dim=1) > 0).all())
    _, plain = topk_encode(x.bfloat16(), low, b_enc.bfloat16(), b_dec.bfloat16(), 20)
    assert not torch.equal(plain, latents), "without near ties this test shows nothing"


def test_batch_near_ties_are_put_right() -> None:
    x, W, b_enc, b_dec, low = draw(64, 48, 700)
    assert_clear(reference.preactivations(*(tensor.double() for tensor in (x, W, b_enc, b_dec))), 20, margin=1e-4)
    expected = batch_topk_encode(x, W, b_enc, b_dec, 20)
    acts, latents, row_offsets = batch_topk_encode_rescored(x, W, b_enc, b_dec, low, 20)
    assert torch.equal(latents, expected[1])
    assert torch.equal(row_offsets, expected[2])
    torch.testing.assert_close(acts, expected[0])
    _, plain, _ = batch_topk_encode(x.bfloat16(), low, b_enc.bfloat16(), b_dec.bfloat16(), 20)
    assert not torch.equal(plain, latents), "without near ties this test shows nothing"


@settings(max_examples=25, deadline=None)
@given(
    n_rows=st.integers(0, 6), d_in=st.integers(1, 9), d_sae=st.integers(1, 90), data=st.data(), seed=st.integers(0, 99)
)
def test_codes_are_the_float_choice_when_candidates_suffice(n_rows, d_in, d_sae, data, seed) -> None:
    """Small integers: exact in float32 with many ties, rounded in bfloat16, positive in both or in neither."""
    k = data.draw(st.integers(1, d_sae))
    x, W, b_enc, b_dec, _ = ((4 * tensor).round() for tensor in draw(n_rows, d_in, d_sae, seed))
    W[:, n_candidates(k, d_sae) :] = 0
    b_enc[n_candidates(k, d_sae) :] = -1
    acts, latents = topk_encode_rescored(x, W, b_enc, b_dec, W.bfloat16(), k)
    assert acts.shape == latents.shape == (n_rows, k)
    assert bool((latents.diff(dim=1) > 0).all())
    truth = dense(*topk_encode(x, W, b_enc, b_dec, k), None, d_sae)
    assert torch.equal(dense(acts, latents, None, d_sae), truth)
    codes = batch_topk_encode_rescored(x, W, b_enc, b_dec, W.bfloat16(), k)
    for out, expected in zip(codes, batch_topk_encode(x, W, b_enc, b_dec, k)):
        assert torch.equal(out, expected)


def test_exact_ties_go_to_the_lower_latent() -> None:
    """Small integers: equal columns of a float product need not have equal bits, at the edge of a BLAS's tile."""
    x, W, b_enc, b_dec, _ = ((4 * tensor).round() for tensor in draw(5, 8, 40))
    W[:, 1::2] = W[:, ::2]
    b_enc[1::2] = b_enc[::2]
    _, latents = topk_encode_rescored(x, W, b_enc, b_dec, W.bfloat16(), 3)
    assert torch.equal(latents, topk_encode(x, W, b_enc, b_dec, 3)[1])
    _, latents, _ = batch_topk_encode_rescored(x, W, b_enc, b_dec, W.bfloat16(), 3)
    assert torch.equal(latents, batch_topk_encode(x, W, b_enc, b_dec, 3)[1])


def test_nan_is_kept() -> None:
    x, W, b_enc, b_dec, low = draw(5, 8, 40)
    x[2, 3] = float("nan")
    acts, _ = topk_encode_rescored(x, W, b_enc, b_dec, low, 3)
    assert bool(acts[2].isnan().all())
    assert not bool(acts[[0, 1, 3, 4]].isnan().any())
    acts, _, row_offsets = batch_topk_encode_rescored(x, W, b_enc, b_dec, low, 3)
    assert bool(acts.isnan().all())
    assert row_offsets.tolist() == [0, 0, 0, 15, 15, 15]


def test_a_low_copy_of_another_shape_is_named() -> None:
    x, W, b_enc, b_dec, low = draw(5, 8, 40)
    for encode in (topk_encode_rescored, batch_topk_encode_rescored):
        with pytest.raises(ValueError, match=r"W_low: shape \(8, 39\), must be W_enc's \(8, 40\)"):
            encode(x, W, b_enc, b_dec, low[:, :39], 3)


@pytest.mark.gpu
def test_gpu_choice_is_the_float32_choice_at_a_real_shape(device) -> None:
    """IEEE float32 on the chip, whose sums differ in order: a code in a thousand may differ at an exact near tie."""
    x, W, b_enc, b_dec, low = (tensor.to(device) for tensor in draw(1024, 1024, 16384))
    torch.cuda.set_sync_debug_mode("error")
    try:
        _, latents = topk_encode_rescored(x, W, b_enc, b_dec, low, 20)
        _, batch_latents, _ = batch_topk_encode_rescored(x, W, b_enc, b_dec, low, 20)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert float((latents == topk_encode(x, W, b_enc, b_dec, 20)[1]).float().mean()) > 0.99
    positions = dense_positions(batch_latents, batch_topk_encode(x, W, b_enc, b_dec, 20)[1])
    assert positions < 0.001


def dense_positions(latents: torch.Tensor, expected: torch.Tensor) -> float:
    """Share of entries that only one of the two has, by latent counts."""
    counts = torch.bincount(latents, minlength=16384) - torch.bincount(expected, minlength=16384)
    return float(counts.abs().sum()) / len(latents)
