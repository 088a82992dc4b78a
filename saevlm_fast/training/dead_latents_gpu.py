"""The auxiliary loss on a GPU: dead_latents.auxiliary in products of float32 accuracy on tensor cores.

Imported for a GPU's tensors only: its kernels load Triton (kernels/dead_latents_triton.py).

Shape suffixes: B rows of a batch, D d_in, A dead latents with padding, P parts of a sum.
"""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from saevlm_fast.kernels import dead_latents_triton as kernels
from saevlm_fast.kernels.latent_gradient import RowGradient
from saevlm_fast.kernels.topk_encode_screen_triton import multiprocessors
from saevlm_fast.sae import SparseAutoencoder

MOST_ELEMENTS = 64 << 20  # of one [rows, dead] block, 4 bytes each
LARGEST_IN_REGISTERS = 32768
ROWS = 32  # of a program that adds up residuals


class Split(NamedTuple):
    """A float32 matrix as two of float16: (hi + lo) * inverse, a power of two for every row."""

    hi: Tensor
    lo: Tensor
    inverse: Tensor

    @classmethod
    def empty(cls, n_rows: int, width: int, device: torch.device) -> "Split":
        hi, lo = torch.empty(2, n_rows, width, dtype=torch.float16, device=device)
        return cls(hi, lo, torch.empty(n_rows, dtype=torch.float32, device=device))

    def rows(self, start: int, stop: int) -> "Split":
        return Split(*(t[start:stop] for t in self))


def tile_config(capability: tuple[int, int]) -> dict[str, Any]:
    """Of the products."""
    if capability[0] in (9, 10):
        return {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "BAND": 16, "num_warps": 8, "num_stages": 3}
    return {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 32, "BAND": 16, "num_warps": 8, "num_stages": 2}


def product_config(device: torch.device) -> dict[str, Any]:
    if device.type == "cpu":  # the interpreter
        return {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 32, "BAND": 2}
    return tile_config((0, 0) if torch.version.hip is not None else torch.cuda.get_device_capability(device))


def row_launch(width: int) -> dict[str, int]:
    """A program that holds a row."""
    block = triton.next_power_of_2(width)
    return {"BLOCK_D": block, "num_warps": min(max(block // 256, 4), 16)}


def gpu_auxiliary(
    sae: SparseAutoencoder,
    x_BD: Tensor,
    x_hat_BD: Tensor,
    latents_A: Tensor,
    number: Tensor,
    alpha: float,
    frozen: str | None = None,
) -> tuple[Tensor, RowGradient | None, RowGradient | None, Tensor]:
    """dead_latents.auxiliary, as a tuple."""
    (n_rows, d_in), n_dead, device, tile = x_BD.shape, len(latents_A), x_BD.device, product_config(x_BD.device)
    x_hat_BD = x_hat_BD.contiguous()
    x_BD = x_BD if x_BD.stride(1) == 1 else x_BD.contiguous()
    row = row_launch(d_in)
    W_enc_SD, W_dec_SD = sae.W_enc.detach().T, sae.W_dec.detach()
    d_sae = len(W_dec_SD)

    c = Split.empty(n_rows, d_in, device)
    n_programs = triton.cdiv(n_rows, ROWS)
    sums_PD = torch.empty(n_programs, d_in, dtype=torch.float64, device=device)
    squares_P = torch.empty(n_programs, dtype=torch.float64, device=device)
    kernels.rows_kernel[(n_programs,)](
        x_BD, x_hat_BD, sae.b_dec.detach(), *c, sums_PD, squares_P, x_BD.stride(0), n_rows, d_in, ROWS=ROWS, **row
    )
    variance = (squares_P.sum() - sums_PD.sum(0).square().sum() / n_rows) / n_rows
    defined = (variance > 0) & (number > 0)
    scale = torch.where(defined, 2 * alpha / (n_rows * variance), 0).float()

    enc, dec, bias_A = (
        Split.empty(n_dead, d_in, device),
        Split.empty(n_dead, d_in, device),
        torch.empty(n_dead, dtype=torch.float32, device=device),
    )
    kernels.latents_kernel[(n_dead,)](
        latents_A, W_enc_SD, sae.b_enc.detach(), W_dec_SD, *enc, bias_A, dec.hi, dec.lo, d_sae, d_in, **row
    )
    block = min(n_rows, max(1, MOST_ELEMENTS // n_dead))
    acts_BA = torch.empty(block, n_dead, dtype=torch.float32, device=device)
    inverse_B = torch.empty(block, dtype=torch.float32, device=device)
    error = Split.empty(block, d_in, device)
    error_BD = torch.empty(block, d_in, dtype=torch.float32, device=device)
    row_squares_B = torch.empty(n_rows, dtype=torch.float32, device=device)
    BM, BN = tile["BLOCK_M"], tile["BLOCK_N"]
    n_tiles = triton.cdiv(n_dead, BM) * triton.cdiv(d_in, BN)
    n_parts = max(1, min(2 * multiprocessors(device) // n_tiles, block // 256))
    size = triton.cdiv(triton.cdiv(block, n_parts), tile["BLOCK_K"]) * tile["BLOCK_K"]
    n_parts = triton.cdiv(block, size)
    parts = {
        name: None if frozen == name else torch.zeros(n_parts, n_dead, d_in, dtype=torch.float32, device=device)
        for name in ("W_enc", "W_dec")
    }
    n_blocks, tiles_m = triton.cdiv(n_rows, block), triton.cdiv(block, BM)
    sums_TA = torch.zeros(n_blocks * tiles_m, n_dead, dtype=torch.float32, device=device)
    largest = torch.zeros(n_blocks, 2, dtype=torch.int32, device=device)
    k = d_in // 2
    for i in range(n_blocks):
        start, stop = i * block, min((i + 1) * block, n_rows)
        x, x_hat, c_block, n = x_BD[start:stop], x_hat_BD[start:stop], c.rows(start, stop), stop - start
        tiles_a, tiles_d = triton.cdiv(n_dead, BN), triton.cdiv(d_in, BN)
        tiles_b = triton.cdiv(n, BM)
        kernels.acts_kernel[(tiles_b * tiles_a,)](*c_block, *enc, bias_A, acts_BA, n, n_dead, d_in, **tile)
        keep = triton.next_power_of_2(n_dead)
        kernels.keep_kernel[(n,)](acts_BA, inverse_B, n_dead, k, BLOCK=keep, num_warps=min(max(keep // 1024, 4), 32))
        kernels.error_kernel[(tiles_b * tiles_d,)](
            acts_BA, inverse_B, dec.hi, dec.lo, x, x_hat, error_BD, largest[i], x.stride(0), n, n_dead, d_in, **tile
        )
        kernels.error_rows_kernel[(n,)](
            error_BD, inverse_B, c_block.inverse, error.hi, error.lo, row_squares_B[start:stop], largest[i], d_in, **row
        )
        grid = (n_tiles, n_parts)
        if parts["W_dec"] is not None:
            kernels.gradient_kernel[grid](
                acts_BA, error.hi, error.lo, largest[i], parts["W_dec"], n, n_dead, d_in, size, i, TOP=9, **tile
            )
        kernels.dacts_kernel[(tiles_b * tiles_a,)](
            error.hi,
            error.lo,
            dec.hi,
            dec.lo,
            inverse_B,
            c_block.inverse,
            largest[i],
            acts_BA,
            sums_TA[i * tiles_m :],
            n,
            n_dead,
            d_in,
            **tile,
        )
        if parts["W_enc"] is not None:
            kernels.gradient_kernel[grid](
                acts_BA,
                c_block.hi,
                c_block.lo,
                largest[i, 1:],
                parts["W_enc"],
                n,
                n_dead,
                d_in,
                size,
                i,
                TOP=14,
                **tile,
            )
    aux = torch.where(defined, row_squares_B.sum(dtype=torch.float64) / n_rows / variance, 0).float()
    gradients = {}
    for name, parts_PAD in parts.items():
        if parts_PAD is None:
            gradients[name] = None
            continue
        rows_AD, squares_A = torch.empty(n_dead, d_in, device=device), torch.empty(n_dead, device=device)
        kernels.finish_kernel[(n_dead,)](
            parts_PAD,
            latents_A,
            W_dec_SD,
            scale,
            rows_AD,
            squares_A,
            n_parts,
            n_dead,
            d_sae,
            d_in,
            PROJECT=name == "W_dec",
            **row,
        )
        gradients[name] = RowGradient(latents_A, rows_AD, squares_A.sum())
    return aux, gradients["W_enc"], gradients["W_dec"], sums_TA.sum(0) * scale
