"""JSON records of ours (cfg.json, index.json, run.json ...): sealed when written, checked when read.

A seal is the last entry of a record, `"sha256"`: the SHA-256 of the file's bytes with these 64 digits as zeros. A
record without a seal is one of another maker or of an older version, and is read as it is. What a record must hold is
said by a schema: a Kind of value, a list (Each) or an object (Fields) of them. Whatever does not fit is one line that
names the file, the entry, its value and what is right.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from saevlm_fast.errors import OtherSettings, first_line, require
from saevlm_fast.files import atomic_write

SEAL = "sha256"
_DEEPEST = 100  # nested lists and objects; ours have seven
LARGEST = 1 << 28  # bytes of a record; the index of ten thousand shards has three million
_ZEROS = "0" * 64
_SEALED = re.compile(rb'"sha256"\s*:\s*"([^"]*)"\s*\}\s*\Z')
_I64 = (1 << 63) - 1


@dataclass(frozen=True)
class Kind:
    """A value for which `fits` holds; `says` is what is right, for messages."""

    says: str
    fits: Callable[[Any], bool]


@dataclass(frozen=True)
class Each:
    """A list of what fits `item`."""

    item: "Schema"


@dataclass(frozen=True)
class Fields:
    """An object with entries that are needed, some that may be absent, and whether there may be others."""

    needed: "Mapping[str, Schema]" = field(default_factory=dict)
    optional: "Mapping[str, Schema]" = field(default_factory=dict)
    others: bool = True


Schema = Kind | Each | Fields


def whole(low: int = 0, high: int = _I64) -> Kind:
    """A whole number, low .. high; neither true nor 1.0."""
    upper = f"{high}" if high < _I64 else "2^63 - 1"
    return Kind(f"a whole number from {low} to {upper}", lambda value: type(value) is int and low <= value <= high)


def optional(kind: Kind) -> Kind:
    """That kind, or null."""
    return Kind(f"{kind.says}, or null", lambda value: value is None or kind.fits(value))


TEXT = Kind("a string", lambda value: isinstance(value, str))
FLAG = Kind("true or false", lambda value: isinstance(value, bool))
NUMBER = Kind("a number", lambda value: isinstance(value, int | float) and not isinstance(value, bool))
RECORD = Kind("an object", lambda value: isinstance(value, dict))
DIGEST = Kind(
    "a SHA-256 of 64 hexadecimal digits",
    lambda value: isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None,
)


def is_name(value: Any) -> bool:
    """Whether a text is the name of a file or directory beside others: what a file of ours may call another by.

    One component of a path, so neither absolute nor with a separator, and neither `.` nor `..`.
    """
    return isinstance(value, str) and Path(value).name == value and value not in ("", ".", "..") and "\0" not in value


FILE_NAME = Kind("the name of a file in the same directory", is_name)


def read_record(
    path: str | os.PathLike[str], schema: Fields, error: type[ValueError] = ValueError, beside_seal: str | None = None
) -> dict[str, Any]:
    """The record in a file, without its seal.

    beside_seal: an entry that is there if and only if the seal is, so that a damaged name of either is seen.

    Raises:
        ValueError: (or `error`) no such file, not JSON, altered since it was sealed, or an entry that does not fit.
        OSError: it cannot be read.
    """
    path = Path(path)
    require(path.is_file(), f"{path}: no such file", error)
    n_bytes = path.stat().st_size
    require(n_bytes <= LARGEST, f"{path}: {n_bytes} bytes; a record has at most {LARGEST}", error)
    data = path.read_bytes()
    value = parse_json(data, path, error)
    require(isinstance(value, dict), f"{path}: it holds {_shown(value)}; an object is needed", error)
    lone = beside_seal is not None and (SEAL in value) != (beside_seal in value)
    require(not lone, f"{path}: altered, it holds only one of {SEAL!r} and {beside_seal!r}", error)
    if SEAL in value:
        _check_seal(data, value.pop(SEAL), path, error)
    check_record(value, schema, path, error)
    return value


def write_record(path: str | os.PathLike[str], value: Mapping[str, Any]) -> None:
    """Writes a sealed record, atomically: strict JSON (no NaN: ValueError), indented, ending in a newline."""
    text = sealed(json.dumps(value, indent=2, allow_nan=False))
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def sealed(text: str) -> str:
    """The text of a JSON object of at least one entry, with its seal."""
    body = text.removesuffix("}").rstrip()
    head, tail = f'{body},\n  "{SEAL}": "', '"\n}\n'
    return f"{head}{hashlib.sha256(f'{head}{_ZEROS}{tail}'.encode()).hexdigest()}{tail}"


def _check_seal(data: bytes, digest: Any, path: Path, error: type[ValueError]) -> None:
    place = _SEALED.search(data)
    whole_file = b"" if place is None else data[: place.start(1)] + _ZEROS.encode() + data[place.end(1) :]
    same = place is not None and hashlib.sha256(whole_file).hexdigest() == digest
    advice = "who changed it on purpose removes that entry, the comma before it, and in cfg.json weights_sha256 too"
    message = f"its {SEAL} is not that of what it holds ({advice})"
    require(same, f"{path}: altered, {message}", error)


def parse_json(data: bytes, where: str | os.PathLike[str], error: type[ValueError] = ValueError) -> Any:
    """Strict JSON in UTF-8: neither NaN nor infinity, nested at most 100 deep. ValueError (or `error`) otherwise."""
    try:
        value = json.loads(data.decode("utf-8"), parse_constant=_refused, parse_float=_finite)
    except (ValueError, RecursionError) as reason:
        raise error(f"{where}: not valid JSON ({first_line(reason)})") from None
    level = [value]
    for _ in range(_DEEPEST):
        level = [inner for outer in level for inner in _inside(outer)]
    require(not level, f"{where}: nested more than {_DEEPEST} deep", error)
    return value


def _inside(value: Any) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []


def _refused(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")


def _finite(text: str) -> float:
    value = float(text)
    require(math.isfinite(value), f"{text[:40]} is too large a number")
    return value


def object_of(value: Any) -> dict[str, Any]:
    """The value if it is an object, else one without entries: free-form parts of records may hold anything."""
    return value if isinstance(value, dict) else {}


def check_record(value: Any, schema: Schema, where: str | os.PathLike[str], error: type[ValueError]) -> None:
    """Raises error naming the first entry that does not fit."""
    problem = _problem(value, schema, "")
    if problem:
        raise error(f"{where}: {problem}")


def _problem(value: Any, schema: Schema, key: str) -> str | None:
    """What is wrong with an entry, or with one in it."""
    if isinstance(schema, Kind):
        return None if schema.fits(value) else f"{key or 'it'} is {_shown(value)}; {schema.says} is needed"
    if isinstance(schema, Each):
        if not isinstance(value, list):
            return f"{key or 'it'} is {_shown(value)}; a list is needed"
        inside = (_problem(item, schema.item, f"{key}[{i}]") for i, item in enumerate(value))
        return next((problem for problem in inside if problem), None)
    if not isinstance(value, dict):
        return f"{key or 'it'} is {_shown(value)}; an object is needed"
    return _problem_of_fields(value, schema, key)


def _problem_of_fields(value: dict[str, Any], schema: Fields, key: str) -> str | None:
    before = f"{key}." if key else ""
    for name, kind in (*schema.needed.items(), *schema.optional.items()):
        if name in value:
            problem = _problem(value[name], kind, before + name)
            if problem:
                return problem
        elif name in schema.needed:
            return f"{before}{name} is missing"
    unknown = [] if schema.others else [name for name in value if name not in {**schema.needed, **schema.optional}]
    return f"{before}{unknown[0]!a:.80} is not an entry of it" if unknown else None


def _shown(value: Any) -> str:
    text = f"an object of {len(value)} entries" if isinstance(value, dict) else ascii(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def check_same_settings(path: Path, settings: Mapping[str, Mapping[str, Any]], free: tuple[str, ...] = ()) -> None:
    """Whether the settings a run was started with (in the record `path`, section -> name -> value) are these.

    free: sections and names that may differ.

    Raises:
        ValueError: a damaged file. OtherSettings: settings that differ.
    """
    stored = read_record(path, Fields(dict.fromkeys(settings, RECORD)))
    differ = [
        (section, name, value, before)
        for section, values in settings.items()
        for name, value in values.items()
        if (before := stored[section].get(name)) != value and not {section, name} & set(free)
    ]
    if differ:
        raise OtherSettings(differ)
