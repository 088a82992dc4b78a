"""What SAEs are measured on."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from saevlm_fast.data.label_sets import LabelSet, halves
from saevlm_fast.data.rows import Activations
from saevlm_fast.errors import require
from saevlm_fast.measures.behaviour import Behaviour
from saevlm_fast.measures.subjects import ImageRows
from saevlm_fast.measures.taxonomy import Taxonomy
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

    def of_taxonomy(self) -> LabelSet | None:
        """The first label set that it is about."""
        known = set() if self.taxonomy is None else set(self.taxonomy.paths)
        fits = (each for each in self.label_sets if known & set(each.names) and np.diff(each.offsets_N1).max() <= 1)
        return next(fits, None)

    def beside_the_taxonomy(self) -> str | None:
        """Which labels it lacks, in words; None if it has all of the set that it is about, or there is no such set."""
        labels = self.of_taxonomy()
        if labels is None or self.taxonomy is None:
            return None
        lacking = [each for each in labels.names if each not in self.taxonomy.paths]
        if not lacking:
            return None
        return (
            f"{len(lacking)} of {len(labels.names)} labels of {labels.name} are not in {self.taxonomy.origin}, such as "
            f"{lacking[0]!r}: depths are of the other images"
        )


def _digest(label_sets: tuple[LabelSet, ...]) -> str:
    digest = hashlib.sha256()
    for each in label_sets:
        digest.update(f"{each.name} {each.names}".encode())
        for array in (each.labels_M, each.offsets_N1, each.known_N):
            digest.update(array.tobytes())
    return digest.hexdigest()
