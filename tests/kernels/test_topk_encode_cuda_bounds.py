"""The bound by which the GPU's encoders screen: it holds, and it is reached."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from screened_weights import low_weights

from saevlm_fast.kernels.topk_encode_cuda import Screening


def truncating_product(x_BP, w_SP):
    """A tensor core at its worst: 16 products and the sum so far, all cut off at 24 bits of the largest, one way."""
    x, w = x_BP.double().numpy(), w_SP.double().numpy()
    acc = np.zeros((len(x), len(w)))
    for d in range(0, x.shape[1], 16):
        terms = np.concatenate([x[:, None, d : d + 16] * w[None, :, d : d + 16], acc[..., None]], axis=2)
        largest = np.abs(terms).max(axis=2, keepdims=True)
        unit = 2.0 ** (np.floor(np.log2(np.maximum(largest, 1e-300))) - 23)
        acc = (np.floor(terms / unit) * unit).sum(axis=2)
        unit = 2.0 ** (np.floor(np.log2(np.maximum(np.abs(acc), 1e-300))) - 23)
        acc = np.floor(acc / unit) * unit
    return torch.from_numpy(acc)


def bounds(x_BD, W_SD, b_S, device):
    """(screened values [B, P] and inverse [B, 1] of the rows' units, slack [B, G]), float64, with no b_dec."""
    x_BD, W_DS, b_S, zeros_D = (t.to(device) for t in (x_BD, W_SD.t(), b_S, torch.zeros(x_BD.shape[1])))
    ((_, screen),) = Screening(W_DS, b_S, zeros_D, 64, low_weights(W_DS)).chunks(x_BD, None, None)
    by_error_G, by_norm_G, constant_G = screen.factors_3G.double().cpu()
    error_B1, norm_B1, inverse_B1 = (
        t.double().cpu()[:, None] for t in (screen.error_R, screen.norm_R, screen.inverse_R)
    )
    slack_BG = error_B1 * by_error_G + norm_B1 * by_norm_G + constant_G
    return screen.pre_RP.double().cpu(), inverse_B1, 1.001 * slack_BG


@settings(max_examples=12)
@given(
    seed=st.integers(0, 2**31),
    d_in=st.integers(1, 130),
    scales=st.tuples(st.integers(-100, 40), st.integers(-20, 8), st.integers(-60, 40)),
    spread=st.floats(0, 4),
    one_sign=st.booleans(),
)
def test_bounds_hold(device, seed, d_in, scales, spread, one_sign):
    """|z - v| <= slack + R |v| for every latent, with the worst roundings of a tensor core."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*size):
        values = torch.randn(*size, generator=generator) * (spread * torch.randn(*size, generator=generator)).exp()
        return values.abs() if one_sign else values

    x_BD, W_SD, b_S = (t * 2.0**scale for t, scale in zip((draw(3, d_in), draw(70, d_in), draw(70)), scales))
    x_BD[0] = 0
    pre_BP, inverse_B1, slack_BG = bounds(x_BD, W_SD, b_S, device)
    slack_BS = slack_BG.repeat_interleave(64, 1)[:, :70]
    z_BS = x_BD.double() @ W_SD.double().t() + b_S.double()
    with np.errstate(invalid="ignore"):  # what float16 does not hold: not among the sound
        worst_BS = truncating_product((x_BD.double() * inverse_B1).half(), W_SD.half())
    worst_BS = (worst_BS + b_S.double() * inverse_B1).half().double() / inverse_B1
    found_BS = pre_BP[:, :70] / inverse_B1
    sound_BS = found_BS.abs() + slack_BS < 3e4 / inverse_B1
    for v_BS in (worst_BS, found_BS):
        assert bool(((z_BS - v_BS).abs() <= slack_BS + 1.02 * 2.0**-11 * v_BS.abs())[sound_BS].all())


def test_bounds_are_reached(device):
    """All roundings of x in one direction, and a sum near 0: the error is a good part of what the slack allows for."""
    error = 0.99 * 2.0**-11
    x_BD = torch.tensor([1 + error, -(1 + 2.0**-10 - error)]).repeat(1, 32)
    pre_BP, inverse_B1, slack_BG = bounds(x_BD, torch.ones(1, 64), torch.zeros(1), device)
    found = float((x_BD.double().sum() - pre_BP[0, 0] / inverse_B1).abs())
    assert 0.4 * float(slack_BG) < found < float(slack_BG)
