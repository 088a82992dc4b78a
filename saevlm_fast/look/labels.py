"""Classes of images from a file, in place of those that a store has."""

from pathlib import Path

from saevlm_fast.errors import require
from saevlm_fast.images.sources import MAX_LINE


def read_labels(path: Path) -> dict[str, str]:
    """Image id -> class, from UTF-8 lines `IMAGE TAB CLASS`; empty lines are left out.

    Raises:
        ValueError: it cannot be read, or a line has no tab.
    """
    require(path.is_file(), f"labels: {path} is not a file")
    found: dict[str, str] = {}
    try:
        with open(path, encoding="utf-8-sig") as lines:
            for number, line in enumerate(iter(lambda: lines.readline(MAX_LINE), ""), 1):
                image, tab, label = line.rstrip("\r\n").partition("\t")
                if image or tab:
                    fits = bool(tab) and bool(label) and len(line) < MAX_LINE
                    require(fits, f"labels: {path}: line {number} is not IMAGE TAB CLASS")
                    found[image] = label
    except UnicodeDecodeError as error:
        raise ValueError(f"labels: {path}: not UTF-8 text: {error.reason} at byte {error.start}") from error
    require(len(found) > 0, f"labels: {path} has no lines")
    return found
