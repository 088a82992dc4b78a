"""One pass over images by ranks: one_pass.py's, whose forwards are dealt among them, and whose SAEs are shared.

    with joined(device, timeout) as peers:
        trained = train_from_images_shared(peers, tower, source, saes, recipes, options, stream, images_path="photos")

Forward n is that of one process, a whole batch of its images, and rank n mod R makes it and holds its rows. Every R
forwards the ranks tell each other how many rows they have: so all know what lies where in the buffers of one process,
and put the same batches together (sharded_held.py).

Shape suffixes: B rows of a batch, R rows of a window, M of a forward, D d_in.
"""

import os
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any

import torch
from torch import Tensor

from saevlm_fast.config import RunOptions, SAEConfig, SAESize, StreamSettings, TrainConfig
from saevlm_fast.data.mixing import MixingBuffer
from saevlm_fast.errors import require
from saevlm_fast.harvesting.plan import HarvestPlan
from saevlm_fast.harvesting.stores import BatchRows
from saevlm_fast.harvesting.stream import Forward, Keeping, TowerStream
from saevlm_fast.images.open import open_held_out
from saevlm_fast.images.sources import ImageSource
from saevlm_fast.outputs import output_lock
from saevlm_fast.runtime import interruptible
from saevlm_fast.towers.tower import Tower
from saevlm_fast.training.capture import told_of_compiling
from saevlm_fast.training.evaluate import Metrics
from saevlm_fast.training.many import Member, OnFinished, Trained, evaluated_all, nothing_more, recipes_of
from saevlm_fast.training.one_pass import OnePass, check_controls, rows_of, trained_by
from saevlm_fast.training.process_group import MeshPeers
from saevlm_fast.training.sharded_evaluate import SharedRowSums
from saevlm_fast.training.sharded_held import SharedMixingBuffer
from saevlm_fast.training.sharded_keeping import SharedKeeping
from saevlm_fast.training.sharded_many import SharedMember
from saevlm_fast.training.sharded_state import ShardedState
from saevlm_fast.training.shards import Shard, check_shardable
from saevlm_fast.training.streamed import Place, Position, StreamedState

_NONE = torch.zeros(0, dtype=torch.int64)  # what a BatchRows says of images, where nobody asks


def train_from_images_shared(
    peers: MeshPeers,
    tower: Tower,
    source: ImageSource,
    saes: Mapping[str, SAESize],
    config: Mapping[str, TrainConfig],
    options: RunOptions,
    stream: StreamSettings,
    *,
    images_path: str,
    on_begin: Callable[[], None] = lambda: None,
    on_log: Callable[[str, int, Metrics], None] = lambda name, step, metrics: None,
    on_step: Callable[[int, int], None] = lambda done, total: None,
    on_evaluated: Callable[[int, int], None] = lambda done, total: None,
    on_note: Callable[[str], None] = lambda text: None,
    on_finished: OnFinished = nothing_more,
) -> dict[str, Trained]:
    """`train_from_images` by all ranks, which call this at once.

    Args:
        peers: the ranks.
        tower: of this rank, on its device. source: the images, the same for every rank.
        saes, config: what SAEs, and the recipe of each, by names.
        options: where the run goes; output is needed. The device is the rank's own.
        stream, images_path: as of `train_from_images`; so are on_begin, on_log, on_step, on_evaluated, on_note, and
            on_finished, which rank 0 calls.

    Returns:
        As `train_from_images`: of the SAEs rank 0 has all of each, another rank its part.

    Raises:
        ValueError: as `train_from_images` and `train_many_shared`; ranks with other images or towers.
        Interrupted: as `train_shared`.
    """
    assert options.output is not None
    recipes, _ = recipes_of("train_from_images_shared", saes, SAESize, config, replace(options, data_parallel=1), {})
    check_controls(recipes)
    held_out = open_held_out(stream.validation_images, images_path)
    kind, told = partial(SharedOnePass, peers), (on_begin, on_log, on_step, on_evaluated, on_note, on_finished)
    with told_of_compiling(on_note):
        return trained_by(kind, source, images_path, tower, stream, options, recipes, saes, held_out, *told)


class SharedTowerStream(TowerStream):
    """Forwards of which each rank makes its own. Attributes: peers: the ranks."""

    def __init__(self, peers: MeshPeers, *given: Any):
        super().__init__(*given)
        self.peers = peers

    def forwards(self, first: int, keeping: Keeping | None = None) -> Generator[Forward, None, None]:
        """TowerStream's, of all ranks; of forwards that another one has made, the number of rows, [M, 0], and for
        keeping what a store says of them.

        ValueError: as there, on all ranks alike.
        """
        rank, world = self.peers.rank, self.peers.world
        with closing(self.passes(first + (rank - first) % world, world, _local_ranks())) as own:
            for forward, lines in own:
                kept = keeping if first < self.forwards_per_epoch else None
                known = self.peers.collect((_told_of(forward.rows, kept is not None), lines))
                for number in range(first, first + world):
                    told, skipped = known[number % world]
                    self.note(skipped)
                    elsewhere = [BatchRows(torch.empty(n, 0), *more) for n, more in told]
                    rows = forward.rows if number % world == rank else elsewhere
                    if kept is not None and number < self.forwards_per_epoch:
                        kept.add(number, rows, skipped)
                    yield Forward(number, rows)
                first += world

    def each_once(
        self, plan: HarvestPlan, ranges: list[range]
    ) -> Generator[tuple[list[BatchRows], list[str]], None, None]:
        """TowerStream's, of all ranks: each makes every R-th forward, and all have the rows of all."""
        rank, world = self.peers.rank, self.peers.world
        with closing(self.through(plan, ranges[rank::world], _local_ranks())) as own:
            for first in range(0, len(ranges), world):
                yield from self._told(*next(own, ([], [])))[: len(ranges) - first]

    def _told(self, own: list[BatchRows], lines: list[str]) -> list[tuple[list[BatchRows], list[str]]]:
        """What every rank's forward gave, in their order."""
        known = self.peers.collect(([len(rows_of(each)) for each in own], lines))
        parts: list[list[BatchRows]] = [[] for _ in known]
        dtype = self.config.torch_store_dtype
        for place, store in enumerate(self.plan.stores):
            counts = [
                counts_of[place] if counts_of else 0 for counts_of, _ in known
            ]  # without any if no image could be used
            padded_MD = torch.zeros(max(counts), store.width, dtype=dtype, device=self.tower.device)
            if own:
                padded_MD[: counts[self.peers.rank]] = rows_of(own[place])
            # As bytes, which every backend carries whatever the dtype is.
            told = self.peers.gather(padded_MD.view(torch.uint8)).view(dtype) if max(counts) else padded_MD[None]
            for part, rows_MD, n in zip(parts, told.expand(len(parts), -1, -1), counts):
                part.append(BatchRows(rows_MD[:n], _NONE, _NONE))
        return [(part, skipped) for part, (_, skipped) in zip(parts, known)]


def _told_of(rows: list[BatchRows], kept: bool) -> list[tuple[int, tuple[Any, ...]]]:
    """What the others need to know of a forward's rows: how many there are; and for stores the rest."""
    return [(len(rows_of(each)), each[1:] if kept else (_NONE, _NONE)) for each in rows]


def _local_ranks() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


class SharedStreamedState(StreamedState, ShardedState):
    """The rank's part of an SAE that is trained on the rows of a place, which the ranks have between them."""

    def __init__(self, place: Place, sae: SAEConfig, config: TrainConfig, device: torch.device, peers: MeshPeers):
        self.place, self.position = place, Position()
        rows: Any = place.rows  # as of StreamedState
        ShardedState.__init__(self, rows, sae, config, device, peers)

    def whole_batches(self, start_step: int, n_steps: int, announce: bool = True) -> Generator[Tensor, None, None]:
        """StreamedState's batches, which are whole."""
        yield from self.place.first_batches(n_steps)

    def check_same_data(self) -> None:
        """SharedOnePass has, before the first forward."""


class _StreamedMember(SharedMember):
    """Whether it goes on, all ranks decide by what rank 0 sees."""

    @property
    def has_checkpoint(self) -> bool:
        peers = self.shared.peers
        return bool(peers.share(super().has_checkpoint if peers.rank == 0 else None))


class SharedPlace(Place):
    """A place whose rows the ranks hold between them, and whose SAEs they share."""

    buffer: SharedMixingBuffer

    def __init__(self, peers: MeshPeers, *given: Any):
        self.peers = peers
        super().__init__(*given)

    def _mixing(self, *given: Any, **more: Any) -> MixingBuffer:
        return SharedMixingBuffer(self.peers.ranks, self.device, *given, **more)

    def _member(self, name: str, sae: SAEConfig, config: TrainConfig, *rest: Any) -> Member:
        check_shardable(sae, config, self.peers.ranks)
        return _StreamedMember(name, SharedStreamedState(self, sae, config, self.device, self.peers), *rest)

    def feed(self, forward: int, rows_MD: Tensor) -> Iterator[int]:
        """Place's, of rows of the rank that makes this forward."""
        self.buffer.announce(forward % self.peers.world, len(rows_MD))
        return super().feed(forward, rows_MD)


class SharedOnePass(OnePass):
    """OnePass of all ranks, which call its methods at once."""

    def __init__(self, peers: MeshPeers, *given: Any):
        self.peers, self.place_of = peers, partial(SharedPlace, peers)
        super().__init__(*given)
        self.part_of, self.n_ranks = self._largest_part, peers.world

    def _largest_part(self, sae: SAEConfig) -> SAEConfig:
        world = self.peers.ranks.latents.world
        return Shard(sae, world - 1, world).config

    def _stream(self, *given: Any) -> TowerStream:
        return SharedTowerStream(self.peers, *given)

    def enter(self, stack: ExitStack) -> None:
        """OnePass's. ValueError: also ranks with other images, or another tower, than rank 0."""
        first, *others = self.peers.collect([place.rows.known_by for place in self.places])
        for rank, theirs in enumerate(others, 1):
            for its, wanted in zip(theirs, first):
                for name, value in wanted.items():
                    what = f"{name} is {its[name]} for rank {rank}, but {value} for rank 0"
                    require(its[name] == value, f"images: {what}; every rank needs the same images and tower")
        super().enter(stack)

    def _keeping(self, place: Path, stack: ExitStack) -> Keeping:
        if self.peers.rank == 0:
            stack.enter_context(output_lock(place, directory=True))
        return SharedKeeping(self.stream, self.peers)

    def _check_unused(self) -> None:
        if self.peers.rank == 0:
            super()._check_unused()
        self.peers.agree(True)  # nobody goes on before rank 0 has all locks, and has refused what is there

    def _interruptible(self) -> AbstractContextManager[Event]:
        return interruptible(patient=True)

    def _stops(self, interrupted: Event) -> bool:
        """Whether any rank was interrupted: all stop after the same step."""
        return self.peers.agree(interrupted.is_set())[0]

    def finish(
        self,
        held_out: ImageSource | None,
        hooks: ExitStack,
        on_evaluated: Callable[[int, int], None],
        on_finished: OnFinished,
    ) -> dict[str, Trained]:
        """Of all ranks, which evaluate the SAEs together; rank 0 puts them together and saves them."""
        members = [member for member in self.members if isinstance(member, SharedMember)]
        finished = [member.finish() for member in members]

        def evaluate() -> list[Metrics]:
            with hooks:
                parts = zip(members, finished)
                sums = [SharedRowSums(part, member.shared.shard, self.peers.ranks) for member, (part, _) in parts]
                return self._evaluated(sums, held_out, on_evaluated)

        saes = [part if whole is None else whole for part, whole in finished]
        return evaluated_all([*members], saes, evaluate, on_finished if self.peers.rank == 0 else nothing_more)
