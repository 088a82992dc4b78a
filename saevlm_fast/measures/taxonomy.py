"""A taxonomy: the path of every label from the root down, and how deep the last node is that two labels share.

A file is JSON, {"label": path}, or CSV, a line `label,node,node,...` each, the root first. A node is a text, or a list
of texts of which the first is its name (["n02120997", "feline"]). A label of several paths, as WordNet has them, is
{"paths": [path, path]}: then the deepest node that any two of the paths share counts.
"""

import csv
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from saevlm_fast.errors import check_kind, first_line, require, shown

_MOST_LABELS = 20_000  # with several paths, whose depths are a matrix


@dataclass(frozen=True)
class Taxonomy:
    """Paths of labels.

    Attributes:
        paths: label -> its paths, each the nodes from the root down.
        origin: where they are from, for messages and records.
    """

    paths: Mapping[str, tuple[tuple[str, ...], ...]]
    origin: str = "paths"

    @classmethod
    def of(cls, paths: Mapping[str, Sequence[str]], origin: str = "paths") -> "Taxonomy":
        """One path a label. ValueError: a path that is empty."""
        check_kind("paths", paths, Mapping, "a mapping of labels to paths")
        for label, path in paths.items():
            nodes = isinstance(path, list | tuple) and all(isinstance(node, str) for node in path)
            require(nodes, f"paths: {shown(path)} of {shown(label)} is not a sequence of texts")
            require(len(path) > 0, f"taxonomy: {origin}: the path of {label!r} is empty")
        return cls({label: (tuple(path),) for label, path in paths.items()}, origin)

    @property
    def is_tree(self) -> bool:
        """Whether each label has one path."""
        return all(len(paths) == 1 for paths in self.paths.values())

    def nodes(self, labels: Sequence[str]) -> np.ndarray:
        """int64 [L, depth]: at each depth the number of the node on each label's first path, -1 below its end.

        A node is told apart by all that is above it: nodes of one name on different paths are different.
        """
        firsts = [self.paths[label][0] for label in labels]
        depth = max((len(path) for path in firsts), default=0)
        found = np.full((len(labels), depth), -1, np.int64)
        for d in range(depth):
            known: dict[tuple[str, ...], int] = {}
            for i, path in enumerate(firsts):
                if len(path) > d:
                    found[i, d] = known.setdefault(path[: d + 1], len(known))
        return found

    def depths(self, labels: Sequence[str]) -> np.ndarray:
        """int64 [L, L]: the depth of the deepest node that two labels share on any of their paths.

        Raises:
            ValueError: too many labels of several paths.
        """
        require(len(labels) <= _MOST_LABELS, f"taxonomy: {len(labels)} labels of several paths; {_MOST_LABELS} at most")
        found = np.zeros((len(labels), len(labels)), np.int64)
        depth = max((len(path) for label in labels for path in self.paths[label]), default=0)
        for d in range(depth):
            below: dict[tuple[str, ...], set[int]] = {}
            for i, label in enumerate(labels):
                for path in self.paths[label]:
                    if len(path) > d:
                        below.setdefault(path[: d + 1], set()).add(i)
            for members in below.values():
                found[np.ix_(list(members), list(members))] = d + 1
        return found


def read_taxonomy(path: str | os.PathLike[str]) -> Taxonomy:
    """The taxonomy in a .json or .csv file.

    Raises:
        ValueError: another suffix, no such file, a damaged one, a path that is none, a label twice with other paths.
    """
    path = Path(path)
    require(path.suffix in (".json", ".csv"), f"taxonomy: {path} does not end in .json or .csv")
    require(path.is_file(), f"taxonomy: {path} is not a file")
    try:
        text = path.read_text(encoding="utf-8-sig")
        found = _from_json(text) if path.suffix == ".json" else _from_csv(text)
    except (ValueError, RecursionError, csv.Error) as error:
        raise ValueError(f"taxonomy: {path}: {first_line(error)}") from None
    require(len(found) > 0, f"taxonomy: {path}: no label in it")
    return Taxonomy(found, str(path))


def _from_json(text: str) -> dict[str, tuple[tuple[str, ...], ...]]:
    document = json.loads(text)
    require(isinstance(document, dict), "no object of labels")
    return {label: _paths(label, value) for label, value in document.items()}


def _paths(label: str, value: Any) -> tuple[tuple[str, ...], ...]:
    several: Any = value.get("paths") if isinstance(value, dict) else [value]
    require(isinstance(several, list) and len(several) > 0, f"{label!r}: {value!r:.60} is not a path")
    return tuple(_path(label, each) for each in several)


def _path(label: str, value: Any) -> tuple[str, ...]:
    require(isinstance(value, list) and len(value) > 0, f"{label!r}: {value!r:.60} is not a path of nodes")
    nodes: list[Any] = [node[0] if isinstance(node, list) and node else node for node in value]
    require(all(isinstance(node, str) and node for node in nodes), f"{label!r}: a node of {value!r:.60} is not a text")
    return tuple(nodes)


def _from_csv(text: str) -> dict[str, tuple[tuple[str, ...], ...]]:
    found: dict[str, tuple[tuple[str, ...], ...]] = {}
    for number, line in enumerate(csv.reader(text.splitlines(), strict=True), 1):
        if not line:
            continue
        label, *nodes = (cell.strip() for cell in line)
        path = tuple(node for node in nodes if node)
        require(bool(label and path), f"line {number}: a label and at least one node are needed")
        require(found.get(label, (path,)) == (path,), f"line {number}: {label!r} had another path before")
        found[label] = (path,)
    return found
