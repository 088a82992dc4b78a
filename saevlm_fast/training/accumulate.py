"""A step whose batch goes through the SAE in micro-batches, and makes one Adam step.

A batch of B rows is cut into N micro-batches, every N-th row to one (neighbours on disk are often of one class). What
is made of a micro-batch alone:

    the codes        BatchTopK and Matryoshka keep the k B / N largest of a micro-batch
    the penalty      of relu and jumprelu; the step's is their mean, weighted by rows
    the smallest activation kept, whose mean over the micro-batches moves the inference threshold

Everything else is the whole batch's, to rounding: mse and its gradient, dead latents and their auxiliary loss, the
clip, Adam. A TopK step is therefore the step without micro-batches.

Sparse codes are joined (here, and gpu_codes.py on a GPU), and the step goes on as with one batch. Where the batch is
large beside the SAE, or the codes are half dense, one micro-batch is taken after the other, and their gradients are
summed: in memory are two whole gradients, and the residuals and entries of one micro-batch (here on a CPU; of dense
codes gpu_dense.py on a GPU).

Shape suffixes: B rows, G Matryoshka groups, D d_in, S d_sae, M entries.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from saevlm_fast.config import SAEConfig
from saevlm_fast.kernels.segment_sum import segment_sum
from saevlm_fast.kernels.sparse_decode import gather_dot_op, matryoshka_decode
from saevlm_fast.sae import SparseAutoencoder
from saevlm_fast.sparse_codes import SparseCodes
from saevlm_fast.training.any_device import whole_gradients
from saevlm_fast.training.dead_latents import DeadLatents, auxiliary
from saevlm_fast.training.penalty import Penalty, joined_penalty, totals

Numbers = tuple[Tensor, Tensor, Tensor, Tensor | None]  # overall, mse, aux, penalty


def joins(sae: SAEConfig, n_rows: int) -> bool:
    """Whether the batch in its new order, centred, and its residuals take no more memory than the two whole gradients
    that sums need: (2 + groups) B rows of d_in, and 4 d_sae."""
    return (2 + len(sae.group_ends)) * n_rows <= 4 * sae.d_sae


def in_turns(rows_BD: Tensor, n: int) -> Tensor:
    """Rows of n micro-batches, one after the other, as the batch has them: every n-th of one."""
    whole_BD, start = torch.empty_like(rows_BD), 0
    for i in range(n):
        piece_BD = whole_BD[i::n]
        piece_BD.copy_(rows_BD[start : start + len(piece_BD)])
        start += len(piece_BD)
    return whole_BD


def joined(parts: Sequence[tuple[SparseCodes, Penalty | None]], n_rows: int) -> tuple[SparseCodes, Penalty | None]:
    """Codes and penalties of micro-batches as those of their n_rows rows, one after the other, on a CPU."""
    codes = SparseCodes.join([each for each, _ in parts], parts[0][0].d_sae)
    penalties = [penalty.times(each.n_rows / n_rows) for each, penalty in parts if penalty is not None]
    return codes, joined_penalty(penalties, torch.cat) if penalties else None


class SummedGradients:
    """Losses and gradients of the micro-batches of one batch, added one by one.

    Attributes:
        x_hat_BD: the batch's reconstruction. gradients: by name, W_enc's latent-major, W_dec's projected once
            `finish` has been called. fired_S: rows on which each latent fired.
    """

    def __init__(self, sae: SparseAutoencoder, x_BD: Tensor, n: int):
        self.sae, self.x_BD, self.n = sae, x_BD, min(n, len(x_BD))
        self.x_hat_BD = torch.empty_like(x_BD)
        self.mse = x_BD.new_zeros(())
        self.penalty: Tensor | None = None
        self.gradients: dict[str, Tensor] = {}
        self.fired_S = torch.zeros_like(sae.b_enc, dtype=torch.int64)

    def add(self, number: int, x_BD: Tensor, codes: SparseCodes, penalty: Penalty | None) -> None:
        """The micro-batch of this number, its rows and their codes."""
        rows = slice(number, None, self.n)
        self.fired_S += codes.fired()
        share = len(x_BD) / len(self.x_BD)
        if penalty is None:
            self.x_hat_BD[rows], mse, gradients = _gradients(self.sae, x_BD, codes)
        else:
            nothing = DeadLatents(codes.top_indices.new_empty(0), 0)
            self.x_hat_BD[rows], (_, mse, _, lost, _), gradients = whole_gradients(
                self.sae, x_BD, codes, nothing, 0.0, penalty
            )
            self.penalty = lost * share if self.penalty is None else self.penalty + lost * share
        self.mse = self.mse + mse * share
        for name, gradient in gradients.items():
            if name in self.gradients:
                self.gradients[name].add_(gradient, alpha=share)
            else:
                self.gradients[name] = gradient.mul_(share)

    def finish(self, dead: DeadLatents, auxk_alpha: float) -> Numbers:
        """The losses, once the auxiliary loss of the whole batch is added."""
        aux = auxiliary(self.sae, self.x_BD, self.x_hat_BD, dead, auxk_alpha)
        if aux is None:
            overall, aux_loss = self.mse, self.mse.new_zeros(())
        else:
            overall, aux_loss = self.mse + auxk_alpha * aux.loss, aux.loss
            dead_A = dead.latents_A.clamp(max=self.sae.config.d_sae - 1)  # padding, of a GPU, has zero gradients
            rows = {"W_enc": aux.W_enc, "W_dec": aux.W_dec}
            added = {name: each.rows_AD for name, each in rows.items() if each is not None} | {"b_enc": aux.b_enc_A}
            for name, rows_AD in added.items():
                self.gradients[name].index_add_(0, dead_A, rows_AD)
            self.gradients["b_dec"] -= self.sae.W_enc.detach()[:, dead_A] @ aux.b_enc_A
        return overall if self.penalty is None else overall + self.penalty, self.mse, aux_loss, self.penalty


def _gradients(sae: SparseAutoencoder, x_BD: Tensor, codes: SparseCodes) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """x_hat_BD of the last prefix, mse (0-d), and its gradients; of an SAE that keeps k latents a row."""
    W_dec, b_dec, ends = sae.W_dec.detach(), sae.b_dec.detach(), sae.config.group_ends
    n_rows, n_groups = len(x_BD), len(ends)
    x_hat_GBD = matryoshka_decode(*codes.flat(), W_dec, b_dec, ends).contiguous()
    x_hat_BD = x_hat_GBD[-1].clone()
    error_GBD = x_hat_GBD.sub_(x_BD)
    mse = error_GBD.square().sum() / (n_rows * n_groups)
    error_GBD *= 2 / (n_rows * n_groups)
    for g in reversed(range(n_groups - 1)):  # an entry of group g is part of every later prefix
        error_GBD[g] += error_GBD[g + 1]
    acts_M, latents_M, order_M, offsets_S1 = codes.by_latent()
    rows_M = codes.entry_rows().clamp(max=n_rows - 1)[order_M]
    groups_M = torch.bucketize(latents_M, torch.tensor(ends, device=x_BD.device), right=True)
    errors_M, source_RD = groups_M * n_rows + rows_M, error_GBD.flatten(0, 1)
    dots_M = gather_dot_op(source_RD, errors_M, latents_M, W_dec)
    dacts_M = torch.where(acts_M > 0, dots_M, 0)
    db_enc = totals(dacts_M, offsets_S1)
    dW_dec = segment_sum(acts_M, errors_M, offsets_S1, source_RD)
    dW_dec.addcmul_(W_dec, totals(acts_M * dots_M, offsets_S1)[:, None], value=-1)
    gradients = {
        "W_enc": segment_sum(dacts_M, rows_M, offsets_S1, x_BD - b_dec),
        "b_enc": db_enc,
        "W_dec": dW_dec,
        "b_dec": error_GBD[0].sum(0) - sae.W_enc.detach() @ db_enc,
    }
    return x_hat_BD, mse, gradients
