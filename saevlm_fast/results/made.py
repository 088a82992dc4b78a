"""What made a result: the settings in it or beside it, which a command has left (cli/record.py)."""

import os
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from saevlm_fast.measures.results import Figures
from saevlm_fast.records import object_of
from saevlm_fast.results.kinds import Result

SETTINGS_FILE = "settings.toml"  # of cli/record.py, which stands above
_MADE = "made"
_OF = ("sae", "activations", "codes", "embeddings")  # paths that a table and its settings name


def has_record(path: Path) -> bool:
    """Whether settings lie beside a file."""
    return _beside(path).is_file()


def is_record(path: Path) -> bool:
    """Whether something is the settings of a result, not the result."""
    return path.name == SETTINGS_FILE or path.name.endswith(f".{SETTINGS_FILE}")


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.name}.{SETTINGS_FILE}")


def around(path: Path, kind: Result | None) -> Iterator[Path]:
    """Settings of the file, or of directories, that a file may be a part of, as tables of an evaluation are."""
    if kind is not None and path.is_file():
        if kind.beside is not None:
            yield _beside(kind.beside(path))
        yield from (folder / SETTINGS_FILE for folder in path.absolute().parents[:2])


def record_of(path: Path, kinds: tuple[Result, ...], *also: Path) -> tuple[Result, Figures, Figures] | None:
    """Which of `kinds` has its settings in a result, beside it or in `also`; these, and by what it was made."""
    own = path / SETTINGS_FILE if path.is_dir() else _beside(path)
    for file in (own, *also):
        try:
            document = tomllib.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            continue  # what a result holds is told without
        for kind in kinds:
            if isinstance(document.get(kind.command), dict):
                return kind, document[kind.command], object_of(document.get(_MADE))
    return None


def misfit_of(metadata: dict[str, str], settings: Figures, made: Figures) -> str | None:
    """What a table says that it is of, where the settings beside it say otherwise."""
    directory = str(made.get("directory", ""))
    for name in _OF if "calls" not in made else ():  # of one that was resumed the place of each call is not known
        said, asked = metadata.get(name), settings.get(name)
        places: list[Any] = asked if isinstance(asked, list) else [asked]
        if said is None or not places or not all(isinstance(each, str) for each in places):
            continue
        if not _are_same(said.split(","), places, directory):
            return f"{name} is {said} in it, and {', '.join(places)} in {SETTINGS_FILE}"
    return None


def _are_same(pieces: list[str], places: list[str], directory: str) -> bool:
    """Whether what stands between commas names the places, of which each may have commas itself."""
    if not places:
        return not pieces
    for n in range(1, len(pieces) + 1):
        named = ",".join(pieces[:n])
        for each in {named, named.removeprefix(" ")}:  # ms-score has a blank after the comma
            is_it = each == places[0] or _normal(directory, each) == _normal(directory, places[0])
            if is_it and _are_same(pieces[n:], places[1:], directory):
                return True
    return False


def _normal(directory: str, name: str) -> str:
    return os.path.normpath(os.path.join(directory, name))
