"""The command line: what Typer is told of a setting, and what becomes of what it has read."""

import inspect
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_origin

import typer
from rich.markup import escape

from saevlm_fast.cli.config_file import LISTS_OF_TEXTS, read_config, used
from saevlm_fast.cli.names import default_text, flag_of, is_needed, key_of, ordered
from saevlm_fast.errors import require
from saevlm_fast.settings import (
    READERS,
    Listed,
    Setting,
    choices_of,
    kinds_of,
    path_of,
    settings_of,
    several_of,
    title_of,
)


def parameter(cls: Any, name: str, known: Setting) -> inspect.Parameter:
    """What Typer is told of a field. Its default is None: only what was given comes through."""
    kind, choices = kinds_of(cls)[name], choices_of(cls, name)
    brackets = ["required"] if is_needed(cls, name, known) else []
    brackets += [] if (default := default_text(cls, name, known)) is None else [f"default: {default}"]
    text = escape(known.help) + "".join(f"  \\[{each}]" for each in brackets)
    several = ",..." if known.swept else ""
    more: dict[str, Any] = {"help": text, "show_default": False, "rich_help_panel": title_of(cls, name)}
    if kind is Path and not known.positional:
        more |= {"metavar": "PATH"}
    elif choices:
        more |= {
            "metavar": "|".join(choices) + (",..." if known.swept else ""),
            "autocompletion": lambda: list(choices),
        }
    elif get_origin(kind) is tuple:
        more |= {"metavar": "<a,b,...>"}
    elif kind in READERS and known.parse is None:
        more |= {"metavar": f"<{kind.__name__}>{several}"}
    if known.positional:
        told = typer.Argument(None, **more)
    else:
        flag = flag_of(name, known)  # what a file can turn on, the command line can turn off
        told = typer.Option(None, f"{flag}/--no-{flag[2:]}" if kind is bool and known.in_file else flag, **more)
    kind = _typer_kind(kind, known, bool(choices))
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=told, annotation=kind)


def _typer_kind(kind: Any, known: Setting, has_choices: bool) -> Any:
    if get_origin(kind) is tuple:
        return list[str] | None
    # Typer takes "" for the working directory, and does not say which text is no number.
    if has_choices or known.parse is not None or kind is Path or kind in READERS:
        return str | None
    return kind | None


def arguments(name: str, cls: Any, values: Mapping[str, Any]) -> Any:
    """The options of a command, from what Typer has read, and the file of --config if there is one.

    Raises:
        ValueError: what the file, a value or their combination are refused for; what is needed and was not given.
    """
    known = settings_of(cls)
    given = {field: _from_text(cls, field, value) for field, value in values.items() if _was_given(value)}
    from_file = read_config(given["config"], name, cls) if "config" in given else {}
    for field in used(given):
        for other in known[field].instead_of:
            from_file.pop(other, None)
    given = from_file | given
    for field, _ in ordered(cls):
        if is_needed(cls, field, known[field]) and field not in given:
            key, flag = key_of(field, known[field]), flag_of(field, known[field])
            raise ValueError(f"{key}: needed; give {flag}, or {key} in the file of --config")
    return cls.of(given)


def _was_given(value: Any) -> bool:
    return value is not None and value != []


def _from_text(cls: Any, name: str, value: Any) -> Any:
    known = settings_of(cls)[name]
    key = key_of(name, known)
    if kinds_of(cls)[name] is Path:
        return path_of(key, value)
    require(value != "", f"{key}: is empty")
    if known.swept and isinstance(value, str) and "," in value:
        parts = [part.strip() for part in value.split(",")]
        require("" not in parts, f"{key}: {value!r} has a value that is empty")
        return several_of(key, parts, lambda part: _from_text(cls, name, part))
    if known.parse is None:
        return READERS[kind](key, value) if (kind := kinds_of(cls)[name]) in READERS else value
    return known.parse(name, _listed(value, kinds_of(cls)[name]) if isinstance(value, list) else value)


def _listed(values: list[str], kind: Any) -> str:
    """What was given of a list; a path that is there is one value, commas and all."""
    if kind not in LISTS_OF_TEXTS:
        return ",".join(values)
    return Listed(part for each in values for part in ([each] if os.path.exists(each) else each.split(",")))
