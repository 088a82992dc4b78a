"""The directory that saevlm-fast evaluate writes."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saevlm_fast.cli.evaluate_options import EvaluateArguments
from saevlm_fast.cli.record import SETTINGS_FILE, Record
from saevlm_fast.cli.terminal import say
from saevlm_fast.errors import require
from saevlm_fast.urls import redacted_text

if TYPE_CHECKING:
    from saevlm_fast.measures.evaluation import Evaluation
    from saevlm_fast.measures.inputs import Inputs

EVALUATION, LATENTS, PAIRS, PICTURE = "evaluation.json", "latents", "pairs", "evaluation.png"
_OURS = (EVALUATION, LATENTS, PAIRS, "parts", PICTURE, SETTINGS_FILE)


def check_output(options: EvaluateArguments) -> None:
    """ValueError: there is an evaluation that nobody said to replace or to continue, or something else of its names."""
    from saevlm_fast.outputs import is_being_swapped

    output = options.output
    require(not output.exists() or output.is_dir(), f"output: {output} is a file; a directory is written")
    used = _is_evaluation(output) or is_being_swapped(output) or (output / ".replacement").is_dir()
    require(
        not used or options.resume or options.force,
        f"output: {output} already holds an evaluation; use --resume to add to it or --force to replace it",
    )
    for name in () if used else _OURS:
        there = output / name
        require(
            not (there.exists() or there.is_symlink()),
            f"output: {there} exists, and {output} holds no evaluation; choose another directory",
        )


def _is_evaluation(output: Path) -> bool:
    return (output / EVALUATION).is_file() or (output / "parts").is_dir()


def _remove_old(output: Path) -> None:
    from saevlm_fast.files import remove

    for name in _OURS:
        remove(output / name)


@contextmanager
def working_directory(options: EvaluateArguments) -> Iterator[Path]:
    """Where the work goes on: in the output, or, with --force, in what replaces it when it is whole."""
    from saevlm_fast.files import remove_leftovers
    from saevlm_fast.outputs import begin_replacement, publish, settle, workplace

    output = options.output
    settle(output, _remove_old)
    if options.force and _is_evaluation(output):
        begin_replacement(output)
    place = workplace(output)
    for folder in (place, *(place / name for name in (LATENTS, PAIRS)), *place.glob("parts/*")):
        remove_leftovers(folder)  # of one that was killed
    yield place
    if place != output:
        publish(output, _remove_old)


def write_evaluation(
    options: EvaluateArguments, inputs: "Inputs", evaluation: "Evaluation", place: Path, record: Record
) -> None:
    """Tables, picture, settings if they are not there yet, and at last evaluation.json."""
    from saevlm_fast.files import write_json_atomic
    from saevlm_fast.measures.figures import draw

    _write_tables(evaluation, place)
    drawn = draw(evaluation, place / PICTURE)
    if not drawn:
        say(f"no {PICTURE}: matplotlib is not installed (saevlm-fast[notebook])")
    record.write()
    write_json_atomic(place / EVALUATION, _document(options, inputs, evaluation))


def record_of(options: EvaluateArguments, inputs: "Inputs") -> Record:
    """The settings, which repeat the evaluation from anywhere."""
    return Record("evaluate", options, options.output, rows=inputs.activations.n_rows)


def _write_tables(evaluation: "Evaluation", place: Path) -> None:
    """One table of latents and one of pairs a subject."""
    from saevlm_fast.measures.parts import write_columns

    for folder in (LATENTS, PAIRS):
        (place / folder).mkdir(exist_ok=True)
    for each in evaluation.results:
        name = each.subject.name
        write_columns(place / _file(LATENTS, name), each.latents, {"subject": name})
        write_columns(place / _file(PAIRS, name), each.pairs, {"subject": name})


def _document(options: EvaluateArguments, inputs: "Inputs", evaluation: "Evaluation") -> dict[str, Any]:
    given: dict[str, Any] = {
        "sae": list(options.sae),
        "activations": str(options.activations),
        "embeddings": list(map(redacted_text, options.embeddings)),
        "labels": redacted_text(options.labels),
        "label_sets": [{"name": each.name, "labels": len(each.names)} for each in inputs.label_sets],
        "taxonomy": None if options.taxonomy is None else str(options.taxonomy),
        "rows": inputs.activations.n_rows,
        "images": len(inputs.rows.ids),
        "masks": None if options.masks is None else str(options.masks),
        "random_activations": None if options.random_activations is None else str(options.random_activations),
        "pool": options.pool,
        "model": options.model,
        "images_shown": None if inputs.behaviour is None else len(inputs.behaviour.ids),
        "source": inputs.activations.source,
    }
    files = {
        each.subject.name: {"latents": _file(LATENTS, each.subject.name), "pairs": _file(PAIRS, each.subject.name)}
        for each in evaluation.results
    }
    return evaluation.as_json() | {"inputs": given, "files": files}


def _file(folder: str, name: str) -> str:
    from saevlm_fast.measures.parts import file_name

    return f"{folder}/{file_name(name)}.parquet"
