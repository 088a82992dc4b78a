"""A training run of several ranks (torchrun): run.py's, with the latents of the SAE shared among them.

    with joined(device, timeout) as peers:
        metrics = train_shared(peers, activations, sae_config, config, options)

The SAE, its losses and its directory are those of one process; docs/how-to/many-gpus.md.

Shape suffixes: B rows of a chunk, D d_in, S the rank's latents.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from saevlm_fast.config import RunOptions, SAEConfig, TrainConfig
from saevlm_fast.data.rows import Activations
from saevlm_fast.runtime import interruptible, one_thread, resolve_device, tf32_products
from saevlm_fast.sae import SparseAutoencoder
from saevlm_fast.training.capture import told_of_compiling
from saevlm_fast.training.evaluate import Metrics
from saevlm_fast.training.evaluated import EvaluatedRows, look_at
from saevlm_fast.training.process_group import MeshPeers
from saevlm_fast.training.run import (
    both,
    fitting,
    is_small,
    mono_embeddings_of,
    take_steps,
    telling_what_is_kept,
    watched,
)
from saevlm_fast.training.sharded_directory import SharedRunDirectory
from saevlm_fast.training.sharded_evaluate import evaluate_shared
from saevlm_fast.training.sharded_state import ShardedState
from saevlm_fast.training.shards import check_shardable
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
    on_evaluated: Callable[[int, int], None] = lambda done, total: None,
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
        validation: rows on which the finished SAE is evaluated; the training rows otherwise, as
            of `train`.
        mono_embeddings: as of `train`; so are on_log, on_step, on_evaluated, on_note, and on_picture, which rank 0
            calls.

    Returns:
        What `evaluate` says of the SAE on every rank.

    Raises:
        ValueError: as `train`; a setting that is for one process, fewer latents than ranks, ranks with
            other data or another disk.
        Interrupted: SIGINT or SIGTERM arrived at any rank, and a checkpoint has been written; or a rank is gone.
    """
    check_shardable(sae_config, config, peers.ranks)
    assert options.output is not None
    activations, held_out = fitting(activations, validation, sae_config)
    evaluated = EvaluatedRows.of_run(activations, held_out, config)
    embeddings = mono_embeddings_of(mono_embeddings, activations, config)
    kept = SharedRunDirectory(options.output, options.checkpoint_every, options.resume, options.force, peers)
    with kept.locked(), Watch(options.log_to) as watch:
        check_data(peers, activations, held_out, embeddings)
        look_at(evaluated, config, whole=False, rank=peers.rank, world=peers.world)
        device = resolve_device(options.device)
        state = ShardedState(activations, sae_config, config, device, peers, embeddings, options.data_on)
        kept.begin(state)
        watch.begin(lambda: kept.path, state.stepper.n_steps, watched(state, sae_config, options), device)
        with (
            tf32_products(False),
            interruptible(patient=True) as interrupted,
            one_thread(is_small(state.shard.config, config)),
            told_of_compiling(on_note),
        ):
            take_steps(state, kept, options, both(watch.log, on_log), on_step, interrupted, capture=False)
            part, whole = state.exported_part(), state.export_whole()
            watch.pause()
            kept.save_whole(whole)
            with telling_what_is_kept(kept):
                metrics = evaluate_shared(part, state.shard, peers.ranks, evaluated, on_evaluated)
        logged = {f"eval/{name}": value for name, value in metrics.items()}
        kept.finish(config.n_steps, logged)
        watch.finish(config.n_steps, logged, lambda: None if whole is None else on_picture(whole))
    return metrics


def check_data(peers: MeshPeers, *stores: Activations | None) -> None:
    """Compares stores with their digests, of which each rank does a share. ActivationError: one was altered."""
    for activations in stores:
        if activations is not None:
            activations.check_whole_shared(peers.rank, peers.collect)
