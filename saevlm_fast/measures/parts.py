"""Finished measures on disk: one SAE x measure a part, written atomically, known again by what went into it.

parts/SUBJECT/MEASURE.json             {"version", "key", "figures"}; written last: where it is, the part is whole
parts/SUBJECT/MEASURE.latents.parquet  columns of the measure, one row a latent, if it has any
parts/SUBJECT/MEASURE.pairs.parquet    kind, latent, rank, other, value, support, if it has any
"""

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from saevlm_fast.errors import first_line, while_writing
from saevlm_fast.files import atomic_write, write_json_atomic
from saevlm_fast.measures.results import MEASURES, PARTS_VERSION, Measured, plain

PARTS = "parts"
COMPARED = "compared-with-"  # begins the name of what is measured of two SAEs
_TABLES = ("latents", "pairs")


def key_of(**made_of: Any) -> str:
    """SHA-256 of everything that a part follows from.

    The version is that of all parts: with one of its own, a command would make them anew and not know why.
    """
    followed = {**made_of, "version": PARTS_VERSION}
    return hashlib.sha256(json.dumps(followed, sort_keys=True, default=str).encode()).hexdigest()


def file_name(name: str) -> str:
    """A subject's name as files have it; one of other letters than these is told apart by a digest."""
    found = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "unnamed"
    if re.fullmatch(r"[A-Za-z0-9._ /-]+", name):
        return found
    return f"{found}-{hashlib.sha256(name.encode(errors='surrogateescape')).hexdigest()[:8]}"


def finished_measures(directory: Path) -> dict[str, list[str]]:
    """subject, as files have its name -> its finished measures below a directory; empty if there are none."""
    found: dict[str, list[str]] = {}
    for file in sorted((directory / PARTS).glob("*/*.json")):
        if file.stem in MEASURES or file.stem.startswith(COMPARED):
            found.setdefault(file.parent.name, []).append(file.stem)
    return found


class Parts:
    """Finished measures below a directory; in memory without one.

    tell: is told, once, that there are some of another version of this program, which are made anew.
    on_first: is called once, when the first one has been written.
    """

    def __init__(
        self,
        directory: Path | None,
        tell: Callable[[str], None] = lambda text: None,
        on_first: Callable[[], None] = lambda: None,
    ) -> None:
        self.directory, self._tell, self._on_first = directory, tell, on_first
        self._told = self._has_written = False

    def read(self, subject: str, measure: str, key: str) -> Measured | None:
        """The part that was made of the same, None if there is none, or it is damaged: it is then made anew."""
        if self.directory is None:
            return None
        stem = self._stem(subject, measure)
        try:
            document = json.loads(stem.with_name(f"{stem.name}.json").read_text(encoding="utf-8"))
            if not isinstance(document, dict) or document.get("key") != key:
                self._tell_of_version(document)
                return None
            tables = [_read_columns(stem.with_name(f"{stem.name}.{which}.parquet")) for which in _TABLES]
            return Measured(_with_nan(document["figures"]), *tables)
        except (OSError, ValueError, KeyError, RecursionError, pa.ArrowException):
            return None

    def _tell_of_version(self, document: Any) -> None:
        version = document.get("version") if isinstance(document, dict) else PARTS_VERSION
        if version != PARTS_VERSION and not self._told:
            self._told = True
            self._tell(
                f"{self.directory}: what is finished there is of another version of this program (parts of version "
                f"{version}, here {PARTS_VERSION}): it is made anew"
            )

    def write(self, subject: str, measure: str, key: str, measured: Measured) -> None:
        """The tables first, then what makes them a part."""
        if self.directory is None:
            return
        stem = self._stem(subject, measure)
        kept = "measures that were finished before it are kept, and --resume goes on with them"
        with while_writing(f"{measure} of {subject}", kept):
            self._write(stem, measured, {"version": PARTS_VERSION, "key": key, "figures": plain(measured.figures)})
        if not self._has_written:
            self._has_written = True
            self._on_first()

    def _write(self, stem: Path, measured: Measured, document: dict[str, Any]) -> None:
        stem.parent.mkdir(parents=True, exist_ok=True)
        json_file = stem.with_name(f"{stem.name}.json")
        json_file.unlink(missing_ok=True)
        for which, columns in zip(_TABLES, (measured.latents, measured.pairs)):
            path = stem.with_name(f"{stem.name}.{which}.parquet")
            path.unlink(missing_ok=True)
            if columns:
                write_columns(path, columns)
        write_json_atomic(json_file, document)

    def _stem(self, subject: str, measure: str) -> Path:
        assert self.directory is not None
        return self.directory / PARTS / file_name(subject) / measure


def write_columns(path: Path, columns: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> None:
    """A parquet table, atomically."""
    table = pa.table({name: pa.array(column) for name, column in columns.items()})
    table = table.replace_schema_metadata(dict(metadata or {}))
    with atomic_write(path) as temporary:
        pq.write_table(table, temporary)


def _read_columns(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        return {}
    try:
        with pq.ParquetFile(path) as file:
            table = file.read()
    except pa.ArrowException as error:
        raise ValueError(first_line(error)) from None
    return {name: table[name].to_numpy() for name in table.column_names}


def _with_nan(value: Any) -> Any:
    """null of JSON is a number that is not defined, but for k, which may be none."""
    if isinstance(value, dict):
        return {key: None if key == "k" and each is None else _with_nan(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_with_nan(each) for each in value]
    return math.nan if value is None else value
