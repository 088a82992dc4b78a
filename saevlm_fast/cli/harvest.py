"""saevlm-fast harvest: images through a vision tower to stores."""

import time
from contextlib import ExitStack, closing
from dataclasses import MISSING, dataclass
from operator import mul
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from saevlm_fast.cli.options import Plan, WorkOptions, command
from saevlm_fast.cli.planning import (
    check_writable,
    disk_figures,
    free_memory,
    memory_figures,
    peak_memory,
    replaced_figures,
)
from saevlm_fast.cli.record import Record
from saevlm_fast.cli.same_call import check_same_call
from saevlm_fast.cli.terminal import HarvestBar, say, tell, warn
from saevlm_fast.config import DEVICE_HELP, HarvestOptions, HarvestSettings, RunOptions
from saevlm_fast.errors import goes_on, require
from saevlm_fast.settings import integers, same_as, setting, texts
from saevlm_fast.urls import redacted_text

if TYPE_CHECKING:
    import torch

    from saevlm_fast.harvesting.config import HarvestConfig
    from saevlm_fast.harvesting.plan import HarvestPlan, PlannedStore
    from saevlm_fast.harvesting.ranks import Ranks
    from saevlm_fast.harvesting.run import HarvestSummary
    from saevlm_fast.images.batches import Batch
    from saevlm_fast.images.sources import ImageSource
    from saevlm_fast.towers.tower import Tower


@dataclass(frozen=True, kw_only=True)
class HarvestArguments(HarvestSettings, HarvestOptions, WorkOptions):
    """Options of `saevlm-fast harvest`."""

    title = "Model and place in it"
    made_from: ClassVar = {
        "model": ("model", "random_weights"),
        "images": ("images", "limit"),
        "fingerprint": ("images",),
        "content": ("images",),
        "stores": ("point", "layer", "tokens"),
        "points": ("point", "layer"),
    }

    model: str = setting(help="hf:NAME_OR_DIR, open_clip:ARCH/PRETRAINED_OR_FILE or timm:NAME[:FILE].", place="model")
    images: str = same_as(HarvestOptions, "images", MISSING)
    layer: tuple[int, ...] = setting((), help="Block, from 0; several: 5,8,11. One pass.", parse=integers)
    point: tuple[str, ...] = setting(
        ("residual",), help="residual, mlp, attention, projection, pooled, language; several: a,b.", parse=texts
    )
    tokens: tuple[str, ...] = setting(
        (),
        help="cls, patches, all, mean, random:K, random:K:all; of language all, text, image, last; several: a,b.",
        shown="cls; of language all",
        parse=texts,
    )
    random_weights: Literal["none", "blocks", "all"] = setting(
        "none",
        help="Draw the model's weights anew, by --seed: blocks (embeddings of patches and positions stay) or all. A "
        "control: what its images and architecture give alone.",
    )
    device: str = setting("auto", help=DEVICE_HELP)
    collective_timeout: float = same_as(
        RunOptions,
        "collective_timeout",
        3600.0,
        help="Under torchrun: seconds without a sign of a rank, after which the others end.",
        recorded=False,
    )

    def harvest_config(self) -> "HarvestConfig":
        """What is harvested, with hook points and tokens in place of their names."""
        from saevlm_fast.harvesting.config import HarvestConfig, default_tokens
        from saevlm_fast.towers.tokens import Tokens
        from saevlm_fast.towers.tower import HookPoint

        points = tuple(HookPoint.all_of(self.point, self.layer))
        chosen = self.tokens or (default_tokens(self.point),)
        return self.part(HarvestConfig, points=points, tokens=tuple(Tokens.parse(text) for text in chosen))


def _sentence(options: HarvestArguments, source: "ImageSource", tower: "Tower") -> str:
    n_images = min(len(source), options.limit or len(source))
    place = redacted_text(options.images)
    what = f"{options.model} on {tower.device}: {tower.n_blocks} blocks; {n_images:,} images of {place}"
    return what + (f" ({source.n_ignored:,} other files ignored)" if source.n_ignored else "")


def _tower(options: HarvestArguments, config: "HarvestConfig", device: str) -> "Tower":
    """The model, its weights drawn anew if that is asked for."""
    from saevlm_fast.harvesting.inputs import tower_for
    from saevlm_fast.runtime import resolve_device
    from saevlm_fast.towers.random_weights import randomise

    vision = options.random_weights == "none" or not config.is_language
    require(vision, f"random_weights: {options.random_weights} is of vision towers; the point is language")
    tower = tower_for(options.model, config, resolve_device(device), on_message=tell)
    if options.random_weights != "none":
        randomise(tower, options.random_weights, options.seed)
    return tower


def plan(options: HarvestArguments) -> Plan:
    """What would be written; the time from two forward passes of the first batch."""
    from saevlm_fast.harvesting.inputs import open_source
    from saevlm_fast.harvesting.plan import HarvestPlan
    from saevlm_fast.harvesting.sizes import beside_rows
    from saevlm_fast.harvesting.stores import check_output
    from saevlm_fast.runtime import resolve_device

    config, engine = options.harvest_config(), options.part(HarvestOptions)
    check_output(engine)
    check_writable(options.output)
    source = open_source(options.images, config)
    free = free_memory(resolve_device(options.device))
    tower = _tower(options, config, options.device)
    tower = tower if config.square is None else tower.squared(config.square)
    with tower.hooked(config.points) as run:
        planned = HarvestPlan(source, tower, run, config, engine)
        _tell_notes(source)
        _warn_of_mismatch(config, tower)
        batch, decoding = _first_batch(source, tower, min(planned.n_images, config.batch_size))
        with peak_memory(tower.device) as peak:
            seconds = _seconds_an_image(batch, decoding, tower, run)
            forward = peak()
        row_bytes = [_row_bytes(planned, store, batch) for store in planned.stores]
        beside = sum(beside_rows(planned, store) for store in planned.stores)
    n = planned.n_images
    rows = [n * store.rows_per_image for store in planned.stores]
    weights = sum(p.numel() * p.element_size() for p in tower.model.parameters())
    return Plan(
        _sentence(options, source, tower),
        {
            "images": n,
            "stores": [f"{store.path}: {rows:,} x {store.width:,}" for rows, store in zip(rows, planned.stores)],
            "units_of_work": f"{planned.n_units:,} of {planned.images_per_unit:,} images",
            **memory_figures(tower.device, weights + forward, free),
            "a_forward_bytes": forward,
            **disk_figures(options.output, sum(map(mul, rows, row_bytes)) + beside),
            **replaced_figures(options.output, options.force),
            **({} if seconds is None else {"an_image_seconds": seconds, "all_images_seconds": seconds * n}),
        },
    )


def _first_batch(source: "ImageSource", tower: "Tower", n: int) -> "tuple[Batch, float]":
    """The first n images, and the seconds that reading and decoding them took in this process."""
    from saevlm_fast.images.batches import image_batches

    start = time.perf_counter()
    with closing(image_batches(source, tower.preprocess, [range(n)], 0, False)) as batches:
        batch = next(batches)
    return batch, time.perf_counter() - start


def seconds_an_image(source: "ImageSource", tower: "Tower", run: Any, n: int) -> float | None:
    """Of the first n images, in this process; None if none of them can be used."""
    return _seconds_an_image(*_first_batch(source, tower, n), tower, run)


def _seconds_an_image(batch: "Batch", decoding: float, tower: "Tower", run: Any) -> float | None:
    """Reading, decoding and a forward pass in this process; workers do the first two beside the third."""
    if batch.inputs is None:
        return None
    inputs = {name: tensor.to(tower.device) for name, tensor in batch.inputs.items()}
    n = len(batch.images) + len(batch.skipped)
    return (decoding + min(_seconds(run, inputs, tower.device) for _ in range(2))) / n


def _row_bytes(planned: "HarvestPlan", store: "PlannedStore", batch: "Batch") -> int:
    """What a row takes on disk."""
    from saevlm_fast.harvesting.sizes import known_l0, row_bytes

    k = 0 if planned.sae is None else known_l0(planned)
    return row_bytes(planned, store, _measured_l0(planned, store, batch) if k is None else k)


def _measured_l0(planned: "HarvestPlan", store: "PlannedStore", batch: "Batch") -> float:
    """Latents that fire on a row of the first batch, on average; 0, which is unknown, if no image of it is usable."""
    from saevlm_fast.data.codes import mean_pool_codes
    from saevlm_fast.sae import inferred

    sae = planned.sae
    if batch.inputs is None or sae is None:
        return 0.0
    inputs = {name: tensor.to(planned.tower.device) for name, tensor in batch.inputs.items()}
    ids = [planned.source.image_id(i) for i in batch.images]
    acts = planned.run(inputs)[store.point]
    chosen = planned.run.select(acts, store.tokens, ids, planned.config.seed, batch.inputs)
    codes = inferred(sae, chosen.rows_MD)
    if planned.config.pool == "mean":
        codes = mean_pool_codes(codes, chosen.image_of_row, len(batch.images))
    return float(codes.l0().double().mean())


def _seconds(run: Any, inputs: dict[str, "torch.Tensor"], device: "torch.device") -> float:
    import torch

    start = time.perf_counter()
    run(inputs)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


@command("harvest", plan=plan, shared=True)
def harvest(options: HarvestArguments) -> dict[str, Any] | None:
    """Run images through a model; store activations, or an SAE's codes. Under torchrun, ranks share the work."""
    from saevlm_fast.harvesting.ranks import torchrun_ranks
    from saevlm_fast.outputs import output_lock

    with torchrun_ranks(options.collective_timeout) as ranks, ExitStack() as locks:
        check_same_call(ranks, options)
        if ranks.rank == 0:  # the others take theirs when it has prepared the output
            locks.enter_context(output_lock(options.output, directory=True))
        return _harvest(options, ranks)


def _harvest(options: HarvestArguments, ranks: "Ranks") -> dict[str, Any] | None:
    from saevlm_fast.harvesting.inputs import open_source
    from saevlm_fast.harvesting.run import harvest as run_harvest
    from saevlm_fast.harvesting.stores import check_output

    config, engine = options.harvest_config(), options.part(HarvestOptions)
    if ranks.rank == 0:
        check_output(engine)  # before a model is loaded
    source = open_source(options.images, config)
    tower = _tower(options, config, ranks.device(options.device))
    if ranks.rank == 0:
        say(_sentence(options, source, tower))
        _tell_notes(source)
        _warn_of_mismatch(config, tower)
    again = "continue with the same command and --resume" + (" in place of --force" if options.force else "")
    with goes_on(again), HarvestBar(ranks.rank, ranks.world) as bar:
        summary = run_harvest(source, tower, config, engine, ranks=ranks, on_images=bar.on_images)
    if ranks.rank != 0:
        return None
    Record("harvest", options, options.output, images=summary.n_images, ranks=ranks.world).write()
    _print_summary(summary)
    return _as_json(summary)


def _tell_notes(source: "ImageSource") -> None:
    for note in source.notes:
        tell(f"images: {note}")


def _warn_of_mismatch(config: "HarvestConfig", tower: "Tower") -> None:
    from saevlm_fast.provenance import sae_mismatch

    if config.sae is not None and (what := sae_mismatch(config.sae, tower, *config.stores[0])) is not None:
        warn(f"{what}; its codes of anything else mean little")


def _print_summary(summary: "HarvestSummary") -> None:
    seconds, n = max(summary.seconds, 1e-9), summary.n_done_here
    say(
        f"{summary.n_images:,} images, {summary.n_skipped:,} skipped; here {n:,} in {seconds:.0f} s, "
        f"{n / seconds:.1f} images/s, {summary.waiting / seconds:.0%} of it waiting for decoded images"
    )
    if summary.n_skipped:
        say(f"skipped images and why: {summary.output / 'skipped.jsonl'}")
    for path in summary.stores:
        say(f"wrote {path}")


def _as_json(summary: "HarvestSummary") -> dict[str, Any]:
    return {
        "output": str(summary.output),
        "stores": [str(path) for path in summary.stores],
        "images": summary.n_images,
        "skipped": summary.n_skipped,
        "images_here": summary.n_done_here,
        "seconds": summary.seconds,
        "seconds_waiting": summary.waiting,
    }
