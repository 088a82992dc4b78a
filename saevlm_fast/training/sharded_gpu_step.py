"""The step of a rank on a GPU, one replica: gpu_step.py's kernels, and between them what ranks tell each other.

    codes    the rank's own by the screened encoder, then the one choice     kernels/shared_choice_triton.py
    rows     parts, residuals, dacts                                         kernels/shared_rows_triton.py
    entries  in latent order, totals, chunks                                 as gpu_step.py's
    numbers  b_dec's gradient, losses, clip factor                           kernels/shared_numbers_triton.py
    update   Adam on W_dec, then on W_enc and b_enc                          as gpu_step.py's

Nothing is asked of the device, shapes are fixed, and what changes from step to step is read from it. What is told, and
in which order: sharded_step.py. docs/kernels.md section 4
"""

from collections.abc import Callable
from typing import NamedTuple, cast

import torch
from torch import Tensor
from torch.nn.functional import pad

from saevlm_fast.config import TrainConfig
from saevlm_fast.kernels.latent_update_triton import Scalars, launch_bias, launch_update
from saevlm_fast.kernels.shared_choice_triton import Told, launch_compact, launch_keep, launch_keep_of_batch
from saevlm_fast.kernels.shared_largest_triton import launch_keep_largest_
from saevlm_fast.kernels.shared_numbers_triton import launch_numbers, launch_settle
from saevlm_fast.kernels.shared_rows_triton import launch_parts, launch_passed, launch_residuals
from saevlm_fast.kernels.step_entries_triton import launch_chunks, launch_order, new_entries
from saevlm_fast.kernels.step_rows_triton import Rows
from saevlm_fast.kernels.step_totals_triton import launch_totals
from saevlm_fast.kernels.topk_encode_cuda import Centred
from saevlm_fast.peers import Peers, Ranks
from saevlm_fast.sae import SparseAutoencoder
from saevlm_fast.sparse_codes import SparseCodes
from saevlm_fast.training.choice import FEW_OFFERS, NOTHING
from saevlm_fast.training.dead_latents import DeadLatents
from saevlm_fast.training.gpu_codes import chosen
from saevlm_fast.training.gpu_step import State, add_auxiliary, add_mono, aux_rows, beside
from saevlm_fast.training.gradients import Losses
from saevlm_fast.training.mono import MonoTerm
from saevlm_fast.training.sharded_dead import shared_auxiliary
from saevlm_fast.training.shards import Shard


class OwnCodes(NamedTuple):
    """The rank's part of the one choice, in CSR form with padding; the smallest activation above 0 that any rank keeps
    (float32 [1]; None of topk); and x - b_dec with its norms, if the encoder leaves it."""

    codes: SparseCodes
    smallest: Tensor | None
    centred: Centred | None


def own_codes(sae: SparseAutoencoder, shard: Shard, ranks: Ranks, x_BD: Tensor, state: State) -> OwnCodes:
    """sharded_rows.choose with the low copy of the rank's W_enc, of one replica."""
    n_rows, d_in = x_BD.shape
    centred = None if state.low is None else Centred.empty(n_rows, d_in, x_BD.device)
    codes = chosen(sae, x_BD, state.low, centred)
    (acts, latents, row_offsets), k, peers, smallest = codes.flat(), shard.whole.known_k, ranks.latents, None
    told = Told(peers.add_up, peers.gather, peers.rank)
    if row_offsets is not None:
        mask, smallest = launch_keep_of_batch(acts, row_offsets, k * len(x_BD), told)
    elif peers.world * k > FEW_OFFERS:
        kept_BK = acts.clone()
        launch_keep_largest_(kept_BK, k, told)
        mask = (kept_BK != 0).int()
    else:
        offers_BK = acts if acts.shape[1] == k else pad(acts, (0, k - acts.shape[1]), value=NOTHING)
        mask = launch_keep(peers.gather(offers_BK), peers.rank, acts.shape[1])
    kept = launch_compact(acts, latents, row_offsets, mask)
    return OwnCodes(SparseCodes.from_flat(*kept, codes.d_sae), smallest, centred)


def sharded_gpu_step(
    sae: SparseAutoencoder,
    config: TrainConfig,
    ranks: Ranks,
    state: State,
    x_BD: Tensor,
    own: OwnCodes,
    dead_latents: Callable[[], DeadLatents] | None,
    mono: MonoTerm | None = None,
    most_dead: int | None = None,
) -> tuple[Tensor, Losses, int | Tensor]:
    """The step on a batch and the rank's codes of it; `state` and the threshold are moved on in place.

    Args:
        sae: the rank's part, whose parameters `state` holds; groups end where they do among its latents.
        config: of the whole SAE.
        ranks: of one replica.
        state: moved on.
        x_BD: the batch.
        own: of the batch.
        dead_latents: the rank's; asked once state.idle_S has moved on. None while none can be.
        mono: of MonoLoss with sums over all ranks, or None.
        most_dead: of all ranks, if that is known.

    Returns:
        x_hat_BD of the last prefix, losses, number of dead latents of all ranks.
    """
    codes, W, n_groups, frozen = own.codes.csr(), state.parameters, len(state.group_ends_G), config.frozen
    with beside(x_BD) as side:
        with side:
            order = launch_order(codes[1], codes[2], own.codes.d_sae)
        rows = _rows(ranks.latents, x_BD, codes, state, own.centred)
    mono_loss = None if mono is None else add_mono(codes[0], rows, order, n_groups, mono)
    entries = new_entries(rows, order)
    with beside(x_BD) as side:
        with side:
            launch_chunks(entries, codes[0], rows, order)
        totals = launch_totals(entries, codes[0], rows, order, W["W_enc"], state.idle_S, frozen)

    aux, aux_numbers, slots_S, n_dead = None, None, None, cast("int | Tensor", 0)
    if dead_latents is not None:
        dead = dead_latents()
        given = dead, config.auxk_alpha, len(x_BD), frozen, most_dead
        aux, n_dead = shared_auxiliary(sae, ranks, x_BD, rows.x_hat_BD, *given)
        if aux is not None and len(dead.latents_A) == 0:  # none of the rank's own
            aux_numbers, aux = (aux.numbers(), torch.zeros_like(W["b_dec"])), None
        if aux is not None:
            aux_numbers = add_auxiliary(aux, dead.latents_A, W["W_enc"], totals.db_enc_S)
            slots_S = dead.slots(own.codes.d_sae)
    own_numbers, of_rows_D = launch_numbers(entries, rows, totals, frozen, aux_numbers)
    numbers = ranks.latents.gather(own_numbers)
    scalars = Scalars(torch.empty_like(numbers[0, :1]), state.schedule, config.betas, config.eps)
    counters, sizes = (state.step_index, state.bad_step, sae.threshold), (len(x_BD), n_groups)
    moving = None if own.smallest is None else (own.smallest, config.threshold_beta, config.threshold_start)
    aux_loss = None if aux_numbers is None else aux_numbers[0]
    settled = scalars, counters, state.of("b_dec"), sizes, config.clip_norm, config.auxk_alpha, moving, aux_loss
    overall, mse, of_aux = launch_settle(numbers, of_rows_D, *settled)

    if frozen != "W_dec":
        more = aux_rows(aux and aux.W_dec, slots_S)
        launch_update(entries, totals.parallel_S, scalars, state.of("W_dec"), None, more, cone=state.cone)
    if frozen == "W_enc":
        launch_bias(totals.db_enc_S, scalars, state.of("b_enc"))
    else:
        more = aux_rows(aux and aux.W_enc, slots_S)
        launch_update(entries, totals.db_enc_S, scalars, state.of("W_enc"), state.of("b_enc"), more, state.low)
    if mono_loss is not None:
        overall.add_(mono_loss)
    return rows.x_hat_BD, Losses(overall, mse, of_aux, None, mono_loss), n_dead


def _rows(
    peers: Peers, x_BD: Tensor, codes: tuple[Tensor, Tensor, Tensor], state: State, centred: Centred | None
) -> Rows:
    """Of all rows, with the rank's entries; squared residuals are of the rank's share of the rows."""
    n_rows, W_dec, b_dec = len(x_BD), state.parameters["W_dec"], state.parameters["b_dec"]
    share = -(-n_rows // peers.world)
    parts = launch_parts(codes, state.group_ends_G, W_dec, share * peers.world)
    received = peers.exchange(parts.view(peers.world, share, *parts.shape[1:]))
    first = min(peers.rank * share, n_rows)
    of_share = range(first, min(first + share, n_rows))
    suffix, squared = launch_residuals(received, x_BD, b_dec, of_share, n_rows)
    suffix_RD = peers.gather(suffix).view(-1, suffix.shape[2])[: n_rows * suffix.shape[1]]
    return launch_passed(x_BD, codes, state.group_ends_G, W_dec, b_dec, suffix_RD, squared, n_rows, centred)
