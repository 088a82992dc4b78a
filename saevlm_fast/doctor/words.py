"""Text that may be pasted into an issue: no user, no path of a home or an installation, no token."""

import getpass
import re
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from saevlm_fast.errors import first_line

_TOKEN = re.compile(r"\b(hf|sk|ghp|gho|glpat|api)[_-][A-Za-z0-9_-]{12,}|(?<=://)[^/@\s]+:[^/@\s]+(?=@)")
_LONGEST = 300


def said(error: BaseException) -> str:
    """An error in one line, without what is nobody's business."""
    return anonymous(f"{type(error).__name__}: {first_line(error)}"[:_LONGEST])


def anonymous(value: Any) -> Any:
    """Of JSON: the same, every text in it without names, paths of homes and tokens."""
    if isinstance(value, dict):
        return {anonymous(key): anonymous(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [anonymous(each) for each in value]
    if not isinstance(value, str):
        return value
    text = _TOKEN.sub("***", value)
    for path, name in _places():
        text = text.replace(path, name)
    text = re.sub(r"(/home/|/Users/)[^/\s:'\"]+", r"\1***", text)
    user = _user()
    return re.sub(rf"(?<![A-Za-z0-9]){re.escape(user)}(?![A-Za-z0-9])", "***", text) if user else text


def _places() -> list[tuple[str, str]]:
    """Paths that say where somebody works, the longest first."""
    places = {sys.prefix: "<python>", str(Path(__file__).parents[2]): "<packages>", str(Path.cwd()): "."}
    with suppress(RuntimeError):  # no home
        places[str(Path.home())] = "~"
    return sorted(((path, name) for path, name in places.items() if len(path) > 1), key=lambda item: -len(item[0]))


def _user() -> str | None:
    """root is nobody's name."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError, ImportError):
        return None
    return None if user == "root" or len(user) < 2 else user
