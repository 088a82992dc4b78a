"""The TOML file of --config: the settings of a command, checked as those of the command line are."""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from saevlm_fast.cli.names import COMMANDS, key_of
from saevlm_fast.errors import did_you_mean, require
from saevlm_fast.settings import (
    NUMBERS,
    READERS,
    Listed,
    Setting,
    default_of,
    kinds_of,
    path_of,
    settings_of,
    several_of,
)

MADE = "made"  # the table of settings.toml that says how a result was made; nothing is read from it

LISTS_OF_TEXTS = (tuple[str, ...], tuple[Path, ...])  # which may have commas


def read_config(path: Path, name: str, cls: Any) -> dict[str, Any]:
    """The settings of a command in a TOML file: keys at the top, and those of its table, which win.

    Raises:
        ValueError: no TOML; a key that is no setting of the command, with the nearest that is; a value of another kind.
        OSError: it cannot be read.
    """
    require(path.is_file(), f"config: {path} is not a file")
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8-sig"))  # with or without a byte order mark
    except RecursionError:
        raise ValueError(f"{path}: not valid TOML (nested too deeply)") from None
    except ValueError as error:  # no TOML, no UTF-8, or a number of thousands of digits
        raise ValueError(f"{path}: not valid TOML ({error})") from None
    tables = {key: value for key, value in document.items() if isinstance(value, dict)}
    for table in tables:
        near = did_you_mean(table, COMMANDS)
        require(table.replace("_", "-") in COMMANDS or table == MADE, f"{path}: [{table}] is not a command{near}")
    top = {key: value for key, value in document.items() if key not in tables}
    own = next((tables[table] for table in tables if table.replace("_", "-") == name), {})
    others = ", ".join(f"[{table}]" for table in tables if table not in (MADE, name, name.replace("-", "_")))
    require(bool(top or own) or not others, f"{path}: says nothing of {name}, only of {others}")
    top, own = _checked(top, str(path), name, cls), _checked(own, str(path), name, cls)
    for field in used(own):
        for other in settings_of(cls)[field].instead_of:
            top.pop(other, None)
    return top | own


def used(given: Mapping[str, Any]) -> list[str]:
    """What was given and excludes others: a flag that is off does not, nor does a list of nothing."""
    return [field for field, value in given.items() if value is not False and value != ()]


def _checked(table: Mapping[str, Any], where: str, name: str, cls: Any) -> dict[str, Any]:
    """The settings of a table by the names of fields. where: it stands, for messages."""
    settings = {field: known for field, known in settings_of(cls).items() if known.in_file}
    fields = {key_of(field, known): field for field, known in settings.items()} | {field: field for field in settings}
    found: dict[str, Any] = {}
    spelt: dict[str, str] = {}
    for key, value in cls.without_removed(table, where).items():
        field = fields.get(key.replace("-", "_"))
        if field is None:
            raise ValueError(
                f"{where}: {key!r} is not a setting of {name}{did_you_mean(key.replace('-', '_'), fields)}"
            )
        require(field not in found, f"{where}: {spelt.get(field)!r} and {key!r} are one setting; give it once")
        spelt[field] = key
        if value == [] and default_of(cls, field) == ():  # as settings.toml has what was left open
            found[field] = ()
            continue
        if settings[field].tables:
            listed = isinstance(value, list) and len(value) > 0 and all(isinstance(each, dict) for each in value)
            require(listed, f"{where}: {key} is not a list of tables, [[{key}]]")
            tables = [(f"{where}: [[{key}]] {number}", each) for number, each in enumerate(value, 1)]
            found[field] = tuple(_checked(each, where, name, cls) for where, each in tables)
            continue
        found[field] = _from_file(f"{where}: {key}", kinds_of(cls)[field], settings[field], value)
    return found


def _from_file(where: str, kind: Any, known: Setting, value: Any) -> Any:
    """A TOML value as the field has it; lists may also be written as on the command line."""
    if known.swept and isinstance(value, str) and "," in value:
        value = [part.strip() for part in value.split(",")]
        value = [READERS[kind](where, part) for part in value] if kind in READERS and not known.parse else value
    if known.swept and isinstance(value, list):
        require(len(value) > 0, f"{where}: is an empty list")
        return several_of(where, value, lambda part: _from_file(where, kind, known, part))
    if known.parse is not None:
        if isinstance(value, list):
            said = [str(each) for each in value]
            return known.parse(where, Listed(said) if kind in LISTS_OF_TEXTS else ",".join(said))
        require(isinstance(value, str | int | float) and not isinstance(value, bool), f"{where} = {value!r} is no text")
        return known.parse(where, str(value))
    what, accepted = NUMBERS.get(kind, ("a text", str))
    fits = isinstance(value, accepted) and isinstance(value, bool) == (kind is bool)
    require(fits, f"{where} = {value!r} is not {what}")
    require(value != "", f"{where}: is empty")
    return path_of(where, value) if kind is Path else float(value) if kind is float else value
