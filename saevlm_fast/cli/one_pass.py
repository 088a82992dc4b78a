"""saevlm-fast train --model ... --images ...: from images to SAEs in one pass, without a store.

OUTPUT                   the run, of one place and one SAE
OUTPUT/PLACE/NAME        the run of each; PLACE is residual-11-cls, NAME what differs between SAEs (sweep.py), either
                         only where there are several; then also what train_many.py writes beside them
"""

from contextlib import closing
from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING, Any

from saevlm_fast.cli.options import Plan
from saevlm_fast.cli.planning import (
    check_writable,
    disk_figures,
    free_memory,
    memory_figures,
    time_of_all,
)
from saevlm_fast.cli.ranks import device_of_rank, first_rank_first, leads, n_processes, part_of_a_rank, ranks_options
from saevlm_fast.cli.record import SETTINGS_FILE, Record, interrupted_run
from saevlm_fast.cli.terminal import TrainBar, metric_text, print_table, say, tell
from saevlm_fast.cli.train_looks import TowerLooks
from saevlm_fast.cli.train_many import TABLES, evaluated_on, summarise
from saevlm_fast.config import SAESize, StreamSettings, TrainConfig
from saevlm_fast.errors import Interrupted, require
from saevlm_fast.training.memory import Written, training_disk

if TYPE_CHECKING:
    from pathlib import Path

    from saevlm_fast.cli.train_options import TrainArguments
    from saevlm_fast.training.many import Trained
    from saevlm_fast.training.process_group import MeshPeers

Sizes = tuple[dict[str, SAESize], dict[str, TrainConfig]]


def parts_of(options: "TrainArguments") -> "dict[str, TrainArguments]":
    """The options of a command that trains each SAE alone, by the name that it has here; one alone is called ""."""
    from saevlm_fast.training.one_pass import harvest_config

    members = options.members() if options.sweep else {"": options}
    places = harvest_config(options.part(StreamSettings), options.part(TrainConfig))
    several, found = len(places.stores) > 1, {}
    for (place, (point, tokens)), (name, member) in product(zip(places.store_names, places.stores), members.items()):
        whole = "/".join(filter(None, (place if several else "", name)))
        text = None if tokens is None else next(t for t in options.tokens if _name_of(t) == tokens.name)
        found[whole] = replace(
            member,
            layer=() if point.layer is None else (point.layer,),
            point=(point.point,),
            tokens=options.tokens[:1] if text is None else (text,),
            output=options.output / whole,
            keep_store=None,
        )
    return found


def _name_of(tokens: str) -> str:
    from saevlm_fast.towers.tokens import Tokens

    return Tokens.parse(tokens).name


def sizes_of(options: "TrainArguments") -> Sizes:
    """What is trained at every place, by name."""
    members = options.members() if options.sweep else {"": options}
    sizes = {name: member.part(SAESize) for name, member in members.items()}
    return sizes, {name: member.part(TrainConfig) for name, member in members.items()}


def check_outputs(options: "TrainArguments", parts: "dict[str, TrainArguments]") -> None:
    """ValueError: something is there, and nothing says that it may be replaced or gone on with."""
    from saevlm_fast.config import HarvestOptions
    from saevlm_fast.harvesting.stores import check_output
    from saevlm_fast.outputs import check_absent
    from saevlm_fast.training.checkpoints import RUN_FILE, RunDirectory

    alone = set(parts) == {""}
    require(
        alone or not (options.output / RUN_FILE).exists(),
        f"output: {options.output} holds a run of one SAE; name another directory for several",
    )
    used = [RunDirectory(part.output, part.checkpoint_every, part.resume, part.force).used() for part in parts.values()]
    if not any(used) and not options.resume:
        files = (SETTINGS_FILE,) if alone else (SETTINGS_FILE, *TABLES)
        check_absent([options.output / file for file in files], options.force)
    if options.keep_store is not None:
        inside = options.keep_store.absolute() == options.output.absolute()
        require(not inside, f"keep_store: {options.keep_store} is the output; name another directory")
        try:
            check_output(HarvestOptions(options.keep_store, resume=options.resume, force=options.force))
        except ValueError as error:
            raise type(error)(f"keep_store: {str(error).removeprefix('output: ')}") from None


def plan_one_pass(options: "TrainArguments") -> Plan:
    """What would be trained on what; the time from a forward of the first images, under torchrun of a rank's share."""
    from saevlm_fast.cli.harvest import seconds_an_image
    from saevlm_fast.config import RunOptions
    from saevlm_fast.files import human_bytes
    from saevlm_fast.harvesting.config import COMPUTE_DTYPES
    from saevlm_fast.images.open import open_images
    from saevlm_fast.runtime import resolve_device
    from saevlm_fast.towers.load import load_tower
    from saevlm_fast.training.memory import auxiliary_memory
    from saevlm_fast.training.one_pass import OnePass, harvest_config

    device, parts, n_ranks = resolve_device(options.device), parts_of(options), n_processes()
    check_writable(options.output)
    check_outputs(options, parts)
    sizes, recipes = sizes_of(options)
    chosen, config = options.part(StreamSettings), options.part(TrainConfig)
    source = open_images(str(options.images))
    tower = load_tower(str(options.model), device, on_message=tell)
    harvest = harvest_config(chosen, config)
    with tower.hooked(harvest.points, False, COMPUTE_DTYPES[harvest.dtype], harvest.dtype == "tf32") as run:
        given = chosen, options.part(RunOptions), recipes
        held: dict[str, Any] = {"part_of": lambda sae: part_of_a_rank(sae, options.data_parallel), "n_ranks": n_ranks}
        one_pass = OnePass(source, str(options.images), tower, run, harvest, *given, **held)
        free = free_memory(device)
        one_pass.add(sizes, device, lambda name, step, metrics: None)
        n = one_pass.stream.n_images
        looks = TowerLooks(options, tower, source)
        seconds = seconds_an_image(source, tower, run, min(n, chosen.image_batch))
    rows = {place.name: place.rows for place in one_pass.places}
    images = {place.name: -(-config.steps * place.batch_size * n // place.rows.n_rows) for place in one_pass.places}
    saes = [
        (m.state.stepper.sae.config, m.state.config, place.rows.n_rows)
        for place in one_pass.places
        for m in place.members
    ]
    timed = [(part_of_a_rank(sae, options.data_parallel), recipe, n_rows) for sae, recipe, n_rows in saes]
    keep = options.keep_store
    of_dead = sum(auxiliary_memory(*each, device, n_ranks) for each in timed)
    kept = None if keep is None else (keep, sum(each.n_rows * each.row_bytes for each in rows.values()))
    needed = one_pass.needed | ({"dead latents, at most": of_dead} if of_dead else {})
    passing = max(*images.values(), 0 if keep is None else n)  # the first epoch is kept whole
    figures = {
        "images": n,
        "steps": config.steps,
        "places": [f"{name}: {each.n_rows:,} x {each.d:,} an epoch" for name, each in rows.items()],
        "images_through_the_tower": passing,
        "saes": [f"{name or options.output}" for name in parts],
        "scores": looks.note,
        "takes": [f"{name} {human_bytes(size)}" for name, size in needed.items()],
        **memory_figures(device, sum(needed.values()), free),
        **disk_figures(
            options.output, training_disk(*(sae for sae, *_ in saes), written=Written.by(device, n_ranks)), kept
        ),
        **({} if seconds is None else {"all_images_seconds": seconds * passing / n_ranks}),
        **time_of_all(timed, device),
    }
    return Plan(_sentence(options, n, config), figures)


def _sentence(options: "TrainArguments", n_images: int, config: TrainConfig) -> str:
    n = len(parts_of(options))
    kept = "no store" if options.keep_store is None else f"the first epoch's rows are kept in {options.keep_store}"
    return (
        f"{n} {'SAE' if n == 1 else 'SAEs'} on {options.model}, {n_images:,} images of {options.images} in one pass; "
        f"{config.steps:,} steps of {config.batch_size:,}, {kept}"
    )


def run_one_pass(options: "TrainArguments", peers: "MeshPeers | None" = None) -> dict[str, Any] | None:
    """Trains them, by ranks if there are peers. The output is locked."""
    from saevlm_fast.config import RunOptions
    from saevlm_fast.images.open import open_images
    from saevlm_fast.runtime import resolve_device
    from saevlm_fast.towers.load import load_tower
    from saevlm_fast.training.many import nothing_more

    parts, first = parts_of(options), leads(peers)
    if first:
        check_outputs(options, parts)
    device = resolve_device(device_of_rank(options.device, peers))
    source = open_images(str(options.images))
    sizes, recipes = sizes_of(options)
    config = options.part(TrainConfig)
    tower = first_rank_first(peers, lambda: load_tower(str(options.model), device, on_message=tell))
    looks = TowerLooks(options, tower, source) if first else None
    records = [Record("train", part, part.output) for part in parts.values()] if first else []
    if first and set(parts) != {""}:
        records.append(Record("train", options, options.output))
    bar = TrainBar(config.steps)

    def begin() -> None:
        ranks = "" if peers is None else f"{peers.world} ranks: "
        say(ranks + _sentence(options, min(len(source), options.limit or len(source)), config))
        bar.__enter__()

    with closing(_Steps(bar, records, next(iter(parts)), options.resume)) as told:
        try:
            trained = _trained(
                peers,
                tower,
                source,
                sizes,
                recipes,
                ranks_options(options.part(RunOptions), peers),
                options.part(StreamSettings),
                images_path=str(options.images),
                on_begin=begin,
                on_log=told.on_log,
                on_step=told.on_step,
                on_evaluated=bar.on_evaluated,
                on_note=tell,
                on_finished=looks or nothing_more,
            )
        except Interrupted as error:
            raise interrupted_run(error, options.output, records, options.force, peers is not None) from None
    for record in records:
        record.write()
    if looks is None:
        return None
    return _told(options, trained, looks.note)


def _trained(peers: "MeshPeers | None", *what: Any, **told: Any) -> "dict[str, Trained]":
    """The training itself, by one process or by ranks."""
    if peers is None:
        from saevlm_fast.training.one_pass import train_from_images

        return train_from_images(*what, **told)
    from saevlm_fast.training.sharded_one_pass import train_from_images_shared

    return train_from_images_shared(peers, *what, **told)


def _told(options: "TrainArguments", trained: "dict[str, Trained]", note: str) -> dict[str, Any]:
    """What people read of the finished SAEs, and --json prints."""
    kind = "validation" if options.validation_images else "last training"
    if set(trained) != {""}:
        return summarise(options.output, trained, kind, note)
    metrics = dict(trained[""].metrics)
    rows = metrics.pop("rows")
    say(evaluated_on(rows, kind, None))
    print_table(("measure", "value"), ((name, metric_text(value)) for name, value in metrics.items()))
    say(note, f"wrote {options.output}")
    return {
        "output": str(options.output),
        "steps": options.steps,
        "evaluation": {"rows": rows, "of": kind, **metrics},
        "note": note,
    }


class _Steps:
    """The bar, and the settings beside every SAE as soon as its run has begun: places begin one after another, and
    until then what lies there may be a run that is to be replaced."""

    def __init__(self, bar: TrainBar, records: list[Record], first: str, resumes: bool):
        self.bar, self.first, self.resumes = bar, first, resumes
        self.before = [(record, _run_in(record.result)) for record in records]

    def on_log(self, name: str, step: int, metrics: dict[str, float]) -> None:
        """Called after every logged step of every SAE; the bar speaks of the first."""
        self.last = (name, metrics)
        if name == self.first:
            self.bar.text = f"loss {metrics['losses/overall_loss']:.4f}  ev {metrics['metrics/explained_variance']:.3f}"

    def on_step(self, done: int, total: int) -> None:
        """Called after every step of every place."""
        for record, before in self.before:
            if not record.written and self._has_begun(record.result, before):
                record.write()
        self.bar.update(done, total)

    def _has_begun(self, output: "Path", before: tuple[int, int] | None) -> bool:
        now = _run_in(output)
        of_all = output.is_dir() and len(self.before) > 1 and output == self.before[-1][0].result
        return of_all or (now is not None and (self.resumes or now != before))

    def close(self) -> None:
        """When all steps are done, or none will be."""
        self.bar.close()


def _run_in(output: "Path") -> tuple[int, int] | None:
    """By which the run in a directory is told from one that it replaces, or that replaces it."""
    from saevlm_fast.outputs import workplace
    from saevlm_fast.training.checkpoints import RUN_FILE

    try:
        found = (workplace(output) / RUN_FILE).stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns
