"""Lists of images with fields: a .csv file with a header, or .jsonl, a JSON object a line.

The path of an image is in the first of PATH_NAMES, relative to the list's folder; its label in the first of
sources.LABEL_NAMES, its caption in the first of captions.CAPTION_NAMES. Other fields are left alone.
"""

import csv
import json
from collections.abc import Iterator, Mapping
from typing import Any

from saevlm_fast.errors import require
from saevlm_fast.images.captions import caption_field
from saevlm_fast.images.samples import label_text
from saevlm_fast.images.sources import LABEL_NAMES, MAX_LINE, ListSource

PATH_NAMES = ("file_name", "filename", "image", "path", "image_path", "filepath", "file")
_MAX_ROW = 1 << 20  # characters of a line: a caption may be longer than a path


def open_fields(file: str) -> ListSource:
    """The images that a .csv or .jsonl list names.

    Raises:
        ValueError: no field of a path, a line that is no record, a path of MAX_LINE characters, no UTF-8.
    """
    paths: list[str] = []
    labels: list[str | None] = []
    captions: list[str | None] = []
    try:
        for number, row in _records(file):
            where = f"images: {file}: line {number}"
            path = next((row[name] for name in PATH_NAMES if row.get(name)), None)
            require(isinstance(path, str), f"{where}: no path in a field {', '.join(PATH_NAMES)}")
            require(len(str(path)) < MAX_LINE, f"{where} is no path: {MAX_LINE} characters or more")
            paths.append(str(path))
            labels.append(next((text for name in LABEL_NAMES if (text := label_text(row.get(name))) is not None), None))
            captions.append(caption_field(row))
    except UnicodeDecodeError as error:
        raise ValueError(f"images: {file}: not UTF-8 text: {error.reason} at byte {error.start}") from error
    return ListSource(file, paths, labels, captions)


def _records(file: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Every record with the number of its line."""
    with open(file, encoding="utf-8-sig", newline="") as lines:
        if file.lower().endswith(".csv"):
            reader = csv.DictReader(_bounded(file, lines))
            try:
                for row in reader:
                    yield reader.line_num, row
            except csv.Error as error:
                raise ValueError(f"images: {file}: line {reader.line_num}: {error}") from error
            return
        for number, line in enumerate(_bounded(file, lines), 1):
            if line.strip():
                yield number, _json_record(line, f"images: {file}: line {number}")


def _json_record(line: str, where: str) -> Mapping[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: no JSON") from error
    require(isinstance(record, dict), f"{where}: no JSON object")
    return record


def _bounded(file: str, lines: Any) -> Iterator[str]:
    for number, line in enumerate(iter(lambda: lines.readline(_MAX_ROW), ""), 1):
        require(len(line) < _MAX_ROW, f"images: {file}: line {number}: {_MAX_ROW} characters or more")
        yield line
