"""saevlm-fast steerability: which latents, and which neurons, change what a CLIP says of images."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saevlm_fast.cli.options import Plan, WorkOptions, command
from saevlm_fast.cli.planning import check_writable, disk_figures, free_memory, memory_figures
from saevlm_fast.cli.record import Record, settings_path
from saevlm_fast.cli.terminal import Bar, print_wide_table, say, tell, warn
from saevlm_fast.config import DEVICE_HELP, SteerabilityConfig
from saevlm_fast.errors import goes_on, renamed, require
from saevlm_fast.formats.places import SAE_HELP
from saevlm_fast.look.chosen import check_latents
from saevlm_fast.settings import paths, same_as, setting

if TYPE_CHECKING:
    from torch import Tensor

    from saevlm_fast.clip_steering.run import Steerable
    from saevlm_fast.clip_steering.stream import Vocabulary
    from saevlm_fast.clip_steering.units import Units
    from saevlm_fast.images.sources import ImageSource
    from saevlm_fast.sae import SparseAutoencoder
    from saevlm_fast.towers.tower import Tower

_ROW_BYTES = 160  # of the table
_SHOWN = 8


def _not_the_best(name: str, text: str) -> str:
    require(not text.startswith("top:"), f"{name}: {text!r}: no order yet; --screen N takes the most promising")
    return check_latents(name, text)


@dataclass(frozen=True, kw_only=True)
class SteerabilityArguments(WorkOptions):
    """Options of `saevlm-fast steerability`."""

    title = "Model and SAE"
    model: str = setting(help="Tower with a text side, as of harvest.", place="model")
    sae: tuple[Path, ...] = setting(
        help=f"{SAE_HELP} Several of one layer, as of other seeds, separated by commas.", parse=paths
    )
    layer: int = setting(help="Block of the tower, from 0, whose output the SAE is of.", at_least=0)
    images: str = setting(help="Images, as of harvest.", place="images")
    text_model: str | None = setting(None, help="Text side, as of name.", shown="the model's own", place="model")
    words: Path | None = setting(None, help="Vocabulary, one word a line.", shown="1,479 concrete words, built in")
    template: str = setting("a photo of {}", help="What the text side is told of a word.")
    output: Path = setting(help="Table of latents: FILE.parquet, FILE.csv or FILE.json; neurons beside it.")
    latents: str = setting(":", help="0:100, or 3,17,40.", shown="all", parse=_not_the_best)
    neurons: bool = setting(True, help="Ask about the neurons of the residual stream as well.")
    alpha: float = same_as(SteerabilityConfig, "alpha")
    tokens: str = same_as(SteerabilityConfig, "tokens")
    ask: int = same_as(SteerabilityConfig, "ask")
    n_reference: int = same_as(SteerabilityConfig, "n_reference")
    controls: int = same_as(SteerabilityConfig, "controls")
    screen: int | None = same_as(SteerabilityConfig, "screen")
    seed: int = same_as(SteerabilityConfig, "seed")
    batch_size: int = setting(256, help="Changed images of a forward.", at_least=1)
    force: bool = setting(False, help="Replace --output once the new tables are whole.", recorded=False)
    device: str = setting("auto", help=DEVICE_HELP)

    @property
    def neurons_output(self) -> Path:
        """Beside the table of latents."""
        return self.output.with_name(f"{self.output.stem}.neurons{self.output.suffix}")

    @property
    def files(self) -> list[Path]:
        """What must not be there without --force; the last is written last."""
        return [self.output, *([self.neurons_output] if self.neurons else []), settings_path(self.output)]


@dataclass(frozen=True)
class Inputs:
    """What is opened: tower, SAEs, images, words."""

    tower: "Tower"
    saes: "list[SparseAutoencoder]"
    source: "ImageSource"
    vocabulary: "Vocabulary"

    @property
    def made_of(self) -> dict[str, Any]:
        """What finished blocks follow from, beside the settings and the units."""
        return {
            "tower": self.tower.description(),
            "images": self.source.fingerprint(),
            "words": self.vocabulary.words,
            "texts": self.vocabulary.texts_CE.double().sum(0).tolist(),
            "logit_scale": self.vocabulary.logit_scale,
        }


def check(options: SteerabilityArguments) -> None:
    """ValueError: the output may not be written, or is there and whole."""
    from saevlm_fast.clip_steering.run import progress_of
    from saevlm_fast.outputs import check_several_absent
    from saevlm_fast.scoring.tables import check_scores_path

    check_writable(options.output)
    check_scores_path(options.output)
    check_several_absent(options.files, progress_of(options.output), options.force)


def open_inputs(options: SteerabilityArguments) -> Inputs:
    """Everything that is read. ValueError: a model without a text side, an SAE of another width or layer."""
    from saevlm_fast.clip_steering.stream import Vocabulary
    from saevlm_fast.images.open import open_images
    from saevlm_fast.look.names import known_words, vocabulary
    from saevlm_fast.provenance import check_sae_of
    from saevlm_fast.runtime import resolve_device
    from saevlm_fast.sae import SparseAutoencoder
    from saevlm_fast.towers.load import load_tower
    from saevlm_fast.towers.text import load_text_encoder

    device = resolve_device(options.device)
    words = vocabulary(options.words, options.template)
    source = open_images(options.images)
    saes = [SparseAutoencoder.from_pretrained(path, device=device) for path in options.sae]
    for path, sae in zip(options.sae, saes):
        check_sae_of(sae, options.layer, name=str(path))  # before a model is loaded
    with renamed("model" if options.text_model is None else "text_model", "text_model"):
        encoder = load_text_encoder(options.text_model or options.model, device, on_message=tell)
        unscaled = f"{encoder.spec} has no logit scale in its file, so that its cosines are no probabilities"
        require(encoder.logit_scale is not None, unscaled)
    assert encoder.logit_scale is not None
    tower = load_tower(options.model, device, on_message=tell)
    for path, sae in zip(options.sae, saes):
        require(
            tower.anatomy.width in (None, sae.config.d_in),
            f"sae: d_in of {path} is {sae.config.d_in}, but the blocks of {options.model} have width "
            f"{tower.anatomy.width}",
        )
        if (doubt := check_sae_of(sae, options.layer, options.tokens, tower=tower, name=str(path))) is not None:
            warn(f"sae: {doubt}; what it makes of {options.tokens} tokens may mean little")
    words, n_unknown = known_words(words, encoder)
    if n_unknown:
        tell(f"words: {n_unknown:,} left out that {encoder.spec} does not know; {len(words.words):,} are left")
    with renamed("words", "texts"):
        texts_CE = encoder.embed(words.texts)
    return Inputs(tower, saes, source, Vocabulary(tuple(words.words), texts_CE, encoder.logit_scale))


def _kinds(options: SteerabilityArguments, inputs: Inputs) -> "list[tuple[Units, Tensor]]":
    """Kinds of units, the latents of every SAE first, and which ones are asked about."""
    import torch

    from saevlm_fast.clip_steering.units import Latents, Neurons
    from saevlm_fast.look.chosen import chosen_latents

    kinds: list[tuple[Units, Tensor]] = []
    for sae in inputs.saes:
        chosen = torch.tensor(chosen_latents(options.latents, torch.zeros(sae.config.d_sae)))
        kinds.append((Latents(sae), chosen))
    if options.neurons:
        width = inputs.saes[0].config.d_in
        kinds.append((Neurons(width), torch.arange(width)))
    return kinds


def _too_few(units: int, controls: int) -> str | None:
    """What is lost where there are fewer random directions than tell who is steerable."""
    from saevlm_fast.clip_steering.steerability import ENOUGH

    if not 0 < units * controls < ENOUGH:
        return None
    return (
        f"{units} x {controls} random directions are too few to call one steerable, which takes {ENOUGH}: "
        f"--controls {-(-ENOUGH // units)}"
    )


def plan(options: SteerabilityArguments) -> Plan:
    """What would be asked; the time from one block of units."""
    import time

    from saevlm_fast.clip_steering.run import Asking
    from saevlm_fast.clip_steering.steerability import Steering
    from saevlm_fast.clip_steering.stream import opened_stream

    check(options)
    inputs = open_inputs(options)
    kinds = _kinds(options, inputs)
    asked, n_saes = [min(len(chosen), options.screen or len(chosen)) for _, chosen in kinds], len(inputs.saes)
    free = free_memory(inputs.tower.device)
    passes = sum(asked) * (2 + options.controls) + sum(asked[:n_saes])
    with opened_stream(inputs.tower, options.layer, options.tokens, options.batch_size) as stream:
        asking = Asking(stream, inputs.source, inputs.vocabulary, options.part(SteerabilityConfig), {})
        units, chosen = kinds[0]
        steering = Steering(stream, asking.asked, units, inputs.vocabulary, options.controls)
        block = chosen[: steering.at_once]
        start = time.perf_counter()
        steering.changes(block, block.float())
        seconds = (time.perf_counter() - start) / len(block)
        shape = asking.asked[0].x_BTD[0].numel()
    return Plan(
        f"steerability of {sum(asked[:n_saes]):,} latents of {', '.join(map(str, options.sae))} in {options.model}",
        {
            "images_asked_about": asking.n_images,
            "words": len(inputs.vocabulary.words),
            "latents": sum(asked[:n_saes]),
            "neurons": sum(asked[n_saes:]),
            "passes_of_an_image": passes * asking.n_images,
            **({"warning": few} if (few := _too_few(min(asked), options.controls)) else {}),
            **memory_figures(stream.tower.device, 8 * shape * (options.batch_size + 2 * asking.n_images), free),
            **disk_figures(options.output, _ROW_BYTES * sum(len(chosen) for _, chosen in kinds)),
            "time_seconds": seconds * sum(asked),
        },
    )


@command("steerability", plan=plan)
def steerability(options: SteerabilityArguments) -> dict[str, Any]:
    """Which latents and neurons change what a CLIP says of images, beside controls. Interrupted, it goes on."""
    from saevlm_fast.outputs import output_lock

    with output_lock(options.output, directory=False), goes_on():
        check(options)
        found, n_words = _steerability(options)
    figures = _figures(options, found, n_words)
    _print(options, found[0], figures)
    say(f"wrote {options.output}" + (f" and {options.neurons_output}" if options.neurons else ""))
    return {"output": str(options.output), **figures}


def _steerability(options: SteerabilityArguments) -> "tuple[list[Steerable], int]":
    """What was found of every SAE, and of neurons; and the number of words."""
    from saevlm_fast.clip_steering.run import Asking, progress_of
    from saevlm_fast.clip_steering.stream import opened_stream
    from saevlm_fast.files import remove_leftovers
    from saevlm_fast.measures.parts import Parts
    from saevlm_fast.outputs import begin_writing
    from saevlm_fast.runtime import interruptible
    from saevlm_fast.scoring.tables import write_table

    inputs = open_inputs(options)
    config = options.part(SteerabilityConfig)
    progress = progress_of(options.output)
    made_of = inputs.made_of | {"layer": options.layer, "config": vars(config)}
    found: list[Steerable] = []
    with opened_stream(inputs.tower, options.layer, options.tokens, options.batch_size) as stream:
        asking = Asking(stream, inputs.source, inputs.vocabulary, config, made_of)
        kinds = _kinds(options, inputs)
        known = asking.references([units for units, _ in kinds])
        for (units, chosen), reference in zip(kinds, known):
            alive = int((reference.density_S[chosen] > 0).sum())
            total = min(alive, config.screen or alive)
            if few := _too_few(total, config.controls):
                warn(f"{units.kind}s: {few}")
            with interruptible() as interrupted, Bar(f"{units.kind}s", total, f"{units.kind}s") as bar:
                parts, subject = Parts(progress, tell), f"{units.kind}-{len(found)}"
                found.append(asking.measure(units, reference, chosen, parts, bar.update, interrupted, subject))
    metadata = {"sae": ",".join(map(str, options.sae)), "model": options.model, "layer": str(options.layer)}
    metadata |= {name: str(value) for name, value in vars(config).items()}
    begin_writing(options.files, progress, options.force)
    write_table(_latents_table(options, found).replace_schema_metadata(metadata), options.output)
    if options.neurons:
        write_table(found[-1].table.replace_schema_metadata(metadata), options.neurons_output)
    for each in found:
        n, lost = len(each.table), sum(status == "no number" for status in each.table["status"].to_pylist())
        if lost:
            warn(f"alpha: {lost} of {n} {each.kind}s have no S, for the model gives NaN or inf when they are moved")
    skipped = len(stream.skipped)
    if skipped:
        warn(f"images: {skipped} of them are not usable and were left out")
    Record("steerability", options, options.output, images=asking.n_images, words=len(inputs.vocabulary.words)).write()
    remove_leftovers(progress)
    shutil.rmtree(progress, ignore_errors=True)
    return found, len(inputs.vocabulary.words)


def _latents_table(options: SteerabilityArguments, found: "list[Steerable]") -> Any:
    """Of the only SAE, or of all with a column that says of which one a latent is."""
    import pyarrow as pa

    tables = [each.table for each in found[: len(options.sae)]]
    if len(tables) == 1:
        return tables[0]
    named = [
        table.add_column(0, "sae", pa.array([str(path)] * len(table), pa.string()))
        for path, table in zip(options.sae, tables)
    ]
    return pa.concat_tables(named, promote_options="default")


def _figures(options: SteerabilityArguments, found: "list[Steerable]", n_words: int) -> dict[str, Any]:
    """Of latents over all SAEs, where there are several also of those of each, and of neurons."""
    from saevlm_fast.clip_steering.seeds import over_seeds
    from saevlm_fast.measures.results import plain

    latents, neurons = found[: len(options.sae)], found[len(options.sae) :]
    figures: dict[str, Any] = {"of_latents": latents[0].summary}
    if len(latents) > 1:
        figures["of_latents"] = over_seeds(latents, n_words, options.seed)
        figures["saes"] = [{"sae": str(path), **each.summary} for path, each in zip(options.sae, latents)]
    return plain(figures | ({"of_neurons": neurons[0].summary} if neurons else {}))


def _print(options: SteerabilityArguments, found: "Steerable", figures: dict[str, Any]) -> None:
    """found: latents of the first SAE."""
    names = ("asked", "dead", "steerable", "s", "s_random", "s_density", "s_reversed", "s_shuffled", "s_without_error")
    rows = {"latents": figures["of_latents"]} | {each["sae"]: each for each in figures.get("saes", [])}
    rows |= {"neurons": figures["of_neurons"]} if options.neurons else {}
    lines = [(kind, *(_cell(row[name]) for name in (*names, "specificity"))) for kind, row in rows.items()]
    print_wide_table(("", *names, "specificity"), lines)
    from saevlm_fast.clip_steering.steerability import ENOUGH

    for kind, row in rows.items():
        if row["asked"] == 0:
            say(f"{kind}: none of {row['units']:,} fires on the images, so that none is asked about")
        elif row["steerable"]["value"] is None:
            say(
                f"{kind}: {row['random_directions']} random directions are too few to call one so; {ENOUGH} are needed"
                " (--controls)"
            )
    callable_ones = figures["of_latents"]["steerable"]["value"] is not None
    if callable_ones and (shared := figures["of_latents"].get("shared")) is not None:
        say(
            f"words: {shared['by_every']} of {shared['words']} are changed most by a steerable latent of every SAE, "
            f"{shared['by_every_chance']:.1f} by chance (p {shared['p']:.3f}); {shared['by_any']} by one of any"
        )
    best = sorted((row for row in found.table.to_pylist() if row["status"] == "defined"), key=lambda row: -row["s"])
    lines = [
        (str(row["latent"]), f"{row['s']:.4f}", f"{row['chance']:.3f}", row["concept"], f"{row['concept_change']:+.3f}")
        for row in best[:_SHOWN]
    ]
    print_wide_table(("latent", "S", "chance", "most changed word", "by"), lines)
    say("steerable: at most 1 in 100 random directions of the same length, token by token, has an S as large.")


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        low, high = value["interval"]
        if value["value"] is None:
            return "-"
        return f"{value['value']:.1%}" + ("" if low is None else f" [{low:.1%}, {high:.1%}]")
    if isinstance(value, int):
        return f"{value:,}"
    return "-" if value is None else f"{value:.4f}"
