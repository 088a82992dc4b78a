"""What `erase` asks of images: which are of use, a label of each, texts of the classes, words that are drawn."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from saevlm_fast.errors import first_line, renamed, require

if TYPE_CHECKING:
    from saevlm_fast.data.label_sets import LabelSet
    from saevlm_fast.images.sources import ImageSource

SCENE = "scene:"
COLUMNS = ("label", "text", "word", "test_word")


def labels_of(argument: str, spec: str, source: "ImageSource", numbers: Sequence[int]) -> "LabelSet":
    """One label of each image, or none of some. ValueError: no such labels, several of an image."""
    from saevlm_fast.data.label_sets import LabelSet, read_labels

    ids = [source.image_id(i) for i in numbers]
    if spec == "images":
        found = LabelSet.of([source.label(i) for i in numbers], "images")
    elif spec.startswith(SCENE):
        found = LabelSet.of(_of_scenes(argument, spec.removeprefix(SCENE), ids), spec)
    else:
        path, _, column = spec.rpartition(":")
        require(path != "", f"{argument}: {spec!r} is not images, scene:FACTOR or FILE.csv:COLUMN")
        with renamed(argument, "labels"):
            sets = {each.name: each for each in read_labels(path, ids)}
        require(column in sets, f"{argument}: {path} has no column {column!r}, but {', '.join(sets)}")
        found = sets[column]
    found.single()
    return found


def _of_scenes(argument: str, factor: str, ids: list[str]) -> list[str | None]:
    """Of factors of objects, the value of scenes with a single one."""
    from saevlm_fast.box.scenes import OBJECT_FACTORS, SCENE_FACTORS, VALUES
    from saevlm_fast.images.scenes import scene_labels

    require(factor in VALUES, f"{argument}: {factor!r} is not one of {', '.join(VALUES)}")
    objects_NOF, setting_N3 = scene_labels(ids)
    names = VALUES[factor]
    if factor in SCENE_FACTORS:
        return [names[v] for v in setting_N3[:, SCENE_FACTORS.index(factor)]]
    single_N = (objects_NOF[:, :, 0] >= 0).sum(1) == 1
    values_N = objects_NOF[:, 0, OBJECT_FACTORS.index(factor)]
    return [names[v] if one else None for v, one in zip(values_N, single_N)]


def class_texts(spec: str, names: Sequence[str], template: str) -> list[str]:
    """A text of each class."""
    if not spec.startswith(SCENE):
        require("{}" in template, f"class_prompts: {template!r} has no {{}} for the label")
        return [template.replace("{}", name) for name in names]
    from saevlm_fast.box.scenes import VALUES, value_prompts

    factor = spec.removeprefix(SCENE)
    said = dict(zip(VALUES[factor], value_prompts(factor)))
    return [said[name] for name in names]


@dataclass(frozen=True)
class ClassWords:
    """Of each label by column what stands for it: the text that the model is told, the words that are drawn."""

    path: Path
    columns: dict[str, dict[str, str]]

    def of(self, column: str, names: Sequence[str]) -> list[str] | None:
        """None where the file has no such column. ValueError: a label that is not in it."""
        found = self.columns.get(column)
        if found is None:
            return None
        missing = [name for name in names if name not in found]
        require(not missing, f"class_words: {self.path} has no line of the label {missing[:1]}")
        said = [found[name] for name in names]
        twice = [each for each in said if said.count(each) > 1]
        alike = f"class_words: {self.path}: the {column} {twice[:1]} is that of {len(twice)} labels"
        require(not twice, f"{alike}; each needs its own")
        return said


def read_class_words(path: Path) -> ClassWords:
    """A CSV file with a column label and one of text, word, test_word at least.

    Raises:
        ValueError: no such file, other columns, a label twice, an empty cell.
    """
    require(path.is_file(), f"class_words: {path} is not a file")
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            header, *lines = [[cell.strip() for cell in line] for line in csv.reader(file, strict=True) if line] or [[]]
    except (OSError, ValueError, csv.Error) as error:
        raise ValueError(f"class_words: {path}: {first_line(error)}") from None
    require(header != [], f"class_words: {path} is empty; its columns are label and some of text, word, test_word")
    known = "label" in header and len(header) > 1 and set(header) <= set(COLUMNS) and len(set(header)) == len(header)
    require(known, f"class_words: {path} has the columns {', '.join(header)}; label and some of text, word, test_word")
    columns: dict[str, dict[str, str]] = {name: {} for name in header if name != "label"}
    for number, line in enumerate(lines, 2):
        whole = len(line) == len(header) and all(line)
        require(whole, f"class_words: {path}: line {number} needs {len(header)} cells, none empty")
        cells = dict(zip(header, line))
        for name, column in columns.items():
            require(cells["label"] not in column, f"class_words: {path}: {cells['label']!r} stands twice")
            column[cells["label"]] = cells[name]
    return ClassWords(path, columns)
