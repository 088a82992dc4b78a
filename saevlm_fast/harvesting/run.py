"""Harvest: images through a vision tower to stores of activations, or of an SAE's sparse codes, in one pass.

The images are cut into units of work of `images_per_shard` images. A unit becomes one shard in every store (one store
for each hook point and choice of tokens), numbered by the unit, so units may be done in any order, by any number of
processes, and a killed harvest goes on with the units that are missing somewhere. Rows depend on the settings and the
images alone: batches never cross units, and random tokens are seeded per image.

    worker processes: read, decode, preprocess a batch -> device: forward, choose tokens, encode -> writer thread: shard

What is written is decided in harvesting/plan.py; harvesting/stores.py is the output directory.
"""

import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future
from contextlib import ExitStack, closing, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from saevlm_fast.config import HarvestOptions
from saevlm_fast.data.prefetch import loader_threads
from saevlm_fast.errors import Interrupted
from saevlm_fast.harvesting.config import COMPUTE_DTYPES, HarvestConfig
from saevlm_fast.harvesting.forward import forward_rows, on_host
from saevlm_fast.harvesting.plan import HarvestPlan
from saevlm_fast.harvesting.ranks import ALONE, Ranks
from saevlm_fast.harvesting.stores import HarvestStores, UnitPieces, skipped_lines
from saevlm_fast.images.batches import Batch, dead_workers_in_one_line, default_workers, image_batches
from saevlm_fast.images.sources import ImageSource
from saevlm_fast.outputs import output_lock
from saevlm_fast.runtime import interruptible, tf32_products
from saevlm_fast.towers.tower import Tower

_UNITS_IN_FLIGHT = 2


@dataclass
class HarvestSummary:
    """What this process did (n_images and n_skipped: of the whole harvest), and where the stores are.

    seconds: of the loop over images. waiting: of these, for preprocessed batches.
    """

    output: Path
    stores: list[Path]
    n_images: int = 0
    n_skipped: int = 0
    n_done_here: int = 0
    seconds: float = 0.0
    waiting: float = 0.0


def harvest(
    source: ImageSource,
    tower: Tower,
    config: HarvestConfig,
    options: HarvestOptions,
    *,
    ranks: Ranks = ALONE,
    on_images: Callable[[int, int, int], None] = lambda done, total, skipped: None,
) -> HarvestSummary:
    """Runs the images through the tower and writes the stores; the module's docstring says how.

    Args:
        ranks: this process among several that call harvest with the same arguments.
        on_images: called after every batch with the images done, those to do (both of this process), and skipped ones.

    Raises:
        ValueError: settings that fit neither tower nor SAE, an output in use, more unusable images than max_skipped.
        OSError: a write failed. Interrupted: SIGINT or SIGTERM; finished units are on the disk.
    """
    autocast = COMPUTE_DTYPES[config.dtype]
    tower = tower if config.square is None else tower.squared(config.square)
    with ExitStack() as locks:
        if ranks.rank == 0:
            lock = locks.enter_context(output_lock(options.output, directory=True))
        with (
            tf32_products(config.dtype == "tf32"),  # may wait for a thread, as long as Ctrl-C still ends that
            interruptible() as interrupted,
            tower.hooked(config.points, options.compile, autocast, tf32=config.dtype == "tf32") as run,
        ):

            def stop_if() -> None:
                if interrupted.is_set():
                    raise Interrupted(f"interrupted; continue with --resume --output {options.output}")

            plan = HarvestPlan(source, tower, run, config, options)
            stores = HarvestStores(plan)
            if ranks.rank == 0:
                stores.open()
            anew = ranks.world == 1 and not options.resume
            if not anew:
                if ranks.rank == 0:
                    stores.begin()
                    if ranks.world > 1:
                        lock.share()  # with the other ranks
                ranks.barrier(stop_if)
                if ranks.rank > 0:
                    stores.check_prepared(ranks.rank)
                    locks.enter_context(output_lock(options.output, directory=True, exclusive=False))
                stores.resume(part=ranks.rank if ranks.world > 1 else None)
            loop = _Loop(plan, stores, ranks)
            with dead_workers_in_one_line():
                loop.units(on_images, stop_if, anew)
            ranks.barrier(stop_if)
            if ranks.rank == 0:
                loop.summary.n_skipped = stores.finish()
            ranks.barrier()
            return loop.summary


class _Loop:
    """One process's part of the images; methods in the order they happen."""

    def __init__(self, plan: HarvestPlan, stores: HarvestStores, ranks: Ranks):
        self.plan, self.stores, self.ranks = plan, stores, ranks
        self.source, self.device = plan.source, plan.tower.device
        self.summary = HarvestSummary(plan.output, [store.path for store in plan.stores], plan.n_images)

    def units(self, on_images: Callable[[int, int, int], None], stop_if: Callable[[], None], anew: bool) -> None:
        """This rank's share of the units that are not done, the writing of one beside the forward of the next.

        anew: none is done, and the stores are yet to be begun. That takes a second per gigabyte of weights, which are
        hashed, so the thread that writes begins them beside the first forwards.
        """
        missing = [unit for unit in range(self.plan.n_units) if unit not in self.stores.done]
        mine = missing[self.ranks.rank :: self.ranks.world]
        total = sum(len(images) for unit in mine for images in self.plan.batches_of(unit))
        pool, writing = loader_threads(1), deque[Future[None]]()
        start = time.perf_counter()
        try:
            with closing(self._load(mine)) as batches:
                if anew:  # after the workers have been forked
                    writing.append(pool.submit(self._begin))
                for unit in mine:
                    while len(writing) >= _UNITS_IN_FLIGHT:
                        writing.popleft().result()
                    pieces = UnitPieces([[] for _ in self.plan.stores], [], [])
                    for _ in self.plan.batches_of(unit):
                        stop_if()
                        self.ranks.goes_on()
                        self._forward(next(batches), pieces)
                        if self.stores.skips_too_many:
                            _finish(writing)
                            self.stores.check_skipped()
                        on_images(self.summary.n_done_here, total, len(self.stores.skipped))
                    writing.append(pool.submit(self.stores.write_unit, unit, pieces))
            _finish(writing)
        finally:
            pool.shutdown(wait=True)  # what is computed is written, also when interrupted
            self.summary.seconds = time.perf_counter() - start

    def _begin(self) -> None:
        """In the writer thread. On a GPU the weights come by a stream of their own, not behind the queued forwards."""
        on_gpu = self.device.type == "cuda"
        with torch.cuda.stream(torch.cuda.Stream(self.device)) if on_gpu else nullcontext():
            self.stores.begin()
        self.stores.resume(part=None)

    def _load(self, units: list[int]) -> Generator[Batch, None, None]:
        """Preprocessed batches of these units in order; the workers begin at once."""
        ranges = [images for unit in units for images in self.plan.batches_of(unit)]
        on_gpu = self.device.type == "cuda"
        workers = self.plan.options.workers
        if workers is None:
            workers = default_workers(on_gpu, self.ranks.local_world)
        return self._timed(image_batches(self.source, self.plan.tower.preprocess, ranges, workers, on_gpu))

    def _timed(self, batches: Generator[Batch, None, None]) -> Generator[Batch, None, None]:
        """Counts the time that is spent waiting for them."""
        with closing(batches):
            start = time.perf_counter()
            for batch in batches:
                self.summary.waiting += time.perf_counter() - start
                yield batch
                start = time.perf_counter()

    def _forward(self, batch: Batch, pieces: UnitPieces) -> None:
        """Rows of every store, on their way to the host."""
        self.summary.n_done_here += len(batch.images) + len(batch.skipped)
        lines = skipped_lines(self.source, batch)
        pieces.skipped.extend(lines)
        self.stores.skipped.extend(lines)
        for rows, found in zip(pieces.rows, forward_rows(self.plan, batch)):
            rows.append(on_host(found))
        if batch.inputs is not None and self.device.type == "cuda":
            pieces.copied.append(torch.cuda.current_stream(self.device).record_event())


def _finish(writing: Iterable[Future[None]]) -> None:
    for written in writing:
        written.result()
