"""A penalised step on any device: the sums of step.py by public operations, with whole gradients in memory.

For ReLU and JumpReLU on a GPU, whose number of entries the host has to ask for: such a step is not captured. A CPU's
path makes gradients block by block (step.py); the two agree (tests/training/test_penalised_step.py).

Shape suffixes: B rows, D d_in, S d_sae, M entries.
"""

import torch
from torch import Tensor

from saevlm_fast.kernels.latent_gradient import RowGradient
from saevlm_fast.kernels.latent_update import AdamSettings, adam_
from saevlm_fast.kernels.segment_sum import segment_sum
from saevlm_fast.kernels.sparse_decode import gather_dot_op, sparse_decode
from saevlm_fast.sae import SparseAutoencoder
from saevlm_fast.sparse_codes import SparseCodes
from saevlm_fast.training.dead_latents import DeadLatents, auxiliary
from saevlm_fast.training.penalty import Penalty, totals


def whole_gradients(
    sae: SparseAutoencoder, x_BD: Tensor, codes: SparseCodes, dead: DeadLatents, auxk_alpha: float, penalty: Penalty
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor], dict[str, Tensor]]:
    """x_hat_BD; losses (0-d): overall, mse, aux, penalty; gradients by name, W_enc latent-major, W_dec projected."""
    n_rows, W_dec, b_dec = len(x_BD), sae.W_dec.detach(), sae.b_dec.detach()
    x_hat_BD = sparse_decode(*codes.flat(), W_dec, b_dec)
    error_BD = x_hat_BD - x_BD
    mse = error_BD.square().sum() / n_rows
    error_BD *= 2 / n_rows
    acts_M, latents_M, order_M, offsets_S1 = codes.by_latent()
    rows_M = codes.entry_rows()[order_M]
    dots_M = gather_dot_op(error_BD, rows_M, latents_M, W_dec)
    dacts_M = penalty.of_acts(acts_M, dots_M)
    gradients = {
        "W_enc": segment_sum(dacts_M, rows_M, offsets_S1, x_BD - b_dec),
        "b_enc": totals(dacts_M, offsets_S1),
        "W_dec": segment_sum(acts_M, rows_M, offsets_S1, error_BD),
    }
    gradients["W_dec"].addcmul_(W_dec, totals(acts_M * dots_M, offsets_S1)[:, None], value=-1)
    if penalty.band is not None:
        gradients["threshold"] = penalty.band.threshold_gradient(dots_M, latents_M, order_M, offsets_S1)
    aux = auxiliary(sae, x_BD, x_hat_BD, dead, auxk_alpha)
    aux_loss = mse.new_zeros(()) if aux is None else aux.loss
    if aux is not None:
        _add_rows_(gradients["W_enc"], aux.W_enc)
        _add_rows_(gradients["W_dec"], aux.W_dec)
        gradients["b_enc"].index_add_(0, dead.latents_A.clamp(max=sae.config.d_sae - 1), aux.b_enc_A)
    gradients["b_dec"] = error_BD.sum(0) - sae.W_enc.detach() @ gradients["b_enc"]
    return x_hat_BD, (mse + auxk_alpha * aux_loss + penalty.loss, mse, aux_loss, penalty.loss), gradients


def _add_rows_(whole_SD: Tensor, gradient: RowGradient) -> None:
    whole_SD.index_add_(0, gradient.latents_A.clamp(max=len(whole_SD) - 1), gradient.rows_AD)  # padding is zeros


def update_(
    parameters: dict[str, Tensor],
    moments: dict[str, tuple[Tensor, Tensor]],
    gradients: dict[str, Tensor],
    clip_norm: float,
    adam: AdamSettings,
) -> None:
    """Clip, Adam and unit decoder rows, in place. Nothing is asked of the device."""
    wide = torch.promote_types(parameters["W_dec"].dtype, torch.float32)
    squares = torch.stack([gradient.to(wide).square().sum() for gradient in gradients.values()])
    clip = (clip_norm / (squares.sum().sqrt() + 1e-6)).clamp(max=1.0)
    for name, gradient in gradients.items():
        adam_(parameters[name], *moments[name], gradient, clip.to(gradient.dtype), adam)
    W_dec = parameters["W_dec"]
    W_dec /= torch.linalg.vector_norm(W_dec, dim=1, keepdim=True) + torch.finfo(W_dec.dtype).eps
