"""Image sources: a path becomes numbered images.

`open_images` understands, with ids that are unique and an order that no file system or locale can change:

    DIR                        folder of images, sorted by relative POSIX path; id = that path, label = its directory
    LIST.txt                   one path a line, optionally TAB and a label; id = the path as written
    X.tar, *.tar, {000..012}   webdataset shards, read in place; id = member, or shard.tar/member of several shards
    DIR, DIR::SPLIT            datasets.save_to_disk; id = the stored path if every row has its own, else the row
    DIR, DIR::SPLIT, *.parquet Hugging Face parquet shards; id = the stored path likewise, else file.parquet/row
    scenes:SPLIT:N[:SEED]      scenes of the box, drawn as they are read (SPLIT: train, test, novel)

The sources themselves are in images/sources.py, images/tars.py, images/tables.py and images/scenes.py.
"""

import glob
import os
import re

from saevlm_fast.errors import require
from saevlm_fast.images.scenes import PREFIX, open_scenes
from saevlm_fast.images.sources import (
    IMAGE_SUFFIXES,
    FolderSource,
    ImageSource,
    is_image,
    open_list,
    refuse_split,
    walk,
)
from saevlm_fast.images.tables import open_parquet, open_saved_dataset
from saevlm_fast.images.tars import open_tars


def open_images(path: str | os.PathLike[str]) -> ImageSource:
    """Finds the images at `path` (see the module's docstring) and reads none of them.

    In folders, names that begin with a dot (.ipynb_checkpoints, ._AppleDouble) are ignored, symbolic links are
    followed, loops are not. Memory and time: one pass over names, labels and offsets.

    Raises:
        ValueError: in one line: anything that is no source; a truncated or otherwise damaged tar archive or parquet
            file, which is refused as a whole.
    """
    name, split = _split_of(os.fspath(path))
    if name.startswith(PREFIX) and not os.path.exists(name):
        refuse_split(name, split)
        return open_scenes(name)
    if os.path.isdir(name):
        return _open_directory(name, split)
    files = sorted(set(_expand(name)))
    if all(file.lower().endswith(".parquet") for file in files):
        return open_parquet(files, name, split)
    refuse_split(name, split)
    if len(files) == 1 and name.lower().endswith(".txt"):
        return open_list(files[0])
    if all(re.search(r"\.tar(\.\w+)?$|\.tgz$", file.lower()) for file in files):
        return open_tars(files, name)
    raise ValueError(f"images: {path}: not a folder, a list (.txt), .tar or .parquet files")


def _split_of(path: str) -> tuple[str, str]:
    """DIR::SPLIT -> (DIR, SPLIT); a file that is really called so stays whole."""
    name, separator, split = path.rpartition("::")
    return (path, "") if os.path.exists(path) or not separator else (name, split)


def _open_directory(folder: str, split: str) -> ImageSource:
    if os.path.isfile(os.path.join(folder, "dataset_dict.json")) or os.path.isfile(os.path.join(folder, "state.json")):
        return open_saved_dataset(folder, split)
    images, tars, tables, n_other = _scan(folder)
    if images:
        refuse_split(folder, split)
        return FolderSource(folder, images, n_other + len(tars) + len(tables))
    if tars:
        refuse_split(folder, split)
        return open_tars([os.path.join(folder, file) for file in sorted(tars)], folder)
    if tables:
        return open_parquet([os.path.join(folder, file) for file in sorted(tables)], folder, split)
    raise ValueError(
        f"images: {folder}: no image among its {n_other} files; looked for {' '.join(IMAGE_SUFFIXES)}, .tar, .parquet"
    )


def _scan(folder: str) -> tuple[list[str], list[str], list[str], int]:
    """All files below a folder as relative POSIX paths: (images, .tar files, .parquet files, number of others)."""
    images: list[str] = []
    tars: list[str] = []
    tables: list[str] = []
    n_others = 0
    for file in walk(folder, "", ()):
        if is_image(file):
            images.append(file)
        elif file.lower().endswith(".tar"):
            tars.append(file)
        elif file.lower().endswith(".parquet"):
            tables.append(file)
        else:
            n_others += 1
    return images, tars, tables, n_others


def _expand(pattern: str) -> list[str]:
    """{000..012} first, then * ? []; everything named must be there."""
    files: list[str] = []
    for name in _expand_braces(pattern):
        found = [name] if os.path.exists(name) else glob.glob(name, recursive=True)
        require(len(found) > 0, f"images: {name}: no such file or folder")
        files += found
    return files


def _expand_braces(pattern: str) -> list[str]:
    match = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if match is None or os.path.exists(pattern):
        return [pattern]
    first, last, width = int(match[1]), int(match[2]), len(match[1])
    head, tail = pattern[: match.start()], pattern[match.end() :]
    fits = first <= last < first + 1_000_000
    require(fits, f"images: {pattern}: the range {match[0]} must ascend and have at most 1000000 members")
    return [name for number in range(first, last + 1) for name in _expand_braces(f"{head}{number:0{width}d}{tail}")]
