"""saevlm-fast evaluate: how good SAEs are, beside what cannot have learned."""

import shlex
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saevlm_fast.cli.evaluate_inputs import open_inputs, open_random_inputs, open_subjects
from saevlm_fast.cli.evaluate_options import EvaluateArguments
from saevlm_fast.cli.evaluate_output import check_output, record_of, working_directory, write_evaluation
from saevlm_fast.cli.evaluate_print import print_evaluation
from saevlm_fast.cli.options import Plan, command
from saevlm_fast.cli.planning import check_writable, disk_figures, memory_figures, replaced_figures
from saevlm_fast.cli.ranks import device_of_rank, first_rank_first, joined_ranks, leads
from saevlm_fast.cli.record import SETTINGS_FILE, Record
from saevlm_fast.cli.same_call import check_same_call, check_same_data
from saevlm_fast.cli.terminal import Bars, say, tell
from saevlm_fast.errors import Interrupted

if TYPE_CHECKING:
    from saevlm_fast.measures.evaluation import Evaluation
    from saevlm_fast.measures.inputs import Inputs
    from saevlm_fast.measures.subjects import Subject
    from saevlm_fast.peers import Peers

_LATENT_BYTES = 400  # of both tables, about
_ENTRY_BYTES = 24


def plan(options: EvaluateArguments) -> Plan:
    """What would be measured; the time of encoding alone, from a batch of rows, a control taken to be as slow as an
    SAE, and what comes besides.

    How long that takes, which is longer where rows are few, is not known before it is done.
    """
    import time

    from saevlm_fast.measures import kinds
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
    left_out = [f"{name} ({why})" for name, why in kinds.left_out(inputs).items()]
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
            "time_leaves_out": _not_timed(options, inputs),
        },
    )


def _not_timed(options: EvaluateArguments, inputs: "Inputs") -> list[str]:
    """Work that comes beside encoding."""
    from saevlm_fast.measures import kinds

    measures = ", ".join(name for name in kinds.names(inputs) if name != "reconstruction")  # which encoding gives
    found = [f"{measures} of every SAE and control"]
    found += [f"the making of controls: {', '.join(options.controls)}"] if options.controls else []
    return found + (["the first SAE compared with each of the others"] if options.compare else [])


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
        if peers is not None and not leads(peers):
            _take_part(options, subjects, inputs, on_random, peers)
            return None
        record = record_of(options, inputs)
        with working_directory(options) as place, _telling_how_to_go_on(options, record, place, peers):
            evaluation = _evaluate(options, subjects, inputs, on_random, place, peers, record)
    print_evaluation(evaluation, inputs)
    say(f"wrote {options.output}")
    return {"output": str(options.output), **evaluation.as_json()}


@contextmanager
def _telling_how_to_go_on(
    options: EvaluateArguments, record: Record, place: Path, peers: "Peers | None"
) -> Iterator[None]:
    """Where parts are on the disk when it is interrupted: the settings are beside them, and the command that goes on
    with them is told."""
    try:
        yield
    except Interrupted as error:
        if not (place / "parts").is_dir():
            raise
        if options.resume:  # settings that are there are those of the evaluation that it added to
            raise Interrupted(f"{error}; continue with the same command") from None
        record.write()  # it may have come between the first part and these
        program = "saevlm-fast" if peers is None else "torchrun ... -m saevlm_fast.cli"
        settings = shlex.quote(str(place / SETTINGS_FILE))
        raise Interrupted(f"{error}; continue with: {program} evaluate --config {settings} --resume") from None


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
    record: Record,
) -> "Evaluation":
    from saevlm_fast.measures.measure import evaluate_subjects
    from saevlm_fast.measures.parts import Parts

    def on_first() -> None:  # a kill leaves the settings beside it; those of what is resumed stay until it is whole
        if not (options.resume and (place / SETTINGS_FILE).is_file()):
            record.write()

    parts = Parts(place, tell, on_first)
    with Bars("encode ", "rows") as bars:
        evaluation = evaluate_subjects(
            subjects, inputs, options.controls, options.compare, parts, say, bars.update, on_random, peers
        )
    write_evaluation(options, inputs, evaluation, place, record)
    return evaluation
