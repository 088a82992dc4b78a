"""The exact changes of weights: whatever an SAE did before and after, it does the same on rows as they are."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import plain_forward
from saevlm_fast.formats.plain import PlainSAE, gated

D, S, B = 5, 11, 9
ACTIVATIONS = st.sampled_from(["relu", "topk", "jumprelu", "batch_topk"])
SEEDS = st.integers(0, 10_000)
SCALES = st.floats(1e-3, 1e3)
quick = settings(max_examples=25)


def randn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sae(seed, activation):
    threshold = {"jumprelu": randn(seed + 4, S).abs(), "batch_topk": torch.tensor(0.3, dtype=torch.float64)}
    return PlainSAE(
        W_enc=randn(seed, D, S),
        b_enc=randn(seed + 1, S),
        W_dec=randn(seed + 2, S, D),
        b_dec=randn(seed + 3, D),
        activation=activation,
        k=3,
        threshold=threshold.get(activation),
    )


def act(plain, h_BS):
    """z of pre-activations."""
    eye_SS, zero_S = torch.eye(S).double(), torch.zeros(S).double()
    as_given = replace(plain, W_enc=eye_SS, b_enc=zero_S, W_dec=eye_SS, b_dec=zero_S)
    return plain_forward.encode(as_given, h_BS)


def same(one, other):
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9 * (1 + float(other.abs().max())))


@given(SEEDS, ACTIVATIONS)
@quick
def test_without_pre_bias(seed, activation):
    plain, x_BD = sae(seed, activation), randn(seed + 9, B, D)
    z_BS = act(plain, x_BD @ plain.W_enc + plain.b_enc)
    folded = plain.without_pre_bias()
    same(plain_forward.encode(folded, x_BD), z_BS)
    same(folded.encoder_bias_without_pre_bias(), plain.b_enc)


@given(SEEDS, ACTIVATIONS, SCALES, st.booleans())
@quick
def test_of_raw_input(seed, activation, scale, keep_latents):
    plain, x_BD, shift_D = sae(seed, activation), randn(seed + 9, B, D), randn(seed + 8, D)
    n_BD = (x_BD - shift_D) * scale
    folded = plain.of_raw_input(shift_D, scale, keep_latents)
    same(plain_forward.encode(folded, x_BD) * (1 if keep_latents else scale), plain_forward.encode(plain, n_BD))
    same(plain_forward.forward(folded, x_BD), plain_forward.forward(plain, n_BD) / scale + shift_D)


@given(SEEDS, ACTIVATIONS)
@quick
def test_of_whitened_input(seed, activation):
    plain, x_BD, mean_D = sae(seed, activation), randn(seed + 9, B, D), randn(seed + 8, D)
    rotation_DD = torch.linalg.qr(randn(seed + 7, D, D))[0]
    matrix_DD = rotation_DD * torch.linspace(0.3, 3, D, dtype=torch.float64)
    inverse_DD = matrix_DD.inverse()
    folded = plain.of_whitened_input(mean_D, matrix_DD, inverse_DD)
    n_BD = (x_BD - mean_D) @ matrix_DD
    same(plain_forward.encode(folded, x_BD), plain_forward.encode(plain, n_BD))
    same(plain_forward.forward(folded, x_BD), plain_forward.forward(plain, n_BD) @ inverse_DD + mean_D)


@given(SEEDS, ACTIVATIONS)
@quick
def test_by_decoder_norms(seed, activation):
    plain, x_BD = sae(seed, activation), randn(seed + 9, B, D)
    norm_S = plain.W_dec.norm(dim=1)
    h_BS = (x_BD - plain.b_dec) @ plain.W_enc + plain.b_enc
    z_BS = act(plain, h_BS * norm_S)
    folded = plain.scaled_by_decoder_norms()
    same(plain_forward.encode(folded, x_BD), z_BS)
    same(plain_forward.forward(folded, x_BD), (z_BS / norm_S) @ plain.W_dec + plain.b_dec)
    if plain.threshold is not None:  # compared when scaled, returned unscaled
        same(plain_forward.encode(plain.threshold_on_scaled_latents(), x_BD), z_BS / norm_S)


@given(SEEDS)
@quick
def test_gated(seed):
    W_enc, b_dec, x_BD = randn(seed, D, S), randn(seed + 3, D), randn(seed + 9, B, D)
    b_gate, b_mag, r_mag = (randn(seed + i, S) for i in (4, 5, 6))
    e_BS = (x_BD - b_dec) @ W_enc
    z_BS = ((e_BS + b_gate) > 0) * (e_BS * r_mag.exp() + b_mag).relu()
    encoder = dict(zip(("W_enc", "b_enc", "threshold"), gated(W_enc, b_gate, b_mag, r_mag)))
    assert bool((encoder["threshold"] >= 0).all())
    plain = PlainSAE(**encoder, W_dec=randn(seed + 2, S, D), b_dec=b_dec, activation="jumprelu")
    same(plain_forward.encode(plain, x_BD), z_BS)


@given(SEEDS, st.sampled_from([torch.float32, torch.float64]))
@quick
def test_a_threshold_that_is_reached_counts_where_it_did(seed, dtype):
    """h exactly at it, one number below, and one above."""
    theta_S = randn(seed, S).abs().to(dtype) + 0.1
    ends = [theta_S.nextafter(torch.full_like(theta_S, end)) for end in (-torch.inf, torch.inf)]
    h_BS = torch.stack([theta_S, *ends])
    eye_SS, zero_S = torch.eye(S, dtype=dtype), torch.zeros(S, dtype=dtype)
    plain = PlainSAE(W_enc=eye_SS, b_enc=zero_S, W_dec=eye_SS, b_dec=zero_S, activation="jumprelu", threshold=theta_S)
    z_BS = plain_forward.encode(plain.with_inclusive_threshold(), h_BS)
    assert torch.equal(z_BS != 0, h_BS >= theta_S)


CHANGES = {
    "without_pre_bias": lambda plain: plain.without_pre_bias(),
    "of_raw_input": lambda plain: plain.of_raw_input(0.3, 1.7),
    "of_raw_input, latents too": lambda plain: plain.of_raw_input(0.3, 1.7, keep_latents=False),
    "scaled_by_decoder_norms": lambda plain: plain.scaled_by_decoder_norms(),
    "threshold_on_scaled_latents": lambda plain: plain.threshold_on_scaled_latents(),
    "with_scaled_latents": lambda plain: plain.with_scaled_latents(torch.linspace(0.3, 3, S)),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("activation", ["topk", "jumprelu"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=list(CHANGES))
def test_16_bit_weights_are_not_rounded_to_16_bits_again(change, activation, dtype):
    """The change of 16-bit weights is that of the same numbers in float32."""
    names = [*("W_enc", "b_enc", "W_dec", "b_dec"), *(["threshold"] if activation == "jumprelu" else [])]
    narrow = sae(5, activation)
    narrow = replace(narrow, **{name: getattr(narrow, name).to(dtype) for name in names})
    wide = replace(narrow, **{name: getattr(narrow, name).float() for name in names})
    found, expected = change(narrow), change(wide)
    for name in names:
        torch.testing.assert_close(getattr(found, name).float(), getattr(expected, name), rtol=0, atol=0)
    bias_S = narrow.encoder_bias_without_pre_bias()
    assert torch.equal(bias_S, wide.encoder_bias_without_pre_bias())
    gates = narrow.W_enc, narrow.b_enc, narrow.b_enc * 2, narrow.b_enc / 3
    for one, other in zip(gated(*gates), gated(*(tensor.float() for tensor in gates))):
        assert torch.equal(one, other)


@given(SEEDS, ACTIVATIONS)
@quick
def test_batch_norm_and_scaled_latents(seed, activation):
    plain, x_BD = sae(seed, activation), randn(seed + 9, B, D)
    weight_S, bias_S, mean_S, var_S = (
        randn(seed + 10, S),
        randn(seed + 11, S),
        randn(seed + 12, S),
        randn(seed, S).abs(),
    )
    h_BS = (x_BD - plain.b_dec) @ plain.W_enc + plain.b_enc
    z_BS = act(plain, (h_BS - mean_S) / (var_S + 1e-5).sqrt() * weight_S + bias_S)
    folded = plain.after_batch_norm(weight_S, bias_S, mean_S, var_S, 1e-5)
    same(plain_forward.encode(folded, x_BD), z_BS)
    factor_S = randn(seed + 13, S)
    same(
        plain_forward.forward(folded.with_scaled_latents(factor_S), x_BD), (z_BS * factor_S) @ plain.W_dec + plain.b_dec
    )
