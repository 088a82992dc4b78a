"""Settings that name something on this machine, as settings.toml has them: the same from any directory.

A Path is made absolute whatever it is. A text may be a path or something else, a word, a name on the Hub, a template:
what it is, is known by the name of its setting, which means the same in every command.
"""

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from saevlm_fast.formats.places import is_remote
from saevlm_fast.urls import is_url, redacted_text

_TABLES = (".csv", ".parquet", ".json")
_NO_PLACE = re.compile(r"scenes:|hf-dataset:")  # before what images are made by, or called on the Hub
_MADE_HERE = {"control_sae": Path("untrained")}  # Paths that are words, where no directory is called so
_MODEL_OF_DIRECTORY = re.compile(r"(hf:|(?:open_clip|timm):local-dir:)(.+)", re.DOTALL)
_MODEL_OF_FILE = re.compile(r"(open_clip:(?!hf-hub:)[^/]*/|timm:(?:hf-hub:)?[^:]+:)(.+)", re.DOTALL)


def placed(name: str, value: Any) -> Any:
    """The value of a setting, or one of its values: what it names on this machine by its absolute path, a URL without
    its secrets."""
    if isinstance(value, Path):
        stays = is_remote(value) or (value == _MADE_HERE.get(name) and not value.is_dir())
        return str(value if stays else value.absolute())
    return redacted_text(PLACES.get(name, str)(value)) if isinstance(value, str) else value


def _path(text: str) -> str:
    """Of what is there; a font may also be one of the system's, by its name."""
    return _absolute(text) if not is_url(text) and os.path.exists(text) else text


def _table(text: str) -> str:
    """FILE, or FILE:COLUMN; a word is no file, though one may be called so."""
    path, _, column = text.rpartition(":")
    if path.endswith(_TABLES):
        return f"{_path(path)}:{column}"
    return _path(text) if text.endswith(_TABLES) else text


def _images(text: str) -> str:
    """Also DIR::SPLIT, and patterns of names."""
    elsewhere = is_url(text) or text == "none" or (_NO_PLACE.match(text) and not os.path.exists(text))
    return text if elsewhere else _absolute(text)


def _model(text: str) -> str:
    """PREFIX:DIR or PREFIX:NAME:FILE; a model of the box is none of a directory of its name.

    What follows NAME is a file of weights, or a word of open_clip or timm, whatever lies here that is called so.
    """
    from saevlm_fast.box.models import MODELS
    from saevlm_fast.towers.hub import WEIGHT_FILES

    if found := _MODEL_OF_DIRECTORY.fullmatch(text):
        return text if found[2] in MODELS else found[1] + _path(found[2])
    found = _MODEL_OF_FILE.fullmatch(text)
    is_file = found is not None and found[2].endswith(WEIGHT_FILES) and os.path.isfile(found[2])
    return found[1] + _absolute(found[2]) if found is not None and is_file else text


def _assumption(text: str) -> str:
    """KEY=VALUE, where input_mean may be a file."""
    key, _, value = text.partition("=")
    return f"{key}={_path(value)}" if key == "input_mean" else text


def _absolute(text: str) -> str:
    return str(Path(text).absolute())


PLACES: Mapping[str, Callable[[str], str]] = {
    **dict.fromkeys(("sae", "embeddings", "codes", "scores", "names", "steering", "fonts", "test_fonts"), _path),
    **dict.fromkeys(("labels", "what", "also", "groups", "class_prompts", "captions"), _table),
    **dict.fromkeys(("images", "test_images", "validation_images"), _images),
    **dict.fromkeys(("model", "text_model", "clip"), _model),
    "assume": _assumption,
}
