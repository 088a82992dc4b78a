"""The output directory of a harvest: started, replaced or resumed, filled unit by unit, declared complete.

It holds `harvest.json` (the settings, checked by resume; sealed: records.py), `skipped.jsonl` (images that could not be
used), and the stores: the directory itself if there is one, else a directory for each. While the harvest runs, a file
skipped-NNNNN.jsonl holds the skipped images of a finished unit. A harvest that replaces another has all this in
.replacement until it is complete (outputs.py).
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from saevlm_fast.config import HarvestOptions
from saevlm_fast.data.codes import CodesWriter
from saevlm_fast.data.store import joined_index
from saevlm_fast.data.writing import ActivationWriter, StoreWriter, clear_store, merge_parts
from saevlm_fast.errors import ActivationError, doubt, require, size_text
from saevlm_fast.files import TEMPORARY_PREFIX, atomic_write, remove_leftovers
from saevlm_fast.harvesting.plan import HarvestPlan, PlannedStore
from saevlm_fast.harvesting.sizes import beside_rows, known_l0, row_bytes, rows_are_known
from saevlm_fast.images.batches import Batch
from saevlm_fast.images.sources import ImageSource
from saevlm_fast.outputs import (
    LOCK_FILE,
    begin_replacement,
    check_room,
    is_being_swapped,
    lacking_room,
    publish,
    settle,
    workplace,
)
from saevlm_fast.records import (
    FILE_NAME,
    TEXT,
    Each,
    Fields,
    Kind,
    check_record,
    check_same_settings,
    parse_json,
    read_record,
    write_record,
)
from saevlm_fast.sparse_codes import SparseCodes
from saevlm_fast.towers.language import MODALITIES, LanguageTower

HARVEST_FILE, SKIPPED_FILE = "harvest.json", "skipped.jsonl"
_FREE_SETTINGS = ("versions", "path", "spec", "torch", "transformers", "open_clip", "timm")  # may differ on resume
_STORE_NAME = Kind("'.' or the name of a directory beside it", lambda name: name == "." or FILE_NAME.fits(name))
_HARVEST = Fields({"harvest": Fields({"stores": Each(_STORE_NAME)})})
_SKIPPED = Fields({"image": TEXT, "reason": TEXT})


class BatchRows(NamedTuple):
    """Rows of one batch for one store: activations [M, D] or codes; image numbers, token positions; of language models
    what Selected.details has."""

    values: Tensor | SparseCodes
    image_of_row: Tensor
    positions: Tensor
    details: dict[str, Tensor] | None = None


class UnitPieces(NamedTuple):
    """What a unit's batches left: rows of every store, skipped images, events after which the copies are there."""

    rows: list[list[BatchRows]]
    skipped: list[str]
    copied: list[Any]


def skipped_lines(source: ImageSource, batch: Batch) -> list[str]:
    """What skipped.jsonl says of a batch."""
    return [json.dumps({"image": source.image_id(i), "reason": why}) + "\n" for i, why in batch.skipped]


def check_output(options: HarvestOptions) -> None:
    """ValueError if a harvest may not use its output directory. Nothing is touched."""
    output = Path(options.output)
    require(output.is_dir() or not os.path.lexists(output), f"output: {output} is not a directory")
    used = (output / HARVEST_FILE).exists() or is_being_swapped(output)
    require(
        not used or options.resume or options.force,
        f"output: {output} already holds a harvest; use --resume to continue or --force to replace",
    )
    names = [path.name for path in output.iterdir()] if output.is_dir() else []
    # A harvest that was killed before its first file left no more than these.
    occupied = any(name != LOCK_FILE and not name.startswith(TEMPORARY_PREFIX) for name in names)
    require(used or not occupied, f"output: {output} is not empty and holds no harvest")
    if options.force and (output / HARVEST_FILE).exists():
        _stores_of(output / HARVEST_FILE)  # of a damaged one nothing could be removed


class HarvestStores:
    """The stores of a plan on the disk, as one process sees them; methods in the order they happen.

    Attributes:
        done: units that every store has. skipped: lines of skipped.jsonl, this process's and those of `done`.
    """

    def __init__(self, plan: HarvestPlan):
        self.plan, self.output = plan, plan.output
        self.place = plan.output
        self.writers: list[StoreWriter] = []
        self.done: frozenset[int] = frozenset()
        self.skipped: list[str] = []

    def open(self) -> None:
        """Rank 0, which has the lock: finds the place for what will be written.

        Raises:
            ValueError: the output may not be used.
        """
        options = self.plan.options
        settle(self.output, _remove_harvest)
        check_output(options)
        if options.force and (self.output / HARVEST_FILE).exists():
            self._check_room()
            begin_replacement(self.output)
        self.place = workplace(self.output)
        try:
            self._check_disk()
        except ValueError:
            if self.place != self.output and not any(self.place.iterdir()):
                self.place.rmdir()  # --resume would go on with it
            raise

    def begin(self) -> None:
        """Rank 0: harvest.json and empty stores, or those that are there, with whole units.

        Raises:
            ValueError: they were begun with other settings.
        """
        if (self.place / HARVEST_FILE).exists():
            check_same_settings(self.place / HARVEST_FILE, self.plan.settings, free=_FREE_SETTINGS)
        remove_leftovers(self.place)
        if not (self.place / HARVEST_FILE).exists():
            write_record(self.place / HARVEST_FILE, self.plan.settings)
        self._keep_whole_units()

    def check_prepared(self, rank: int) -> None:
        """A rank but 0. ValueError: it does not see what rank 0 has begun, or would harvest something else."""
        file = workplace(self.output) / HARVEST_FILE
        require(file.is_file(), f"output: {file} is not there for rank {rank}; all ranks need the same disk")
        check_same_settings(file, self.plan.settings, free=_FREE_SETTINGS)

    def _keep_whole_units(self) -> None:
        """A unit is done when every store has it, and is done anew in all of them otherwise: an image that could not be
        read then may be readable now."""
        there = [store for store in self.plan.stores if (self._path(store) / "index.json").exists()]
        shards = [{shard.number for shard in joined_index(self._path(store)).shards} for store in there]
        done = set.intersection(*shards) if len(there) == len(self.plan.stores) else set()
        for store in there:
            merge_parts(self._path(store), keep=done)
        for unit in set(range(self.plan.n_units)) - done:
            self._skipped_file(unit).unlink(missing_ok=True)
        for store in self.plan.stores:
            if store not in there:
                self._new_store(store)

    def _check_room(self) -> None:
        """ValueError: where a store will go there is something that is not of the harvest that is replaced."""
        ours = set(_stores_of(self.output / HARVEST_FILE))
        for store in self.plan.stores:
            name = store.path.relative_to(self.output).as_posix()
            there = store.path / "index.json" if name == "." else store.path
            free = name in ours or not os.path.lexists(there)
            require(free, f"output: {there} is there and not of the harvest that --force replaces")

    def _check_disk(self) -> None:
        """ValueError: there is less room than rows and their items take, of stores of which that is certain. Less than
        all stores may take is a Doubt."""
        stores = self.plan.stores
        known = [store for store in stores if rows_are_known(self.plan, store)]
        check_room(self.output, self._left_to_write(known), "what is left to write takes")
        estimate = self._left_to_write(stores) if known != stores else 0
        if lacking := lacking_room(self.output, estimate):
            doubt(
                f"output: what is left to write may take {size_text(estimate)} by estimate, {lacking}; where it is "
                "full the harvest ends, and --resume goes on once there is room"
            )

    def _left_to_write(self, stores: Sequence[PlannedStore]) -> int:
        """Bytes; by k, and by as many tokens as a prompt of few words has, where nothing better is known."""
        plan = self.plan
        l0 = 0 if plan.sae is None else known_l0(plan) or 0
        needed = 0
        for store in stores:
            images = int(self._images_left(store) * (1 - plan.options.max_skipped))  # the others may be unusable
            needed += images * store.rows_per_image * row_bytes(plan, store, l0)
            needed += round(beside_rows(plan, store) * images / plan.n_images)
        return needed

    def _images_left(self, store: PlannedStore) -> int:
        """Of the units that it lacks."""
        numbers = {file.stem.removeprefix("shard-") for file in self._path(store).glob("shard-*.safetensors")}
        missing = (unit for unit in range(self.plan.n_units) if f"{unit:05d}" not in numbers)
        return sum(len(images) for unit in missing for images in self.plan.batches_of(unit))

    def _path(self, store: PlannedStore) -> Path:
        """Where the store is now."""
        return self.place / store.path.relative_to(self.output)

    def _new_store(self, store: PlannedStore) -> None:
        dtype, source = self.plan.config.torch_store_dtype, self.plan.source_of(store)
        # harvest.json may be there, and no index is
        self._writer(self._path(store), store.width, dtype, source, force=True)

    @property
    def _writer(self) -> type[StoreWriter]:
        return ActivationWriter if self.plan.sae is None else CodesWriter

    def resume(self, part: int | None) -> None:
        """Every rank: opens the stores that rank 0 prepared, each rank with its own part of the index."""
        self.place = workplace(self.output)
        self.writers = [self._writer.resume(self._path(store), part=part) for store in self.plan.stores]
        self.done = frozenset(self.writers[0].done)  # rank 0 has seen to it that all have the same
        # In front of what the loop has put there meanwhile, if the stores were begun beside it.
        self.skipped[:0] = [line for unit in sorted(self.done) for line in _lines(self._skipped_file(unit))]

    @property
    def skips_too_many(self) -> bool:
        """Whether more than max_skipped, a share of all images, could not be used."""
        return len(self.skipped) > self.plan.options.max_skipped * self.plan.n_images

    def check_skipped(self) -> None:
        """ValueError if too many images could not be used, which are then listed."""
        limit, n_images = self.plan.options.max_skipped, self.plan.n_images
        if not self.skips_too_many:
            return
        _write_lines(self.place / SKIPPED_FILE, self.skipped)
        last = json.loads(self.skipped[-1])
        raise ValueError(
            f"max_skipped: {len(self.skipped)} of {n_images} images could not be used, more than {limit:.2%}; listed "
            f"in {self.place / SKIPPED_FILE}; the last one is {last['image']}: {last['reason']}; a higher max_skipped "
            "(--max-skipped) and resume (--resume) go on"
        )

    def write_unit(self, unit: int, pieces: UnitPieces) -> None:
        """In the writer thread: the unit's shard in every store."""
        for event in pieces.copied:
            event.synchronize()
        if pieces.skipped:
            _write_lines(self._skipped_file(unit), pieces.skipped)
        for store, writer, rows in zip(self.plan.stores, self.writers, pieces.rows):
            self._write_shard(unit, store, writer, rows)

    def _write_shard(self, unit: int, store: PlannedStore, writer: StoreWriter, rows: list[BatchRows]) -> None:
        images = torch.cat([torch.empty(0, dtype=torch.int64), *(piece.image_of_row for piece in rows)])
        positions = torch.cat([torch.empty(0, dtype=torch.int64), *(piece.positions for piece in rows)])
        items = self.plan.items_of(unit, images, positions)
        told = [piece.details for piece in rows if piece.details is not None]
        if told:
            items = self._with_tokens(items, told)
        if self.plan.sae is not None:
            codes = [piece.values for piece in rows if isinstance(piece.values, SparseCodes)]
            writer.write_shard(unit, SparseCodes.join(codes, store.width), items)
            return
        nothing_0D = torch.empty(0, store.width, dtype=self.plan.config.torch_store_dtype)
        rows_MD = torch.cat([nothing_0D, *(piece.values for piece in rows if isinstance(piece.values, Tensor))])
        try:
            writer.write_shard(unit, rows_MD, items)
        except ActivationError as error:
            bad = (~rows_MD.isfinite()).any(1).nonzero().flatten().tolist()
            whose = f" (image {items['image'][bad[0]]}, token {items['token'][bad[0]]})" if bad else ""
            wider = "; float16 ends at 65504, try --store-dtype bfloat16" if rows_MD.dtype == torch.float16 else ""
            raise ActivationError(f"{error}{whose}{wider}") from error

    def _with_tokens(self, items: pa.Table, told: list[dict[str, Tensor]]) -> pa.Table:
        """The modality, number and text of every token beside its image and place."""
        modality, ids = (torch.cat([each[name] for each in told]).numpy() for name in ("modality", "token_id"))
        known, places = np.unique(ids, return_inverse=True)
        tower = self.plan.tower
        assert isinstance(tower, LanguageTower)
        pieces = pa.array(tower.pieces(known.tolist()), pa.string()).take(pa.array(places.reshape(-1)))
        columns = (pa.array(MODALITIES).take(pa.array(modality)), pa.array(ids.astype(np.int32)), pieces)
        for name, column in zip(("modality", "token_id", "text"), columns):
            items = items.append_column(name, column)
        return items

    def finish(self) -> int:
        """Rank 0, when every unit is on the disk: the skipped images are joined, the stores declared complete, and what
        they replace is removed.

        In this order, so that a kill in between leaves something that resume finishes. Returns the images skipped.

        Raises:
            ValueError: no image could be used, or shards are missing.
        """
        n_units = self.plan.n_units
        pieces = [path for unit in range(n_units) if (path := self._skipped_file(unit)).exists()]
        paths = [self._path(store) for store in self.plan.stores]
        indexes = [joined_index(path) for path in paths]
        for path, index in zip(paths, indexes):
            missing = set(range(n_units)) - {shard.number for shard in index.shards}
            require(not missing, f"{path}: {len(missing)} of {n_units} shards are missing; use --resume")
        skipped_file = self.place / SKIPPED_FILE
        if not all(index.complete for index in indexes):
            self.skipped = [line for piece in pieces for line in _lines(piece)]
            self.check_skipped()
            _write_lines(skipped_file, self.skipped)
        require(len(self.skipped) < self.plan.n_images, f"images: none could be used; see {skipped_file}")
        for path in paths:
            merge_parts(path, complete=True)
        for piece in pieces:
            piece.unlink()
        n_skipped = len(_lines(skipped_file))
        if self.place != self.output:
            publish(self.output, _remove_harvest)
        return n_skipped

    def _skipped_file(self, unit: int) -> Path:
        return self.place / f"skipped-{unit:05d}.jsonl"


def _lines(path: Path) -> list[str]:
    """Of a list of skipped images. ValueError: a line that is none of it."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    for number, line in enumerate(lines, 1):
        where = f"{path}, line {number}"
        check_record(parse_json(line, where), _SKIPPED, where, ValueError)
    return [line.decode("utf-8") for line in lines]


def _write_lines(path: Path, lines: Sequence[str]) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text("".join(lines), encoding="utf-8")


def _remove_harvest(output: Path) -> None:
    """Deletes the stores that the harvest in `output` made, and its own files; what else lies there stays."""
    if not (output / HARVEST_FILE).exists():
        return
    for name in _stores_of(output / HARVEST_FILE):
        store = output / name
        if store.is_symlink():  # what it leads to is not ours
            store.unlink()
            continue
        clear_store(store)
        if name != "." and store.is_dir() and not any(store.iterdir()):
            store.rmdir()
    units = output.glob("skipped-[0-9]*.jsonl")
    for file in (output / SKIPPED_FILE, *units, output / HARVEST_FILE):
        file.unlink(missing_ok=True)


def _stores_of(path: Path) -> list[str]:
    """The directories of the stores that harvest.json names: `.` or plain names beside it."""
    try:
        return list(read_record(path, _HARVEST)["harvest"]["stores"])
    except ValueError as error:
        raise ValueError(f"{error}; delete {path.parent} to start anew") from None
