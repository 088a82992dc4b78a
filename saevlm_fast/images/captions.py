"""Captions: the text that belongs to an image, for models that read both. Where it stands is one rule for each source:

    scenes                the scene in words
    tar shards            NAME.txt, else NAME.caption, else a field of NAME.json
    parquet, save_to_disk a column; of a list of texts (five captions a photo) the first
    LIST.csv, LIST.jsonl  a column, or a field, beside the one of the path
    LIST.txt              what stands behind the TAB
    folder                NAME.txt beside the image, else a field of NAME.json

Fields and columns are those of CAPTION_NAMES, the first that is there, in capitals or not.
"""

import json
import os
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

CAPTION_NAMES = ("caption", "captions", "text", "txt", "sentence", "sentences", "description", "alt_text", "alttext")
MAX_CAPTION_BYTES = 1 << 20  # of one image; the longest window of a model is far below


def caption_text(value: Any) -> str | None:
    """A caption of any container: a text that says something, or the first of a list of texts."""
    if isinstance(value, list | tuple):
        value = next(iter(value), None)
    return value.strip() or None if isinstance(value, str) else None


def caption_field(record: Mapping[str, Any]) -> str | None:
    """The caption in a JSON object or a row, by the name of its field."""
    by_name = {name.lower(): value for name, value in reversed(list(record.items())) if isinstance(name, str)}
    found = (caption_text(by_name.get(name)) for name in CAPTION_NAMES)
    return next((text for text in found if text is not None), None)


def caption_of_file(data: bytes, is_json: bool) -> str | None:
    """The caption in a text or JSON file of one image. JSON that is no object says nothing."""
    text = data.decode(errors="backslashreplace")
    if not is_json:
        return caption_text(text)
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return caption_field(record) if isinstance(record, dict) else None


def caption_column(schema: pa.Schema) -> str | None:
    """The column of a table that holds captions: texts, or lists of them."""
    by_name = {field.name.lower(): field for field in reversed(list(schema))}
    for name in CAPTION_NAMES:
        field = by_name.get(name)
        if field is not None and _is_text_or_list(field.type):
            return field.name
    return None


def _is_text_or_list(kind: pa.DataType) -> bool:
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        kind = kind.value_type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def caption_beside(path: str) -> str | None:
    """The caption in NAME.txt or NAME.json beside the image NAME.jpg."""
    stem = os.path.splitext(path)[0]
    for suffix in (".txt", ".json"):
        file = stem + suffix
        if os.path.isfile(file) and os.path.getsize(file) <= MAX_CAPTION_BYTES:
            with open(file, "rb") as opened:
                text = caption_of_file(opened.read(), is_json=suffix == ".json")
            if text is not None:
                return text
    return None
