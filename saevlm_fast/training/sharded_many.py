"""Several SAEs trained by ranks while the data passes once: many.py's, each with its latents shared among the ranks.

    with joined(device, timeout) as peers:
        trained = train_many_shared(peers, activations, saes, recipes, options)

Every rank has a part of every SAE. A batch is read, told and normalised once; then each SAE takes its step in turn.
"""

from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, closing
from dataclasses import replace

import torch
from torch import Tensor

from saevlm_fast.config import DataOn, RunOptions, SAEConfig, TrainConfig
from saevlm_fast.data.rows import Activations
from saevlm_fast.runtime import interruptible, one_thread, resolve_device, tf32_products
from saevlm_fast.sae import SparseAutoencoder
from saevlm_fast.training.capture import CapturedSteps, told_of_compiling
from saevlm_fast.training.evaluate import Metrics
from saevlm_fast.training.evaluated import EvaluatedRows, look_at
from saevlm_fast.training.many import (
    Member,
    OnFinished,
    Trained,
    evaluated_all,
    nothing_more,
    own_options,
    recipes_of,
    stop_all,
    take_all,
)
from saevlm_fast.training.memory import Written, check_disk, memory_of
from saevlm_fast.training.process_group import MeshPeers
from saevlm_fast.training.run import fitting
from saevlm_fast.training.scale import Scale
from saevlm_fast.training.sharded_directory import SharedRunDirectory
from saevlm_fast.training.sharded_evaluate import evaluate_shared
from saevlm_fast.training.sharded_run import check_data
from saevlm_fast.training.sharded_state import ShardedState
from saevlm_fast.training.shards import Shard, check_shardable
from saevlm_fast.training.watch import group_of


class _MemberState(ShardedState):
    """The state of an SAE whose data the first one's state reads, for all of them; where they begin is found once.

    lead: that first one's; None of itself.
    """

    def __init__(
        self,
        lead: "_MemberState | None",
        activations: Activations,
        sae_config: SAEConfig,
        config: TrainConfig,
        device: torch.device,
        peers: MeshPeers,
        data_on: DataOn,
        others: int,
    ):
        data_on = data_on if lead is None else "host"
        super().__init__(activations, sae_config, config, device, peers, None, data_on, others)
        self.lead, self._begun = lead, None

    _begun: tuple[Scale, Tensor] | None

    def beginning(self) -> tuple[Scale, Tensor]:
        """The lead's."""
        if self.lead is not None:
            return self.lead.beginning()
        if self._begun is None:
            self._begun = super().beginning()
        return self._begun

    def whole_batches(self, start_step: int, n_steps: int, announce: bool = True) -> Generator[Tensor, None, None]:
        """The lead's."""
        if self.lead is not None:
            return self.lead.whole_batches(start_step, n_steps, announce)
        return super().whole_batches(start_step, n_steps, announce)


class SharedMember(Member):
    """A Member of which each rank has a part."""

    def __init__(
        self,
        name: str,
        state: ShardedState,
        options: RunOptions,
        on_log: Callable[[str, int, Metrics], None],
        group: str | None,
    ):
        super().__init__(name, state, options, on_log, group)
        assert options.output is not None
        given = options.output, options.checkpoint_every, options.resume, options.force
        self.shared, self.directory = state, SharedRunDirectory(*given, state.peers, group is not None)
        self.kept = self.directory
        self.steps = CapturedSteps(state.stepper, False)

    def finish(self) -> tuple[SparseAutoencoder, SparseAutoencoder | None]:
        """The rank's part after its last step, and on rank 0 the whole SAE, which it has saved."""
        with one_thread(self.small):
            part, whole = self.shared.exported_part(), self.shared.export_whole()
        self.watch.pause()
        self.directory.save_whole(whole)
        return part, whole


def train_many_shared(
    peers: MeshPeers,
    activations: Activations,
    saes: Mapping[str, SAEConfig],
    config: Mapping[str, TrainConfig],
    options: RunOptions,
    *,
    validation: Activations | None = None,
    on_log: Callable[[str, int, Metrics], None] = lambda name, step, metrics: None,
    on_step: Callable[[int], None] = lambda step: None,
    on_evaluated: Callable[[int, int], None] = lambda done, total: None,
    on_note: Callable[[str], None] = lambda text: None,
    on_finished: OnFinished = nothing_more,
) -> dict[str, Trained]:
    """`train_many` by all ranks, which call this at once.

    Args:
        peers: the ranks.
        activations: rows [N, d_in], the same for every rank.
        saes, config: what SAEs, and the recipe of each, by names that are also those of their directories.
        options: where the run goes; output is needed. The device is the rank's own.
        validation: as of `train_many`; so are on_log, on_step, on_evaluated, on_note, and on_finished, which rank 0
            calls.

    Returns:
        As `train_many`: of the SAEs rank 0 has all of each, another rank its part.

    Raises:
        ValueError: as `train_many` and `train_shared`. Interrupted: as `train_shared`.
    """
    recipes, _ = recipes_of("train_many_shared", saes, SAEConfig, config, replace(options, data_parallel=1), {})
    first = next(iter(saes))
    for name, sae_config in saes.items():
        check_shardable(sae_config, recipes[name], peers.ranks)
        activations, held_out = fitting(activations, validation, sae_config)
    device, group = resolve_device(options.device), group_of(options.output) if len(saes) > 1 else None
    with ExitStack() as stack:
        members: list[SharedMember] = []
        lead: _MemberState | None = None
        of_rank = {name: Shard.of(sae_config, peers.ranks).config for name, sae_config in saes.items()}
        needed = {name: memory_of(part, recipes[name], activations.n_rows) for name, part in of_rank.items()}
        for name, sae_config in saes.items():
            given = activations, sae_config, recipes[name], device, peers, options.data_on
            state = _MemberState(lead, *given, sum(needed.values()) - needed[name])
            lead = lead or state
            members.append(SharedMember(name, state, own_options(options, name), on_log, group))
        for member in members:
            stack.enter_context(member.kept.locked())
            stack.enter_context(member.watch)
        if peers.rank == 0 and options.output is not None and not options.resume:
            steps = recipes[first].n_steps, options.checkpoint_every
            check_disk(options.output, saes.values(), *steps, Written.BY_RANKS)
        check_data(peers, activations, held_out)
        evaluated = EvaluatedRows.of_run(activations, held_out, recipes[first])
        look_at(evaluated, recipes[first], whole=False, rank=peers.rank, world=peers.world)
        for member in members:
            member.begin()
        with tf32_products(False), told_of_compiling(on_note):
            _steps(peers, members, on_step)
            parts = [member.finish() for member in members]

        def evaluate() -> list[Metrics]:
            own = [(part, member.shared.shard) for member, (part, _) in zip(members, parts)]
            found, n = list[Metrics](), evaluated.n_rows

            def on_rows(done: int, total: int) -> None:
                on_evaluated(len(found) * n + done, len(own) * n)

            for part, shard in own:
                found.append(evaluate_shared(part, shard, peers.ranks, evaluated, on_rows))
            return found

        finished = [part if whole is None else whole for part, whole in parts]
        looks = on_finished if peers.rank == 0 else nothing_more
        return evaluated_all([*members], finished, evaluate, looks)


def _steps(peers: MeshPeers, members: list[SharedMember], on_step: Callable[[int], None]) -> None:
    """All remaining steps of all, and none after one in which any rank was interrupted."""
    lead = members[0].shared
    start = min(member.n_steps for member in members)
    remaining = lead.batches(start, lead.config.n_steps - start)
    with interruptible(patient=True) as interrupted, closing(remaining):
        for step, raw_BD in enumerate(remaining, start):
            take_all([*members], step, lead.normalised(raw_BD))
            on_step(step + 1)
            if peers.agree(interrupted.is_set())[0]:
                stop_all([*members])
