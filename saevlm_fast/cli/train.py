"""saevlm-fast train: activations to a sparse autoencoder."""

import shlex
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from saevlm_fast.cli.one_pass import plan_one_pass, run_one_pass
from saevlm_fast.cli.options import Plan, command
from saevlm_fast.cli.planning import (
    check_writable,
    disk_figures,
    memory_figures,
    replaced_figures,
    time_figures,
)
from saevlm_fast.cli.ranks import joined_ranks, leads, n_processes, part_of_a_rank, ranks_options
from saevlm_fast.cli.record import SETTINGS_FILE, Record
from saevlm_fast.cli.same_call import check_same_call
from saevlm_fast.cli.scenes import scene_widths, scenes
from saevlm_fast.cli.terminal import TrainBar, metric_text, print_table, say, tell, warn
from saevlm_fast.cli.train_many import evaluated_on, plan_many, runs_of, train_grid
from saevlm_fast.cli.train_options import Run, TrainArguments
from saevlm_fast.config import RunOptions
from saevlm_fast.errors import Interrupted, require
from saevlm_fast.training.memory import Written, training_disk

if TYPE_CHECKING:
    from saevlm_fast.data.rows import Activations
    from saevlm_fast.training.process_group import MeshPeers

Planned = TypeVar("Planned")


def open_data(options: TrainArguments) -> "tuple[Activations, Activations | None]":
    """The activations and those held out; the box's scenes are harvested, unless they are in the cache.

    ValueError: of the activations there is nothing to learn.
    """
    from saevlm_fast.data.rows import open_activations
    from saevlm_fast.training.scale import check_rows_differ

    activations, validation = options.activations, options.validation
    if activations is None:
        activations = scenes("train", device=options.device).activations
        validation = validation or scenes("test", device=options.device).activations
    data = open_activations(activations)
    check_rows_differ(data)
    return data, None if validation is None else open_activations(validation)


def _planned(options: TrainArguments, make: Callable[[TrainArguments, int, int, Path], Planned]) -> Planned:
    """Opens what is there; the box's scenes need not be harvested to know their number. make: of rows and width."""
    if options.activations is None:
        from saevlm_fast.demo.scene_stores import N_SCENES

        return make(options, N_SCENES["train"], scene_widths()[0], Path("the box's scenes"))
    data, held_out = open_data(options)
    if held_out is not None:
        from saevlm_fast.training.run import check_held_out

        check_held_out(data, held_out)
    return make(options, data.n_rows, data.d, data.path)


def plan(options: TrainArguments) -> Plan:
    """What would be trained; the time from two steps on random rows, under torchrun of a rank's part alone."""
    from saevlm_fast.outputs import workplace
    from saevlm_fast.runtime import resolve_device
    from saevlm_fast.training.checkpoints import latest_checkpoint
    from saevlm_fast.training.memory import most_memory_of
    from saevlm_fast.training.watch import Watch

    Watch(options.log_to)  # what is not installed is refused
    if options.model is not None:
        return plan_one_pass(options)
    if options.sweep:
        return plan_many(options, _planned(options, runs_of))
    device = resolve_device(options.device)
    check_writable(options.output)
    _check_output(options)
    run = _planned(options, Run.of)
    sae, config, n_rows = run.sae, run.config, run.n_rows
    checkpoint = latest_checkpoint(workplace(options.output)) if options.resume else None
    part = part_of_a_rank(sae, options.data_parallel)
    figures = {
        "rows": n_rows,
        "steps": config.n_steps,
        "epochs": config.n_steps * run.batch_size / n_rows,
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "resumes_at": checkpoint.name if checkpoint else None,
        **memory_figures(device, most_memory_of(part, config, n_rows, device, n_processes())),
        **disk_figures(options.output, training_disk(sae, written=Written.by(device, n_processes()))),
        **replaced_figures(options.output, options.force),
        **time_figures(part, config, n_rows, device),
    }
    return Plan(run.sentence, figures)


@command("train", plan=plan, shared=True)
def train(options: TrainArguments) -> dict[str, Any] | None:
    """Train a sparse autoencoder on activations, by the recipe of arXiv 2504.02821. Under torchrun, ranks share it.

    Without --activations: on scenes of the box, which are harvested with tiny-clip and kept in a cache. Lists of values
    (--k 10,20 --expansion 4,16) train an SAE of every combination in one pass over the data. With --model and --images
    that pass is over the images, at one or several layers, and no activations are stored.
    """
    from saevlm_fast.outputs import output_lock, workplace
    from saevlm_fast.training.checkpoints import RUN_FILE
    from saevlm_fast.training.watch import Watch

    ranks = options.device, options.collective_timeout, options.data_parallel
    with joined_ranks(*ranks) as peers, ExitStack() as locks:
        check_same_call(peers, options)
        if peers is not None:
            options = replace(options, output=peers.share(options.output))  # the default has the second in it
        if leads(peers):
            locks.enter_context(output_lock(options.output, directory=True))
        Watch(options.log_to)  # what is not installed is refused before anything is opened
        if options.model is not None:
            return run_one_pass(options, peers)
        if options.sweep:
            data, held_out = open_data(options)
            return train_grid(options, data, held_out, runs_of(options, data.n_rows, data.d, data.path), peers)
        if leads(peers):
            _check_output(options)
        try:
            return _train(options, peers)
        except Interrupted as error:
            settings = workplace(options.output) / SETTINGS_FILE
            begun = not options.force or workplace(options.output) != options.output
            if not begun or not settings.with_name(RUN_FILE).is_file():
                raise  # what is there may be of the run that was to be replaced
            what = str(error).partition(";")[0]
            if not settings.is_file():  # no step was taken
                raise Interrupted(f"{what}; continue with the same command and --resume") from None
            program = "saevlm-fast" if peers is None else "torchrun ... -m saevlm_fast.cli"
            again = f"{program} train --config {shlex.quote(str(settings))} --resume"
            raise Interrupted(f"{what}; continue with: {again}") from None


def _check_output(options: TrainArguments) -> None:
    """ValueError: something is there, and nothing says that it may be replaced or gone on with."""
    from saevlm_fast.outputs import check_absent
    from saevlm_fast.training.checkpoints import RUN_FILE, RunDirectory

    if RunDirectory(options.output, options.checkpoint_every, options.resume, options.force).used():
        return
    output, settings = options.output, options.output / SETTINGS_FILE
    several = (
        [path for depth in ("*", "*/*") for path in output.glob(f"{depth}/{RUN_FILE}")] if settings.is_file() else []
    )
    require(
        options.force or not several,
        f"output: {output} holds {len(several)} runs of one pass; they go on with: saevlm-fast train --config "
        f"{shlex.quote(str(settings))} --resume",
    )
    check_absent([settings], options.force)


def _train(options: TrainArguments, peers: "MeshPeers | None") -> dict[str, Any] | None:
    from saevlm_fast.data.rows import open_activations
    from saevlm_fast.look.run_picture import run_picture
    from saevlm_fast.outputs import workplace
    from saevlm_fast.runtime import resolve_device
    from saevlm_fast.training.checkpoints import latest_checkpoint

    data, held_out = open_data(options)
    run, output = Run.of(options, data.n_rows, data.d, data.path), options.output
    sae, config = run.sae, run.config
    where = ranks_options(options.part(RunOptions), peers)
    resolve_device(where.device)  # refused before anything is said
    say(run.sentence if peers is None else f"{_told_of(peers)}: {run.sentence}")
    if options.resume:
        checkpoint = latest_checkpoint(workplace(output))
        what = f"newest checkpoint {checkpoint.name}" if checkpoint else "no checkpoint yet: starting at step 0"
        say(f"resume: {output}: {what}")
        if checkpoint and checkpoint.name == f"step_{config.n_steps:08d}":
            say("all steps are done: the SAE is evaluated again; for another run give another output, or --force")
    record = Record(
        "train",
        options,
        output,
        rows=run.n_rows,
        d_in=sae.d_in,
        d_sae=sae.d_sae,
        lr=config.peak_lr(sae.d_sae),
        warmup=config.n_warmup,
    )
    with TrainBar(config.n_steps) as bar:

        def on_step(step: int) -> None:
            if leads(peers):
                record.write()
            bar.on_step(step)

        told: dict[str, Any] = {"validation": held_out, "on_log": bar.on_log, "on_step": on_step, "on_note": tell}
        told["on_evaluated"] = bar.on_evaluated
        told["on_picture"] = lambda sae: run_picture(held_out or data, sae, f"{output}, step {config.steps:,}")
        if options.mono_embeddings is not None:
            told["mono_embeddings"] = open_activations(options.mono_embeddings)
        metrics = _run(peers, data, sae, config, where, **told)
    if not leads(peers):
        return None
    record.write()
    _write_card(output)
    rows, kind = metrics.pop("rows"), "validation" if held_out else "training"
    say(evaluated_on(rows, kind, (held_out or data).n_rows))
    print_table(("measure", "value"), ((name, metric_text(value)) for name, value in metrics.items()))
    say(f"wrote {output}")
    return {
        "output": str(output),
        "architecture": sae.architecture,
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "k": sae.k,
        "steps": config.n_steps,
        "control": config.control,
        "evaluation": {"rows": rows, "of": kind, **metrics},
    }


def _told_of(peers: "MeshPeers") -> str:
    n_replicas = peers.ranks.rows.world
    return f"{peers.world} ranks" + (f", {n_replicas} replicas" if n_replicas > 1 else "")


def _run(peers: "MeshPeers | None", *what: Any, **told: Any) -> dict[str, Any]:
    """The training itself, by one process or by ranks."""
    if peers is None:
        from saevlm_fast.training.run import train as run_training

        return run_training(*what, **told)[1]
    from saevlm_fast.training.sharded_run import train_shared

    return train_shared(peers, *what, **told)


def _write_card(output: Path) -> None:
    """README.md beside the SAE. What speaks against it must not cost a finished run."""
    from saevlm_fast.publishing.card import write_card

    try:
        if not write_card(output):
            tell(f"{output / 'README.md'} was written or changed by hand: it stays as it is")
    except ValueError as error:
        warn(f"{error}; no model card was written")
