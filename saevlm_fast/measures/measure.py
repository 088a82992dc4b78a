"""Every measure of several SAEs and of their controls, beside each other: what `saevlm-fast evaluate` does.

Each SAE is encoded once; its codes are kept sparse and given to all measures. A finished measure is kept as a part
(parts.py), so that what was cut short goes on where it was.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

from saevlm_fast.data.label_sets import LabelSet
from saevlm_fast.data.rows import Activations, Matrix, activations_of
from saevlm_fast.errors import check_kind, require, shown, whole_number
from saevlm_fast.measures import kinds
from saevlm_fast.measures.behaviour import Behaviour
from saevlm_fast.measures.codes import KeptCodes
from saevlm_fast.measures.controls import CONTROLS, Moments, Wanted, controls_of_ranks
from saevlm_fast.measures.evaluation import Evaluation, Result
from saevlm_fast.measures.geometry import Side, compare
from saevlm_fast.measures.groups import RANDOM_WEIGHTS, control_of, groups_of, training_of
from saevlm_fast.measures.inputs import Inputs
from saevlm_fast.measures.parts import COMPARED, Parts, file_name, key_of
from saevlm_fast.measures.results import Figures, Measured
from saevlm_fast.measures.separation import headlines
from saevlm_fast.measures.subjects import ImageRows, Subject, encode_all
from saevlm_fast.measures.taxonomy import Taxonomy
from saevlm_fast.peers import Peers
from saevlm_fast.provenance import check_rows_of
from saevlm_fast.runtime import exact_defaults
from saevlm_fast.sae import SparseAutoencoder, check_sae
from saevlm_fast.scoring.source import Pool
from saevlm_fast.settings import check_once, path_of, several

Told = Callable[[str], None]
Counted = Callable[[str, int, int], None]
Works = dict[str, Callable[[], Measured]]


class Measuring:
    """Measures subjects one after the other, from parts where they are finished."""

    def __init__(self, inputs: Inputs, parts: Parts, tell: Told, counted: Counted, peers: Peers | None = None) -> None:
        self.inputs, self.parts, self.tell, self.counted, self.peers = inputs, parts, tell, counted, peers
        self.left_out = kinds.left_out(inputs)
        self._by_digest: dict[str, dict[str, Measured]] = {}  # of controls

    def key(self, subject: Subject, name: str) -> str:
        """Of a part: only what the measure reads."""
        common = ("activations", "pool") + (() if self.inputs.rows.image_of_row is None else ("ids",))
        digests = {each: self.inputs.digests[each] for each in (*common, *kinds.KINDS[name].reads)}
        return key_of(subject=subject.digest, name=subject.name, measure=name, **digests)

    def result(self, subject: Subject) -> tuple[Result, KeptCodes | None]:
        """All measures; and the codes, if they had to be made."""
        names = kinds.names(self.inputs)
        found = {name: self.read(subject.name, name, self.key(subject, name)) for name in names}
        twin = self._by_digest.get(subject.digest, {})  # raw dimensions of the same L0 are those of another group too
        for name in names:
            if found[name] is None and name in twin:
                found[name] = twin[name]
                self.write(subject.name, name, self.key(subject, name), twin[name])
        codes, missing = None, [name for name in names if found[name] is None]
        if missing:
            codes, reconstruction = self.encode(subject)
            works = {"reconstruction": lambda: reconstruction}
            if self.peers is None:
                found |= {name: self._made(name, subject, codes, works) for name in missing}
            else:
                found |= self._made_by_ranks(self.peers, missing, subject, codes, works)
        done = {name: part for name in names if (part := found[name]) is not None}
        if subject.kind == "control":
            self._by_digest[subject.digest] = done
        return _result(subject, done), codes

    def read(self, subject: str, name: str, key: str) -> Measured | None:
        """A finished part, as rank 0 finds it."""
        if self.peers is None:
            return self.parts.read(subject, name, key)
        return self.peers.share(self.parts.read(subject, name, key) if self.peers.rank == 0 else None)

    def write(self, subject: str, name: str, key: str, part: Measured) -> None:
        """By rank 0."""
        if self.peers is None or self.peers.rank == 0:
            self.parts.write(subject, name, key, part)

    def _made(self, name: str, subject: Subject, codes: KeptCodes, works: Works) -> Measured:
        self.tell(f"{subject.name}: {name}")
        part = (works.get(name) or kinds.work(name, self.inputs, subject, codes))()
        self.write(subject.name, name, self.key(subject, name), part)
        return part

    def _made_by_ranks(
        self, peers: Peers, names: list[str], subject: Subject, codes: KeptCodes, works: Works
    ) -> dict[str, Measured]:
        """Passes over images are shared; then every rank finishes some of the measures, each from all codes."""
        for name in names:
            self.tell(f"{subject.name}: {name}")
            works |= {} if name in works else {name: kinds.work(name, self.inputs, subject, codes, peers)}
        made: dict[str, Measured] = {}
        for some in peers.collect({name: works[name]() for name in names[peers.rank :: peers.world]}):
            made |= some
        for name, part in made.items():
            self.write(subject.name, name, self.key(subject, name), part)
        return made

    def encode(self, subject: Subject) -> tuple[KeptCodes, Measured]:
        """The pass over the rows."""
        inputs = self.inputs
        sums, codes = encode_all(
            subject,
            inputs.activations,
            inputs.rows,
            inputs.pool,
            inputs.batch_rows,
            lambda done: self.counted(subject.name, done, inputs.activations.n_rows),
            self.peers,
        )
        return codes, sums.result(subject.k, codes)


def _result(subject: Subject, parts: Mapping[str, Measured]) -> Result:
    latents: dict[str, np.ndarray] = {"latent": np.arange(subject.n_latents)}
    for part in parts.values():
        latents |= part.latents
    tables = [part.pairs for part in parts.values() if part.pairs]
    pairs = {name: np.concatenate([table[name] for table in tables]) for name in tables[0]} if tables else {}
    return Result(subject, {name: part.figures for name, part in parts.items()}, latents, pairs)


def subjects_of(saes: Mapping[str, tuple[SparseAutoencoder, str]]) -> list[Subject]:
    """name -> (SAE, digest of it), as subjects; those that differ by their seed alone are a group.

    SAEs that were trained as controls, or on a tower of random weights, are controls of their group.
    """
    found, groups = [], groups_of({name: sae for name, (sae, _) in saes.items()})
    for name, (sae, digest) in saes.items():
        config, control, group = sae.config, control_of(sae), groups[name]
        seed = config.metadata.get("seed", training_of(sae).get("seed"))
        record = {"architecture": config.architecture, "source": config.metadata.get("source")}
        seed = seed if isinstance(seed, int) else None
        kind = "sae" if control is None else "control"
        found.append(Subject(name, kind, sae, group, digest, control, seed, record))
    return found


def evaluate_subjects(
    subjects: Sequence[Subject],
    inputs: Inputs,
    controls: Sequence[str] = (),
    compared: bool = False,
    parts: Parts | None = None,
    tell: Told = lambda text: None,
    counted: Counted = lambda name, done, total: None,
    random_inputs: Inputs | None = None,
    peers: Peers | None = None,
) -> Evaluation:
    """Measures SAEs, then their controls, group by group; and with `compared`, the first SAE against each other.

    random_inputs: with activations of the tower of random weights, for the SAEs that were trained on it. peers: the
    ranks that share the work, all of which call this; parts are read and written by rank 0, and all have the whole.

    Raises:
        ValueError: inputs of other images, two subjects of one name, an SAE of a random tower without its activations.
    """
    inputs.check()
    _check_names(subjects, controls)
    parts = parts or Parts(None)
    work = Measuring(inputs, parts, tell, counted, peers)
    elsewhere = work if random_inputs is None else Measuring(random_inputs, parts, tell, counted, peers)
    if random_inputs is not None:
        random_inputs.check()
    proper = [each for each in subjects if each.kind == "sae"]
    others = [each for each in subjects if each.kind != "sae"]
    results = [work.result(subject)[0] for subject in proper]
    found = list(results)
    for subject in others:
        on_random = subject.control == RANDOM_WEIGHTS
        require(
            not on_random or random_inputs is not None,
            f"sae: {subject.name} was trained on a tower of random weights; its activations are needed too "
            "(--random-activations)",
        )
        found.append((elsewhere if on_random else work).result(subject)[0])
    measured = list(found)
    moments = Moments.of(inputs.activations, inputs.batch_rows, peers) if controls else None
    for group in dict.fromkeys(subject.group for subject in subjects) if moments is not None else ():
        assert moments is not None
        of_shape = [each for each in measured if each.subject.group == group]
        members = [each for each in of_shape if each.subject.kind == "sae"] or of_shape
        wanted = _wanted(members)
        made = controls_of_ranks(peers, controls, group, wanted, len(members), inputs.activations, moments)
        several = len({subject.group for subject in subjects}) > 1
        for control in made:
            taken = any(control.name == each.name for each in subjects)  # by a control that was trained
            named = f"{control.name} of {members[0].subject.name}" if several or taken else control.name
            found.append(work.result(_named(control, named))[0])
    here = [*proper, *(each for each in others if each.control != RANDOM_WEIGHTS)]
    pairs = list(_compared(work, here)) if compared and len(here) > 1 else []
    sets = [each.name for each in inputs.label_sets]
    spliced = [] if inputs.behaviour is None else list(inputs.behaviour.asked)
    return Evaluation(found, work.left_out, pairs, headlines(sets, list(inputs.embeddings), spliced))


def _check_names(subjects: Sequence[Subject], controls: Sequence[str]) -> None:
    """ValueError: an SAE is called as a kind of control, or two would have files of one name."""
    kinds = {*controls, *(each.control for each in subjects)}
    taken = [each.name for each in subjects if each.kind == "sae" and each.name in kinds]
    require(not taken, f"saes: {shown(taken[:1])} is the name of a control too; name the SAE otherwise")
    files: dict[str, str] = {}
    for each in subjects:
        other = files.setdefault(file_name(each.name), each.name)
        require(other == each.name, f"saes: {shown([other, each.name])} would have files of one name; rename one")


def _named(subject: Subject, name: str) -> Subject:
    return replace(subject, name=name)


def _wanted(members: Sequence[Result]) -> Wanted:
    """Of a group of SAEs."""
    subject = members[0].subject
    sae = subject.model
    assert isinstance(sae, SparseAutoencoder)
    l0 = float(np.mean([each.figures["reconstruction"]["l0"] for each in members]))
    return Wanted(sae.config, l0, sae.b_dec.device)


def _compared(work: Measuring, subjects: Sequence[Subject]) -> Iterator[Figures]:
    """The first SAE and each other of its width."""
    first = subjects[0]
    codes = None
    for other in subjects[1:]:
        key = key_of(first=first.digest, other=other.digest, **work.inputs.digests)
        name = f"{COMPARED}{other.name}"
        part = work.read(first.name, name, key)
        if part is None:
            work.tell(f"{first.name} and {other.name} compared")
            codes = work.encode(first)[0] if codes is None else codes
            sides = [
                Side(subject.model.W_dec, subject.model.W_enc, kept)
                for subject, kept in ((first, codes), (other, work.encode(other)[0]))
            ]
            peers = work.peers
            part = Measured(compare(*sides)) if peers is None or peers.rank == 0 else None
            part = part if peers is None else peers.share(part)
            assert part is not None
            work.write(first.name, name, key, part)
        yield {"first": first.name, "other": other.name, **part.figures}


@exact_defaults()
def measure(
    saes: SparseAutoencoder | Mapping[str, SparseAutoencoder],
    activations: Matrix,
    *,
    embeddings: Matrix | None = None,
    labels: Sequence[str | int | None] | LabelSet | None = None,
    taxonomy: Taxonomy | Mapping[str, Sequence[str]] | None = None,
    controls: Sequence[str] = (),
    compare: bool = False,
    pool: Pool = "max",
    batch_rows: int = 4096,
    behaviour: Behaviour | None = None,
    patch_labels: LabelSet | None = None,
    random_activations: Matrix | None = None,
    output: Path | None = None,
) -> Evaluation:
    """Measures one SAE or several, and what cannot have learned, in every way that the inputs allow.

    Args:
        saes: an SAE, or several by name, as from_pretrained gives them; each on its device.
        activations: rows of the SAEs' width. A store's rows of one image are pooled by `pool`, max or mean.
        embeddings: row i of image i, for the Monosemanticity Score.
        labels: one for each image, a text or a whole number, None where unknown; or a LabelSet. A store's own are taken
            if none are given.
        taxonomy: label -> path from the root, or a Taxonomy.
        controls: of untrained, rotation, raw, pca, kmeans.
        compare: whether the first SAE is matched with each other.
        batch_rows: rows read and encoded at a time.
        behaviour: a tower and images that they are spliced into.
        patch_labels: of the rows of a store of all patches: masks.patch_labels gives them.
        random_activations: of the same images through a tower of random weights, for SAEs that were trained on such.
        output: directory for finished parts, which are not made again.

    Returns:
        An Evaluation: as_json(), table(), and results with figures and one column [S] for every number of a latent.

    Raises:
        ValueError: an SAE of another width, layer or hook point, embeddings or labels of other images, a control that
            there is not, codes that do not fit into memory.
    """
    named = _by_name(saes)
    controls, batch_rows = several("controls", controls), whole_number("batch_rows", batch_rows)
    _check_choices("pool", (pool,), get_args(Pool))
    _check_choices("controls", controls, CONTROLS)
    check_once("controls", controls)
    output = None if output is None else path_of("output", output)
    check_kind("behaviour", behaviour, (Behaviour, type(None)), "a Behaviour")
    check_kind("patch_labels", patch_labels, (LabelSet, type(None)), "a LabelSet")
    check_kind("taxonomy", taxonomy, (Taxonomy, Mapping, type(None)), "a Taxonomy, or a mapping of labels to paths")
    rows = activations_of(activations, "activations")
    inputs = Inputs(
        rows,
        {} if embeddings is None else {"embeddings": activations_of(embeddings, "embeddings")},
        _label_sets(labels, rows),
        taxonomy if isinstance(taxonomy, Taxonomy) or taxonomy is None else Taxonomy.of(taxonomy),
        pool,
        batch_rows,
        behaviour,
        patch_labels=patch_labels,
    )
    on_random = None
    if random_activations is not None:
        drawn = activations_of(random_activations, "random_activations")
        on_random = inputs.of_random_weights(drawn)
    for sae in named.values():
        elsewhere = on_random is not None and control_of(sae) == RANDOM_WEIGHTS
        check_rows_of(sae, drawn if elsewhere else rows)
    subjects = subjects_of({name: (sae, weights_digest(sae)) for name, sae in named.items()})
    return evaluate_subjects(subjects, inputs, controls, compare, Parts(output), random_inputs=on_random)


def _by_name(saes: SparseAutoencoder | Mapping[str, SparseAutoencoder]) -> dict[str, SparseAutoencoder]:
    check_kind("saes", saes, (SparseAutoencoder, Mapping), "a SparseAutoencoder, or a mapping of names to some")
    named = {"sae": saes} if isinstance(saes, SparseAutoencoder) else dict(saes)
    require(len(named) > 0, "saes: none were given")
    for sae in named.values():
        check_sae(sae, "saes")
    return named


def _check_choices(name: str, chosen: Sequence[Any], choices: Sequence[str]) -> None:
    for each in chosen:
        known = isinstance(each, str) and each in choices
        require(known, f"{name}: {shown(each)} is not one of {', '.join(choices)}")


def _label_sets(labels: Sequence[str | int | None] | LabelSet | None, rows: Activations) -> tuple[LabelSet, ...]:
    if isinstance(labels, LabelSet):
        return (labels,)
    if labels is None:
        labels = ImageRows.of(rows).labels
        return (LabelSet.of(labels),) if any(each is not None for each in labels) else ()
    return (LabelSet.of(labels),)


def weights_digest(sae: SparseAutoencoder) -> str:
    """SHA-256 of an SAE's parameters, threshold and shape."""
    digest = hashlib.sha256(f"{sae.config}".encode())
    for tensor in sae.state_dict().values():
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
