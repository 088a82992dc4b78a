"""What there is to know of every measure: what it needs of the inputs, what of them it reads, and how it is made."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from saevlm_fast.measures.codes import KeptCodes
from saevlm_fast.measures.geometry import geometry
from saevlm_fast.measures.hierarchy import hierarchy
from saevlm_fast.measures.inputs import Inputs
from saevlm_fast.measures.labels import labels_of_latents
from saevlm_fast.measures.monosemanticity import monosemanticity
from saevlm_fast.measures.patches import codes_of_rows, labels_of_patches
from saevlm_fast.measures.probes import representation_kept
from saevlm_fast.measures.probing import sparse_probing
from saevlm_fast.measures.results import MEASURES, Measured
from saevlm_fast.measures.subjects import Subject
from saevlm_fast.measures.uniqueness import uniqueness
from saevlm_fast.measures.visaebench import visaebench_numbers
from saevlm_fast.peers import Peers

# Of one subject. What is a sum over images or rows is made at the call, shared by all ranks of peers; the rest is made
# by who calls what is returned, of all codes, without the others.
Maker = Callable[[Inputs, Subject, KeptCodes, Peers | None], Callable[[], Measured]]


class Kind(NamedTuple):
    """A measure.

    Attributes:
        make: None of what comes of the pass over the rows.
        reads: Inputs.digests of what it is made of beside the activations: where one differs, it is made anew.
        lacks: why inputs do not allow it, in words; None where they do.
    """

    make: Maker | None
    reads: tuple[str, ...] = ()
    lacks: Callable[[Inputs], str | None] = lambda inputs: None


def left_out(inputs: Inputs) -> dict[str, str]:
    """Measures that these inputs do not allow, and why."""
    return {name: why for name in MEASURES if (why := KINDS[name].lacks(inputs)) is not None}


def names(inputs: Inputs) -> list[str]:
    """The measures that are made."""
    lacking = left_out(inputs)
    return [name for name in MEASURES if name not in lacking and (name != "visaebench" or inputs.compat)]


def work(
    name: str, inputs: Inputs, subject: Subject, codes: KeptCodes, peers: Peers | None = None
) -> Callable[[], Measured]:
    """One measure of one subject, begun: see Maker. Not of reconstruction, which comes of the pass."""
    make = KINDS[name].make
    assert make is not None
    return make(inputs, subject, codes, peers)


# What they need -------------------------------------------------------------------------------------------------------


def _no_embeddings(inputs: Inputs) -> str | None:
    return None if inputs.embeddings else "no embeddings were given"


def _no_labels(inputs: Inputs) -> str | None:
    if not inputs.label_sets:
        return "there are no labels"
    rare = all(each.counts_L.max() < 2 for each in inputs.label_sets)  # captions, say
    return "no label is on two images" if rare else None


def _no_hierarchy(inputs: Inputs) -> str | None:
    lacking = _no_labels(inputs)
    if inputs.label_sets and lacking is not None:
        return lacking
    if not inputs.label_sets or inputs.taxonomy is None:
        return "it needs labels and a taxonomy"
    fits = inputs.of_taxonomy() is not None
    return None if fits else "no label set has one label an image that the taxonomy knows"


def _no_masks(inputs: Inputs) -> str | None:
    return None if inputs.patch_labels is not None else "no masks were given"


def _no_model(inputs: Inputs) -> str | None:
    return None if inputs.behaviour is not None else "no model and images were given"


# How they are made ----------------------------------------------------------------------------------------------------


def _of_codes(make: Callable[[Inputs, Subject, KeptCodes], Measured]) -> Maker:
    """Of what has no sums over images to share."""
    return lambda inputs, subject, codes, peers: lambda: make(inputs, subject, codes)


def _monosemanticity(inputs: Inputs, subject: Subject, codes: KeptCodes, peers: Peers | None) -> Callable[[], Measured]:
    n = inputs.batch_rows
    scored = {key: monosemanticity(codes, each, key, n, peers) for key, each in inputs.embeddings.items()}
    return lambda: _joined(scored)


def _hierarchy(inputs: Inputs, subject: Subject, codes: KeptCodes) -> Measured:
    labels = inputs.of_taxonomy()
    assert labels is not None  # left_out has seen to it
    assert inputs.taxonomy is not None
    return hierarchy(codes, labels, inputs.taxonomy, subject.group_sizes)


def _labels(inputs: Inputs, subject: Subject, codes: KeptCodes) -> Measured:
    return _joined({each.name: labels_of_latents(codes, each, inputs.half_N) for each in inputs.label_sets})


def _patches(inputs: Inputs, subject: Subject, codes: KeptCodes, peers: Peers | None) -> Callable[[], Measured]:
    labels, image_of_row, half_N = inputs.patch_labels, inputs.rows.image_of_row, inputs.half_N
    assert labels is not None
    assert image_of_row is not None  # a store of all patches
    rows = codes_of_rows(subject.model, inputs.activations, inputs.batch_rows, peers)
    return lambda: labels_of_patches(rows, labels, image_of_row, half_N)


def _probing(inputs: Inputs, subject: Subject, codes: KeptCodes) -> Measured:
    sets, ids = inputs.label_sets, inputs.rows.ids
    return _joined({each.name: sparse_probing(codes, each, inputs.half_N, ids) for each in sets})


def _geometry(inputs: Inputs, subject: Subject, codes: KeptCodes) -> Measured:
    return geometry(codes, subject.model.W_dec, subject.model.W_enc)


def _kept(inputs: Inputs, subject: Subject, codes: KeptCodes, peers: Peers | None) -> Callable[[], Measured]:
    rows, n = (inputs.activations, inputs.rows), inputs.batch_rows
    labels = inputs.label_sets, inputs.half_N
    return representation_kept(subject.model, *rows, codes, *labels, batch_rows=n, peers=peers)


def _behaviour(inputs: Inputs, subject: Subject, codes: KeptCodes, peers: Peers | None) -> Callable[[], Measured]:
    assert inputs.behaviour is not None
    measured = inputs.behaviour.measure(subject.model, peers=peers)
    return lambda: measured


def _visaebench(inputs: Inputs, subject: Subject, codes: KeptCodes) -> Measured:
    given = inputs.label_sets, inputs.embeddings, inputs.taxonomy
    return visaebench_numbers(subject.model, inputs.activations, inputs.rows, *given)


def _joined(parts: Mapping[str, Measured]) -> Measured:
    """Of several label sets or embeddings, figures below their names."""
    columns: dict[str, np.ndarray] = {}
    for each in parts.values():
        columns |= each.latents
    return Measured({name: each.figures for name, each in parts.items()}, columns)


# Of MEASURES.
KINDS = {
    "reconstruction": Kind(None),
    "monosemanticity": Kind(_monosemanticity, ("embeddings",), _no_embeddings),
    "uniqueness": Kind(_of_codes(lambda inputs, subject, codes: uniqueness(codes))),
    "hierarchy": Kind(_of_codes(_hierarchy), ("labels", "taxonomy"), _no_hierarchy),
    "labels": Kind(_of_codes(_labels), ("labels", "ids"), _no_labels),
    "patches": Kind(_patches, ("masks", "ids"), _no_masks),
    "probing": Kind(_of_codes(_probing), ("labels", "ids"), _no_labels),
    "geometry": Kind(_of_codes(_geometry)),
    "kept": Kind(_kept, ("labels", "ids")),
    "behaviour": Kind(_behaviour, ("behaviour",), _no_model),
    "visaebench": Kind(_of_codes(_visaebench), ("labels", "taxonomy", "embeddings", "ids")),
}
