"""saevlm-fast steering-score: how far every latent steers."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from saevlm_fast.cli.answers import BESIDE_WEIGHTS, AnswerArguments, seconds_an_answer, steered_answers, weight_bytes
from saevlm_fast.cli.options import Plan, command
from saevlm_fast.cli.planning import check_writable, disk_figures, free_memory, memory_figures
from saevlm_fast.cli.record import Record, check_recorded, settings_path
from saevlm_fast.cli.terminal import Bar, print_table, say, tell, warn
from saevlm_fast.config import ScoreConfig, ScoreRun
from saevlm_fast.look.chosen import sliced
from saevlm_fast.settings import integers, same_as, setting

if TYPE_CHECKING:
    from saevlm_fast.data.codes import StoredCodes
    from saevlm_fast.data.rows import Activations
    from saevlm_fast.images.sources import ImageSource
    from saevlm_fast.steering.table import SteeringScores

_ROW_BYTES = 200  # of the table, about


def _as_it_is(name: str, text: str) -> str:
    return text


@dataclass(frozen=True, kw_only=True)
class SteeringScoreArguments(AnswerArguments):
    """Options of `saevlm-fast steering-score`."""

    made_from: ClassVar = {
        "sae_weights_sha256": ("sae",),
        "codes_sha256": ("codes",),
        "embeddings_sha256": ("embeddings",),
    }

    images: str = setting(help="The images that codes and embeddings were harvested from.", place="images")
    codes: Path = setting(help="Store of the SAE's codes, one row an image (harvest --pool mean).", remote=True)
    embeddings: Path = setting(help="Image embeddings of the text model's CLIP: store or matrix file.", remote=True)
    text_model: str = setting(help="hf:NAME_OR_DIR or open_clip:ARCH/PRETRAINED_OR_FILE.", place="model")
    output: Path = same_as(ScoreRun, "output")
    latents: str | None = setting(None, help="0:1000, or 3,17,40.", shown="all", parse=_as_it_is)
    alpha: float = same_as(ScoreConfig, "alpha")
    ask: int = same_as(ScoreConfig, "ask")
    prompt: str = same_as(ScoreConfig, "prompt")
    n_reference: int = same_as(ScoreConfig, "n_reference")
    seed: int = same_as(ScoreConfig, "seed")
    max_new_tokens: int = same_as(AnswerArguments, "max_new_tokens", 8)
    resume: bool = same_as(ScoreRun, "resume")
    force: bool = same_as(ScoreRun, "force")
    latents_per_block: int = same_as(ScoreRun, "latents_per_block")

    @property
    def sources(self) -> dict[str, str]:
        """What a run is resumed with the same of."""
        names = ("model", "sae", "images", "codes", "embeddings", "text_model")
        return {name: str(getattr(self, name)) for name in names}


@dataclass(frozen=True)
class Inputs:
    """What is read, opened, and what is measured."""

    codes: "StoredCodes"
    embeddings: "Activations"
    images: "ImageSource"
    config: ScoreConfig
    run: ScoreRun


def open_inputs(options: SteeringScoreArguments) -> Inputs:
    """Everything but the models. ValueError: sides that do not belong together."""
    from saevlm_fast.data.codes import open_codes
    from saevlm_fast.data.rows import open_activations
    from saevlm_fast.images.open import open_images
    from saevlm_fast.provenance import check_codes_of, other_text_model
    from saevlm_fast.scoring.tables import check_scores_path

    check_scores_path(options.output)
    codes, embeddings = open_codes(options.codes), open_activations(options.embeddings)
    images = open_images(options.images)
    config = options.part(ScoreConfig, latents=chosen_latents(options.latents, codes.d_sae))
    run = options.part(ScoreRun, sources=options.sources)
    check_codes_of(codes, options.sae, options.layer)
    if (doubt := other_text_model(embeddings, options.text_model)) is not None:
        warn(f"{doubt}; cosines between two models mean little")
    return Inputs(codes, embeddings, images, config, run)


def chosen_latents(text: str | None, d_sae: int) -> tuple[int, ...]:
    """0:1000 as Python slices, or a list; () for all."""
    if text is None:
        return ()
    return tuple(sliced(text, d_sae)) if ":" in text else integers("latents", text)


def plan(options: SteeringScoreArguments) -> Plan:
    """What would be asked; the time from a batch of answers about a white image."""
    from PIL import Image

    from saevlm_fast.runtime import resolve_device
    from saevlm_fast.steering.score import PER_LATENT, firing_latents, is_finished

    inputs = open_inputs(options)
    check_writable(options.output)
    if options.resume and is_finished(inputs.run):
        return Plan(f"nothing is left to do of {options.output}, if its settings are the same", {})
    _check_output(options, inputs.run)
    alive = set(firing_latents(inputs.codes).tolist())
    latents = inputs.config.latents or tuple(range(inputs.codes.d_sae))
    firing = sum(latent in alive for latent in latents)
    n_asked = max(1, inputs.config.ask)
    n = firing * len(PER_LATENT) * n_asked + 2 * n_asked
    free = free_memory(resolve_device(options.device))
    answerer = steered_answers(options)
    question = answerer.ask(Image.new("RGB", (336, 336), "white"), inputs.config.prompt)
    seconds = seconds_an_answer(answerer, question, n)
    return Plan(
        f"steering score of {len(latents):,} latents of {options.sae} in {options.model}",
        {
            "images": inputs.codes.n_rows,
            "latents": len(latents),
            "latents_that_fire": firing,
            "images_asked_about": n_asked,
            "answers": n,
            "most_tokens_each": options.max_new_tokens,
            **memory_figures(answerer.sae.b_dec.device, weight_bytes(answerer), free, without=BESIDE_WEIGHTS),
            **disk_figures(options.output, _ROW_BYTES * len(latents)),
            "an_answer_seconds": seconds,
            "all_answers_seconds": seconds * n,
        },
    )


@command("steering-score", plan=plan)
def steering_score(options: SteeringScoreArguments) -> dict[str, Any]:
    """The paper's steering score of every latent, beside five controls. Interrupted, it goes on with --resume."""
    from saevlm_fast.outputs import output_lock
    from saevlm_fast.scoring.tables import check_scores_path
    from saevlm_fast.steering.score import is_finished

    check_scores_path(options.output)
    with output_lock(options.output, directory=False):
        run = options.part(ScoreRun, sources=options.sources)
        if options.resume and is_finished(run):
            return _finished(options)
        _check_output(options, run)
        return _steering_score(options)


def _check_output(options: SteeringScoreArguments, run: "ScoreRun") -> None:
    """ValueError: something is there, and nothing says that it may be replaced or gone on with."""
    from saevlm_fast.outputs import check_absent
    from saevlm_fast.steering.score import check_run, is_unfinished

    check_run(run)
    check_absent([settings_path(options.output)], options.force or is_unfinished(run))


def _finished(options: SteeringScoreArguments) -> dict[str, Any]:
    """What there is to say of a table that is whole, if it is what these options ask for."""
    from saevlm_fast.sae import SparseAutoencoder
    from saevlm_fast.steering.score import contents, remove_progress
    from saevlm_fast.steering.table import read_scores

    inputs = open_inputs(options)
    sae = SparseAutoencoder.from_pretrained(options.sae)
    digests = contents(sae, inputs.codes, inputs.embeddings)
    check_recorded("steering-score", options, options.output, digests, free=("batch_size", "device"))
    scores = read_scores(options.output)
    remove_progress(inputs.run)  # what a kill has left of it
    say(f"resume: nothing left to do, {options.output} is finished")
    return _told(options, scores)


def _steering_score(options: SteeringScoreArguments) -> dict[str, Any]:
    from saevlm_fast.runtime import resolve_device
    from saevlm_fast.steering.score import contents
    from saevlm_fast.steering.score import steering_score as score
    from saevlm_fast.towers.text import load_text_encoder

    inputs = open_inputs(options)
    answerer = steered_answers(options)
    encoder = load_text_encoder(options.text_model, resolve_device(options.device), on_message=tell)
    record = Record(
        "steering-score", options, options.output, **contents(answerer.sae, inputs.codes, inputs.embeddings)
    )
    with Bar("steer", unit="answers") as bar:
        scores = score(
            answerer,
            inputs.images,
            inputs.codes,
            inputs.embeddings,
            encoder,
            inputs.config,
            inputs.run,
            on_rows=bar.update,
            on_written=record.write,
        )
    said = _told(options, scores)
    say(f"wrote {options.output}")
    return said


def _told(options: SteeringScoreArguments, scores: "SteeringScores") -> dict[str, Any]:
    _print_scores(scores)
    named = {"image_source" if name == "images" else name: path for name, path in options.sources.items()}
    return {"output": str(options.output), **named, **scores.figures()}


def _print_scores(scores: "SteeringScores") -> None:
    n, n_all = scores.n_well_defined, len(scores.table)
    if n == 0:
        say(f"none of the {n_all:,} latents fires on 16 images or more, so there is no mean")
        return
    say(f"steering score of {n:,} of {n_all:,} latents (16 top images or more)")
    empty = scores.empty_answers()
    print_table(
        ("condition", "mean +- std", "empty answers"),
        (
            (name, f"{mean:.4f}" + (f" +- {std:.4f}" if n > 1 else ""), f"{empty[name]:.1%}")
            for name, (mean, std) in scores.summary().items()
        ),
    )
