"""Harvest: images through a vision tower to stores of activations, or of an SAE's sparse codes, in one pass.

The images are cut into units of work of `images_per_shard` images. A unit becomes one shard in every store (one store
for each hook point and choice of tokens), numbered by the unit, so units may be done in any order, by any number of
processes, and a killed harvest goes on with the units that are missing somewhere. Rows depend on the settings and the
images alone: batches never cross units, and random tokens are seeded per image.

    worker processes: read, decode, preprocess a batch -> device: forward, choose tokens, encode -> writer thread: shard

An output directory holds `harvest.json` (the settings, checked by resume), `skipped.jsonl` (images that could not be
used), and the stores: the directory itself if there is one, else a directory for each. While it runs, a file
skipped-NNNNN.jsonl holds the skipped images of a finished unit.
"""

import hashlib
import json
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist
from torch import Tensor

from saevlm_fast import __version__
from saevlm_fast.config import HarvestOptions, HarvestSettings
from saevlm_fast.data.codes import CodeRows, CodesWriter, codes_of_rows, join_codes, mean_pool_codes
from saevlm_fast.data.rows import loader_threads
from saevlm_fast.data.store import (
    STORE_DTYPES,
    ActivationWriter,
    StoreWriter,
    clear_store,
    joined_index,
    merge_parts,
)
from saevlm_fast.errors import ActivationError, ImageError, Interrupted, check_same_settings, require
from saevlm_fast.files import atomic_write, remove_leftovers, sha256_file, write_json_atomic
from saevlm_fast.images.batches import Batch, dead_workers_in_one_line, default_workers, image_batches
from saevlm_fast.images.open import ImageSource
from saevlm_fast.runtime import interruptible, tf32_products
from saevlm_fast.sae import CONFIG_FILE, WEIGHTS_FILE, SparseAutoencoder, evaluating, read_sae_header
from saevlm_fast.settings import setting
from saevlm_fast.towers.tokens import POOLED, Tokens
from saevlm_fast.towers.tower import HookedTower, HookPoint, Tower

HARVEST_FILE, SKIPPED_FILE, LOCK_FILE = "harvest.json", "skipped.jsonl", ".lock"
COMPUTE_DTYPES = {"float32": None, "tf32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
_UNITS_IN_FLIGHT, _ROWS_PER_SHARD = 2, 65536
_LOCK_SECONDS = 3.0  # a process that was just killed may need a moment to be gone
_FREE_SETTINGS = ("versions", "path", "spec", "torch", "transformers", "open_clip", "timm")  # may differ on resume


@dataclass(frozen=True)
class HarvestConfig(HarvestSettings):
    """What is harvested: everything that decides the rows. `--resume` refuses other settings.

    An SAE writes codes instead of activations, of one point and one choice of tokens (ImageNet's CLS codes are 116 MB).
    """

    points: tuple[HookPoint, ...] = setting(help="Where in the tower.")
    tokens: tuple[Tokens, ...] = setting(
        (Tokens.parse("cls"),), help="Which tokens of points that have them. A store for every pair."
    )

    def check(self) -> None:
        super().check()
        require(len(self.points) > 0, "point: at least one hook point is needed")
        require(len(set(self.points)) == len(self.points), "point, layer: the same hook point is asked for twice")
        require(len(set(self.tokens)) == len(self.tokens), "tokens: the same choice is asked for twice")
        require(
            self.sae is None or len(self.stores) == 1,
            f"sae: an SAE reads one point and one choice of tokens, but {len(self.stores)} are asked for",
        )

    @property
    def stores(self) -> tuple[tuple[HookPoint, Tokens | None], ...]:
        """The stores in order: (point, tokens); points without tokens, such as the projection, have None."""
        return tuple(
            (point, tokens) for point in self.points for tokens in (self.tokens if point.layer is not None else (None,))
        )

    @property
    def torch_store_dtype(self) -> torch.dtype:
        default = "float16" if self.sae is not None else self.dtype.replace("tf32", "float32")
        return STORE_DTYPES[self.store_dtype or default]


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


@dataclass(frozen=True)
class Ranks:
    """The processes of a torchrun, or the only one."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1

    def barrier(self) -> None:
        if self.world == 1:
            return
        try:
            dist.barrier()
        except RuntimeError as error:
            raise Interrupted("another rank has ended; its message says why") from error

    def device(self, name: str) -> str:
        """`auto` and `cuda` are the rank's own GPU."""
        own = self.world > 1 and name in ("auto", "cuda") and torch.cuda.is_available()
        return f"cuda:{self.local_rank}" if own else name


@contextmanager
def torchrun_ranks() -> Iterator[Ranks]:
    """This process among those that torchrun started; joins them with gloo (ranks only wait for each other)."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield Ranks()
        return
    dist.init_process_group("gloo", timeout=timedelta(days=7))  # a rank may wait long for the slowest
    try:
        local_rank, local_world = (int(os.environ.get(name, "0")) for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))
        yield Ranks(dist.get_rank(), world, local_rank, max(1, local_world))
    finally:
        dist.destroy_process_group()


def harvest(
    source: ImageSource,
    tower: Tower,
    config: HarvestConfig,
    options: HarvestOptions,
    *,
    ranks: Ranks = Ranks(),
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
    with (
        interruptible() as interrupted,
        tf32_products(config.dtype == "tf32"),
        tower.hooked(config.points, compile=options.compile, autocast=autocast) as run,
    ):
        job = _Harvest(source, tower, run, config, options, ranks)
        if ranks.rank == 0:
            check_output(options)
            if options.resume and (job.output / HARVEST_FILE).exists():
                check_same_settings(job.output / HARVEST_FILE, job.settings, free=_FREE_SETTINGS)
            with output_lock(job.output, exclusive=True):
                job.open_stores()
        ranks.barrier()
        with output_lock(job.output, exclusive=False):
            job.resume_stores()
            with dead_workers_in_one_line():
                job.units(on_images, interrupted)
            ranks.barrier()
            if ranks.rank == 0:
                job.finish()
        ranks.barrier()
        return job.summary


def check_output(options: HarvestOptions) -> None:
    """ValueError if a harvest may not use its output directory. Nothing is touched."""
    output = Path(options.output)
    require(output.is_dir() or not os.path.lexists(output), f"output: {output} is not a directory")
    used = (output / HARVEST_FILE).exists()
    require(
        not used or options.resume or options.force,
        f"output: {output} already holds a harvest; use --resume to continue or --force to replace",
    )
    occupied = output.is_dir() and any(path.name != LOCK_FILE for path in output.iterdir())
    require(used or not occupied, f"output: {output} is not empty and holds no harvest")


@contextmanager
def output_lock(output: Path, exclusive: bool, refusal: str | None = None) -> Iterator[None]:
    """Ranks of one harvest share the lock; rank 0 prepares the stores alone. Gone with the process, however it ends.

    Raises:
        ValueError: processes of another harvest (ranks whose torchrun was killed, say) are at work in `output`. With
            `refusal` as its message: other commands lock their own directories in this way.
    """
    if os.name == "nt":  # no fcntl there
        yield
        return
    import fcntl

    output.mkdir(parents=True, exist_ok=True)
    with open(output / LOCK_FILE, "a+") as file:
        deadline = time.monotonic() + _LOCK_SECONDS
        while True:
            try:
                # Of this process alone: unlike flock, worker processes that outlive a killed one do not inherit it.
                fcntl.lockf(file, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                message = refusal or f"output: another harvest is writing to {output}"
                require(time.monotonic() < deadline, message)
                time.sleep(0.05)
        yield


class _Store(NamedTuple):
    path: Path
    point: HookPoint
    tokens: Tokens | None
    width: int
    rows_per_image: int


class _Harvest:
    """One process's part of a harvest; methods in the order they happen."""

    def __init__(
        self,
        source: ImageSource,
        tower: Tower,
        run: HookedTower,
        config: HarvestConfig,
        options: HarvestOptions,
        ranks: Ranks,
    ):
        self.source, self.tower, self.run, self.config, self.options, self.ranks = (
            source, tower, run, config, options, ranks,
        )  # fmt: skip
        self.output = Path(options.output)
        self.n_images = min(len(source), config.limit or len(source))
        self.sae = self._open_sae()
        self.stores = self._plan_stores()
        self.images_per_unit = self._images_per_unit()
        self.n_units = -(-self.n_images // self.images_per_unit)
        self.writers: list[StoreWriter] = []
        self.skipped: list[str] = []  # lines of skipped.jsonl: this process's, and those of units done earlier
        self.settings = self._settings()
        self.summary = HarvestSummary(self.output, [store.path for store in self.stores], self.n_images)

    def _open_sae(self) -> SparseAutoencoder | None:
        if self.config.sae is None:
            return None
        sae = SparseAutoencoder.from_pretrained(self.config.sae, device=self.tower.device)
        ((point, _),) = self.config.stores
        width = self.run.shapes[point][1]
        require(
            sae.config.d_in == width,
            f"sae: d_in of {self.config.sae} is {sae.config.d_in}, but {point.name} of {self.tower.spec} has {width}",
        )
        return sae

    def _plan_stores(self) -> list[_Store]:
        single = len(self.config.stores) == 1
        stores = []
        for point, tokens in self.config.stores:
            name = point.name if tokens is None else f"{point.name}-{tokens.name}"
            width = self.run.shapes[point][1] if self.sae is None else self.sae.config.d_sae
            rows = self.run.rows_per_image(point, tokens)  # refuses tokens that the tower does not have
            rows = 1 if self.config.pool == "mean" else rows
            stores.append(_Store(self.output if single else self.output / name, point, tokens, width, rows))
        return stores

    def _images_per_unit(self) -> int:
        """Whole batches: a ragged batch in every unit would cost time (and compile anew)."""
        batch = self.config.batch_size
        wanted = self.config.images_per_shard
        if wanted is None:
            wanted = min(1024, _ROWS_PER_SHARD // max(store.rows_per_image for store in self.stores))
        return max(1, -(-wanted // batch)) * batch

    def open_stores(self) -> None:
        """Rank 0: starts, replaces or resumes."""
        remove_leftovers(self.output)
        if self.options.force and (self.output / HARVEST_FILE).exists():
            _remove_harvest(self.output)
        if not (self.output / HARVEST_FILE).exists():
            write_json_atomic(self.output / HARVEST_FILE, self.settings)
        there = [store for store in self.stores if (store.path / "index.json").exists()]
        shards = [{shard.number for shard in joined_index(store.path).shards} for store in there]
        # A unit is done when every store has it, and is done anew in all of them otherwise: an image that could not be
        # read then may be readable now.
        done = set.intersection(*shards) if len(there) == len(self.stores) else set()
        for store in there:
            merge_parts(store.path, keep=done)
        for unit in set(range(self.n_units)) - done:
            self._skipped_file(unit).unlink(missing_ok=True)
        for store in self.stores:
            if store not in there:
                self._new_store(store)

    def _settings(self) -> dict[str, Any]:
        config, source = self.config, self.source
        return {
            "model": self.tower.description(),
            "images": {"path": self.options.images, "images": self.n_images, "fingerprint": source.fingerprint(),
                       "content": _content(source, self.n_images)},
            "harvest": {
                "stores": [store.path.relative_to(self.output).as_posix() for store in self.stores],
                "points": [point.name for point, _ in config.stores],
                "tokens": [None if tokens is None else tokens.name for _, tokens in config.stores],
                "seed": config.seed, "batch_size": config.batch_size, "dtype": config.dtype,
                "store_dtype": str(config.torch_store_dtype).removeprefix("torch."),
                "images_per_shard": self.images_per_unit, "pool": config.pool,
                "sae": None if config.sae is None else sae_digest(config.sae),
            },
            "versions": {"saevlm_fast": __version__, "torch": torch.__version__},
        }  # fmt: skip

    def _source(self, store: _Store) -> dict[str, Any]:
        """What a store's index says of where its rows come from."""
        settings, config = self.settings, self.config
        return {
            "model": settings["model"],
            "point": store.point.point,
            "layer": store.point.layer,
            "tokens": None if store.tokens is None else store.tokens.name,
            "seed": config.seed,
            "dtype": config.dtype,
            "images": settings["images"],
            "sae": None if config.sae is None else {"path": str(config.sae), "sha256": sae_digest(config.sae)},
            "pool": config.pool,
            "versions": settings["versions"],
        }

    def _new_store(self, store: _Store) -> None:
        # force: harvest.json may lie there already, and no index does.
        self._writer(store.path, store.width, self.config.torch_store_dtype, self._source(store), force=True)

    @property
    def _writer(self) -> type[StoreWriter]:
        return ActivationWriter if self.sae is None else CodesWriter

    def resume_stores(self) -> None:
        """Every rank: opens the stores that rank 0 prepared, each rank with its own part of the index."""
        part = self.ranks.rank if self.ranks.world > 1 else None
        self.writers = [self._writer.resume(store.path, part=part) for store in self.stores]
        self.done = self.writers[0].done  # rank 0 has seen to it that all have the same
        self.skipped = [line for unit in sorted(self.done) for line in _lines(self._skipped_file(unit))]

    def units(self, on_images: Callable[[int, int, int], None], interrupted: threading.Event) -> None:
        """This rank's share of the units that are not done, the writing of one beside the forward of the next."""
        missing = [unit for unit in range(self.n_units) if unit not in self.done]
        mine = missing[self.ranks.rank :: self.ranks.world]
        total = sum(len(images) for unit in mine for images in self._batches_of(unit))
        pool, writing = loader_threads(1), deque[Future[None]]()
        start = time.perf_counter()
        try:
            with closing(self._load(mine)) as batches:
                for unit in mine:
                    while len(writing) >= _UNITS_IN_FLIGHT:
                        writing.popleft().result()
                    pieces = _UnitPieces([[] for _ in self.stores], [], [])
                    for _ in self._batches_of(unit):
                        self._stop_if(interrupted)
                        self._forward(next(batches), pieces)
                        self._check_skipped()
                        on_images(self.summary.n_done_here, total, len(self.skipped))
                    writing.append(pool.submit(self._write_unit, unit, pieces))
            for written in writing:
                written.result()
        finally:
            pool.shutdown(wait=True)  # what is computed is written, also when interrupted
            self.summary.seconds = time.perf_counter() - start

    def _batches_of(self, unit: int) -> list[range]:
        first, batch = unit * self.images_per_unit, self.config.batch_size
        last = min(first + self.images_per_unit, self.n_images)
        return [range(start, min(start + batch, last)) for start in range(first, last, batch)]

    def _load(self, units: list[int]) -> Generator[Batch, None, None]:
        """Preprocessed batches of these units in order; counts the time that is spent waiting for them."""
        ranges = [images for unit in units for images in self._batches_of(unit)]
        on_gpu = self.tower.device.type == "cuda"
        workers = self.options.workers
        if workers is None:
            workers = default_workers(on_gpu, self.ranks.local_world)
        with closing(image_batches(self.source, self.tower.preprocess, ranges, workers, on_gpu)) as stream:
            start = time.perf_counter()
            for batch in stream:
                self.summary.waiting += time.perf_counter() - start
                yield batch
                start = time.perf_counter()

    def _stop_if(self, interrupted: threading.Event) -> None:
        if interrupted.is_set():
            raise Interrupted(f"interrupted; continue with --resume --output {self.output}")

    def _forward(self, batch: Batch, pieces: "_UnitPieces") -> None:
        """Rows of every store, on their way to the host. The device is waited for only where the number of rows is its
        own doing: codes above a threshold, and pooling."""
        self.summary.n_done_here += len(batch.images) + len(batch.skipped)
        lines = [json.dumps({"image": self.source.image_id(i), "reason": why}) + "\n" for i, why in batch.skipped]
        pieces.skipped.extend(lines)
        self.skipped.extend(lines)
        if batch.inputs is None:
            return
        device = self.tower.device
        inputs = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.inputs.items()}
        ids = [self.source.image_id(i) for i in batch.images]
        acts = self.run(inputs)
        for store, rows in zip(self.stores, pieces.rows):
            rows.append(self._rows(store, acts[store.point], batch.inputs, ids, batch.images))
        if device.type == "cuda":
            pieces.copied.append(torch.cuda.current_stream(device).record_event())

    def _rows(
        self, store: _Store, acts: Tensor, inputs: Mapping[str, Tensor], ids: list[str], images: list[int]
    ) -> "_Rows":
        """The chosen tokens of one batch; with an SAE, their codes."""
        chosen = self.run.select(acts, store.tokens, ids, self.config.seed, inputs)
        image_of_row, positions = chosen.image_of_row, chosen.positions
        if self.sae is None:
            values: tuple[Tensor, ...] = (chosen.rows_MD.to(self.config.torch_store_dtype),)
        else:
            with evaluating(self.sae):
                values = codes_of_rows(self.sae.encode(chosen.rows_MD.to(self.sae.b_dec.dtype)))
            if self.config.pool == "mean":
                values = mean_pool_codes(values, chosen.image_of_row, len(images))
                image_of_row, positions = torch.arange(len(images)), torch.full((len(images),), POOLED)
        on_host = tuple(_to_host(tensor) for tensor in values)
        return _Rows(on_host, torch.tensor(images)[image_of_row], positions)

    def _check_skipped(self) -> None:
        """Fails as soon as more than max_skipped, a share of all images, could not be used."""
        if len(self.skipped) <= self.options.max_skipped * self.n_images:
            return
        self._write_lines(self.output / SKIPPED_FILE, self.skipped)
        last = json.loads(self.skipped[-1])
        raise ValueError(
            f"max_skipped: {len(self.skipped)} of {self.n_images} images could not be used, more than "
            f"{self.options.max_skipped:.2%}; listed in {self.output / SKIPPED_FILE}; the last one is {last['image']}: "
            f"{last['reason']}"
        )

    def _write_unit(self, unit: int, pieces: "_UnitPieces") -> None:
        """In the writer thread: the unit's shard in every store."""
        for event in pieces.copied:
            event.synchronize()
        if pieces.skipped:
            self._write_lines(self._skipped_file(unit), pieces.skipped)
        for store, writer, rows in zip(self.stores, self.writers, pieces.rows):
            self._write_shard(unit, store, writer, rows)

    def _write_shard(self, unit: int, store: _Store, writer: StoreWriter, rows: list["_Rows"]) -> None:
        images = torch.cat([torch.empty(0, dtype=torch.int64), *(piece.image_of_row for piece in rows)])
        positions = torch.cat([torch.empty(0, dtype=torch.int64), *(piece.positions for piece in rows)])
        items = self._items(unit, images, positions)
        if self.sae is not None:
            writer.write_shard(unit, join_codes([CodeRows(*piece.values) for piece in rows]), items)
            return
        nothing_0D = torch.empty(0, store.width, dtype=self.config.torch_store_dtype)
        rows_MD = torch.cat([nothing_0D, *(piece.values[0] for piece in rows)])
        try:
            writer.write_shard(unit, rows_MD, items)
        except ActivationError as error:
            bad = (~rows_MD.isfinite()).any(1).nonzero().flatten().tolist()
            whose = f" (image {items['image'][bad[0]]}, token {items['token'][bad[0]]})" if bad else ""
            wider = "; float16 ends at 65504, try --store-dtype bfloat16" if rows_MD.dtype == torch.float16 else ""
            raise ActivationError(f"{error}{whose}{wider}") from error

    def _items(self, unit: int, images: Tensor, positions: Tensor) -> pa.Table:
        """Ids and labels are asked for once an image: an image may have hundreds of rows."""
        numbers = [i for batch in self._batches_of(unit) for i in batch]
        places = pa.array((images - numbers[0]).numpy())
        ids = pa.array([self.source.image_id(i) for i in numbers], pa.string())
        labels = pa.array([self.source.label(i) for i in numbers], pa.string())
        tokens = pa.array(positions.numpy().astype(np.int32))
        return pa.table({"image": ids.take(places), "token": tokens, "label": labels.take(places)})

    def _skipped_file(self, unit: int) -> Path:
        return self.output / f"skipped-{unit:05d}.jsonl"

    def _write_lines(self, path: Path, lines: Sequence[str]) -> None:
        with atomic_write(path) as temporary:
            temporary.write_text("".join(lines), encoding="utf-8")

    def finish(self) -> None:
        """Rank 0, when every unit is on the disk: the skipped images are joined, the stores declared complete.

        In this order, so that a kill in between leaves something that resume finishes.
        """
        pieces = [path for unit in range(self.n_units) if (path := self._skipped_file(unit)).exists()]
        indexes = [joined_index(store.path) for store in self.stores]
        for store, index in zip(self.stores, indexes):
            missing = set(range(self.n_units)) - {shard.number for shard in index.shards}
            require(not missing, f"{store.path}: {len(missing)} of {self.n_units} shards are missing; use --resume")
        if not all(index.complete for index in indexes):
            self.skipped = [line for piece in pieces for line in _lines(piece)]
            self._check_skipped()
            self._write_lines(self.output / SKIPPED_FILE, self.skipped)
        require(len(self.skipped) < self.n_images, f"images: none could be used; see {self.output / SKIPPED_FILE}")
        for store in self.stores:
            merge_parts(store.path, complete=True)
        for piece in pieces:
            piece.unlink()
        self.summary.n_skipped = len(_lines(self.output / SKIPPED_FILE))


class _Rows(NamedTuple):
    """Rows of one batch for one store on the host: (activations [M, D],) or codes; image numbers, token positions."""

    values: tuple[Tensor, ...]
    image_of_row: Tensor
    positions: Tensor


class _UnitPieces(NamedTuple):
    """What a unit's batches left: rows of every store, skipped images, events after which the copies are there."""

    rows: list[list[_Rows]]
    skipped: list[str]
    copied: list[Any]


def _to_host(tensor: Tensor) -> Tensor:
    """A copy on the host (a view would keep all tokens alive); from a GPU without waiting for it."""
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type == "cuda")
    return host.copy_(tensor, non_blocking=True)


def _content(source: ImageSource, n_images: int) -> str:
    """Fingerprint of what is in the images: hash of 64 of them, evenly spread."""
    digest = hashlib.sha256()
    for i in torch.linspace(0, n_images - 1, min(n_images, 64), dtype=torch.float64).round().long().tolist():
        try:
            digest.update(hashlib.sha256(source.read(i)).digest())
        except ImageError as error:
            digest.update(str(error).encode())
    return digest.hexdigest()[:16]


def sae_mismatch(sae_directory: Path, tower: Tower, point: HookPoint, tokens: Tokens | None) -> str | None:
    """What an SAE was trained on, where its record of that differs from what it is to encode: None if nothing does."""
    source = read_sae_header(sae_directory)[0].metadata.get("source")
    if not isinstance(source, dict):  # free-form in SAEs and stores of other makers
        return None
    now = {"point": point.point, "layer": point.layer, "tokens": None if tokens is None else tokens.name}
    before = {name: source.get(name, value) for name, value in now.items()}
    model = source.get("model")
    weights = model.get("weights_sha256") if isinstance(model, dict) else None
    other_model = weights is not None and weights != tower.description()["weights_sha256"]
    if before == now and not other_model:
        return None
    where = f"{before['point']} of layer {before['layer']}, tokens {before['tokens']}"
    return f"{sae_directory} was trained on {where}{' of another model' if other_model else ''}"


def sae_digest(directory: Path) -> str:
    """SHA-256 of an SAE's files, as stores of its codes record it."""
    return hashlib.sha256(
        "".join(sha256_file(directory / name) for name in (CONFIG_FILE, WEIGHTS_FILE)).encode()
    ).hexdigest()


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []


def _remove_harvest(output: Path) -> None:
    """Deletes the stores that the harvest in `output` made, and its own files; what else lies there stays."""
    for name in _stores_of(output / HARVEST_FILE):
        clear_store(output / name)
        if name != "." and (output / name).is_dir() and not any((output / name).iterdir()):
            (output / name).rmdir()
    for file in (*output.glob("skipped*.jsonl"), output / HARVEST_FILE):
        file.unlink(missing_ok=True)


def _stores_of(path: Path) -> list[str]:
    """The directories of the stores that harvest.json names: `.` or plain names beside it."""
    try:
        names = [str(name) for name in json.loads(path.read_text(encoding="utf-8"))["harvest"]["stores"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: damaged ({type(error).__name__}: {error}); delete {path.parent} to start anew"
        ) from None
    require(all(Path(name).name == name or name == "." for name in names), f"{path}: a store lies outside the harvest")
    return names
