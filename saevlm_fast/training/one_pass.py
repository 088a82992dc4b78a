"""From images to SAEs in one pass: tower, shuffle buffers, steps. Nothing is stored unless it is asked for.

    trained = train_from_images("hf:tiny-clip", "photos", {"k5": SAESize(k=5)}, layer=[1, 3], steps=500, output="saes")

    forwards (harvesting/stream.py) -> a buffer for every place (data/mixing.py) -> steps of all SAEs of the place

The images pass once for all places and SAEs, over as many epochs as the place needs that gets the fewest rows of an
image; each SAE is, to the bit, the one that is trained alone. The order is a function of the seed and the images'
number, so that a killed run goes on: the rows of the buffers go through the tower again.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing
from itertools import islice
from numbers import Real
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from saevlm_fast.config import (
    HarvestOptions,
    RunOptions,
    SAEConfig,
    SAESize,
    StreamSettings,
    TrainConfig,
    keyword_settings,
)
from saevlm_fast.errors import check_kind, require
from saevlm_fast.harvesting.config import COMPUTE_DTYPES, HarvestConfig
from saevlm_fast.harvesting.plan import PlannedStore
from saevlm_fast.harvesting.stores import BatchRows
from saevlm_fast.harvesting.stream import Keeping, TowerStream
from saevlm_fast.images.batches import dead_workers_in_one_line
from saevlm_fast.images.open import Images, open_held_out, open_images
from saevlm_fast.images.sources import ImageSource
from saevlm_fast.outputs import output_lock
from saevlm_fast.runtime import interruptible, own_defaults, resolve_device, tf32_products
from saevlm_fast.settings import several
from saevlm_fast.towers.load import SPECS, load_tower
from saevlm_fast.towers.tokens import Tokens
from saevlm_fast.towers.tower import HookedTower, HookPoint, Tower
from saevlm_fast.training.capture import told_of_compiling
from saevlm_fast.training.checkpoints import RunDirectory
from saevlm_fast.training.evaluate import Metrics, RowSums
from saevlm_fast.training.many import (
    Member,
    OnFinished,
    Trained,
    evaluated_all,
    nothing_more,
    own_options,
    recipes_of,
    stop_all,
)
from saevlm_fast.training.memory import Written, check_disk, check_memory, memory_of
from saevlm_fast.training.progress import ProgressLine
from saevlm_fast.training.sharded_held import places_of_rank
from saevlm_fast.training.streamed import Place, StreamedRows
from saevlm_fast.training.watch import group_of
from saevlm_fast.urls import redacted_text

if TYPE_CHECKING:
    from saevlm_fast.training.sharded_evaluate import SharedRowSums

_EVALUATED_AT_A_TIME = 4096


@own_defaults()
def train_from_images(
    model: str | Tower,
    images: Images,
    saes: Mapping[str, SAESize],
    config: TrainConfig | Mapping[str, TrainConfig] | None = None,
    options: RunOptions | None = None,
    stream: StreamSettings | None = None,
    *,
    images_path: str | None = None,
    progress: bool = False,
    on_begin: Callable[[], None] = lambda: None,
    on_log: Callable[[str, int, Metrics], None] = lambda name, step, metrics: None,
    on_step: Callable[[int, int], None] = lambda done, total: None,
    on_evaluated: Callable[[int, int], None] = lambda done, total: None,
    on_note: Callable[[str], None] = lambda text: None,
    on_finished: OnFinished = nothing_more,
    **settings: Any,
) -> dict[str, Trained]:
    """Train SAEs on a tower's activations while the images pass through it; no activations are stored.

        trained = train_from_images("hf:tiny-clip", "photos", {"": SAESize(k=5)}, layer=11, steps=500, output="sae")

    Args:
        model: a spec of `load_tower`, or a tower. images: what `open_images` takes, or what it has opened.
        saes: what SAEs, by names; each is trained at every point and choice of tokens.
        config, options: as of `train_many`; or their fields by name.
        stream: layers, points, tokens, the buffer and more; or its fields by name, as layer=[11, 17], buffer="4GiB".
        images_path: what records call the images, where they are open already.
        progress: show a line. on_begin: called before the first image passes, once nothing that is known by then speaks
            against it. on_log: called with the name of every SAE at its logged steps. on_step: called with the
            steps done at all places, and those to do. on_evaluated, on_note: as of `train`. on_finished: as of
            `train_many`; the tower has no hooks by then.

    Returns:
        The SAEs in raw units, with what is measured of them on stream.validation_images, or else on the rows of the
        last window of the buffer, which they were trained on. By the name of the SAE, of several places by
        residual-11-cls/NAME; directories in options.output are called so too.

    Raises:
        ValueError: settings that fit neither the tower, the images nor each other, a buffer that is smaller than a
            batch, outputs in use, more memory needed than is free, too many unusable images, non-finite losses.
        Interrupted: SIGINT or SIGTERM; checkpoints have been written, if there is an output.
    """
    chosen, rest = _stream_settings(stream, settings)
    recipes, options = recipes_of("train_from_images", saes, SAESize, config, options, rest)
    check_controls(recipes)
    harvest_config(chosen, next(iter(recipes.values())))  # what is refused, before a model is loaded
    check_kind("images_path", images_path, (str, type(None)), "a text")
    check_kind("model", model, (str, Tower), f"{SPECS}, or a Tower")
    device = resolve_device(options.device)
    source = open_images(images)
    path = os.fspath(images) if isinstance(images, str | os.PathLike) else images_path or ""
    held_out = open_held_out(chosen.validation_images, path)
    tower = model if isinstance(model, Tower) else load_tower(model, device)
    line = ProgressLine(next(iter(recipes.values())).steps)

    def logged(name: str, step: int, metrics: Metrics) -> None:
        if progress:
            line.log(step, metrics)
        on_log(name, step, metrics)

    def evaluated(done: int, total: int) -> None:
        if progress:
            line.evaluated(done, total)
        on_evaluated(done, total)

    with closing(line), told_of_compiling(line.note if progress else on_note):
        told = on_begin, logged, on_step, evaluated, on_note, on_finished
        return trained_by(OnePass, source, path, tower, chosen, options, recipes, saes, held_out, *told)


def trained_by(
    kind: "Callable[..., OnePass]",
    source: ImageSource,
    path: str,
    tower: Tower,
    chosen: StreamSettings,
    options: RunOptions,
    recipes: Mapping[str, TrainConfig],
    saes: Mapping[str, SAESize],
    held_out: ImageSource | None,
    on_begin: Callable[[], None],
    on_log: Callable[[str, int, Metrics], None],
    on_step: Callable[[int, int], None],
    on_evaluated: Callable[[int, int], None],
    on_note: Callable[[str], None],
    on_finished: OnFinished,
) -> dict[str, Trained]:
    """A pass from its hooks to what is returned of it. kind: OnePass, or what ranks make of it."""
    harvest, device = harvest_config(chosen, next(iter(recipes.values()))), resolve_device(options.device)
    with ExitStack() as stack:
        hooks = stack.enter_context(ExitStack())
        tf32 = harvest.dtype == "tf32"
        run = hooks.enter_context(tower.hooked(harvest.points, False, COMPUTE_DTYPES[harvest.dtype], tf32))
        one_pass = kind(source, path, tower, run, harvest, chosen, options, recipes)
        one_pass.add(saes, device, on_log)
        one_pass.enter(stack)
        on_begin()
        with tf32_products(False), dead_workers_in_one_line():
            one_pass.steps(on_step, on_note)
            return one_pass.finish(held_out, hooks, on_evaluated, on_finished)


def check_controls(recipes: Mapping[str, TrainConfig]) -> None:
    """ValueError: a control that needs what a pass does not have."""
    for recipe in recipes.values():
        known = recipe.control not in ("shuffled", "untrained")
        require(known, f"control: {recipe.control} is of a run from a store, whose batches are at hand")


def harvest_config(stream: StreamSettings, config: TrainConfig) -> HarvestConfig:
    """What a harvest of the same rows would be asked for."""
    return HarvestConfig(
        points=tuple(HookPoint.all_of(stream.point, stream.layer)),
        tokens=tuple(Tokens.parse(text) for text in stream.tokens),
        seed=config.seed,
        limit=stream.limit,
        batch_size=stream.image_batch,
        dtype=stream.tower_dtype,
    )


class OnePass:
    """The places, the stream that feeds them, and what is kept of it; methods in the order they happen.

    part_of: what of an SAE this process holds. n_ranks: processes that hold the buffers' rows between them.
    """

    place_of: Callable[..., Place] = Place

    def __init__(
        self,
        source: ImageSource,
        path: str,
        tower: Tower,
        run: HookedTower,
        harvest: HarvestConfig,
        chosen: StreamSettings,
        options: RunOptions,
        recipes: Mapping[str, TrainConfig],
        part_of: Callable[[SAEConfig], SAEConfig] = lambda sae: sae,
        n_ranks: int = 1,
    ):
        self.part_of, self.n_ranks = part_of, n_ranks
        self.chosen, self.options, self.recipes, self.path = chosen, options, recipes, path
        self.config = next(iter(recipes.values()))
        output = chosen.keep_store or options.output or Path("store")
        given = {"resume": options.resume, "force": options.force} if chosen.keep_store else {}
        engine = HarvestOptions(output, path, workers=chosen.workers, max_skipped=chosen.max_skipped, **given)
        self.stream = self._stream(source, tower, run, harvest, engine)
        self.places: list[Place] = []
        self.keeping: Keeping | None = None

    def _stream(self, *given: Any) -> TowerStream:
        return TowerStream(*given)

    @property
    def members(self) -> list[Member]:
        """All SAEs, place by place."""
        return [member for place in self.places for member in place.members]

    def add(
        self, saes: Mapping[str, SAESize], device: torch.device, on_log: Callable[[str, int, Metrics], None]
    ) -> None:
        """A place for every store that a harvest would write, with all SAEs. ValueError: what does not fit."""
        device_of_buffer = torch.device("cpu") if self.chosen.buffer_on == "host" else device
        places, needed = self._sized_places(saes), {}
        for name, rows, configs in places:
            if device_of_buffer == device:
                needed[f"the buffer of {name}"] = self._held(rows) * rows.row_bytes
            for whole, (sae, recipe) in configs.items():
                needed[f"the SAE {whole}".strip()] = memory_of(self.part_of(sae), recipe, rows.n_rows)
        self.needed = needed
        check_memory(device, needed)
        if self.options.output is not None and not self.options.resume:
            all_saes = [sae for _, _, configs in places for sae, _ in configs.values()]
            steps = self.config.n_steps, self.options.checkpoint_every
            check_disk(self.options.output, all_saes, *steps, Written.by(device, self.n_ranks))
        group = group_of(self.options.output) if len(places) * len(saes) > 1 else None
        for name, rows, configs in places:
            place = self.place_of(name, rows, self.config, self._capacity(rows), device_of_buffer, device)
            for whole, (sae, recipe) in configs.items():
                place.add(whole, sae, recipe, own_options(self.options, whole), on_log, group)
            self.places.append(place)

    def _sized_places(
        self, saes: Mapping[str, SAESize]
    ) -> list[tuple[str, StreamedRows, dict[str, tuple[SAEConfig, TrainConfig]]]]:
        """Of every place its name, its rows, and its SAEs by their whole names."""
        plan, found = self.stream.plan, []
        names = plan.config.store_names
        for name, store in zip(names, plan.stores):
            configs = {}
            for sae_name, sae in _sized(saes, self.recipes, store.width).items():
                whole = f"{name}/{sae_name}".rstrip("/") if len(names) > 1 else sae_name
                configs[whole] = sae, self.recipes[sae_name]
            rows = self._rows(store)
            require(rows.n_rows > 1, f"images: one row of {name} in {rows.path}: there is nothing to learn")
            found.append((name, rows, configs))
        return found

    def _capacity(self, rows: StreamedRows) -> int:
        """Rows of a place's buffer."""
        batch_size, n_rows = min(self.config.batch_size, rows.n_rows), self.config.steps * self.config.batch_size
        return self.chosen.buffer_rows(batch_size, rows.row_bytes, n_rows)

    def _held(self, rows: StreamedRows) -> int:
        """Rows of it that this process holds; one of several up to a forward more than its share."""
        capacity, forward = self._capacity(rows), self.stream.config.batch_size * rows.n_rows // self.stream.n_images
        return capacity if self.n_ranks == 1 else places_of_rank(capacity, self.n_ranks, forward)

    def _rows(self, store: PlannedStore) -> StreamedRows:
        plan, dtype = self.stream.plan, self.stream.config.torch_store_dtype
        source = plan.source_of(store) | {"images": plan.settings["images"]}
        known_by = {
            "tower": plan.settings["model"]["class"],
            "weights of the tower": plan.settings["model"]["weights_sha256"],
            "images": plan.settings["images"]["images"],
            "names of the images": plan.settings["images"]["fingerprint"],
            "content of the images": plan.settings["images"]["content"],
            "point": store.point.name,
            "tokens": None if store.tokens is None else store.tokens.name,
            "image_batch": self.stream.config.batch_size,
            "tower_dtype": self.stream.config.dtype,
            "buffer": self.chosen.buffer,
        }
        return StreamedRows(
            self.stream.n_images * store.rows_per_image,
            store.width * dtype.itemsize,
            store.width,
            dtype,
            Path(redacted_text(self.path) or "images"),
            source,
            known_by,
        )

    def enter(self, stack: ExitStack) -> None:
        """Locks the outputs, refuses those in use, and finds where the places go on."""
        for member in self.members:
            stack.enter_context(member.kept.locked())
            stack.enter_context(member.watch)
        self._check_unused()
        if self.chosen.keep_store is not None:
            self.keeping = self._keeping(self.chosen.keep_store, stack)
        for place in self.places:
            place.resume()

    def _keeping(self, place: Path, stack: ExitStack) -> Keeping:
        """What writes the first epoch there, locked."""
        stack.enter_context(output_lock(place, directory=True))
        return Keeping(self.stream)

    def _check_unused(self) -> None:
        for member in self.members:
            if isinstance(member.kept, RunDirectory):
                member.kept.used()

    def _interruptible(self) -> "AbstractContextManager[Event]":
        return interruptible()

    def _stops(self, interrupted: Event) -> bool:
        """Whether nothing more is to be done."""
        return interrupted.is_set()

    def steps(self, on_step: Callable[[int, int], None], on_note: Callable[[str], None]) -> None:
        """All remaining steps of all places, and the rest of the first epoch if it is kept."""
        total = self.config.steps * len(self.places)
        starts = [place.start.forward for place in self.places]
        starts += [] if self.keeping is None or self.keeping.is_whole else [self.keeping.first_missing]
        filling = ", ".join(f"{place.name} {place.buffer.n_places:,}" for place in self.places)
        on_note(f"filling the buffers before the first step, rows: {filling}")
        with (
            self._interruptible() as interrupted,
            closing(self.stream.forwards(min(starts), self.keeping)) as forwards,
        ):
            for forward in forwards:
                for place, found in zip(self.places, forward.rows):
                    for _ in place.feed(forward.number, rows_of(found)):
                        on_step(sum(each.buffer.step for each in self.places), total)
                        if self._stops(interrupted):
                            stop_all(self.members)
                if self._stops(interrupted):
                    stop_all(self.members)
                if all(place.is_done for place in self.places) and (self.keeping is None or self.keeping.is_whole):
                    return

    def finish(
        self,
        held_out: ImageSource | None,
        hooks: ExitStack,
        on_evaluated: Callable[[int, int], None],
        on_finished: OnFinished,
    ) -> dict[str, Trained]:
        """Saves the SAEs and evaluates them. hooks: of the tower, which are closed before on_finished."""
        saes = [member.finished() for member in self.members]

        def evaluate() -> list[Metrics]:
            with hooks:
                return self._evaluated([RowSums(sae) for sae in saes], held_out, on_evaluated)

        return evaluated_all(self.members, saes, evaluate, on_finished)

    @torch.no_grad()
    def _evaluated(
        self,
        sums: "Sequence[RowSums | SharedRowSums]",
        held_out: ImageSource | None,
        on_evaluated: Callable[[int, int], None],
    ) -> list[Metrics]:
        """sums: of all SAEs, place by place."""
        left, of_places = iter(sums), dict[str, list[Any]]()
        for place in self.places:
            of_places[place.name] = list(islice(left, len(place.members)))
        done, total = 0, sum(self._n_evaluated(place, held_out) for place in self.places)
        for place, x_BD in self._evaluated_rows(held_out):
            for each in of_places[place.name]:
                each.add(x_BD)
            done += len(x_BD)
            on_evaluated(done, total)
        return [each.metrics() for each in sums]

    def _n_evaluated(self, place: Place, held_out: ImageSource | None) -> int:
        """Rows, if all images can be used."""
        if held_out is None:
            return place.buffer.n_last_rows
        return len(held_out) * (place.rows.n_rows // self.stream.n_images)

    def _evaluated_rows(self, held_out: ImageSource | None) -> Iterator[tuple[Place, Tensor]]:
        """Some rows of held-out images at a time, or of the last window; and the place that they are of."""
        if held_out is None:
            for place in self.places:
                for x_BD in place.buffer.last_rows(_EVALUATED_AT_A_TIME):
                    yield place, x_BD
            return
        for rows in self.stream.in_order(held_out, str(self.chosen.validation_images)):
            for place, given in zip(self.places, rows):
                yield place, rows_of(given).clone()  # no tensor of inference mode


def rows_of(found: BatchRows) -> Tensor:
    """Those of activations, which are no codes."""
    assert isinstance(found.values, Tensor)
    return found.values


def _sized(saes: Mapping[str, SAESize], recipes: Mapping[str, TrainConfig], d_in: int) -> dict[str, SAEConfig]:
    found = {name: size.config(d_in) for name, size in saes.items()}
    for name, sae in found.items():
        recipes[name].check_fits(sae)
    return found


def _stream_settings(stream: StreamSettings | None, settings: dict[str, Any]) -> tuple[StreamSettings, dict[str, Any]]:
    """What is the stream's of settings by name, and the rest."""
    ours, *_ = keyword_settings("train_from_images", settings, StreamSettings, TrainConfig, RunOptions)
    rest = {name: value for name, value in settings.items() if name not in ours}
    check_kind("stream", stream, (StreamSettings, type(None)), "StreamSettings")
    require(stream is None or not ours, f"{', '.join(ours)}: given beside stream, which has that already")
    if stream is not None:
        return stream, rest
    for name in ("layer", "point", "tokens"):
        if name in ours:
            one = isinstance(ours[name], str | Real)
            ours[name] = (ours[name],) if one else several(name, ours[name])
    return StreamSettings(**ours), rest
