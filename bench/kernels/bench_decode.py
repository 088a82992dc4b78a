"""Decoding sparse codes, plain and Matryoshka, beside the product of a dense code matrix with W_dec."""

import pytest
import torch

from saevlm_fast.config import MATRYOSHKA_FRACTIONS, group_sizes_from_fractions
from saevlm_fast.kernels.reference import densify
from saevlm_fast.kernels.sparse_decode import matryoshka_decode, sparse_decode


@pytest.fixture
def codes(case, device, tensor_dtype):
    """Random fixed-k codes [B, K]: k different latents a row, ascending."""
    generator = torch.Generator().manual_seed(0)
    first_BK = torch.randint(0, case.d_sae - case.k, (case.n_rows, case.k), generator=generator)
    latents_BK = first_BK.sort(1).values + torch.arange(case.k)
    acts_BK = torch.rand(case.n_rows, case.k, generator=generator)
    return acts_BK.to(device, tensor_dtype), latents_BK.to(device), None


@pytest.mark.parametrize("impl", ["dense", "saevlm_fast"])
@pytest.mark.parametrize("decoder", ["plain", "matryoshka"])
def test_decode(measure, encoder_gemm, case, codes, batches, precision, tensor_dtype, tolerance, decoder, impl):
    x_BD = batches[0].to(tensor_dtype)
    W_dec_SD = torch.nn.functional.normalize(torch.randn(case.d_sae, case.d_in, device=x_BD.device), dim=1)
    W_dec_SD, b_dec_D = W_dec_SD.to(tensor_dtype), x_BD.mean(0)
    ends = [case.d_sae]
    if decoder == "matryoshka":
        sizes = group_sizes_from_fractions(MATRYOSHKA_FRACTIONS, case.d_sae)
        ends = torch.tensor(sizes).cumsum(0).tolist()
    dense_BS = densify(*codes, case.d_sae)

    def fast():
        if decoder == "plain":
            return sparse_decode(*codes, W_dec_SD, b_dec_D)[None]
        return matryoshka_decode(*codes, W_dec_SD, b_dec_D, ends)

    def dense():
        return torch.stack([torch.addmm(b_dec_D, dense_BS[:, :end], W_dec_SD[:end]) for end in ends])

    def check():
        expected = dense()
        torch.testing.assert_close(fast(), expected, atol=tolerance * float(expected.abs().max()), rtol=0)

    read, written = case.n_rows * case.k * case.d_in, len(ends) * case.n_rows * case.d_in
    measure(
        f"{decoder} decode",
        impl,
        {
            "saevlm_fast": (fast, {"GB/s": 1e-9 * (read + written) * tensor_dtype.itemsize}),
            "dense": (dense, {"GFLOP/s": 2e-9 * case.n_rows * case.d_in * sum(ends)}),
        },
        check=check,
        shape=case.shape,
        dtype=precision,
        floor=encoder_gemm(x_BD, W_dec_SD.T),
    )
