"""Images and labels in the columns of a table: one rule, whatever the container (parquet, save_to_disk, ...).

The image column is the first of these that is there; of several of a kind, the one called image:

    declared      an Image in the features that datasets leaves in the schema
    struct        with a field bytes, as datasets stores images
    binary        encoded images
    text          paths: the first value ends like an image's name

A cell's bytes count, else the file at its path, relative to the folder of the table. The label column is the first of
LABEL_NAMES that holds text, whole numbers or truth values, else the ClassLabel with most classes.
"""

import json
import os
import re
from collections.abc import Callable
from typing import Any

import pyarrow as pa

from saevlm_fast.errors import ImageError, first_line
from saevlm_fast.images.samples import label_text
from saevlm_fast.images.sources import LABEL_NAMES, is_image, not_empty, read_file


def declared_features(schema: pa.Schema, where: str) -> dict[str, dict[str, Any]]:
    """{column: feature} as datasets left them in the schema's metadata. ValueError: damaged."""
    try:
        info = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        features = info.get("info", {}).get("features", {}).items()
        return {name: f for name, f in features if isinstance(f, dict) and name in schema.names}
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"images: {where}: damaged Hugging Face metadata: {first_line(error)}") from error


def image_column(schema: pa.Schema, first_values: Callable[[str], list[Any]], where: str) -> str:
    """The column that holds the images. first_values: of a column, some from the top.

    Raises:
        ValueError: none, or several and none called image.
    """
    declared = [name for name, feature in declared_features(schema, where).items() if feature.get("_type") == "Image"]
    structs = [f.name for f in schema if pa.types.is_struct(f.type) and f.type.get_field_index("bytes") >= 0]
    binary = [f.name for f in schema if _is_binary(f.type)]
    found = declared or structs or binary
    if not found:
        texts = [f.name for f in schema if is_text(f.type)]
        found = [name for name in texts if any(is_image(value) for value in first_values(name) if value)]
    if len(found) != 1 and "image" not in found:
        names = ", ".join(schema.names)
        what = f"several image columns ({', '.join(found)})" if found else f"no image column among {names}"
        raise ValueError(f"images: {where}: {what}; one is needed, or one called image")
    return "image" if "image" in found else found[0]


def stored_path(cell: Any) -> str | None:
    """The path in a cell, if there is one."""
    path = cell.get("path") if isinstance(cell, dict) else cell
    return path if isinstance(path, str) and path else None


def image_bytes(cell: Any, folder: str) -> bytes:
    """The encoded image of a cell: None, bytes, a path, or a struct of both. folder: what paths are relative to.

    Raises:
        ImageError: neither bytes nor a path, empty bytes, a path that cannot be read.
    """
    data = cell.get("bytes") if isinstance(cell, dict) else cell
    if isinstance(data, bytes):
        return not_empty(data)
    path = stored_path(cell)
    if path is None:
        raise ImageError("neither bytes nor a path is stored")
    if re.match(r"\w+://", path):
        raise ImageError("an address, not a file; download it first")
    try:
        return read_file(os.path.join(folder, path))
    except ImageError as error:
        raise ImageError(f"no bytes are stored, but a path: {error}") from None


class LabelColumn:
    """Which column of a table holds the labels, and how a value of it is called.

    Attributes:
        name: the column, None where there is none.
        note: for the user: which one was taken of several, or why there is none; None where the choice is plain.
    """

    def __init__(self, schema: pa.Schema, where: str):
        features = declared_features(schema, where)
        self._classes = {n: _class_names(f, where) for n, f in features.items() if f.get("_type") == "ClassLabel"}
        called = [name for name in LABEL_NAMES if name in schema.names]
        named = [name for name in called if _can_be_label(schema.field(name).type)]
        declared = sorted(self._classes, key=lambda name: -len(self._classes[name]))
        candidates = list(dict.fromkeys(named + declared))
        self.name = candidates[0] if candidates else None
        others = [name for name in dict.fromkeys(called + declared) if name != self.name]
        self.note: str | None = None
        if self.name is None:
            reason = f"{', '.join(called)}: not text, numbers or truth values" if called else "no ClassLabel either"
            self.note = f"no labels: looked for a column {', '.join(LABEL_NAMES)} ({reason})"
        elif others:
            self.note = f"labels come from column {self.name}; not used: {', '.join(others)}"
        elif self.name not in ("label", *self._classes):
            self.note = f"labels come from column {self.name}"

    def text(self, value: Any) -> str | None:
        """The class's name; -1 is how a test split says that there is none."""
        names = self._classes.get(self.name or "")
        if names is None or not isinstance(value, int):
            return label_text(value)
        return names[value] if 0 <= value < len(names) else None


def _class_names(feature: dict[str, Any], where: str) -> list[str]:
    names = feature.get("names")
    if not isinstance(names, list):
        raise ValueError(f"images: {where}: damaged Hugging Face metadata: a ClassLabel without names")
    return [str(name) for name in names]


def _values(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def is_text(kind: pa.DataType) -> bool:
    """Columns of text, a dictionary of it included."""
    kind = _values(kind)
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _is_binary(kind: pa.DataType) -> bool:
    kind = _values(kind)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


def _can_be_label(kind: pa.DataType) -> bool:
    return is_text(kind) or pa.types.is_integer(_values(kind)) or pa.types.is_boolean(kind)
