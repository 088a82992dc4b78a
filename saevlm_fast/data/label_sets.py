"""Labels of images: from the items of a store (its folders), from a column, from a CSV of ids and labels.

An image of which nothing is known is left out; an image that is known to have no label counts as negative for all.
Shape suffixes: N images, L labels, M (image, label) entries.
"""

import csv
import math
import os
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np

from saevlm_fast.errors import doubt, first_line, renamed, require, shown
from saevlm_fast.remote.cache import fetched, telling_urls
from saevlm_fast.settings import several
from saevlm_fast.urls import is_url, url_of

Label = str | int


@dataclass(frozen=True)
class LabelSet:
    """Labels of N images.

    Attributes:
        name: of the set. names: of the L labels, sorted.
        labels_M: int32, ascending within an image. offsets_N1: int64, image i owns offsets_N1[i]:offsets_N1[i + 1].
        known_N: whether anything is known of an image.
    """

    name: str
    names: tuple[str, ...]
    labels_M: np.ndarray
    offsets_N1: np.ndarray
    known_N: np.ndarray

    @classmethod
    def of(cls, labels: Iterable[Label | Iterable[Label] | None], name: str = "labels") -> "LabelSet":
        """One label an image, several, or None of an image of which nothing is known. An empty text is no label.

        Raises:
            ValueError: no image has a label; a number below 0, but for a set of -1 and 1.
        """
        per_image = [_labels_of(each) for each in several("labels", labels)]
        names = tuple(sorted({label for each in per_image if each is not None for label in each}))
        require(len(names) > 0, f"labels: {name}: no image has a label")
        _check_marks(name, names, per_image)
        number = {label: i for i, label in enumerate(names)}
        rows = [[] if each is None else sorted(number[label] for label in each) for each in per_image]
        offsets_N1 = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
        labels_M = np.array([label for row in rows for label in row], np.int32)
        return cls(name, names, labels_M, offsets_N1, np.array([each is not None for each in per_image], bool))

    @property
    def n_images(self) -> int:
        return len(self.known_N)

    @property
    def counts_L(self) -> np.ndarray:
        """Images of each label."""
        return np.bincount(self.labels_M, minlength=len(self.names))

    @property
    def images_M(self) -> np.ndarray:
        """The image of every entry, int64."""
        return np.repeat(np.arange(self.n_images), np.diff(self.offsets_N1))

    def single(self) -> np.ndarray:
        """int64 [N]: the label of each image, -1 of those without one. ValueError: an image has several."""
        several = np.flatnonzero(np.diff(self.offsets_N1) > 1)
        require(not len(several), f"labels: {self.name}: image {several[:1].tolist()} has several; one each is needed")
        found = np.full(self.n_images, -1, np.int64)
        found[self.images_M] = self.labels_M
        return found

    def matrix(self) -> Any:
        """scipy's CSR matrix [N, L] of ones."""
        from scipy.sparse import csr_array

        ones = np.ones(len(self.labels_M), np.float64)
        return csr_array((ones, self.labels_M, self.offsets_N1), shape=(self.n_images, len(self.names)))

    def part(self, keep_N: np.ndarray) -> "LabelSet":
        """Of some images, with the same labels."""
        kept_M = keep_N[self.images_M]
        offsets_N1 = np.concatenate([[0], np.diff(self.offsets_N1)[keep_N].cumsum()]).astype(np.int64)
        return LabelSet(self.name, self.names, self.labels_M[kept_M], offsets_N1, self.known_N[keep_N])

    def shuffled(self, generator: np.random.Generator) -> "LabelSet":
        """The images' labels given to each other."""
        return self.taken(generator.permutation(self.n_images))

    def taken(self, order_N: np.ndarray) -> "LabelSet":
        """Image i has the labels of image order_N[i], a permutation."""
        lengths_N = np.diff(self.offsets_N1)
        offsets_N1 = np.concatenate([[0], lengths_N[order_N].cumsum()]).astype(np.int64)
        within_M = np.arange(len(self.labels_M)) - np.repeat(offsets_N1[:-1], lengths_N[order_N])
        labels_M = self.labels_M[np.repeat(self.offsets_N1[:-1][order_N], lengths_N[order_N]) + within_M]
        return LabelSet(self.name, self.names, labels_M, offsets_N1, self.known_N[order_N])


def _labels_of(image: Any) -> set[str] | None:
    if image is None:
        return None
    alone = isinstance(image, str) or getattr(image, "ndim", None) == 0 or not isinstance(image, Iterable)
    # A row of a matrix may be ones and zeros, and is no list of labels.
    listed = [image] if alone else None if hasattr(image, "ndim") or isinstance(image, bytes) else list(image)
    found = [_name(each) for each in listed or []]
    fits = listed is not None and None not in found
    require(fits, f"labels: {shown(image)} is no text or whole number, or several")
    return {name for name in found if name}  # an empty one is no label, as an empty cell is


def _name(label: Any) -> str | None:
    """A text, or a whole number as one, also of an array or a tensor; None of another thing."""
    label = label.item() if getattr(label, "ndim", None) == 0 else label
    whole = isinstance(label, Integral) and not isinstance(label, bool)
    return str(label) if whole or isinstance(label, str) else None


class Marks:
    """Looks among labels, which may come piece by piece, for numbers below 0, with which data sets mark what is not
    labelled; of attributes -1 beside 1 is no. Numbers may be written in any way: -1, -1.00."""

    def __init__(self) -> None:
        self._first, self._ones, self._others = "", set[float](), False

    def add(self, labels: Iterable[str | None]) -> "Marks":
        """Distinct ones will do."""
        for label in labels:
            if not label:
                continue
            number = _number(label)
            if number < 0:
                self._first = self._first or label
            if abs(number) == 1:
                self._ones.add(number)
            else:
                self._others = True
        return self

    def found(self, whole: bool = True) -> str:
        """The first that is none of a class; "" if there is none. whole: no label comes after these."""
        of_attributes = not self._others and (self._ones == {-1, 1} or not whole)
        return "" if of_attributes else self._first


def _number(label: str) -> float:
    """That it says; NaN of a text that is none."""
    try:
        return float(label) if "_" not in label and math.isfinite(float(label)) else math.nan
    except ValueError:
        return math.nan


def _check_marks(name: str, names: Sequence[str], per_image: Sequence[set[str] | None]) -> None:
    """ValueError: numbers below 0."""
    if not (mark := Marks().add(names).found()):
        return
    n = sum(label is not None and mark in label for label in per_image)
    raise ValueError(
        f"labels: {name}: {mark} on {n:,} images is below 0, as unlabelled images are marked; give None where "
        "nothing is known of an image (in a file no line), '' where it has no label (an empty cell), or a class a "
        "name; --labels none leaves out those of a store",
    )


def halves(ids: Sequence[str]) -> np.ndarray:
    """bool [N]: the half for choosing; the other is for reporting. By the images' ids, so that no order matters."""
    return np.array([zlib.crc32(f"half of {each}".encode()) & 1 for each in ids], bool)


@telling_urls()
def read_labels(path: str | os.PathLike[str], ids: Sequence[str]) -> list[LabelSet]:
    """Label sets in a file: .csv with a header, .parquet, each column after the first one a set.

    The first column is the image's id, as the store has it, or the row's number where a matrix has no ids. An id may
    stand in several lines: the image then has several labels. An empty cell is no label, nor is NaN among numbers; an
    image that is in no line is left out. Lines of images that are not there are passed over, with a Doubt if there are
    images without a line as well. Columns without a label of any of the images, and those that LabelSet.of refuses, are
    left out, with a Doubt, if there are others.

    Raises:
        ValueError: no such file, a damaged one, a column twice, none but the first, no line of any of the images, no
            label in any column, numbers below 0 in all that have labels.
        RemoteError: a URL that cannot be read.
    """
    path = fetched(url_of(path)).path if is_url(path) else Path(path)
    require(path.suffix in (".csv", ".parquet"), f"labels: {path} does not end in .csv or .parquet")
    require(path.is_file(), f"labels: {path} is not a file")
    try:
        header, lines = _csv_lines(path) if path.suffix == ".csv" else _parquet_lines(path)
    except (ValueError, OSError, csv.Error) as error:
        raise ValueError(f"labels: {path}: {first_line(error)}") from None
    require(len(header) > 1, f"labels: {path}: columns {header}; an id and at least one column of labels are needed")
    require(len(set(header)) == len(header), f"labels: {path}: a column stands twice in {header}")
    number = {each: i for i, each in enumerate(ids)}
    require(header[0] not in number, f"labels: {path}: the first line is of image {header[0]!r}; a header is needed")
    found: list[list[set[str] | None]] = [[None] * len(ids) for _ in header[1:]]
    stranger, n_strangers = "", 0
    for identity, *cells in lines:
        image = number.get(identity)
        if image is None:
            stranger, n_strangers = stranger or identity, n_strangers + 1
            continue
        for column, cell in zip(found, cells):
            column[image] = (column[image] or set()) | ({cell} if cell else set())
    there = any(each is not None for each in found[0])
    example = f"such as {ids[0]!r}" if len(ids) else ""
    require(there, f"labels: {path}: no line of any of the {len(ids)} images, {example}")
    n_known = sum(each is not None for each in found[0])
    if n_strangers and n_known < len(ids):
        told = f"{n_known:,} of {len(ids):,} images are in it, and {n_strangers:,} of its lines are of none"
        doubt(f"labels: {path}: {told}, such as {stranger!r}")
    labelled = {name: column for name, column in zip(header[1:], found) if any(column)}
    require(len(labelled) > 0, f"labels: {path}: no image has a label in {', '.join(header[1:])}")
    _tell_left_out(path, "no image has a label in it", [name for name in header[1:] if name not in labelled])
    sets, refused = [], {}
    for name, column in labelled.items():
        try:
            with renamed(f"labels: {path}", "labels"):
                sets.append(LabelSet.of(column, name))
        except ValueError as error:
            refused[name] = error
    if not sets:
        raise next(iter(refused.values()))
    _tell_left_out(path, "it has numbers below 0, as unlabelled images are marked", list(refused))
    return sets


def _tell_left_out(path: Path, reason: str, columns: Sequence[str]) -> None:
    if columns:
        more = f" and {len(columns) - 3} more" if len(columns) > 3 else ""
        doubt(f"labels: {path}: left out, as {reason}: {', '.join(columns[:3])}{more}")


def _csv_lines(path: Path) -> tuple[list[str], list[list[str]]]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        header, *lines = [line for line in csv.reader(file, strict=True) if line] or [[]]
    for number, line in enumerate(lines, 2):
        require(len(line) == len(header), f"line {number}: {len(line)} cells; the header has {len(header)}")
    numbers = [all(_is_number(line[i].strip()) for line in lines) for i in range(len(header))]
    stripped = [[_text(cell.strip(), number) for cell, number in zip(line, numbers)] for line in lines]
    return [cell.strip() for cell in header], stripped


def _is_number(cell: str) -> bool:
    """A cell that says nothing is of any column."""
    try:
        return not cell or float(cell) is not None
    except ValueError:
        return False


def _parquet_lines(path: Path) -> tuple[list[str], list[list[str]]]:
    import pyarrow as pa

    from saevlm_fast.data.parquet import open_table, read_text_columns

    try:
        with open_table(path) as file:
            names = list(file.schema_arrow.names)
            table = read_text_columns(file, names)
            numbers = [pa.types.is_floating(field.type) for field in file.schema_arrow]
        columns = [
            [_text(cell, number) for cell in column.to_pylist()] for column, number in zip(table.columns, numbers)
        ]
    except pa.ArrowException as error:
        raise ValueError(first_line(error)) from None
    return names, [list(line) for line in zip(*columns)]


def _text(cell: Any, of_number: bool) -> str:
    text = "" if cell is None else str(cell)
    return "" if of_number and text.lower() == "nan" else text
