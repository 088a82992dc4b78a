"""saevlm-fast train: activations to a sparse autoencoder."""

import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

from saevlm_fast.cli.options import Plan, WorkOptions, command
from saevlm_fast.cli.planning import (
    check_writable,
    disk_figures,
    memory_figures,
    replaced_figures,
    time_figures,
    training_disk,
    training_memory,
)
from saevlm_fast.cli.record import SETTINGS_FILE, Record
from saevlm_fast.cli.scenes import new_run_directory, scene_widths, scenes
from saevlm_fast.cli.sweep import expanded, names_of, one_of
from saevlm_fast.cli.terminal import TrainBar, print_table, say, tell, warn
from saevlm_fast.cli.train_many import plan_many, runs_of, train_grid
from saevlm_fast.config import EXPANSION, SELECTING, K, RunOptions, SAEConfig, SAESize, TrainConfig
from saevlm_fast.errors import Interrupted, require
from saevlm_fast.settings import same_as, setting

if TYPE_CHECKING:
    from saevlm_fast.data.rows import Activations

Planned = TypeVar("Planned")


@dataclass(frozen=True, kw_only=True)
class TrainArguments(SAESize, TrainConfig, RunOptions, WorkOptions):
    """Options of `saevlm-fast train`."""

    title = "Data"

    activations: Path | None = setting(
        None,
        help="Activation store, or a matrix [N, d]: .npy, .safetensors, .pt.",
        shown="the box's scenes",
        remote=True,
    )
    validation: Path | None = setting(
        None,
        help="Held-out activations for the final evaluation.",
        shown="none; on the box its test scenes",
        remote=True,
    )
    embeddings: Path | None = setting(
        None, help="With several SAEs: embeddings of the images that they are evaluated on, for the summary's MS."
    )
    sweep: tuple[Any, ...] = setting(
        (),
        help="[[sweep]] tables of settings, each an SAE; all see the same batches in one pass, as those of lists do.",
        on_command_line=False,
        tables=True,
    )
    mono_embeddings: Path | None = setting(
        None,
        help="Embeddings by which MonoLoss scores, row i of row i: a store or a matrix.",
        shown="the rows themselves",
    )
    output: Path = same_as(RunOptions, "output", shown="runs/DATE-TIME")
    expansion: float | None = same_as(SAESize, "expansion", shown="8; on the box 4")
    k: int | None = same_as(SAESize, "k", shown="20; on the box 10")
    steps: int = same_as(TrainConfig, "steps", shown="110,000, as the paper; on the box 1,200")
    batch_size: int = same_as(TrainConfig, "batch_size", shown="4096; on the box 512")
    dead_after: int = same_as(TrainConfig, "dead_after", shown="10,000,000; on the box 100,000")
    given: Mapping[str, Any] = field(default_factory=dict, compare=False)  # of several SAEs, once for all

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Self:
        """Without activations, what was not given is as the box's scenes need it. With several SAEs, the first."""
        base, tables = expanded(given)
        if tables:
            names_of(tables)  # no two in one directory
            alone = {name: value for name, value in base.items() if name != "embeddings"}
            first = cls.of(one_of(alone, tables[0]))
            given = base | {"output": first.output}
            return replace(first, sweep=tables, given=given, embeddings=base.get("embeddings"))
        require("embeddings" not in base, "embeddings: of several SAEs; of one, ms-score makes the score")
        require("output" in given or not given.get("resume"), "output: --resume needs the directory of the run")
        defaults: dict[str, Any] = {"output": new_run_directory(), "expansion": EXPANSION, "k": K}
        if "activations" not in given:
            from saevlm_fast.demo.scene_stores import RECIPE

            defaults |= RECIPE
        if given.get("architecture", SAESize.architecture) not in SELECTING:
            del defaults["k"]
        if "d_sae" in given:
            del defaults["expansion"]
        return cls(**defaults | dict(given))

    def members(self) -> dict[str, Self]:
        """The options of each of several SAEs, by name: those of a command that trains it alone."""
        base = {name: value for name, value in self.given.items() if name != "embeddings"}
        return {
            name: self.of(one_of(base, table) | {"output": self.output / name})
            for name, table in zip(names_of(self.sweep), self.sweep)
        }

    def said(self, name: str) -> Any:
        """For settings.toml: what [[sweep]] says is not said twice."""
        return self.given.get(name) if any(name in table for table in self.sweep) else super().said(name)


@dataclass(frozen=True)
class Run:
    """What is trained on what: the SAE that fits activations [n_rows, d]."""

    n_rows: int
    path: Path
    sae: SAEConfig
    config: TrainConfig

    @classmethod
    def of(cls, options: TrainArguments, n_rows: int, d: int, path: Path) -> "Run":
        """ValueError: the SAE's settings do not fit the width."""
        sae, config = options.part(SAESize).config(d), options.part(TrainConfig)
        config.check_fits(sae)
        return cls(n_rows, path, sae, config)

    @property
    def batch_size(self) -> int:
        """Rows of a step."""
        return min(self.config.batch_size, self.n_rows)

    @property
    def sentence(self) -> str:
        """For people."""
        sae, config = self.sae, self.config
        k = "" if sae.k is None else f", k = {sae.k}"
        control = "" if config.control is None else f"control {config.control}: "
        return (
            f"{control}{sae.architecture} SAE {sae.d_in} -> {sae.d_sae}{k}, on {self.n_rows:,} rows; "
            f"{config.n_steps:,} steps of {self.batch_size:,}, lr {config.peak_lr(sae.d_sae):.3g}, {self.path}"
        )


def open_data(options: TrainArguments) -> "tuple[Activations, Activations | None]":
    """The activations and those held out; the box's scenes are harvested, unless they are in the cache."""
    from saevlm_fast.data.rows import open_activations

    activations, validation = options.activations, options.validation
    if activations is None:
        activations = scenes("train", device=options.device).activations
        validation = validation or scenes("test", device=options.device).activations
    return open_activations(activations), None if validation is None else open_activations(validation)


def _planned(options: TrainArguments, make: Callable[[TrainArguments, int, int, Path], Planned]) -> Planned:
    """Opens what is there; the box's scenes need not be harvested to know their number. make: of rows and width."""
    if options.activations is None:
        from saevlm_fast.demo.scene_stores import N_SCENES

        return make(options, N_SCENES["train"], scene_widths()[0], Path("the box's scenes"))
    data, held_out = open_data(options)
    require(
        held_out is None or held_out.d == data.d,
        f"validation: width {held_out.d if held_out else 0} differs from the activations' {data.d}",
    )
    return make(options, data.n_rows, data.d, data.path)


def plan(options: TrainArguments) -> Plan:
    """What would be trained; the time from two steps on random rows."""
    from saevlm_fast.outputs import workplace
    from saevlm_fast.runtime import resolve_device
    from saevlm_fast.training.checkpoints import latest_checkpoint
    from saevlm_fast.training.watch import Watch

    if options.sweep:
        return plan_many(options, _planned(options, runs_of))
    device = resolve_device(options.device)
    check_writable(options.output)
    Watch(options.log_to)  # what is not installed is refused
    _check_output(options)
    run = _planned(options, Run.of)
    sae, config, n_rows = run.sae, run.config, run.n_rows
    checkpoint = latest_checkpoint(workplace(options.output)) if options.resume else None
    figures = {
        "rows": n_rows,
        "steps": config.n_steps,
        "epochs": config.n_steps * run.batch_size / n_rows,
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "resumes_at": checkpoint.name if checkpoint else None,
        **memory_figures(device, training_memory(sae, run.batch_size, config.accumulate, config.control)),
        **disk_figures(options.output, training_disk(sae)),
        **replaced_figures(options.output, options.force),
        **time_figures(sae, config, n_rows, device),
    }
    return Plan(run.sentence, figures)


@command("train", plan=plan)
def train(options: TrainArguments) -> dict[str, Any]:
    """Train a sparse autoencoder on activations, by the recipe of arXiv 2504.02821.

    Without --activations: on scenes of the box, which are harvested with tiny-clip and kept in a cache. Lists of values
    (--k 10,20 --expansion 4,16) train an SAE of every combination in one pass over the data.
    """
    from saevlm_fast.outputs import output_lock, workplace

    with output_lock(options.output, directory=True):
        if options.sweep:
            data, held_out = open_data(options)
            return train_grid(options, data, held_out, runs_of(options, data.n_rows, data.d, data.path))
        _check_output(options)
        try:
            return _train(options)
        except Interrupted as error:
            settings = workplace(options.output) / SETTINGS_FILE
            begun = not options.force or workplace(options.output) != options.output
            if not settings.is_file() or not begun:  # what is there may be of the run that was to be replaced
                raise
            what = str(error).partition(";")[0]
            again = f"saevlm-fast train --config {shlex.quote(str(settings))} --resume"
            raise Interrupted(f"{what}; continue with: {again}") from None


def _check_output(options: TrainArguments) -> None:
    """ValueError: something is there, and nothing says that it may be replaced or gone on with."""
    from saevlm_fast.outputs import check_absent
    from saevlm_fast.training.checkpoints import RunDirectory

    if not RunDirectory(options.output, options.checkpoint_every, options.resume, options.force).used():
        check_absent([options.output / SETTINGS_FILE], options.force)


def _train(options: TrainArguments) -> dict[str, Any]:
    from saevlm_fast.data.rows import open_activations
    from saevlm_fast.look.run_picture import run_picture
    from saevlm_fast.outputs import workplace
    from saevlm_fast.runtime import resolve_device
    from saevlm_fast.training.checkpoints import latest_checkpoint
    from saevlm_fast.training.run import train as run_training

    data, held_out = open_data(options)
    run, output = Run.of(options, data.n_rows, data.d, data.path), options.output
    sae, config = run.sae, run.config
    resolve_device(options.device)  # refused before anything is said
    say(run.sentence)
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
            record.write()
            bar.on_step(step)

        _, metrics = run_training(
            data,
            sae,
            config,
            options.part(RunOptions),
            validation=held_out,
            mono_embeddings=None if options.mono_embeddings is None else open_activations(options.mono_embeddings),
            on_log=bar.on_log,
            on_step=on_step,
            on_note=tell,
            on_picture=lambda sae: run_picture(held_out or data, sae, f"{output}, step {config.steps:,}"),
        )
    record.write()
    _write_card(output)
    rows, kind = metrics.pop("rows"), "validation" if held_out else "training"
    say(f"evaluation on all {rows:,} {kind} rows")
    print_table(("measure", "value"), ((name, f"{value:.4f}") for name, value in metrics.items()))
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


def _write_card(output: Path) -> None:
    """README.md beside the SAE. What speaks against it must not cost a finished run."""
    from saevlm_fast.publishing.card import write_card

    try:
        if not write_card(output):
            tell(f"{output / 'README.md'} was written or changed by hand: it stays as it is")
    except ValueError as error:
        warn(f"{error}; no model card was written")
