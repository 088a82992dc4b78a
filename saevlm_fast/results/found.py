"""Results as they lie on the disk: found, told, checked.

A result is known by what it holds: the columns of its table or the entries of its JSON, which kinds.py lists. What made
it stands in a settings.toml in it or beside it (made.py), and of a table also in its metadata. A picture or a page is
known by its settings alone. What has no settings any more is described without.
"""

import os
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.csv as pa_csv

from saevlm_fast.data.parquet import open_table
from saevlm_fast.errors import first_line, require
from saevlm_fast.files import human_bytes
from saevlm_fast.look.tables import read_table
from saevlm_fast.measures.parts import finished_measures
from saevlm_fast.measures.results import Figures, plain
from saevlm_fast.records import LARGEST, Fields, object_of, read_record
from saevlm_fast.results.kinds import EVALUATION, RESULTS, Result
from saevlm_fast.results.made import around, misfit_of, record_of

SUFFIXES = (".parquet", ".csv", ".json")

Held = Any  # a pyarrow.Table, or a record


class Found(NamedTuple):
    """A result, be it a damaged one, before its numbers are looked at.

    Attributes:
        path: of the result. contents: of it, or of its main file. kind: as its columns or entries tell; None of a
            picture or a page. damage: why they tell nothing. recorded: by the settings beside it.
    """

    path: Path
    contents: "_Contents"
    kind: Result | None
    damage: ValueError | None
    recorded: tuple[Result, Figures, Figures] | None


def find(path: Path) -> Found | None:
    """A result, and what was read to know it, so that it is read once; None of what is none."""
    main = _main_file(path)
    if path.is_dir() and main == path:
        return None
    contents, kind, damage = _Contents(main), None, None
    try:
        kind = contents.kind()
    except (OSError, ValueError) as error:
        damage = error if isinstance(error, ValueError) else ValueError(f"{main}: {first_line(error)}")
    recorded = record_of(path, RESULTS if kind is None else (kind,), *around(path, kind))
    is_one = kind is not None or recorded is not None or isinstance(damage, _TooLarge)
    return Found(path, contents, kind, damage, recorded) if is_one else None


def describe(found: Found) -> dict[str, Any]:
    """What inspect says of a result beside its path and size: what, command, figures, metadata, settings and made.

    "misfit": why the settings beside it are not its own, and not told, as where a table was replaced without them.

    Raises:
        ValueError: it is damaged.
    """
    if found.damage is not None:
        raise found.damage
    kind, figures, metadata = found.kind, None, {}
    if kind is not None:
        try:
            held = found.contents.held(kind.columns)
            figures, metadata = kind.figures(held), _metadata(held)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, pa.ArrowException) as error:
            reason = f"damaged, it is not what {kind.command} writes ({first_line(error)})"
            # Without its settings it may as well be somebody else's that has such columns or entries.
            doubt = "" if found.recorded else "no result of a command, or "
            raise ValueError(f"{found.path}: {doubt}{reason}") from None
    told, settings, made = found.recorded or (kind, {}, {})
    assert told is not None
    misfit = misfit_of(metadata, settings, made)
    if misfit is not None:
        settings, made = {}, {}
    return ({} if misfit is None else {"misfit": misfit}) | {
        "what": told.what,
        "command": told.command,
        "figures": plain(object_of(made.get("resolved")) if figures is None else figures),
        "metadata": metadata,
        "settings": settings,
        "made": made,
    }


def describe_cut(path: Path) -> dict[str, Any] | None:
    """The same of an evaluation that was cut short, and "finished": by subject, measures; None where there is none."""
    finished = finished_measures(path)
    if not finished or _main_file(path) != path:
        return None
    _, settings, made = record_of(path, (EVALUATION,)) or (EVALUATION, {}, {})
    said = {"what": EVALUATION.what, "command": EVALUATION.command, "settings": settings, "made": made}
    return said | {"figures": {}, "metadata": {}, "finished": finished}


def check_whole(path: Path) -> None:
    """Reads every table and every record of a result. ValueError: which one is damaged."""
    for file in sorted(each for each in (path.rglob("*") if path.is_dir() else [path]) if each.suffix in SUFFIXES):
        _Contents(file).held()


def _main_file(path: Path) -> Path:
    files = [path / each.file for each in RESULTS if each.file is not None] if path.is_dir() else []
    return next((file for file in files if file.is_file()), path)


class _TooLarge(ValueError):
    """JSON that is not read: whose it is stays unknown."""


class _Contents:
    """A file that may be a result. JSON is read once, however often it is asked; of a table, first its columns alone,
    for it may be anybody's, and large."""

    def __init__(self, path: Path):
        self.path = path
        self._record: dict[str, Any] | None = None

    def kind(self) -> Result | None:
        """By the columns of a table, or the entries of a record; None of another file. ValueError: it is damaged."""
        is_one = self.path.suffix in SUFFIXES and self.path.is_file()  # a pipe would wait for ever
        names = set(self._names()) if is_one else set()
        return next((each for each in RESULTS if names.issuperset(each.entries)), None)

    def held(self, columns: tuple[str, ...] = ()) -> Held:
        """The table, or the record; JSON may be a record of a table's metadata and rows. ValueError: neither.

        columns: of a table, if they are enough.
        """
        if self.path.suffix != ".json":
            return read_table(self.path, columns)
        record = self._json()
        if not _is_table(record):
            return record
        try:
            table = pa.Table.from_pylist(record["latents"])
        except (pa.ArrowException, TypeError, AttributeError) as error:
            raise ValueError(f"{self.path}: not a table of latents: {first_line(error)}") from None
        return table.replace_schema_metadata({name: str(value) for name, value in record["metadata"].items()})

    def _names(self) -> list[str]:
        """Of columns or entries."""
        if self.path.suffix == ".json":
            record = self._json()
            rows = record["latents"] if _is_table(record) else [record]
            return list(rows[0]) if rows and isinstance(rows[0], dict) else []
        try:
            if self.path.suffix == ".parquet":
                with open_table(self.path) as file:
                    return list(file.schema_arrow.names)
            with pa.OSFile(os.fsencode(self.path)) as file, pa_csv.open_csv(file) as reader:
                return list(reader.schema.names)
        except (OSError, ValueError, pa.ArrowException) as error:
            raise ValueError(f"{self.path}: not a table: {first_line(error)}") from None

    def _json(self) -> dict[str, Any]:
        if self._record is None:
            size = self.path.stat().st_size
            message = f"{self.path}: {human_bytes(size)} of JSON; at most {human_bytes(LARGEST)} are read to know whose"
            require(size <= LARGEST, message, _TooLarge)
            self._record = read_record(self.path, Fields())
        return self._record


def _is_table(record: dict[str, Any]) -> bool:
    return isinstance(record.get("metadata"), dict) and isinstance(record.get("latents"), list)


def _metadata(held: Held) -> dict[str, str]:
    if isinstance(held, dict):
        return {}
    return {key.decode(): value.decode() for key, value in (held.schema.metadata or {}).items() if key != b"pandas"}
