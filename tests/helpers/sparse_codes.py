"""Random sparse codes and error bounds, shared by the tests of segment_sum and sparse_decode."""

import torch
from torch import Tensor

from saevlm_fast.kernels import reference
from saevlm_fast.sparse_codes import SparseCodes


def random_codes(n_rows: int, k: int, d_sae: int, layout: str, dtype: torch.dtype, seed: int = 0):
    """(acts, latents, row_offsets) on CPU; latent 0 fires in nearly every row, so there is always one heavy latent.

    "csr" rows have 0..k entries and the capacity n_rows * k leaves padding behind them, which carries NaN activations
    at latent 0: whoever reads it shows it.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = [_ascending_latents(k, d_sae, generator) for _ in range(n_rows)]
    latents_BK = torch.stack(rows) if rows else torch.empty(0, k, dtype=torch.int64)
    acts_BK = torch.rand(n_rows, k, generator=generator, dtype=torch.float64) + 0.1
    if layout == "fixed":
        return acts_BK.to(dtype), latents_BK, None
    kept_BK = torch.rand(n_rows, k, generator=generator) < 0.7
    kept_BK[n_rows // 2 :: 5] = False  # empty rows
    row_offsets = torch.cat([torch.zeros(1, dtype=torch.int64), kept_BK.sum(1).cumsum(0)])
    padding = int((~kept_BK).sum())
    acts_M = torch.nn.functional.pad(acts_BK[kept_BK], (0, padding), value=float("nan"))
    return acts_M.to(dtype), torch.nn.functional.pad(latents_BK[kept_BK], (0, padding)), row_offsets


def random_sparse_codes(n_rows: int, k: int, d_sae: int, layout: str, dtype: torch.dtype, seed: int = 0) -> SparseCodes:
    """The same as SparseCodes."""
    return SparseCodes.from_flat(*random_codes(n_rows, k, d_sae, layout, dtype, seed), d_sae)


def group_by_latent(r_NK):
    """acts_M, images_M, offsets_S1 of the non-zeros of a dense matrix."""
    latents_M, images_M = torch.nonzero(r_NK.T).unbind(1)
    counts_S = torch.bincount(latents_M, minlength=r_NK.shape[1])
    return r_NK.T[latents_M, images_M], images_M, torch.nn.functional.pad(counts_S.cumsum(0), (1, 0))


def _ascending_latents(k: int, d_sae: int, generator: torch.Generator) -> Tensor:
    others = 1 + torch.randperm(d_sae - 1, generator=generator)[: max(k - 1, 0)]
    return torch.cat([torch.zeros(1, dtype=torch.int64), others])[:k].sort().values


def assert_near_truth(out: Tensor, truth: Tensor, magnitude: Tensor, roundings: int = 1) -> None:
    """|out - truth| within `roundings` roundings to out's dtype plus float32 summation (float64 for float64).

    magnitude is the same sum over absolute terms. A sum accumulated in a half type does not pass.
    """
    out, truth, magnitude = out.cpu(), truth.cpu(), magnitude.cpu()
    assert out.shape == truth.shape
    sum_eps = torch.finfo(torch.float64 if out.dtype == torch.float64 else torch.float32).eps
    allowed = roundings * torch.finfo(out.dtype).eps * magnitude + 32 * sum_eps * magnitude
    if out.dtype in (torch.float16, torch.bfloat16) and roundings == 1:
        allowed = torch.finfo(out.dtype).eps * truth.abs() + 32 * sum_eps * magnitude + torch.finfo(out.dtype).tiny
    error = (out.double() - truth).abs()
    assert bool((error <= allowed).all()), f"worst excess {(error - allowed).max():.3e}, error {error.max():.3e}"


def segment_sum_magnitude(weights_M: Tensor, ids_M: Tensor, offsets_L1: Tensor, source_RD: Tensor) -> Tensor:
    return reference.segment_sum(weights_M.abs().double(), ids_M, offsets_L1, source_RD.abs().double())
