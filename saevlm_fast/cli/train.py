"""saevlm-fast train: activations to a sparse autoencoder."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from saevlm_fast.cli.options import Plan, WorkOptions, command
from saevlm_fast.cli.planning import (
    check_writable,
    disk_figures,
    memory_figures,
    time_figures,
    training_disk,
    training_memory,
)
from saevlm_fast.cli.record import Record
from saevlm_fast.cli.scenes import new_run_directory, scenes
from saevlm_fast.cli.terminal import TrainBar, print_table, say
from saevlm_fast.config import EXPANSION, RunOptions, SAEConfig, SAESize, TrainConfig
from saevlm_fast.errors import require
from saevlm_fast.settings import same_as, setting

if TYPE_CHECKING:
    from saevlm_fast.data.rows import Activations


@dataclass(frozen=True, kw_only=True)
class TrainArguments(SAESize, TrainConfig, RunOptions, WorkOptions):
    """Options of `saevlm-fast train`."""

    title = "Data"

    activations: Path | None = setting(
        None, help="Activation store, or a matrix [N, d]: .npy, .safetensors, .pt.", shown="the box's scenes"
    )
    validation: Path | None = setting(
        None,
        help="Held-out activations for the final evaluation.",
        shown="none; on the box its test scenes",
    )
    output: Path = same_as(RunOptions, "output", shown="runs/DATE-TIME")
    expansion: float | None = same_as(SAESize, "expansion", shown="8; on the box 4")
    k: int = same_as(SAESize, "k", shown="20; on the box 10")
    steps: int = same_as(TrainConfig, "steps", shown="110,000, as the paper; on the box 1,200")
    batch_size: int = same_as(TrainConfig, "batch_size", shown="4096; on the box 512")
    dead_after: int = same_as(TrainConfig, "dead_after", shown="10,000,000; on the box 100,000")

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Self:
        """Without activations, what was not given is as the box's scenes need it."""
        require("output" in given or not given.get("resume"), "output: --resume needs the directory of the run")
        defaults: dict[str, Any] = {"output": new_run_directory(), "expansion": EXPANSION}
        if "activations" not in given:
            from saevlm_fast.demo.scene_stores import RECIPE

            defaults |= RECIPE
        if "d_sae" in given:
            del defaults["expansion"]
        return cls(**defaults | dict(given))


@dataclass(frozen=True)
class Inputs:
    """What a run reads, opened, and the SAE that fits it."""

    data: "Activations"
    held_out: "Activations | None"
    sae: SAEConfig
    config: TrainConfig

    @property
    def sentence(self) -> str:
        """What is trained on what."""
        sae, config, data = self.sae, self.config, self.data
        return (
            f"{sae.architecture} SAE {data.d} -> {sae.d_sae}, k = {sae.k}, on {data.n_rows:,} rows; {config.steps:,} "
            f"steps of {min(config.batch_size, data.n_rows):,}, lr {config.peak_lr(sae.d_sae):.3g}, {data.path}"
        )


def open_inputs(options: TrainArguments) -> Inputs:
    """Opens the activations, or harvests the box's scenes."""
    from saevlm_fast.data.rows import open_activations

    activations, validation = options.activations, options.validation
    if activations is None:
        activations = scenes("train", device=options.device).activations
        validation = validation or scenes("test", device=options.device).activations
    data = open_activations(activations)
    held_out = None if validation is None else open_activations(validation)
    return Inputs(data, held_out, options.part(SAESize).config(data.d), options.part(TrainConfig))


def plan(options: TrainArguments) -> Plan:
    """What would be trained; the time from two steps on random rows."""
    from saevlm_fast.runtime import resolve_device
    from saevlm_fast.training.checkpoints import RunDirectory, latest_checkpoint

    device = resolve_device(options.device)
    check_writable(options.output)
    RunDirectory(options.output, options.checkpoint_every, options.resume, options.force).used()
    inputs = open_inputs(options)
    sae, config, n_rows = inputs.sae, inputs.config, inputs.data.n_rows
    batch_size = min(config.batch_size, n_rows)
    checkpoint = latest_checkpoint(options.output) if options.resume else None
    figures = {
        "rows": n_rows,
        "steps": config.steps,
        "epochs": config.steps * batch_size / n_rows,
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "resumes_at": checkpoint.name if checkpoint else None,
        **memory_figures(device, training_memory(sae, batch_size)),
        **disk_figures(options.output, training_disk(sae)),
        **time_figures(sae, config, n_rows, device),
    }
    return Plan(inputs.sentence, figures)


@command("train", plan=plan)
def train(options: TrainArguments) -> dict[str, Any]:
    """Train a sparse autoencoder on activations, by the recipe of arXiv 2504.02821.

    Without --activations: on scenes of the box, which are harvested with tiny-clip and kept in a cache.
    """
    from saevlm_fast.training.checkpoints import latest_checkpoint
    from saevlm_fast.training.run import train as run_training

    inputs = open_inputs(options)
    sae, config, output = inputs.sae, inputs.config, options.output
    say(inputs.sentence)
    if options.resume:
        checkpoint = latest_checkpoint(output)
        what = f"newest checkpoint {checkpoint.name}" if checkpoint else "no checkpoint yet: starting at step 0"
        say(f"resume: {output}: {what}")
    record = Record(
        "train",
        options,
        output,
        rows=inputs.data.n_rows,
        d_in=sae.d_in,
        d_sae=sae.d_sae,
        lr=config.peak_lr(sae.d_sae),
        warmup=config.n_warmup,
    )
    with TrainBar(config.steps) as bar:

        def on_step(step: int) -> None:
            record.write()
            bar.on_step(step)

        _, metrics = run_training(
            inputs.data,
            sae,
            config,
            options.part(RunOptions),
            validation=inputs.held_out,
            on_log=bar.on_log,
            on_step=on_step,
        )
    record.write()
    rows, kind = metrics.pop("rows"), "validation" if inputs.held_out else "training"
    say(f"evaluation on all {rows:,} {kind} rows")
    print_table(("measure", "value"), ((name, f"{value:.4f}") for name, value in metrics.items()))
    say(f"wrote {output}")
    return {
        "output": str(output),
        "architecture": sae.architecture,
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "k": sae.k,
        "steps": config.steps,
        "evaluation": {"rows": rows, "of": kind, **metrics},
    }
