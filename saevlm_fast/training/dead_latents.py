"""Dead latents, and the auxiliary loss by which they reconstruct what the others leave. docs/recipe.md section 1.

Shape suffixes: B rows of a batch, D d_in, S d_sae, A dead latents.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from saevlm_fast.kernels.common import on_gpu
from saevlm_fast.kernels.latent_gradient import RowGradient, dense_gradient_rows, latent_slots
from saevlm_fast.sae import SparseAutoencoder

_AUX_ELEMENTS = 8 << 20  # of one [rows, dead] block of the auxiliary loss
_DEAD_ROUNDING = 256  # a GPU's padded list of dead latents grows by at least that
_STEPS_A_COUNT = 8  # steps between two counts of what can be dead


class DeadLatents(NamedTuple):
    """Dead latents, ascending, and how many. On a GPU latents_A is longer: its end is padding, latents of d_sae."""

    latents_A: Tensor
    number: int | Tensor
    slots_S: Tensor | None = None

    def slots(self, d_sae: int) -> Tensor:
        """int32 [d_sae]: a latent's place in the list, -1 if it is not there."""
        return latent_slots(self.latents_A, d_sae) if self.slots_S is None else self.slots_S


class DeadBound:
    """On a GPU: how many latents can be dead in a step, known before it begins. Nobody waits for a step.

    Counted every few steps are the latents that can be dead within twice as many, whatever fires in between; the count
    is used from the next time on, when it has long reached the host. Where that is more rows than make a latent dead,
    any can be.

    Args:
        add_up: what ranks that share the latents say together, of a whole number. All ask at once.

    Attributes:
        of_all: the bound on the dead latents of all ranks; None until something was asked.
    """

    def __init__(self, add_up: Callable[[Tensor], Tensor] | None = None) -> None:
        self._add_up = add_up
        self.of_all: int | None = None
        self._known = -1, 0  # rows seen up to which it holds, and the bound
        self._asked: tuple[int, Tensor, torch.cuda.Event] | None = None  # the same, on its way: counts, arrival

    def latents(self, idle_S: Tensor, n_rows: int, n_rows_seen: int, dead_after: int) -> int:
        """An upper bound on (idle_S >= dead_after).sum() after this step, of n_rows rows, the last of n_rows_seen.

        idle_S is as it was before the step.
        """
        before, ahead = n_rows_seen - n_rows, 2 * _STEPS_A_COUNT * n_rows
        if n_rows_seen > self._known[0] and self._asked is not None:
            holds, counts, arrival = self._asked
            arrival.synchronize()
            self._asked = None
            self._know(holds, counts)
        if n_rows_seen > self._known[0]:  # the first time, or rows come faster: there is nothing to go by, so wait
            self._know(before + ahead, self._counts(idle_S, ahead, dead_after))
        if self._asked is None and n_rows_seen > self._known[0] - ahead // 2:
            found = self._counts(idle_S, ahead, dead_after)
            counts, arrival = torch.empty(len(found), dtype=torch.int64, pin_memory=True), torch.cuda.Event()
            counts.copy_(found, non_blocking=True)
            arrival.record()
            self._asked = before + ahead, counts, arrival
        return self._known[1]

    def _counts(self, idle_S: Tensor, n_rows: int, dead_after: int) -> Tensor:
        """Latents that can be dead then: these, and of ranks those of all behind them."""
        own = may_be_dead(idle_S, n_rows, dead_after).sum().view(1)
        return own if self._add_up is None else torch.cat([own, self._add_up(own)])

    def _know(self, holds: int, counts: Tensor) -> None:
        own, *_ = several = counts.tolist()
        self._known, self.of_all = (holds, own), several[-1]


def padded_size(bound: int, d_sae: int) -> int:
    """Length of a GPU's list of at most `bound` dead latents: few lengths, each at most an eighth (or 255) too long.

    Every length is captured anew where the step is in a CUDA graph.
    """
    unit = max(_DEAD_ROUNDING, 1 << max(bound.bit_length() - 4, 0))
    return min(d_sae, -(-bound // unit) * unit)


def may_be_dead(idle_S: Tensor, n_rows: int, dead_after: int) -> Tensor:
    """[d_sae] bool: latents that are dead after n_rows more rows, unless they fire in these."""
    return idle_S + n_rows >= dead_after


class Auxiliary(NamedTuple):
    """The auxiliary loss (0-d), and its gradients times alpha: W_enc's and W_dec's of dead latents, b_enc's [A]. None
    of frozen weights."""

    loss: Tensor
    W_enc: RowGradient | None
    W_dec: RowGradient | None
    b_enc_A: Tensor
    on_gpu: Tensor | None = None

    def numbers(self) -> Tensor:
        """(loss, squared norm of all its gradients) [2]."""
        if self.on_gpu is not None:
            return self.on_gpu
        squares = self.b_enc_A.square().sum()
        for rows in (self.W_enc, self.W_dec):
            squares = squares if rows is None else squares + rows.squared_norm
        return torch.stack([self.loss, squares])


def auxiliary(
    sae: SparseAutoencoder,
    x_BD: Tensor,
    x_hat_BD: Tensor,
    dead: DeadLatents,
    alpha: float,
    frozen: str | None = None,
) -> Auxiliary | None:
    """The auxiliary loss: dead latents reconstruct the residual x - x_hat, detached, without bias. None if none is.

    ||residual - aux reconstruction||^2 over the residual's variance, both mean over the batch; the top d_in / 2 dead
    latents of each row take part. frozen: W_enc or W_dec, whose gradient is not made.
    """
    n_rows, d_in = x_BD.shape
    if len(dead.latents_A) == 0:
        return None
    places = len(dead.latents_A) * d_in  # the kernels count those in 32 bits
    if on_gpu(x_BD) and x_BD.dtype == torch.float32 and places < 2**31:
        return _on_gpu(sae, x_BD, x_hat_BD, dead, alpha, frozen)
    residual_BD, centred_BD = x_BD - x_hat_BD, x_BD - sae.b_dec.detach()
    dead_A = dead.latents_A.clamp(max=sae.config.d_sae - 1)
    variance = (residual_BD - residual_BD.mean(0)).square().sum() / n_rows
    W_enc_AD, W_dec_AD = sae.W_enc.detach().T[dead_A], sae.W_dec.detach()[dead_A]
    b_enc_A = sae.b_enc.detach()[dead_A]
    dW_enc_AD, dW_dec_AD = (None if frozen == name else torch.zeros_like(W_enc_AD) for name in ("W_enc", "W_dec"))
    db_enc_A = torch.zeros_like(b_enc_A)
    squared = residual_BD.new_zeros(())
    defined = (variance > 0) & (dead.number > 0)
    scale = torch.where(defined, 2 * alpha / (n_rows * variance), 0)
    block = max(1, _AUX_ELEMENTS // len(dead_A))
    for start in range(0, n_rows, block):
        c_BD, r_BD = centred_BD[start : start + block], residual_BD[start : start + block]
        acts_BA = torch.addmm(b_enc_A, c_BD, W_enc_AD.T).relu_()
        if isinstance(dead.number, Tensor):  # padding is never active, and so has zero gradients
            acts_BA.masked_fill_(dead.latents_A == sae.config.d_sae, 0)
        acts_BA = _keep_largest_(acts_BA, d_in // 2)
        error_BD = acts_BA @ W_dec_AD - r_BD
        squared += error_BD.square().sum()
        error_BD *= scale
        dacts_BA = torch.where(acts_BA > 0, error_BD @ W_dec_AD.T, 0)
        if dW_dec_AD is not None:
            dW_dec_AD.addmm_(acts_BA.T, error_BD)
        if dW_enc_AD is not None:
            dW_enc_AD.addmm_(dacts_BA.T, c_BD)
        db_enc_A += dacts_BA.sum(0)
    aux = torch.where(defined, squared / n_rows / variance, 0)
    dW_enc = dW_enc_AD if dW_enc_AD is None else dense_gradient_rows(dead.latents_A, dW_enc_AD)
    W_dec = sae.W_dec.detach()
    dW_dec = dW_dec_AD if dW_dec_AD is None else dense_gradient_rows(dead.latents_A, dW_dec_AD, W_dec)
    return Auxiliary(aux, dW_enc, dW_dec, db_enc_A)


def _on_gpu(
    sae: SparseAutoencoder, x_BD: Tensor, x_hat_BD: Tensor, dead: DeadLatents, alpha: float, frozen: str | None
) -> Auxiliary:
    from saevlm_fast.kernels.auxiliary_triton import Weights, launch_auxiliary

    weights = Weights(sae.W_enc.detach().T, sae.b_enc.detach(), sae.W_dec.detach(), sae.b_dec.detach())
    number = torch.as_tensor(dead.number, device=x_BD.device)
    with torch.cuda.device_of(x_BD):
        x_BD, x_hat_BD = x_BD if x_BD.stride(1) == 1 else x_BD.contiguous(), x_hat_BD.contiguous()
        found = launch_auxiliary(weights, x_BD, x_hat_BD, dead.latents_A, number, alpha, frozen)
    rows = {name: RowGradient(dead.latents_A, *gradient) for name, gradient in found.rows.items()}
    return Auxiliary(found.numbers[0], rows.get("W_enc"), rows.get("W_dec"), found.b_enc_A, found.numbers)


def _keep_largest_(acts_BA: Tensor, k: int) -> Tensor:
    """Zero all but the k largest of every row, in place."""
    if k >= acts_BA.shape[1]:
        return acts_BA
    kept = torch.topk(acts_BA, k, dim=1, sorted=False)
    return acts_BA.zero_().scatter_(1, kept.indices, kept.values)
