"""A dense forward of the plain form, written from its docstring alone; float64."""

import torch
from torch import Tensor

from saevlm_fast.formats.plain import PlainSAE


def normalised(plain: PlainSAE, x_BD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(n(x), its mean, its scale): x = n(x) scale + mean."""
    zero_B = torch.zeros_like(x_BD[:, :1])
    if plain.input_norm == "layer_norm":
        mean_B, std_B = x_BD.mean(1, keepdim=True), x_BD.std(1, keepdim=True)
        return (x_BD - mean_B) / (std_B + plain.eps), mean_B, std_B
    if plain.input_norm == "token_norm":
        scale_B = x_BD.norm(dim=1, keepdim=True) / x_BD.shape[1] ** 0.5
        return x_BD / scale_B, zero_B, scale_B
    return x_BD, zero_B, torch.ones_like(zero_B)


def encode(plain: PlainSAE, x_BD: Tensor) -> Tensor:
    """z [B, d_sae]. A batch_topk without threshold keeps the k largest of a row."""
    x_BD = normalised(plain, x_BD.double())[0]
    h_BS = (x_BD - plain.b_dec.double()) @ plain.W_enc.double() + plain.b_enc.double()
    if plain.threshold is not None:
        return torch.where((h_BS > plain.threshold.double()) & (h_BS > 0), h_BS, 0.0)
    if plain.activation == "relu":
        return h_BS.relu()
    values_BK, latents_BK = h_BS.topk(plain.k, dim=1)
    return torch.zeros_like(h_BS).scatter(1, latents_BK, values_BK.relu())


def decode(plain: PlainSAE, z_BS: Tensor, x_BD: Tensor) -> Tensor:
    """x_hat [B, d_in] of z, with the statistics of x."""
    _, mean_B, scale_B = normalised(plain, x_BD.double())
    return (z_BS @ plain.W_dec.double() + plain.b_dec.double()) * scale_B + mean_B


def forward(plain: PlainSAE, x_BD: Tensor) -> Tensor:
    """x_hat [B, d_in]."""
    return decode(plain, encode(plain, x_BD), x_BD)
