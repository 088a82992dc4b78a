"""Images in a random order, epoch after epoch, through a tower: rows for a trainer that stores none.

Every epoch is a new permutation of all images, a function of (seed, epoch), cut into batches of forward passes; the
last one of an epoch may be smaller. Forwards are numbered through all epochs, so that a run goes on at any of them.
What is kept of it (`Keeping`) is the first epoch: a harvest of the images in that order.
"""

import copy
import hashlib
from collections.abc import Generator
from contextlib import closing
from typing import NamedTuple

import torch

from saevlm_fast.config import HarvestOptions
from saevlm_fast.data.order import permutation
from saevlm_fast.errors import require
from saevlm_fast.harvesting.config import HarvestConfig
from saevlm_fast.harvesting.forward import forward_rows, on_host
from saevlm_fast.harvesting.plan import HarvestPlan
from saevlm_fast.harvesting.stores import BatchRows, HarvestStores, UnitPieces, skipped_lines
from saevlm_fast.images.batches import default_workers, image_batches
from saevlm_fast.images.sources import ImageSource
from saevlm_fast.towers.tower import HookedTower, Tower

_TAG = 0x696D67  # keeps these permutations apart from those of rows


class ShuffledImages:
    """An ImageSource whose images are those of another one in a random order, a function of (seed, epoch)."""

    def __init__(self, source: ImageSource, n_images: int, seed: int, epoch: int):
        self.source, self.n_ignored, self.notes = source, source.n_ignored, source.notes
        self._order, self._key = permutation(n_images, seed, _TAG, epoch), f"{n_images} {seed} {epoch}"

    def first(self, n: int) -> "ShuffledImages":
        """The first n of them, or all."""
        some = copy.copy(self)
        some._order, some._key = self._order[:n], f"{self._key} {n}"
        return some

    @property
    def numbers(self) -> list[int]:
        """Those of the images in the other source."""
        return [int(number) for number in self._order]

    def __len__(self) -> int:
        return len(self._order)

    def image_id(self, i: int) -> str:
        """Its name."""
        return self.source.image_id(int(self._order[i]))

    def label(self, i: int) -> str | None:
        """Its class."""
        return self.source.label(int(self._order[i]))

    def read(self, i: int) -> bytes:
        """The encoded image."""
        return self.source.read(int(self._order[i]))

    def fingerprint(self) -> str:
        """Of the images and their order."""
        return hashlib.sha256(f"{self.source.fingerprint()} {self._key}".encode()).hexdigest()


class Forward(NamedTuple):
    """One forward pass: its number, and the rows of every store of the plan on the device; none of unusable images."""

    number: int
    rows: list[BatchRows]


class TowerStream:
    """Forward passes over the images, without end.

    Args:
        source: the images. tower, run: with its hooks in place. config: points, tokens, batch size, seed.
        options: workers, the share of unusable images that is borne, and the path that records name; its output is
            where the first epoch is kept, if `keep` says so.

    Attributes:
        plan: of the first epoch. skipped: numbers of unusable images, of the epochs seen here.

    Raises:
        ValueError: settings that do not fit the tower.
    """

    def __init__(
        self, source: ImageSource, tower: Tower, run: HookedTower, config: HarvestConfig, options: HarvestOptions
    ):
        self.source, self.tower, self.run, self.config, self.options = source, tower, run, config, options
        self.n_images = min(len(source), config.limit or len(source))
        self.plan = self._plan(0)
        self.skipped: set[str] = set()

    @property
    def forwards_per_epoch(self) -> int:
        """Batches that the images are cut into."""
        return -(-self.n_images // self.config.batch_size)

    def _plan(self, epoch: int) -> HarvestPlan:
        images = ShuffledImages(self.source, self.n_images, self.config.seed, epoch)
        return HarvestPlan(images, self.tower, self.run, self.config, self.options)

    def forwards(self, first: int, keeping: "Keeping | None" = None) -> Generator[Forward, None, None]:
        """From the first-th on. keeping: of the first epoch, is given every one of it.

        Raises:
            ValueError: more unusable images than max_skipped. OSError: a batch failed for another reason.
        """
        with closing(self.passes(first)) as passes:
            for forward, lines in passes:
                self.note(lines)
                if keeping is not None and forward.number < self.forwards_per_epoch:
                    keeping.add(forward.number, forward.rows, lines)
                yield forward

    def passes(self, first: int, every: int = 1, n_local: int = 1) -> Generator[tuple[Forward, list[str]], None, None]:
        """Every `every`-th of the forwards from the first-th on, and what skipped.jsonl says of each.

        n_local: processes of this machine, which have their own; its cores are shared among their workers.

        Raises:
            OSError: a batch failed for another reason than its images.
        """
        while True:
            epoch, start = divmod(first, self.forwards_per_epoch)
            plan = self.plan if epoch == 0 else self._plan(epoch)
            ranges = [images for unit in range(plan.n_units) for images in plan.batches_of(unit)][start::every]
            with closing(self.through(plan, ranges, n_local)) as passed:
                for rows, lines in passed:
                    yield Forward(first, rows), lines
                    first += every

    def through(
        self, plan: HarvestPlan, ranges: list[range], n_local: int = 1
    ) -> Generator[tuple[list[BatchRows], list[str]], None, None]:
        """The rows of these batches of a plan's images, and what skipped.jsonl says of each; else as `passes`."""
        on_gpu = self.tower.device.type == "cuda"
        workers = default_workers(on_gpu, n_local) if self.options.workers is None else self.options.workers
        with closing(image_batches(plan.source, self.tower.preprocess, ranges, workers, on_gpu)) as batches:
            for batch in batches:
                yield forward_rows(plan, batch), skipped_lines(plan.source, batch)

    def note(self, lines: list[str]) -> None:
        """Unusable images. ValueError: they are more than max_skipped, or all, of which no epoch has a row."""
        self.skipped.update(lines)
        limit, n, last = self.options.max_skipped, len(self.skipped), "".join(lines[-1:]).strip()
        require(
            n <= limit * self.n_images,
            f"max_skipped: {n} of {self.n_images} images could not be used, more than {limit:.2%}; "
            f"the last one: {last}",
        )
        require(n < self.n_images, f"images: none of {n} images could be used; the last one: {last}")

    def in_order(self, source: ImageSource, path: str) -> Generator[list[BatchRows], None, None]:
        """The rows of other images, each once and in their order: those of an evaluation. path: as records name it.

        Raises:
            ValueError: none of them could be used, or more than `max_skipped` allows could not.
        """
        n = len(source)
        plan = HarvestPlan(source, self.tower, self.run, self.config, self.options)
        ranges = [range(i, min(i + self.config.batch_size, n)) for i in range(0, n, self.config.batch_size)]
        n_skipped = 0
        with closing(self.each_once(plan, ranges)) as passed:
            for rows, lines in passed:
                n_skipped += len(lines)
                require(
                    n_skipped <= self.options.max_skipped * n,
                    f"max_skipped: {n_skipped} of {n} images of {path} could not be used, more than "
                    f"{self.options.max_skipped:.2%}",
                )
                yield rows
        require(n_skipped < n, f"images: none of the {n} images of {path} could be used")

    def each_once(
        self, plan: HarvestPlan, ranges: list[range]
    ) -> Generator[tuple[list[BatchRows], list[str]], None, None]:
        """`through`, by whoever shares the stream."""
        return self.through(plan, ranges)


class Keeping:
    """The stores of a stream's first epoch, written as a harvest writes them: unit by unit, resumed by units.

    Attributes:
        first_missing: the first forward that is not in the stores; all forwards of an epoch where they are whole.
    """

    def __init__(self, stream: TowerStream):
        self.stream, self.plan = stream, stream.plan
        self.stores = HarvestStores(self.plan)
        self.per_unit = self.plan.images_per_unit // stream.config.batch_size
        self._pieces: dict[int, UnitPieces] = {}
        self._finished = False
        self._open()
        self.stores.resume(part=self._part)
        missing = [unit for unit in range(self.plan.n_units) if unit not in self.stores.done]
        self.first_missing = missing[0] * self.per_unit if missing else stream.forwards_per_epoch
        self._finish_if_whole()

    def _open(self) -> None:
        self.stores.open()
        self.stores.begin()

    @property
    def _part(self) -> int | None:
        """Of the stores' indexes that this process writes, if others write, too."""
        return None

    def add(self, number: int, rows: list[BatchRows], skipped: list[str]) -> None:
        """A forward of the first epoch; a unit is written when its last one is there."""
        unit, place = divmod(number, self.per_unit)
        if self._finished or unit in self.stores.done:
            return
        if place == 0:
            self._pieces = {unit: UnitPieces([[] for _ in self.plan.stores], [], [])}
        if unit not in self._pieces:  # begun in the middle: it is done anew
            return
        pieces = self._pieces[unit]
        pieces.skipped.extend(skipped)
        self.stores.skipped.extend(skipped)
        for held, found in zip(pieces.rows, self._held(number, rows)):
            held.append(found)
        if rows and self.stream.tower.device.type == "cuda":
            pieces.copied.append(torch.cuda.current_stream(self.stream.tower.device).record_event())
        if place == len(self.plan.batches_of(unit)) - 1:
            self._write(unit, self._pieces.pop(unit))
            self.stores.done |= {unit}
            self._finish_if_whole()

    def _finish_if_whole(self) -> None:
        if not self._finished and len(self.stores.done) == self.plan.n_units:
            self._finish()
            self._finished = True

    def _held(self, number: int, rows: list[BatchRows]) -> list[BatchRows]:
        """A forward's, as they are held until their unit is written."""
        return [on_host(each) for each in rows]

    def _write(self, unit: int, pieces: UnitPieces) -> None:
        self.stores.write_unit(unit, pieces)

    def _finish(self) -> None:
        self.stores.finish()

    @property
    def is_whole(self) -> bool:
        """Whether the stores are complete."""
        return self._finished
