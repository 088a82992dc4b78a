"""saevlm-fast evaluate: how good SAEs are, beside what cannot have learned."""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from saevlm_fast.cli.evaluate_masks import MaskArguments, open_masks
from saevlm_fast.cli.evaluate_model import SplicedArguments, open_behaviour
from saevlm_fast.cli.evaluate_print import print_evaluation
from saevlm_fast.cli.options import Plan, WorkOptions, command
from saevlm_fast.cli.planning import check_writable, disk_figures, memory_figures, replaced_figures
from saevlm_fast.cli.ranks import device_of_rank, first_rank_first, joined_ranks, leads
from saevlm_fast.cli.record import SETTINGS_FILE, Record
from saevlm_fast.cli.same_call import check_same_call, check_same_data
from saevlm_fast.cli.terminal import Bar, say, warn
from saevlm_fast.config import DEVICE_HELP, RunOptions
from saevlm_fast.errors import Interrupted, require
from saevlm_fast.settings import path_of, same_as, setting, texts
from saevlm_fast.urls import redacted_text

if TYPE_CHECKING:
    from saevlm_fast.data.rows import Activations
    from saevlm_fast.measures.inputs import Inputs
    from saevlm_fast.measures.measure import Evaluation
    from saevlm_fast.measures.subjects import Subject
    from saevlm_fast.peers import Peers
    from saevlm_fast.sae import SparseAutoencoder

EVALUATION, LATENTS, PAIRS, PICTURE = "evaluation.json", "latents", "pairs", "evaluation.png"
CONTROLS = ("untrained", "rotation", "raw", "pca", "kmeans")  # those of measures/controls.py, which imports torch
_OURS = (EVALUATION, LATENTS, PAIRS, "parts", PICTURE, SETTINGS_FILE)
_LATENT_BYTES = 400  # of both tables, about
_ENTRY_BYTES = 24
_NO_LABELS, _FROM_STORE = "none", "store"


def _controls(name: str, text: str) -> tuple[str, ...]:
    """all, none, or a list."""
    if text in ("all", "none"):
        return CONTROLS if text == "all" else ()
    named = texts(name, text)
    for each in named:
        require(each not in ("all", "none"), f"{name}: {each!r} stands alone, without others")
        require(each in CONTROLS, f"{name}: {each!r} is not one of all, none, {', '.join(CONTROLS)}")
    return named


@dataclass(frozen=True, kw_only=True)
class EvaluateArguments(SplicedArguments, MaskArguments, WorkOptions):
    """Options of `saevlm-fast evaluate`."""

    title = "What is measured"
    sae: tuple[str, ...] = setting(
        help="SAE directories, separated by commas, or the option given again; those that differ by their seed alone "
        "make a group.",
        parse=texts,
    )
    activations: Path = setting(help="Activation store, or a matrix [N, d]: .npy, .safetensors, .pt.", remote=True)
    output: Path = setting(help="Directory for evaluation.json, a table of latents for every SAE, and finished parts.")
    embeddings: tuple[str, ...] = setting(
        (), help="Image embeddings for the Monosemanticity Score, row i of image i; several, as --sae.", parse=texts
    )
    labels: str = setting(
        _FROM_STORE,
        help="Labels of images: FILE.csv or FILE.parquet (image, then a column a label set), store (its own), none.",
    )
    taxonomy: Path | None = setting(None, help="Path of every label from the root: FILE.json or FILE.csv.")
    controls: tuple[str, ...] = setting(
        (),
        help=f"Measured beside, at the same L0 (of kmeans one cluster fires): all, or of {', '.join(CONTROLS)}.",
        parse=_controls,
        shown="none",
    )
    random_activations: Path | None = setting(
        None,
        help="Of the same images through the tower of random weights (harvest --random-weights), for the SAEs among "
        "--sae that were trained on such: a control.",
        remote=True,
    )
    compat: Literal["none", "visaebench"] = setting("none", help="Numbers as another benchmark computes them, as well.")
    compare: bool = setting(False, help="Match the first SAE's latents with those of each other.")
    pool: Literal["max", "mean"] = setting("max", help="Of the rows of an image, where there are several.")
    batch_size: int = setting(4096, help="Rows read and encoded at a time.", at_least=1)
    resume: bool = setting(
        False, help="Keep what is finished in --output and add to it.", recorded=False, instead_of=("force",)
    )
    force: bool = setting(False, help="Replace the evaluation in --output.", recorded=False, instead_of=("resume",))
    device: str = setting("auto", help=DEVICE_HELP)
    collective_timeout: float = same_as(RunOptions, "collective_timeout", 3600.0, recorded=False)

    def check(self) -> None:
        super().check()
        require(not (self.resume and self.force), "resume and force exclude each other")
        for each in (*self.sae, *self.embeddings):
            require(bool(each) and "\0" not in each, f"sae, embeddings: {each!r} is not a path")
        require(len(self.sae) > 0, "sae: none was given")
        require(not self.compare or len(self.sae) > 1, "compare: needs at least two SAEs; give --sae again")
        needs_labels = self.taxonomy is None or self.labels != _NO_LABELS
        require(needs_labels, "taxonomy: it is about labels, and --labels none leaves them out")
        require(self.compat == "none" or self.pool == "max", "compat: visaebench pools by the maximum; give --pool max")
        path = path_of("labels", self.labels)
        known = self.labels in (_FROM_STORE, _NO_LABELS) or path.suffix in (".csv", ".parquet")
        require(known, f"labels: {self.labels!r} is not store, none, FILE.csv or FILE.parquet")


# What goes in ---------------------------------------------------------------------------------------------------------


def names_of(paths: tuple[str, ...]) -> list[str]:
    """Short names of paths, each its own: the last parts that tell them apart."""
    parts = [path_of("path", each).absolute().parts[1:] or ("root",) for each in paths]
    for n in range(1, max(map(len, parts)) + 1):
        names = ["/".join(each[-n:]) for each in parts]
        if len(set(names)) == len(names):
            return names
    raise ValueError(f"sae, embeddings: a path is given twice among {redacted_text(', '.join(paths))}")


def open_subjects(options: EvaluateArguments) -> "tuple[list[Subject], dict[str, SparseAutoencoder]]":
    """The SAEs, on the device. ValueError: what is damaged, one that is given twice."""
    from saevlm_fast.measures.measure import subjects_of, weights_digest
    from saevlm_fast.runtime import resolve_device
    from saevlm_fast.sae import SparseAutoencoder

    device = resolve_device(options.device)
    saes = {
        name: SparseAutoencoder.from_pretrained(path, device=device)
        for name, path in zip(names_of(options.sae), options.sae)
    }
    subjects = subjects_of({name: (sae, weights_digest(sae)) for name, sae in saes.items()})
    seen: dict[str, str] = {}
    for subject in subjects:
        twin = seen.setdefault(subject.digest, subject.name)
        require(twin == subject.name, f"sae: {subject.name} is the same SAE as {twin}")
    return subjects, saes


def open_inputs(options: EvaluateArguments, saes: "Mapping[str, SparseAutoencoder]") -> "Inputs":
    """What they are measured on. ValueError: what is damaged, of other images, or of another layer than the SAEs'."""
    from saevlm_fast.data.label_sets import LabelSet, read_labels
    from saevlm_fast.data.rows import open_activations
    from saevlm_fast.measures.groups import RANDOM_WEIGHTS, control_of
    from saevlm_fast.measures.inputs import Inputs
    from saevlm_fast.measures.taxonomy import read_taxonomy

    activations = open_activations(options.activations)
    _check_rows({name: sae for name, sae in saes.items() if control_of(sae) != RANDOM_WEIGHTS}, activations)
    _tell_trained_on(options, activations)
    embeddings = {
        name: open_activations(path)
        for name, path in zip(names_of(options.embeddings) if options.embeddings else (), options.embeddings)
    }
    taxonomy = None if options.taxonomy is None else read_taxonomy(options.taxonomy)
    inputs = Inputs(activations, embeddings, (), taxonomy, options.pool, options.batch_size)
    if options.labels == _FROM_STORE:
        labels = inputs.rows.labels
        sets = [LabelSet.of(labels)] if any(each is not None for each in labels) else []
    else:
        sets = [] if options.labels == _NO_LABELS else read_labels(options.labels, inputs.rows.ids)
    inputs = replace(
        inputs,
        label_sets=tuple(sets),
        compat=options.compat == "visaebench",
        patch_labels=open_masks(options, activations),
    )
    inputs.check()
    if options.model is not None:
        behaviour = open_behaviour(options, options.labels, options.device, activations, saes)
        inputs = replace(inputs, behaviour=behaviour)
    return inputs


def _check_rows(saes: "Mapping[str, SparseAutoencoder]", activations: "Activations") -> None:
    from saevlm_fast.provenance import check_rows_of

    for name, sae in saes.items():
        require(
            sae.config.d_in == activations.d,
            f"sae: d_in of {name} is {sae.config.d_in}, but the activations have width {activations.d}",
        )
        if (doubt := check_rows_of(sae, activations)) is not None:
            warn(f"{doubt}; its codes of {activations.path} may mean little")


def _tell_trained_on(options: EvaluateArguments, activations: "Activations") -> None:
    """Of SAEs whose run says so."""
    from saevlm_fast.training.checkpoints import read_settings
    from saevlm_fast.training.state import DATA_DIGEST

    for place in options.sae:
        try:
            settings = read_settings(Path(place))
        except (ValueError, OSError):  # no run of this program
            continue
        trained = settings["train"].get("control") != "untrained" and DATA_DIGEST in settings["data"]
        if trained and settings["data"][DATA_DIGEST] == activations.digest():
            warn(f"{place} was trained on the rows of {activations.path}; on others it may do worse")


def open_random_inputs(
    options: EvaluateArguments, saes: "Mapping[str, SparseAutoencoder]", inputs: "Inputs"
) -> "Inputs | None":
    """The same with the activations of random weights; None without these. ValueError: of another tower or images."""
    from saevlm_fast.data.rows import open_activations
    from saevlm_fast.measures.groups import RANDOM_WEIGHTS, control_of

    mine = {name: sae for name, sae in saes.items() if control_of(sae) == RANDOM_WEIGHTS}
    if options.random_activations is None:
        require(
            not mine,
            f"sae: {', '.join(mine)}: trained on a tower of random weights; give its activations, --random-activations",
        )
        return None
    require(bool(mine), "random_activations: no SAE among --sae was trained on a tower of random weights")
    activations = open_activations(options.random_activations)
    _check_rows(mine, activations)
    return inputs.of_random_weights(activations)


# Where it goes --------------------------------------------------------------------------------------------------------


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
    for name in _OURS:
        path = output / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


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


def plan(options: EvaluateArguments) -> Plan:
    """What would be measured; the time of encoding alone, from a batch of rows, a control taken to be as slow as an
    SAE.

    How long the measures take, which is longer where rows are few, is not known before they are made.
    """
    import time

    from saevlm_fast.sae import SparseAutoencoder, inferred

    check_output(options)
    check_writable(options.output)
    subjects, saes = open_subjects(options)
    inputs = open_inputs(options, saes)
    open_random_inputs(options, saes, inputs)
    n, n_latents = inputs.activations.n_rows, sum(each.n_latents for each in subjects)
    sample = inputs.activations.rows(_first_rows(n, options.batch_size))
    models = [subject.model for subject in subjects if isinstance(subject.model, SparseAutoencoder)]
    for model in models:
        inferred(model, sample[:1])  # a first call may compile
    start, entries = time.perf_counter(), 0
    for model in models:
        entries = max(entries, inferred(model, sample).n_entries)
    seconds = (time.perf_counter() - start) * n / len(sample) * (1 + len(options.controls))
    widest = max((each.d for each in inputs.embeddings.values()), default=0)
    sums = 16 * max(each.n_latents for each in subjects) * widest  # of the score, of both halves of the images
    device = saes[subjects[0].name].b_dec.device
    left_out = [f"{name} ({why})" for name, why in inputs.left_out().items()]
    return Plan(
        f"evaluation of {len(subjects)} SAEs and {len(options.controls)} kinds of control",
        {
            "rows": n,
            "images": len(inputs.rows.ids),
            "latents": n_latents,
            "label_sets": [each.name for each in inputs.label_sets],
            "images_shown": None if inputs.behaviour is None else len(inputs.behaviour.ids),
            "left_out": left_out,
            **replaced_figures(options.output, options.force),
            **memory_figures(device, _ENTRY_BYTES * entries * n // len(sample) + sums),
            **disk_figures(options.output, _LATENT_BYTES * n_latents * (1 + len(options.controls))),
            "encoding_alone_seconds": seconds,
        },
    )


def _first_rows(n: int, batch_size: int) -> Any:
    import torch

    return torch.arange(min(n, batch_size))


@command("evaluate", plan=plan, shared=True)
def evaluate(options: EvaluateArguments) -> dict[str, Any] | None:
    """Measures SAEs in every way that the inputs allow, beside controls that cannot have learned.

    Reconstruction and sparsity, uniqueness, hierarchy, labels, probes, geometry, behaviour; several SAEs side by side.
    Under torchrun, ranks share the passes over images, and divide the measures.
    """
    from saevlm_fast.outputs import output_lock

    with joined_ranks(options.device, options.collective_timeout) as peers, ExitStack() as locks:
        check_same_call(peers, options)
        if leads(peers):
            locks.enter_context(output_lock(options.output, directory=True))
            check_output(options)
        here = replace(options, device=device_of_rank(options.device, peers))
        subjects, saes = first_rank_first(peers, lambda: open_subjects(here))
        inputs = open_inputs(here, saes)
        on_random = open_random_inputs(here, saes, inputs)
        if peers is not None:
            check_same_data(peers, inputs.digests | {"sae": [each.digest for each in subjects]})
        with _telling_how_to_go_on(options):
            if peers is not None and not leads(peers):
                _take_part(options, subjects, inputs, on_random, peers)
                return None
            with working_directory(options) as place:
                evaluation = _evaluate(options, subjects, inputs, on_random, place, peers)
    print_evaluation(evaluation, inputs)
    say(f"wrote {options.output}")
    return {"output": str(options.output), **evaluation.as_json()}


@contextmanager
def _telling_how_to_go_on(options: EvaluateArguments) -> Iterator[None]:
    """Where parts of this evaluation are on the disk when it is interrupted."""
    from saevlm_fast.outputs import workplace

    try:
        yield
    except Interrupted as error:
        place = workplace(options.output)
        if not (place / "parts").is_dir() or (options.force and place == options.output):
            raise  # what is there may be of the evaluation that was to be replaced
        instead = " instead of --force" if options.force else ""
        raise Interrupted(f"{error}; continue with the same command and --resume{instead}") from None


def _take_part(
    options: EvaluateArguments,
    subjects: "list[Subject]",
    inputs: "Inputs",
    on_random: "Inputs | None",
    peers: "Peers",
) -> None:
    """The work of a rank that writes nothing."""
    from saevlm_fast.measures.measure import evaluate_subjects

    what = options.controls, options.compare
    evaluate_subjects(subjects, inputs, *what, random_inputs=on_random, peers=peers)


def _evaluate(
    options: EvaluateArguments,
    subjects: "list[Subject]",
    inputs: "Inputs",
    on_random: "Inputs | None",
    place: Path,
    peers: "Peers | None",
) -> "Evaluation":
    from saevlm_fast.files import write_json_atomic
    from saevlm_fast.measures.figures import draw
    from saevlm_fast.measures.measure import evaluate_subjects
    from saevlm_fast.measures.parts import Parts

    bars: dict[str, Bar] = {}

    def counted(name: str, done: int, total: int) -> None:
        bar = bars.setdefault(name, Bar(f"encode {name}", total, "rows"))
        bar.update(done)
        if done == total:
            bars.pop(name).close()

    evaluation = evaluate_subjects(
        subjects, inputs, options.controls, options.compare, Parts(place), say, counted, on_random, peers
    )
    _write_tables(evaluation, place)
    drawn = draw(evaluation, place / PICTURE)
    if not drawn:
        say(f"no {PICTURE}: matplotlib is not installed (saevlm-fast[notebook])")
    labels = options.labels if options.labels in (_FROM_STORE, _NO_LABELS) else _placed(options.labels)
    as_done = replace(options, sae=_absolute(options.sae), embeddings=_absolute(options.embeddings), labels=labels)
    Record("evaluate", as_done, options.output, rows=inputs.activations.n_rows).write()
    write_json_atomic(place / EVALUATION, _document(options, inputs, evaluation))
    return evaluation


def _absolute(paths: tuple[str, ...]) -> tuple[str, ...]:
    """As settings.toml has them."""
    return tuple(_placed(each) for each in paths)


def _placed(path: str) -> str:
    return str(path_of("path", path).absolute())


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


def _write_tables(evaluation: "Evaluation", place: Path) -> None:
    """One table of latents and one of pairs a subject."""
    from saevlm_fast.measures.parts import write_columns

    for folder in (LATENTS, PAIRS):
        (place / folder).mkdir(exist_ok=True)
    for each in evaluation.results:
        name = each.subject.name
        write_columns(place / _file(LATENTS, name), each.latents, {"subject": name})
        write_columns(place / _file(PAIRS, name), each.pairs, {"subject": name})
