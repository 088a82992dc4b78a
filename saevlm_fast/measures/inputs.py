"""What SAEs are measured on, and what these inputs allow."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from saevlm_fast.data.label_sets import LabelSet, halves
from saevlm_fast.data.rows import Activations
from saevlm_fast.errors import require
from saevlm_fast.measures.behaviour import Behaviour
from saevlm_fast.measures.codes import KeptCodes
from saevlm_fast.measures.geometry import geometry
from saevlm_fast.measures.hierarchy import hierarchy
from saevlm_fast.measures.labels import labels_of_latents
from saevlm_fast.measures.monosemanticity import monosemanticity
from saevlm_fast.measures.patches import codes_of_rows, labels_of_patches
from saevlm_fast.measures.probes import representation_kept
from saevlm_fast.measures.probing import sparse_probing
from saevlm_fast.measures.results import MEASURES, Measured
from saevlm_fast.measures.subjects import ImageRows, Subject
from saevlm_fast.measures.taxonomy import Taxonomy
from saevlm_fast.measures.uniqueness import uniqueness
from saevlm_fast.measures.visaebench import visaebench_numbers
from saevlm_fast.peers import Peers
from saevlm_fast.scoring.source import Pool


@dataclass(frozen=True)
class Inputs:
    """What SAEs are measured on.

    Attributes:
        activations: rows. embeddings: name -> rows, row i of image i. label_sets, taxonomy: of the images, or none.
        pool: how the rows of an image become one. batch_rows: read and encoded at a time.
        behaviour: the tower and images that SAEs are spliced into, or none. compat: whether visaebench's own numbers
            are wanted too. patch_labels: of the rows, from masks.
    """

    activations: Activations
    embeddings: Mapping[str, Activations] = field(default_factory=dict)
    label_sets: tuple[LabelSet, ...] = ()
    taxonomy: Taxonomy | None = None
    pool: Pool = "max"
    batch_rows: int = 4096
    behaviour: Behaviour | None = None
    compat: bool = False
    patch_labels: LabelSet | None = None

    @cached_property
    def rows(self) -> ImageRows:
        return ImageRows.of(self.activations)

    @cached_property
    def half_N(self) -> np.ndarray:
        return halves(self.rows.ids)

    @cached_property
    def digests(self) -> dict[str, str]:
        """Of everything but the SAEs."""
        of_patches = () if self.patch_labels is None else (self.patch_labels,)
        ids = hashlib.sha256("\n".join(self.rows.ids).encode()).hexdigest() if self.activations.has_items else "rows"
        paths = "" if self.taxonomy is None else str(sorted(self.taxonomy.paths.items()))
        return {
            "activations": self.activations.digest(),
            "ids": ids,
            "labels": _digest(self.label_sets),
            "masks": _digest(of_patches),
            "taxonomy": hashlib.sha256(paths.encode()).hexdigest(),
            "embeddings": str([(name, each.digest()) for name, each in self.embeddings.items()]),
            "pool": self.pool,
            "behaviour": "" if self.behaviour is None else self.behaviour.digest(),
        }

    def of_random_weights(self, activations: Activations) -> "Inputs":
        """The same with what a tower of random weights gives of the same images; nothing is spliced into it.

        Raises:
            ValueError: of other images, or in another order: labels and embeddings would be other images'.
        """
        there = replace(self, activations=activations, behaviour=None)
        mine = self.activations
        require(
            there.rows.ids == self.rows.ids,
            f"random_activations: {activations.path} is of other images, or in another order, than {mine.path}",
        )
        require(
            self.patch_labels is None or activations.n_rows == mine.n_rows,
            f"random_activations: {activations.n_rows} rows, not {mine.n_rows}; masks are of rows",
        )
        return there

    def check(self) -> None:
        """ValueError: embeddings or labels of other images than the activations'."""
        n = len(self.rows.ids)
        for name, embeddings in self.embeddings.items():
            found = embeddings.n_rows
            require(found == n, f"embeddings: {name} has {found} rows; there are {n} images in {self.activations.path}")
            if embeddings.has_items and self.activations.has_items:
                ids = ImageRows.of(embeddings).ids
                require(
                    len(ids) == n, f"embeddings: {name} has {found} rows of {len(ids)} images; one row each is needed"
                )
                other = next((i for i, pair in enumerate(zip(ids, self.rows.ids)) if pair[0] != pair[1]), None)
                require(other is None, f"embeddings: {name}: row {other} is another image than in the activations")
        if self.patch_labels is not None:
            name, found = self.patch_labels.name, self.patch_labels.n_images
            require(found == self.activations.n_rows, f"masks: of {found} rows, not {self.activations.n_rows}")
            image_of_row = self.rows.image_of_row
            whole = image_of_row is not None and np.array_equal(image_of_row, np.arange(found) // (found // n))
            require(whole, f"masks: {self.activations.path} is no store of as many patches of every image")
            taken = any(each.name == name for each in self.label_sets)
            require(not taken, f"labels: {name!r} is the name of the masks' label set; name the column otherwise")
        for each in self.label_sets:
            require(each.n_images == n, f"labels: {each.name} has {each.n_images} images, not {n}")

    def left_out(self) -> dict[str, str]:
        """Measures that these inputs do not allow, and why."""
        needs = {
            "monosemanticity": (bool(self.embeddings), "no embeddings were given"),
            "hierarchy": (bool(self.label_sets) and self.taxonomy is not None, "it needs labels and a taxonomy"),
            "labels": (bool(self.label_sets), "there are no labels"),
            "patches": (self.patch_labels is not None, "no masks were given"),
            "probing": (bool(self.label_sets), "there are no labels"),
            "behaviour": (self.behaviour is not None, "no model and images were given"),
        }
        found = {name: why for name, (given, why) in needs.items() if not given}
        if self.label_sets and all(each.counts_L.max() < 2 for each in self.label_sets):  # captions, say
            found |= dict.fromkeys(("hierarchy", "labels", "probing"), "no label is on two images")
        if "hierarchy" not in found and self._of_taxonomy() is None:
            found["hierarchy"] = "no label set has one label an image that the taxonomy knows"
        return found

    def _of_taxonomy(self) -> LabelSet | None:
        """The first label set that it is about."""
        known = set() if self.taxonomy is None else set(self.taxonomy.paths)
        fits = (each for each in self.label_sets if known & set(each.names) and np.diff(each.offsets_N1).max() <= 1)
        return next(fits, None)

    def names(self) -> list[str]:
        """The measures that are made."""
        left_out = self.left_out()
        return [name for name in MEASURES if name not in left_out and (name != "visaebench" or self.compat)]

    def beside_the_taxonomy(self) -> str | None:
        """Which labels it lacks, in words; None if it has all of the set that it is about, or there is no such set."""
        labels = self._of_taxonomy()
        if labels is None or self.taxonomy is None:
            return None
        lacking = [each for each in labels.names if each not in self.taxonomy.paths]
        if not lacking:
            return None
        return (
            f"{len(lacking)} of {len(labels.names)} labels of {labels.name} are not in {self.taxonomy.origin}, such as "
            f"{lacking[0]!r}: depths are of the other images"
        )

    def work(self, name: str, subject: Subject, codes: KeptCodes, peers: Peers | None = None) -> Callable[[], Measured]:
        """One measure of one subject, but for reconstruction, which comes of the pass.

        What is a sum over images or rows is made now, shared by all ranks of peers; the rest is made by who calls what
        is returned, of all codes, without the others.
        """
        if name == "monosemanticity":
            n = self.batch_rows
            scored = {key: monosemanticity(codes, each, key, n, peers) for key, each in self.embeddings.items()}
            return lambda: _joined(scored)
        if name == "patches":
            rows = codes_of_rows(subject.model, self.activations, self.batch_rows, peers)
            return lambda: self._patches(rows)
        if name == "kept":
            more: dict[str, Any] = {"batch_rows": self.batch_rows, "peers": peers}
            return representation_kept(
                subject.model, self.activations, self.rows, codes, self.label_sets, self.half_N, **more
            )
        if name == "behaviour":
            assert self.behaviour is not None
            measured = self.behaviour.measure(subject.model, peers=peers)
            return lambda: measured
        return lambda: self._of_codes(name, subject, codes)

    def _patches(self, rows: KeptCodes) -> Measured:
        assert self.patch_labels is not None
        assert self.rows.image_of_row is not None  # a store of all patches
        return labels_of_patches(rows, self.patch_labels, self.rows.image_of_row, self.half_N)

    def _of_codes(self, name: str, subject: Subject, codes: KeptCodes) -> Measured:
        sets = self.label_sets
        makers: dict[str, Callable[[], Measured]] = {
            "uniqueness": lambda: uniqueness(codes),
            "geometry": lambda: geometry(codes, subject.model.W_dec, subject.model.W_enc),
            "hierarchy": lambda: self._hierarchy(subject, codes),
            "labels": lambda: _joined({each.name: labels_of_latents(codes, each, self.half_N) for each in sets}),
            "probing": lambda: _joined(
                {each.name: sparse_probing(codes, each, self.half_N, self.rows.ids) for each in sets}
            ),
            "visaebench": lambda: visaebench_numbers(
                subject.model, self.activations, self.rows, sets, self.embeddings, self.taxonomy
            ),
        }
        return makers[name]()

    def _hierarchy(self, subject: Subject, codes: KeptCodes) -> Measured:
        labels = self._of_taxonomy()
        assert labels is not None  # left_out has seen to it
        assert self.taxonomy is not None
        return hierarchy(codes, labels, self.taxonomy, subject.group_sizes)


def _digest(label_sets: tuple[LabelSet, ...]) -> str:
    digest = hashlib.sha256()
    for each in label_sets:
        digest.update(f"{each.name} {each.names}".encode())
        for array in (each.labels_M, each.offsets_N1, each.known_N):
            digest.update(array.tobytes())
    return digest.hexdigest()


def _joined(parts: Mapping[str, Measured]) -> Measured:
    """Of several label sets or embeddings, figures below their names."""
    columns: dict[str, np.ndarray] = {}
    for each in parts.values():
        columns |= each.latents
    return Measured({name: each.figures for name, each in parts.items()}, columns)
