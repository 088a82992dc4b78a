"""Inputs of the encoders on which the selection is exact or clear, and how codes are compared."""

import torch
from torch.testing import assert_close


def integer_inputs(shape, dtype, kind="ties", seed=0, device="cpu"):
    """Small integers: every product and sum is exact in every dtype, and ties are everywhere."""
    (n_rows, d_in, d_sae), generator = shape, torch.Generator().manual_seed(seed)
    x_BD, W_enc_SD, b_enc_S, b_dec_D = (
        torch.randint(-high, high + 1, size, generator=generator).to(dtype)
        for high, size in ((2, (n_rows, d_in)), (2, (d_sae, d_in)), (2, (d_sae,)), (1, (d_in,)))
    )
    if kind == "negative":
        b_enc_S -= 200
    if kind == "sparse":  # most rows have fewer than k positives
        b_enc_S -= int(5 * d_in**0.5)
    if kind == "nan" and n_rows:
        x_BD[n_rows // 2], b_enc_S[d_sae // 3], x_BD[0, 0] = torch.nan, torch.nan, torch.inf
    return x_BD.to(device), W_enc_SD.to(device).t(), b_enc_S.to(device), b_dec_D.to(device)


def float_inputs(shape, dtype=torch.float64, seed=0, device="cpu"):
    (n_rows, d_in, d_sae), generator = shape, torch.Generator().manual_seed(seed)
    sizes = ((n_rows, d_in), (d_sae, d_in), (d_sae,), (d_in,))
    x_BD, W_enc_SD, b_enc_S, b_dec_D = (torch.randn(s, generator=generator, dtype=torch.float64) for s in sizes)
    inputs = x_BD, W_enc_SD.t() / d_in**0.5, b_enc_S / 4, b_dec_D / 4
    return tuple(tensor.to(device=device, dtype=dtype) for tensor in inputs)


def midway(values, share=0.5):
    """A threshold that no rounding can cross: in the middle of the widest gap near this share of the values."""
    ascending = values.flatten().double().sort().values
    n = int(share * len(ascending))
    near = ascending[max(0, n - 10) : n + 10]
    widest = int(near.diff().argmax())
    return float(near[widest : widest + 2].mean())


def assert_clear(pre_BS, k, margin=1e-5):
    """What is selected does not hang on a rounding: the k-th value and the next lie apart, in rows and in the batch.

    A property of the data (float64): where it holds, float32 in whatever order must select the same entries.
    """
    for values, n in ((pre_BS, k), (pre_BS.flatten()[None], k * len(pre_BS))):
        last, following = values.topk(n + 1).values[:, -2:].unbind(1)
        assert bool((last - following > margin).all()), "these data are ties in float32: choose others"


def assert_codes(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b, rtol=1e-12, atol=1e-12, equal_nan=True)
