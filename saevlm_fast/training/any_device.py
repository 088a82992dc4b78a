"""A penalised step on any device: the sums of gradients.py by public operations, with whole gradients in memory.

For ReLU and JumpReLU codes that are hardly sparse, as at the start of a run, when half of the latents fire: then matrix
products, a chunk of rows at a time, are 20 times as fast as sums over entries (measured on a CPU). A CPU's path for
sparse codes makes gradients block by block (gradients.py). A GPU has its own for either (gpu_codes.py, gpu_dense.py),
and comes here with MonoLoss, weights in 16 bits and the like. All agree (tests/training/test_penalised_step.py).

Shape suffixes: B rows, R rows of a chunk, D d_in, S d_sae, M entries.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from saevlm_fast.kernels.common import Cone
from saevlm_fast.kernels.grouping import entry_rows
from saevlm_fast.kernels.latent_gradient import RowGradient
from saevlm_fast.kernels.latent_update import AdamSettings, adam_
from saevlm_fast.kernels.segment_sum import segment_sum
from saevlm_fast.kernels.sparse_decode import gather_dot_op, sparse_decode
from saevlm_fast.sae import SparseAutoencoder
from saevlm_fast.sparse_codes import SparseCodes
from saevlm_fast.training.dead_latents import DeadLatents, auxiliary
from saevlm_fast.training.mono import DenseMono, MonoTerm, mono_of_entries
from saevlm_fast.training.penalty import Penalty, totals

_DENSE_SHARE = 1 / 32  # of entries among all B * S, from which products are faster
_CHUNK_BYTES = 64 << 20  # of one [R, S] matrix


def is_dense(codes: SparseCodes) -> bool:
    """Whether matrix products are the faster way."""
    return len(codes.top_indices) > _DENSE_SHARE * codes.n_rows * codes.d_sae


class _Sums(NamedTuple):
    """x_hat_BD, the gradient of mse to it, the squared error (0-d), and gradients; those of frozen weights are None.
    W_dec's is projected. mono: MonoLoss."""

    x_hat_BD: Tensor
    error_BD: Tensor
    squared: Tensor
    W_enc: Tensor | None
    b_enc: Tensor
    W_dec: Tensor | None
    threshold: Tensor | None
    mono: Tensor | None


def whole_gradients(
    sae: SparseAutoencoder,
    x_BD: Tensor,
    codes: SparseCodes,
    dead: DeadLatents,
    auxk_alpha: float,
    penalty: Penalty,
    frozen: str | None = None,
    mono: MonoTerm | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None], dict[str, Tensor]]:
    """x_hat_BD; losses (0-d): overall, mse, aux, penalty, mono; gradients by name, W_enc latent-major, W_dec projected.

    frozen: W_enc or W_dec, of which none is made.
    """
    sums = (_sums_by_products if is_dense(codes) else _sums_of_entries)(sae, x_BD, codes, penalty, frozen, mono)
    mse = sums.squared / len(x_BD)
    named = {"W_enc": sums.W_enc, "b_enc": sums.b_enc, "W_dec": sums.W_dec, "threshold": sums.threshold}
    gradients = {name: gradient for name, gradient in named.items() if gradient is not None}
    aux = auxiliary(sae, x_BD, sums.x_hat_BD, dead, auxk_alpha, frozen)
    aux_loss = mse.new_zeros(()) if aux is None else aux.loss
    if aux is not None:
        for name, rows in (("W_enc", aux.W_enc), ("W_dec", aux.W_dec)):
            if rows is not None:
                _add_rows_(gradients[name], rows)
        gradients["b_enc"].index_add_(0, dead.latents_A.clamp(max=sae.config.d_sae - 1), aux.b_enc_A)
    gradients["b_dec"] = sums.error_BD.sum(0) - sae.W_enc.detach() @ gradients["b_enc"]
    overall = mse + auxk_alpha * aux_loss + penalty.loss
    overall = overall if sums.mono is None else overall + sums.mono
    return sums.x_hat_BD, (overall, mse, aux_loss, penalty.loss, sums.mono), gradients


def _sums_of_entries(
    sae: SparseAutoencoder,
    x_BD: Tensor,
    codes: SparseCodes,
    penalty: Penalty,
    frozen: str | None,
    mono: MonoTerm | None,
) -> _Sums:
    W_dec, b_dec = sae.W_dec.detach(), sae.b_dec.detach()
    x_hat_BD = sparse_decode(*codes.flat(), W_dec, b_dec)
    error_BD = x_hat_BD - x_BD
    squared = error_BD.square().sum()
    error_BD *= 2 / len(x_BD)
    acts_M, latents_M, order_M, offsets_S1 = codes.by_latent()
    rows_M = codes.entry_rows()[order_M]
    dots_M = gather_dot_op(error_BD, rows_M, latents_M, W_dec)
    dacts_M = penalty.of_acts(acts_M, dots_M)
    band, dW_dec, mono_loss = penalty.band, None, None
    if mono is not None:
        mono_loss, of_acts_M = mono_of_entries(acts_M, rows_M, latents_M, offsets_S1, mono)
        dacts_M = dacts_M + of_acts_M
    if frozen != "W_dec":
        dW_dec = segment_sum(acts_M, rows_M, offsets_S1, error_BD)
        dW_dec.addcmul_(W_dec, totals(acts_M * dots_M, offsets_S1)[:, None], value=-1)
    return _Sums(
        x_hat_BD,
        error_BD,
        squared,
        None if frozen == "W_enc" else segment_sum(dacts_M, rows_M, offsets_S1, x_BD - b_dec),
        totals(dacts_M, offsets_S1),
        dW_dec,
        None if band is None else band.threshold_gradient(dots_M, latents_M, order_M, offsets_S1),
        mono_loss,
    )


def _sums_by_products(
    sae: SparseAutoencoder,
    x_BD: Tensor,
    codes: SparseCodes,
    penalty: Penalty,
    frozen: str | None,
    mono: MonoTerm | None,
) -> _Sums:
    """The same sums, chunk by chunk of rows: [R, S] matrices of codes and of their gradient are all that is dense."""
    W_dec, b_dec, band, n_rows = sae.W_dec.detach(), sae.b_dec.detach(), penalty.band, len(x_BD)
    latents_M = codes.csr()[1]
    x_hat_BD, error_BD = torch.empty_like(x_BD), torch.empty_like(x_BD)
    dW_enc, dW_dec = (None if frozen == name else torch.zeros_like(W_dec) for name in ("W_enc", "W_dec"))
    db_enc, parallel_S = torch.zeros_like(sae.b_enc.detach()), torch.zeros_like(sae.b_enc.detach())
    squared = x_BD.new_zeros(())
    dtheta_S = None if band is None else torch.zeros_like(band.threshold_S)
    dense_mono = None if mono is None else DenseMono(codes.d_sae, mono.embeddings, mono.weight)
    if dense_mono is not None:
        for rows, _, _, z_RS in _chunks(codes):
            dense_mono.add(rows, z_RS)
    scores = None if dense_mono is None else dense_mono.scores()
    for rows, entries, places_M, z_RS in _chunks(codes):
        x_RD = x_BD[rows]
        x_hat_BD[rows] = torch.addmm(b_dec, z_RS, W_dec)
        error_RD = torch.sub(x_hat_BD[rows], x_RD, out=error_BD[rows])
        squared += error_RD.square().sum()
        error_RD *= 2 / n_rows
        dz_RS = error_RD @ W_dec.T
        if dW_dec is not None:
            dW_dec.addmm_(z_RS.T, error_RD)
            parallel_S += (z_RS * dz_RS).sum(0)
        if band is not None and dtheta_S is not None:
            terms_M = band.terms(dz_RS.view(-1)[places_M], latents_M[entries], band.pre_M[entries])
            dtheta_S += _placed(terms_M, places_M, len(x_RD), codes.d_sae).sum(0)
        dh_RS = penalty.of_acts(z_RS, dz_RS)
        if dense_mono is not None and scores is not None:
            dh_RS = dh_RS + dense_mono.gradient(scores, rows, z_RS)
        if dW_enc is not None:
            dW_enc.addmm_(dh_RS.T, x_RD - b_dec)
        db_enc += dh_RS.sum(0)
    if dW_dec is not None:
        dW_dec.addcmul_(W_dec, parallel_S[:, None], value=-1)
    mono_loss = None if scores is None else scores.loss
    return _Sums(x_hat_BD, error_BD, squared, dW_enc, db_enc, dW_dec, dtheta_S, mono_loss)


def _chunks(codes: SparseCodes) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
    """Rows, their entries, where these stand in the flat [R, S] matrix, and that matrix, chunk by chunk."""
    acts_M, latents_M, row_offsets = codes.csr()
    chunk = max(1, _CHUNK_BYTES // (codes.d_sae * acts_M.element_size()))
    ends = [*row_offsets[::chunk].tolist(), len(latents_M)]  # a threshold leaves no padding
    for number, start in enumerate(range(0, codes.n_rows, chunk)):
        entries, rows = slice(ends[number], ends[number + 1]), slice(start, min(start + chunk, codes.n_rows))
        places_M = _places(row_offsets[rows.start : rows.stop + 1], latents_M[entries], codes.d_sae)
        yield rows, entries, places_M, _placed(acts_M[entries], places_M, rows.stop - rows.start, codes.d_sae)


def _places(row_offsets_R1: Tensor, latents_M: Tensor, d_sae: int) -> Tensor:
    """Where the entries of a chunk of rows stand in its flat [R, S] matrix: each in a place of its own."""
    return entry_rows(latents_M, row_offsets_R1 - row_offsets_R1[0]) * d_sae + latents_M


def _placed(values_M: Tensor, places_M: Tensor, n_rows: int, d_sae: int) -> Tensor:
    return values_M.new_zeros(n_rows * d_sae).index_copy_(0, places_M, values_M).view(n_rows, d_sae)


def _add_rows_(whole_SD: Tensor, gradient: RowGradient) -> None:
    whole_SD.index_add_(0, gradient.latents_A.clamp(max=len(whole_SD) - 1), gradient.rows_AD)  # padding is zeros


def update_(
    parameters: dict[str, Tensor],
    moments: dict[str, tuple[Tensor, Tensor]],
    gradients: dict[str, Tensor],
    clip_norm: float,
    adam: AdamSettings,
    cone: Cone | None = None,
) -> None:
    """Clip, Adam and unit decoder rows (in the cone), in place, of what has a gradient. Nothing is asked of a GPU."""
    wide = torch.promote_types(parameters["W_dec"].dtype, torch.float32)
    squares = torch.stack([gradient.to(wide).square().sum() for gradient in gradients.values()])
    clip = (clip_norm / (squares.sum().sqrt() + 1e-6)).clamp(max=1.0)
    for name, gradient in gradients.items():
        adam_(parameters[name], *moments[name], gradient, clip.to(gradient.dtype), adam)
    if "W_dec" not in gradients:
        return
    W_dec = parameters["W_dec"]
    W_dec /= torch.linalg.vector_norm(W_dec, dim=1, keepdim=True) + torch.finfo(W_dec.dtype).eps
    if cone is not None:
        cone.hold_(W_dec)
