"""What saevlm-fast evaluate measures, and on what: SAEs, activations, embeddings, labels, masks, a model."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from saevlm_fast.cli.evaluate_masks import open_masks
from saevlm_fast.cli.evaluate_model import open_behaviour
from saevlm_fast.cli.evaluate_options import FROM_STORE, NO_LABELS, EvaluateArguments
from saevlm_fast.cli.terminal import warn
from saevlm_fast.errors import require
from saevlm_fast.settings import path_of
from saevlm_fast.urls import redacted_text

if TYPE_CHECKING:
    from saevlm_fast.data.rows import Activations
    from saevlm_fast.measures.inputs import Inputs
    from saevlm_fast.measures.subjects import Subject
    from saevlm_fast.sae import SparseAutoencoder


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
    if options.labels == FROM_STORE:
        labels = inputs.rows.labels
        sets = [LabelSet.of(labels)] if any(each is not None for each in labels) else []
    else:
        sets = [] if options.labels == NO_LABELS else read_labels(options.labels, inputs.rows.ids)
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
