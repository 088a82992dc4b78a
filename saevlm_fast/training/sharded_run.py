"""A training run of several ranks (torchrun): run.py's, with the latents of the SAE shared among them.

    with joined(device, timeout) as peers:
        metrics = train_shared(peers, activations, sae_config, config, options)

The SAE, its losses and its directory are those of one process; docs/how-to/many-gpus.md.

Shape suffixes: B rows of a chunk, D d_in, S the rank's latents.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from saevlm_fast.config import RunOptions, SAEConfig, TrainConfig
from saevlm_fast.data.rows import Activations
from saevlm_fast.errors import require
from saevlm_fast.kernels.sparse_decode import sparse_decode
from saevlm_fast.kernels.topk_encode import threshold_encode
from saevlm_fast.peers import Ranks, in_order
from saevlm_fast.runtime import interruptible, one_thread, resolve_device, tf32_products
from saevlm_fast.sae import SparseAutoencoder
from saevlm_fast.sparse_codes import SparseCodes
from saevlm_fast.training.capture import told_of_compiling
from saevlm_fast.training.evaluate import Metrics, metrics_of_sums, row_sums
from saevlm_fast.training.process_group import MeshPeers
from saevlm_fast.training.run import (
    both,
    fitting,
    is_small,
    look_at,
    mono_embeddings_of,
    take_steps,
    telling_what_is_kept,
    watched,
)
from saevlm_fast.training.sharded_directory import SharedRunDirectory
from saevlm_fast.training.sharded_rows import choose, shared_by_rows, summed_over_ranks
from saevlm_fast.training.sharded_state import ShardedState
from saevlm_fast.training.shards import Shard, check_shardable, cut
from saevlm_fast.training.watch import Watch

if TYPE_CHECKING:
    from PIL.Image import Image


def train_shared(
    peers: MeshPeers,
    activations: Activations,
    sae_config: SAEConfig,
    config: TrainConfig,
    options: RunOptions,
    *,
    validation: Activations | None = None,
    mono_embeddings: Activations | None = None,
    on_log: Callable[[int, Metrics], None] = lambda step, metrics: None,
    on_step: Callable[[int], None] = lambda step: None,
    on_note: Callable[[str], None] = lambda text: None,
    on_picture: "Callable[[SparseAutoencoder], Image | None]" = lambda sae: None,
) -> Metrics:
    """Train one SAE on all ranks, which call this at once; it is written to options.output. `train` in several parts.

    Args:
        peers: the ranks.
        activations: rows [N, d_in], the same for every rank.
        sae_config: what SAE.
        config: the recipe.
        options: where the run goes; output is needed. The device is the rank's own.
        validation: rows on which the finished SAE is evaluated; the training rows otherwise.
        mono_embeddings: as of `train`; so are on_log, on_step, on_note, and on_picture, which rank 0 calls.

    Returns:
        What `evaluate` says of the SAE over all validation rows, on every rank.

    Raises:
        ValueError: as `train`; a setting that is for one process, data_on device, fewer latents than ranks, ranks with
            other data or another disk.
        Interrupted: SIGINT or SIGTERM arrived at any rank, and a checkpoint has been written; or a rank is gone.
    """
    check_shardable(sae_config, config, peers.ranks)
    require(options.data_on != "device", "data_on: device is of one process; several ranks read rows from the host")
    assert options.output is not None
    activations, evaluated = fitting(activations, validation, sae_config)
    embeddings = mono_embeddings_of(mono_embeddings, activations, config)
    kept = SharedRunDirectory(options.output, options.checkpoint_every, options.resume, options.force, peers)
    with kept.locked(), Watch(options.log_to) as watch:
        check_data(peers, activations, evaluated, embeddings)
        look_at(evaluated, config, whole=False, rank=peers.rank, world=peers.world)
        device = resolve_device(options.device)
        state = ShardedState(activations, sae_config, config, device, peers, embeddings)
        kept.begin(state)
        watch.begin(lambda: kept.path, state.stepper.n_steps, watched(state, sae_config, options), device)
        with (
            interruptible(patient=True) as interrupted,
            tf32_products(False),
            one_thread(is_small(state.shard.config, config)),
            told_of_compiling(on_note),
        ):
            take_steps(state, kept, options, both(watch.log, on_log), on_step, interrupted, capture=False)
            part, whole = state.exported_part(), state.export_whole()
            watch.pause()
            kept.save_whole(whole)
            with telling_what_is_kept(kept):
                metrics = evaluate_shared(part, state.shard, peers.ranks, evaluated)
        logged = {f"eval/{name}": value for name, value in metrics.items()}
        kept.finish(config.n_steps, logged)
        watch.finish(config.n_steps, logged, lambda: None if whole is None else on_picture(whole))
    return metrics


def check_data(peers: MeshPeers, *stores: Activations | None) -> None:
    """Compares stores with their digests, of which each rank does a share. ActivationError: one was altered."""
    for activations in stores:
        if activations is not None:
            activations.check_whole_shared(peers.rank, peers.collect)


@torch.no_grad()
def evaluate_shared(
    part: SparseAutoencoder, shard: Shard, ranks: Ranks, activations: Activations, batch_rows: int = 4096
) -> Metrics:
    """`evaluate` of an SAE whose latents are spread over ranks: the same measures, on every rank.

    Args:
        part: the rank's latents in raw units, with the threshold.
        shard: which they are.
        ranks: all of them; all call this.
        activations: rows [N, d_in], of which each rank reads its share, and measures it.
        batch_rows: rows of a replica at a time.
    """
    device, n_rows, peers = part.b_dec.device, activations.n_rows, ranks.latents
    sums_4D = torch.zeros(4, shard.whole.d_in, dtype=torch.float64, device=device)
    fired_S = torch.zeros(shard.size, dtype=torch.int64, device=device)
    n_fired = torch.zeros(1, dtype=torch.int64, device=device)
    mine = cut(n_rows, ranks.rows.world)[ranks.rows.rank]
    for start in range(mine.start, mine.stop, batch_rows):
        n = min(batch_rows, mine.stop - start)
        share = -(-n // peers.world)
        first = min(peers.rank * share, n)
        own_BD = activations.rows(torch.arange(start + first, start + min(first + share, n)))
        own_BD = own_BD.to(device, part.b_dec.dtype)
        x_BD = shared_by_rows(peers, own_BD, share, n)
        codes = _inference_codes(part, shard, ranks.one_replica(), x_BD)
        partial_BD = sparse_decode(*codes.flat(), part.W_dec, torch.zeros_like(part.b_dec))
        x_hat_BD = summed_over_ranks(peers, partial_BD)[0] + part.b_dec
        sums_4D += row_sums(own_BD, x_hat_BD, part.b_dec)
        fires_M = (codes.top_acts > 0).flatten().long()
        fired_S.index_add_(0, codes.top_indices.flatten(), fires_M)
        n_fired += fires_M.sum()
    n_dead = int(peers.add_up((ranks.rows.add_up(fired_S) == 0).sum()))
    sums_4D = in_order(ranks.everyone.gather(sums_4D))
    return metrics_of_sums(sums_4D, int(ranks.everyone.add_up(n_fired)), n_dead / shard.whole.d_sae, n_rows)


def _inference_codes(part: SparseAutoencoder, shard: Shard, ranks: Ranks, x_BD: Tensor) -> SparseCodes:
    """The rank's part of the codes at inference: above the threshold, or of the one choice of topk."""
    if shard.whole.architecture == "topk":
        return choose(part, shard, ranks, x_BD).codes
    weights = x_BD, part.W_enc.detach(), part.b_enc.detach(), part.b_dec.detach()
    threshold = part.threshold if part.threshold.ndim == 1 else float(part.threshold)
    return SparseCodes.from_flat(*threshold_encode(*weights, threshold), shard.size)
