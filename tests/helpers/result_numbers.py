"""The numbers that a command wrote, to compare two of its results by."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from saevlm_fast.results import found as results


def numbers_in(path: Path) -> list[float]:
    """Of a result that `inspect` knows; none of any other."""
    found = results.find(path)
    return list(_numbers_of(results.describe(found)["figures"])) if found else []


def _numbers_of(figures: Any) -> Iterator[float]:
    """In its order."""
    if isinstance(figures, dict):
        figures = list(figures.values())
    for each in figures if isinstance(figures, list) else [figures]:
        if isinstance(each, dict | list):
            yield from _numbers_of(each)
        elif isinstance(each, int | float):
            yield each
