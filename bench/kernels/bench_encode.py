"""Encoding: TopK and BatchTopK beside dense pre-activations and torch.topk."""

import pytest
import torch

from saevlm_fast.kernels.sparse_decode import gather_dot
from saevlm_fast.kernels.topk_encode import batch_topk_encode, topk_encode


def dense_topk(x_BD, W_enc_DS, b_enc_S, b_dec_D, k):
    """(acts, latents) [B, K]. Without the scatter into a dense matrix that a dense decoder needs next."""
    return torch.relu((x_BD - b_dec_D) @ W_enc_DS + b_enc_S).topk(k, dim=1)


def dense_batch_topk(x_BD, W_enc_DS, b_enc_S, b_dec_D, k):
    """(acts, flat positions) [B * k]."""
    return torch.relu((x_BD - b_dec_D) @ W_enc_DS + b_enc_S).flatten().topk(k * len(x_BD))


def check_codes(codes, dense_acts, x_BD, W_enc_DS, b_enc_S, b_dec_D, tolerance):
    """The kept values are the largest (as sorted lists, so near ties may swap), and are what their latents produce."""
    acts, latents, *row_offsets = codes
    tolerance *= float(dense_acts.max())
    torch.testing.assert_close(acts.sort(dim=-1, descending=True).values, dense_acts, atol=tolerance, rtol=0)
    offsets = row_offsets[0] if row_offsets else None
    centred_BD = x_BD.float() - b_dec_D.float()
    pre = gather_dot(centred_BD, latents, offsets, W_enc_DS.T.float().contiguous()) + b_enc_S[latents].float()
    torch.testing.assert_close(acts.float(), torch.where(acts > 0, pre, 0.0), atol=tolerance, rtol=0)


@pytest.mark.parametrize("impl", ["dense", "saevlm_fast"])
@pytest.mark.parametrize("selection", ["topk", "batch_topk"])
def test_encode(measure, encoder_gemm, case, batches, precision, tensor_dtype, tolerance, selection, impl):
    x_BD = batches[0].to(tensor_dtype)
    rows_SD = torch.randn(case.d_sae, case.d_in, device=x_BD.device) / case.d_in**0.5
    W_enc_DS = rows_SD.to(tensor_dtype).T  # latent-major, as the SAE holds it
    args = x_BD, W_enc_DS, 0.01 * torch.randn_like(W_enc_DS[0]), x_BD.mean(0), case.k
    fast, dense = {"topk": (topk_encode, dense_topk), "batch_topk": (batch_topk_encode, dense_batch_topk)}[selection]
    gflop = {"GFLOP/s": 2e-9 * case.n_rows * case.d_in * case.d_sae}
    measure(
        f"{selection} encode",
        impl,
        {"saevlm_fast": (lambda: fast(*args), gflop), "dense": (lambda: dense(*args), gflop)},
        check=lambda: check_codes(fast(*args), dense(*args)[0], *args[:4], tolerance),
        shape=case.shape,
        dtype=precision,
        floor=encoder_gemm(x_BD, W_enc_DS),
    )
