"""The step after the encoder on a GPU: losses, clip factor and update in a dozen kernels, nothing asked of the device.

    rows     decoder, losses, gradient of every prefix, dacts          kernels/step_rows_triton.py
    entries  the codes' entries in latent order                        kernels/step_entries_triton.py
    totals   db_enc, idle counters, bound of the norm                  kernels/step_totals_triton.py
    clip     by the bound, or by the norm where the bound fails; b_dec kernels/gradient_norm_triton.py
    update   Adam on W_dec, then on W_enc and b_enc                    kernels/latent_update_triton.py

Imported for a GPU's tensors only: these modules load Triton. What changes from step to step is read from the device, so
that a captured CUDA graph can be replayed. docs/kernels.md section 4
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from saevlm_fast.config import CALIBRATED, TrainConfig
from saevlm_fast.kernels.common import Cone
from saevlm_fast.kernels.dead_rows_triton import launch_biases
from saevlm_fast.kernels.gradient_norm_triton import launch_clip, launch_decide
from saevlm_fast.kernels.latent_gradient import RowGradient
from saevlm_fast.kernels.latent_update_triton import Scalars, launch_bias, launch_update
from saevlm_fast.kernels.low_weights import LowWeights
from saevlm_fast.kernels.step_entries_triton import Order, launch_chunks, launch_order, new_entries
from saevlm_fast.kernels.step_rows_triton import Rows, launch_rows
from saevlm_fast.kernels.step_totals_triton import launch_totals
from saevlm_fast.kernels.topk_encode_cuda import Centred
from saevlm_fast.sae import SparseAutoencoder
from saevlm_fast.sparse_codes import SparseCodes
from saevlm_fast.training.dead_latents import Auxiliary, DeadLatents, auxiliary
from saevlm_fast.training.gradients import Losses
from saevlm_fast.training.mono import MonoTerm, mono_of_entries
from saevlm_fast.training.penalty import Penalty
from saevlm_fast.training.snapshot import copying_stream

_side_streams: dict[torch.cuda.Stream, torch.cuda.Stream] = {}  # one for every stream that steps are launched on


class State(NamedTuple):
    """What a step reads and moves on, on the device.

    parameters and moments by name (W_enc latent-major [d_sae, d_in]), idle_S, step_index (read), bad_step, Adam's
    schedule (read), ends of the Matryoshka groups (read), the low copy of W_enc if the encoder works with one, and the
    cone that the decoder's rows are held in, if they are (read).
    """

    parameters: dict[str, Tensor]
    moments: dict[str, tuple[Tensor, Tensor]]
    idle_S: Tensor
    step_index: Tensor
    bad_step: Tensor
    schedule: Tensor
    group_ends_G: Tensor
    low: LowWeights | None
    cone: Cone | None = None

    def of(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        """A parameter with its moments."""
        return self.parameters[name], *self.moments[name]


def gpu_step(
    sae: SparseAutoencoder,
    config: TrainConfig,
    state: State,
    x_BD: Tensor,
    codes: SparseCodes,
    centred: Centred | None,
    dead_latents: Callable[[], DeadLatents],
    mono: MonoTerm | None = None,
    penalty: Penalty | None = None,
) -> tuple[Tensor, Losses, DeadLatents]:
    """The step on a batch and its codes; `state` and the threshold are moved on in place.

    Args:
        sae: whose parameters `state` holds.
        config: the recipe.
        state: moved on.
        x_BD: the batch.
        codes: of the batch.
        centred: x - b_dec with its norms, or None.
        dead_latents: asked once state.idle_S has moved on.
        mono: of MonoLoss, or None.
        penalty: of the codes of relu and jumprelu.

    Returns:
        x_hat_BD of the last prefix, losses, dead latents.
    """
    (acts, latents, row_offsets), W, ends = codes.flat(), state.parameters, state.group_ends_G
    with beside(x_BD) as side:
        with side:
            order = launch_order(latents, row_offsets, codes.d_sae)
        shown = acts if penalty is None else penalty.shown(acts)
        rows = launch_rows(x_BD, shown, latents, row_offsets, ends, W["W_dec"], W["b_dec"], centred)
    dtheta_S = None if penalty is None else _add_penalty(acts, latents, rows, order, penalty)
    mono_loss = None if mono is None else add_mono(acts, rows, order, len(ends), mono)
    entries = new_entries(rows, order)
    frozen = config.frozen
    l1 = None if penalty is None or penalty.band is not None else torch.as_tensor(penalty.of_act)
    with beside(x_BD) as side:
        with side:
            launch_chunks(entries, acts, rows, order)
        totals = launch_totals(entries, acts, rows, order, W["W_enc"], state.idle_S, frozen, l1)

        dead = dead_latents()
        aux = auxiliary(sae, x_BD, rows.x_hat_BD, dead, config.auxk_alpha, frozen)
        slots_S = None if aux is None else dead.slots(codes.d_sae)
        more = None if aux is None else add_auxiliary(aux, dead.latents_A, W["W_enc"], totals.db_enc_S)
        more = more if dtheta_S is None else _with_threshold(more, dtheta_S, W["b_dec"])
        moves = sae.config.architecture in CALIBRATED and config.accumulate == 1
        moving = (config.threshold_beta, config.threshold_start) if moves else None
        counters = state.step_index, state.bad_step, sae.threshold
        decision = launch_decide(rows, totals, counters, config.clip_norm, config.auxk_alpha, moving, more)
    constants = state.schedule, config.betas, config.eps
    clip = launch_clip(entries, totals, decision, config.clip_norm, *constants, state.of("b_dec"), frozen)

    scalars = Scalars(clip, *constants)
    with beside(x_BD) as side:
        if frozen != "W_dec":
            more = aux_rows(aux and aux.W_dec, slots_S)
            with side:
                launch_update(entries, totals.parallel_S, scalars, state.of("W_dec"), None, more, cone=state.cone)
        biases = state.of("b_enc")
        if frozen == "W_enc":
            launch_bias(totals.db_enc_S, scalars, biases)
        else:
            more = aux_rows(aux and aux.W_enc, slots_S)
            launch_update(entries, totals.db_enc_S, scalars, state.of("W_enc"), biases, more, state.low)
    if dtheta_S is not None:
        launch_bias(dtheta_S, scalars, state.of("threshold"))
    overall, mse, aux_loss = decision.losses
    others = None if penalty is None else penalty.loss, mono_loss
    for loss in others:
        if loss is not None:
            overall.add_(loss)
    return rows.x_hat_BD, Losses(overall, mse, aux_loss, *others), dead


def _add_penalty(acts: Tensor, latents: Tensor, rows: Rows, order: Order, penalty: Penalty) -> Tensor | None:
    """The penalty's gradient is added to rows.dacts_M, which had the dots of all entries; that of thresholds [S]."""
    dtheta_S = None
    if penalty.band is not None:
        order_M = order.order_M
        given = rows.dacts_M[order_M], latents[order_M], order_M, order.offsets_S1.long()
        dtheta_S = penalty.band.threshold_gradient(*given)
    rows.dacts_M.copy_(penalty.of_acts(acts, rows.dacts_M))
    return dtheta_S


def _with_threshold(more: tuple[Tensor, Tensor] | None, dtheta_S: Tensor, b_dec_D: Tensor) -> tuple[Tensor, Tensor]:
    """What `add_auxiliary` gives, or nothing, and the thresholds' part of the norm."""
    square = dtheta_S.square().sum()
    if more is None:
        return torch.stack([torch.zeros_like(square), square]), torch.zeros_like(b_dec_D)
    numbers, of_b_dec_D = more
    return torch.stack([numbers[0], numbers[1] + square.to(numbers.dtype)]), of_b_dec_D


def add_mono(acts: Tensor, rows: Rows, order: Order, n_groups: int, mono: MonoTerm) -> Tensor:
    """MonoLoss; its gradient is added to rows.dacts_M. A decoder gradient's part along its rows stays (mono.py)."""
    order_M, offsets_S1 = order.order_M, order.offsets_S1.long()
    rows_M = rows.bags_M[order_M].long() // n_groups
    positions_M = torch.arange(len(order_M), device=order_M.device)
    latents_M = torch.searchsorted(offsets_S1[1:], positions_M, right=True)  # of padding too large, and not used
    found = mono_of_entries(acts.flatten()[order_M].to(rows.dacts_M.dtype), rows_M, latents_M, offsets_S1, mono)
    rows.dacts_M.view(-1).index_add_(0, order_M, found.of_acts_M.to(rows.dacts_M.dtype))  # each place once
    return found.loss


def add_auxiliary(aux: Auxiliary, latents_A: Tensor, W_enc_SD: Tensor, db_enc_S: Tensor) -> tuple[Tensor, Tensor]:
    """(loss, squared norm of W_enc's, W_dec's and b_enc's gradient) [2], and W_enc^T db_enc, of this loss alone.

    Its db_enc is added to db_enc_S: a dead latent has no entry that fired.
    """
    return aux.numbers(), launch_biases(latents_A, aux.b_enc_A, W_enc_SD, db_enc_S)


def aux_rows(gradient: RowGradient | None, slots_S: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """Rows of the auxiliary loss, and the slot of every latent among them."""
    return None if gradient is None or slots_S is None else (gradient.rows_AD, slots_S)


@contextmanager
def beside(x_BD: Tensor) -> Iterator[AbstractContextManager[object]]:
    """A context whose kernels run beside those outside it: sorting keeps few of a GPU's processors busy.

    Memory is safe without record_stream: either stream goes on only when the other is done with what it has been given.
    """
    if not x_BD.is_cuda:
        yield nullcontext()
        return
    stream = torch.cuda.current_stream()
    if stream not in _side_streams:
        _side_streams[stream] = side_stream(x_BD.device)
    side = _side_streams[stream]
    side.wait_stream(stream)
    try:
        yield torch.cuda.stream(side)
    finally:
        stream.wait_stream(side)


def side_stream(device: torch.device) -> torch.cuda.Stream:
    """One whose kernels are not behind a long kernel's programs; never the one on which checkpoints are copied."""
    side = torch.cuda.Stream(device, priority=-1)
    return side if side != copying_stream(device) else torch.cuda.Stream(device, priority=-1)
