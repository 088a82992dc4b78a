"""Losses of a batch and the gradient of every parameter, on a CPU: sums over the entries of sparse codes.

The dense [B, d_sae] matrix of activations is never formed, and a weight's gradient is made block by block where it is
used (kernels/latent_gradient.py). docs/recipe.md section 1
"""

from typing import NamedTuple

import torch
from torch import Tensor

from saevlm_fast.errors import require
from saevlm_fast.kernels.common import Workspace
from saevlm_fast.kernels.cpu_loops import bounds_by_work, compiles, in_parts
from saevlm_fast.kernels.grouping import entry_rows
from saevlm_fast.kernels.latent_gradient import EntryGradient, RowGradient, entry_gradient, segment_totals
from saevlm_fast.kernels.segment_sum import check_ids, segment_sum, segment_sum_cpu
from saevlm_fast.kernels.sparse_decode import gather_dot_op, group_bag_offsets
from saevlm_fast.sae import SparseAutoencoder
from saevlm_fast.sparse_codes import SparseCodes
from saevlm_fast.training.dead_latents import DeadLatents, auxiliary
from saevlm_fast.training.mono import MonoTerm, mono_of_entries
from saevlm_fast.training.penalty import Penalty

_BLOCK_BYTES = 2 << 20  # of the residuals of one block of rows on a CPU
_MULTIPLIED_AT_A_TIME = 256  # latents of a product
_SUMMED_AT_A_TIME = 64  # latents of a segment: one is the work of one thread

_residuals, _centred_rows = Workspace(), Workspace()


class Losses(NamedTuple):
    """0-d tensors: overall = mse + auxk_alpha * aux + penalty, which relu and jumprelu alone have, + mono."""

    overall: Tensor
    mse: Tensor
    aux: Tensor
    penalty: Tensor | None = None
    mono: Tensor | None = None


class Gradients(NamedTuple):
    """Gradients of every parameter, None of frozen weights; W_enc's are held per latent, [.., d_in] rows, like W_dec's.

    Those of the auxiliary loss, on dead latents alone, are to be added: a list of one or none.
    """

    W_enc: EntryGradient | None
    aux_enc: list[RowGradient]
    b_enc: Tensor
    W_dec: EntryGradient | None
    aux_dec: list[RowGradient]
    b_dec: Tensor
    threshold: Tensor | None = None

    def rows(self) -> dict[str, tuple[EntryGradient, list[RowGradient]]]:
        """Those of the matrices that learn."""
        named = {"W_enc": (self.W_enc, self.aux_enc), "W_dec": (self.W_dec, self.aux_dec)}
        return {name: (gradient, aux) for name, (gradient, aux) in named.items() if gradient is not None}

    def vectors(self) -> dict[str, Tensor]:
        """Those of all that is no matrix."""
        named = {"b_enc": self.b_enc, "b_dec": self.b_dec}
        return named if self.threshold is None else named | {"threshold": self.threshold}


def loss_and_gradients(
    sae: SparseAutoencoder,
    x_BD: Tensor,
    codes: SparseCodes,
    dead: DeadLatents,
    auxk_alpha: float,
    penalty: Penalty | None = None,
    frozen: str | None = None,
    mono: MonoTerm | None = None,
) -> tuple[Tensor, Losses, Gradients]:
    """Of one batch and its codes, on a CPU: losses, and the gradient of every parameter. docs/recipe.md section 1.

    mse = mean over Matryoshka prefixes (one prefix otherwise) of mean_b ||x - x_hat_g||^2: divided by the number of
    groups once; the paper's code divides twice. frozen: W_enc or W_dec, whose gradient is not made.

    Returns:
        x_hat_BD of the last prefix, the losses, the gradients (the decoder's projected). The next call on this thread
        overwrites what the gradients of the weights are made from.
    """
    n_groups = len(sae.config.group_ends)
    bag_offsets = _bag_offsets(sae, codes)
    rows = _through_rows(sae, x_BD, codes, bag_offsets)
    x_hat_BD, mse = rows.x_hat_BD, rows.squared / (len(x_BD) * n_groups)
    dW_enc, dW_dec, db_enc, dtheta, mono_loss = _latent_gradients(sae, codes, bag_offsets, rows, penalty, frozen, mono)

    aux = auxiliary(sae, x_BD, x_hat_BD, dead, auxk_alpha, frozen)
    aux_loss, aux_enc, aux_dec = mse.new_zeros(()), list[RowGradient](), list[RowGradient]()
    if aux is not None:
        aux_loss = aux.loss
        aux_enc, aux_dec = ([] if rows is None else [rows] for rows in (aux.W_enc, aux.W_dec))
        db_enc.index_add_(0, dead.latents_A, aux.b_enc_A)
    db_dec = rows.suffix_BGD[:, 0].sum(0) - _through_encoder(sae.W_enc.detach(), db_enc)
    overall = mse + auxk_alpha * aux_loss
    more = [None if penalty is None else penalty.loss, mono_loss]
    for loss in more:
        overall = overall if loss is None else overall + loss
    losses = Losses(overall, mse, aux_loss, *more)
    return x_hat_BD, losses, Gradients(dW_enc, aux_enc, db_enc, dW_dec, aux_dec, db_dec, dtheta)


def _through_encoder(W_enc_DS: Tensor, db_enc_S: Tensor) -> Tensor:
    """W_enc @ db_enc [d_in], of the latents that have a gradient: the others' weights are not read."""
    if not W_enc_DS.t().is_contiguous():
        return W_enc_DS @ db_enc_S
    (latents_A,) = db_enc_S.nonzero(as_tuple=True)
    if 2 * len(latents_A) > len(db_enc_S):
        return _matrix_times_vector(W_enc_DS, db_enc_S)
    offsets = torch.arange(0, len(latents_A) + _SUMMED_AT_A_TIME, _SUMMED_AT_A_TIME).clamp_(max=len(latents_A))
    return segment_sum(db_enc_S[latents_A], latents_A, offsets, W_enc_DS.t()).sum(0)


def _matrix_times_vector(W_DS: Tensor, v_S: Tensor) -> Tensor:
    """W @ v [d_in], W.t() contiguous. With two threads `@` takes 1.2 to 1.8 times as long (measured)."""
    d_in, size = len(W_DS), _MULTIPLIED_AT_A_TIME
    n_parts = len(v_S) // size
    whole = n_parts * size
    sums_P1D = torch.bmm(v_S[:whole].view(n_parts, 1, size), W_DS.t()[:whole].view(n_parts, size, d_in))
    return sums_P1D.sum((0, 1)) + W_DS[:, whole:] @ v_S[whole:]


def _centred(x_BD: Tensor, b_dec: Tensor) -> Tensor:
    """x - b_dec, in memory that the next call on this thread overwrites."""
    return torch.sub(x_BD, b_dec, out=_centred_rows.get(x_BD.numel(), x_BD.dtype).view(x_BD.shape))


def _bag_offsets(sae: SparseAutoencoder, codes: SparseCodes) -> Tensor:
    """Bag b * G + g is the run of row b's entries in Matryoshka group g: [B * G + 1]."""
    _, latents_M, row_offsets = codes.csr()
    if len(sae.config.group_ends) == 1:
        return row_offsets
    return group_bag_offsets(latents_M, row_offsets, sae.config.group_ends, sae.config.d_sae)


class _Rows(NamedTuple):
    """What the rows of a batch leave for the gradients of the latents.

    x_hat_BD of the last prefix; the sum of the squared residuals x_hat_g - x of all rows and prefixes (0-d); x - b_dec;
    and the gradient of mse that the entries of every group receive: an entry of group j is part of every prefix g >= j,
    so theirs is the suffix sum. The next call on this thread overwrites the last two. Perhaps the norms of these two,
    and the dot products of all entries' rows of W_dec with what the entries receive.
    """

    x_hat_BD: Tensor
    squared: Tensor
    centred_BD: Tensor
    suffix_BGD: Tensor
    centred_norm_B: Tensor | None = None
    suffix_norm_R: Tensor | None = None
    dots_M: Tensor | None = None


def _through_rows(sae: SparseAutoencoder, x_BD: Tensor, codes: SparseCodes, bag_offsets: Tensor) -> _Rows:
    if compiles(x_BD, sae.W_dec, sae.b_dec, codes.top_acts):
        return _through_rows_at_once(sae, x_BD, codes, bag_offsets)
    x_hat_BD, squared, suffix_BGD = _prefix_residuals(sae, x_BD, codes, bag_offsets)
    return _Rows(x_hat_BD, squared, _centred(x_BD, sae.b_dec.detach()), suffix_BGD)


def _through_rows_at_once(sae: SparseAutoencoder, x_BD: Tensor, codes: SparseCodes, bag_offsets: Tensor) -> _Rows:
    """The rows of W_dec are read from memory once, for the decoder and for the dot products."""
    from saevlm_fast.kernels.step_rows_numba import step_rows

    (n_rows, d_in), n_groups = x_BD.shape, len(sae.config.group_ends)
    acts_M, latents_M, _ = codes.csr()
    _check_codes(codes, x_BD, bag_offsets, sae)
    suffix_RD = _residuals.get(n_rows * n_groups * d_in, x_BD.dtype).view(n_rows * n_groups, d_in)
    centred_BD = _centred_rows.get(x_BD.numel(), x_BD.dtype).view(x_BD.shape)
    x_hat_BD, dots_M = torch.empty_like(x_BD), torch.zeros_like(acts_M)
    (squared_B, centred_norm_B), suffix_norm_R = x_BD.new_empty(2, n_rows), x_BD.new_empty(n_rows * n_groups)
    given = acts_M, latents_M, bag_offsets, x_BD, sae.W_dec, sae.b_dec, x_BD.new_tensor([2 / max(n_rows * n_groups, 1)])
    of_groups = suffix_RD.view(n_rows, n_groups, d_in), suffix_norm_R.view(n_rows, n_groups)
    made = x_hat_BD, squared_B, centred_BD, centred_norm_B, *of_groups, dots_M
    in_parts(step_rows, bounds_by_work(bag_offsets[::n_groups], 4), *given, *made)
    return _Rows(x_hat_BD, squared_B.sum(), centred_BD, of_groups[0], centred_norm_B, suffix_norm_R, dots_M)


def _check_codes(codes: SparseCodes, x_BD: Tensor, bag_offsets: Tensor, sae: SparseAutoencoder) -> None:
    """A loop would read and write beside what does not fit."""
    require(codes.n_rows == len(x_BD), f"codes: {codes.n_rows} rows, x has {len(x_BD)}")
    require(x_BD.shape[1] == sae.config.d_in, f"x: {x_BD.shape[1]} columns, d_in is {sae.config.d_in}")
    acts_M, latents_M, row_offsets = codes.csr()
    end = min(len(acts_M), len(latents_M))
    fit = int(row_offsets[0]) == 0 and int(row_offsets[-1]) <= end and bool((row_offsets.diff() >= 0).all())
    require(fit, f"codes: row_offsets do not ascend from 0 to at most {end}")
    require(bool((bag_offsets.diff() >= 0).all()), "codes: latents do not ascend in every row")
    check_ids(latents_M[: int(row_offsets[-1])], sae.config.d_sae)


def _prefix_residuals(
    sae: SparseAutoencoder, x_BD: Tensor, codes: SparseCodes, bag_offsets: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Of all Matryoshka prefixes, row block by row block: a block stays in cache through all that is done to it.

    Returns:
        x_hat_BD of the last prefix; the sum of the squared residuals x_hat_g - x of all rows and prefixes (0-d); and
        the gradient of mse that the entries of every group receive [B, G, d_in]: an entry of group j is part of every
        prefix g >= j, so theirs is the suffix sum. The next call on this thread overwrites it.
    """
    (n_rows, d_in), n_groups = x_BD.shape, len(sae.config.group_ends)
    W_dec, b_dec = sae.W_dec.detach(), sae.b_dec.detach()
    x_hat_BD, squared = torch.empty_like(x_BD), []
    acts_M, latents_M, _ = codes.csr()
    # Memory of this thread: a first touch of 20 MiB costs ten times the write.
    suffix_RD = _residuals.get(n_rows * n_groups * d_in, x_BD.dtype)
    suffix_BGD = suffix_RD.view(n_rows, n_groups, d_in)
    for start, stop in _row_blocks(x_BD, n_groups):
        offsets = bag_offsets[start * n_groups : stop * n_groups + 1]
        # Not segment_sum_into: embedding_bag fetches ahead, and the rows of W_dec lie far apart (docs/decisions.md).
        sums_bGD = segment_sum_cpu(acts_M, latents_M, offsets, W_dec).view(stop - start, n_groups, d_in)
        sums_bGD[:, 0] += b_dec
        for g in range(1, n_groups):
            sums_bGD[:, g] += sums_bGD[:, g - 1]
        x_hat_BD[start:stop] = sums_bGD[:, -1]
        residuals_bGD = torch.sub(sums_bGD, x_BD[start:stop, None], out=suffix_BGD[start:stop])
        squared.append(torch.linalg.vector_norm(residuals_bGD, dim=2).square_().sum())
        residuals_bGD *= 2 / (n_rows * n_groups)
        for g in reversed(range(n_groups - 1)):
            residuals_bGD[:, g] += residuals_bGD[:, g + 1]
    return x_hat_BD, torch.stack(squared).sum(), suffix_BGD


def _row_blocks(x_BD: Tensor, n_groups: int) -> list[tuple[int, int]]:
    size = max(1, _BLOCK_BYTES // (n_groups * x_BD.shape[1] * x_BD.element_size()))
    return [(start, min(start + size, len(x_BD))) for start in range(0, len(x_BD), size)]


def _latent_gradients(
    sae: SparseAutoencoder,
    codes: SparseCodes,
    bag_offsets: Tensor,
    rows: _Rows,
    penalty: Penalty | None,
    frozen: str | None,
    mono: MonoTerm | None,
) -> tuple[EntryGradient | None, EntryGradient | None, Tensor, Tensor | None, Tensor | None]:
    """dW_enc, dW_dec, db_enc [d_sae], that of thresholds, and MonoLoss, from one sort of the entries by latent."""
    suffix_RD = rows.suffix_BGD.flatten(0, 1)
    acts_M, latents_M, order_M, offsets_S1 = codes.by_latent()
    bags_M = entry_rows(codes.top_indices, bag_offsets).clamp_(max=max(len(suffix_RD) - 1, 0))[order_M]
    rows_M, W_dec = bags_M // len(sae.config.group_ends), sae.W_dec.detach()
    if rows.dots_M is None:  # a latent's entries side by side: W_dec is read once
        dots_M = gather_dot_op(suffix_RD, bags_M, latents_M, W_dec)
    else:
        dots_M = rows.dots_M[order_M]
    dacts_M = torch.where(acts_M > 0, dots_M, 0)
    projected = acts_M, bags_M, offsets_S1, suffix_RD, dacts_M, rows.suffix_norm_R
    dW_dec = None if frozen == "W_dec" else entry_gradient(*projected)
    dtheta = mono_loss = None
    if penalty is not None:
        dacts_M = penalty.of_acts(acts_M, dots_M)
        dtheta = penalty.band and penalty.band.threshold_gradient(dots_M, latents_M, order_M, offsets_S1)
    if mono is not None:
        mono_loss, of_acts_M = mono_of_entries(acts_M, rows_M, latents_M, offsets_S1, mono)
        dacts_M = dacts_M + of_acts_M
    centred = rows.centred_BD, None, rows.centred_norm_B
    dW_enc = None if frozen == "W_enc" else entry_gradient(dacts_M, rows_M, offsets_S1, *centred)
    return dW_enc, dW_dec, segment_totals(dacts_M, offsets_S1), dtheta, mono_loss
