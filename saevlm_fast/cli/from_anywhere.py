"""Settings that name something on this machine, as settings.toml has them: the same from any directory.

A Path is made absolute whatever it is. A text may be a path or something else, a word, a name on the Hub, a template:
its setting says of what kind it is (`place`).
"""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from saevlm_fast.formats.places import is_remote
from saevlm_fast.settings import Setting
from saevlm_fast.urls import is_url, redacted_text

_Parts = tuple[str, str, str]  # a text: what stands before the path in it, the path, what stands behind
_TABLES = (".csv", ".parquet", ".json")
_NO_PLACE = re.compile(r"scenes:|hf-dataset:")  # before what images are made by, or called on the Hub
_MADE_HERE = {"control_sae": Path("untrained")}  # Paths that are words, where no directory is called so
_MODEL_OF_DIRECTORY = re.compile(r"(hf:|(?:open_clip|timm):local-dir:)(.+)", re.DOTALL)
_MODEL_OF_FILE = re.compile(r"(open_clip:(?!hf-hub:)[^/]*/|timm:(?:hf-hub:)?[^:]+:)(.+)", re.DOTALL)


def placed(name: str, known: Setting, value: Any) -> Any:
    """The value of a setting, or one of its values: what it names on this machine by its absolute path, a URL without
    its secrets."""
    if isinstance(value, Path):
        stays = is_remote(value) or (value == _MADE_HERE.get(name) and not value.is_dir())
        return str(value if stays else value.absolute())
    if not isinstance(value, str):
        return value
    before, path, after = _parts(known, value)
    return redacted_text(before + (str(Path(path).absolute()) if path else "") + after)


def path_in(known: Setting, value: Any) -> Path | None:
    """What a value of a setting names on this machine, or would name; None if that is nothing."""
    path = _parts(known, value)[1] if isinstance(value, str) else value
    return Path(path) if path and isinstance(path, str | Path) and not is_remote(Path(path)) else None


def _parts(known: Setting, text: str) -> _Parts:
    return _KINDS[known.place](text) if known.place is not None else (text, "", "")


def _path(text: str) -> _Parts:
    """Of what is there; a font may also be one of the system's, by its name."""
    return ("", text, "") if not is_url(text) and os.path.exists(text) else (text, "", "")


def _table(text: str) -> _Parts:
    """FILE, or FILE:COLUMN; a word is no file, though one may be called so."""
    path, _, column = text.rpartition(":")
    if path.endswith(_TABLES):
        return *_path(path)[:2], f":{column}"
    return _path(text) if text.endswith(_TABLES) else (text, "", "")


def _images(text: str) -> _Parts:
    """Also DIR::SPLIT, and patterns of names."""
    is_here = os.path.exists(text)
    if is_url(text) or text == "none" or (_NO_PLACE.match(text) and not is_here):
        return text, "", ""
    path, colons, split = (text, "", "") if is_here else text.partition("::")
    return "", path, colons + split


def _model(text: str) -> _Parts:
    """PREFIX:DIR or PREFIX:NAME:FILE; a model of the box is none of a directory of its name.

    What follows NAME is a file of weights, or a word of open_clip or timm, whatever lies here that is called so.
    """
    from saevlm_fast.box.models import MODELS
    from saevlm_fast.towers.hub import WEIGHT_FILES

    if found := _MODEL_OF_DIRECTORY.fullmatch(text):
        is_here = found[2] not in MODELS and not is_url(found[2]) and os.path.exists(found[2])
    else:
        found = _MODEL_OF_FILE.fullmatch(text)
        is_here = found is not None and found[2].endswith(WEIGHT_FILES) and os.path.isfile(found[2])
    return (found[1], found[2], "") if found is not None and is_here else (text, "", "")


def _assumption(text: str) -> _Parts:
    """KEY=VALUE, where input_mean may be a file."""
    key, _, value = text.partition("=")
    before, path, after = _path(value) if key == "input_mean" else (value, "", "")
    return f"{key}={before}", path, after


_KINDS: dict[str, Callable[[str], _Parts]] = {
    "path": _path,
    "table": _table,
    "images": _images,
    "model": _model,
    "assumption": _assumption,
}
