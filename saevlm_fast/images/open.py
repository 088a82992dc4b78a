"""Image sources: a path becomes numbered images.

`open_images` understands, with ids that are unique and an order that no file system or locale can change:

    DIR                        folder of images, sorted by relative POSIX path; id = that path, label = its directory
    LIST.txt                   one path a line, optionally TAB and a label; id = the path as written
    LIST.csv, LIST.jsonl       a record a line with fields of path, label and caption (images/listed.py)
    X.tar, *.tar, {000..012}   webdataset shards, read in place; id = member, or shard.tar/member of several shards
                               (images/samples.py: which members are images, which are labels)
    DIR, DIR::SPLIT            datasets.save_to_disk; id = the stored path if every row has its own, else the row
    DIR, DIR::SPLIT, *.parquet Hugging Face parquet shards; id = the stored path likewise, else file.parquet/row
    scenes:SPLIT:N[:SEED]      scenes of the box, drawn as they are read (SPLIT: train, test, novel)
    s3://..., https://..., hf://datasets/USER/NAME   the same by URL, but save_to_disk (images/remote.py)
    hf-dataset:USER/NAME:CONFIG::SPLIT   a data set on the Hub by its name (images/hub_datasets.py)
    [...]                      in Python, a list of PIL images, arrays, bytes and paths (images/given.py)

Columns of images and labels follow one rule, images/columns.py. Bytes of a file name that are not UTF-8 are written as
\\xNN in ids. The sources themselves are in images/sources.py, images/tars.py, images/tables.py and images/scenes.py.
"""

import glob
import os
import re
from collections.abc import Sequence
from typing import TypeAlias

from saevlm_fast.errors import check_kind, renamed, require
from saevlm_fast.images import hub_datasets
from saevlm_fast.images.given import GivenImage, GivenImages
from saevlm_fast.images.listed import open_fields
from saevlm_fast.images.remote import open_remote_images
from saevlm_fast.images.scenes import PREFIX, open_scenes
from saevlm_fast.images.sources import (
    IMAGE_SUFFIXES,
    FolderSource,
    ImageSource,
    is_image,
    open_list,
    refuse_split,
    require_regular,
    walk,
)
from saevlm_fast.images.tables import ParquetSource, open_parquet, open_saved_dataset
from saevlm_fast.images.tars import TarSource, open_tars
from saevlm_fast.urls import is_url, url_of

Images: TypeAlias = str | os.PathLike[str] | Sequence[GivenImage] | ImageSource  # a list or a tuple
_KINDS = {".tar": "tars", ".parquet": "tables", ".tgz": "packed", ".zip": "packed"}
_KINDS |= dict.fromkeys((".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst", ".tar.lz4"), "packed")


def open_images(path: Images) -> ImageSource:
    """Finds the images at `path` (see the module's docstring) and reads none of them. What is opened stays as it is.

    In folders, names that begin with a dot (.ipynb_checkpoints, ._AppleDouble) are ignored, symbolic links are
    followed, loops are not. Memory and time: one pass over names, labels and offsets.

    Nothing waits: named pipes, sockets and devices are refused where a list, an archive or a table should be, and are
    unusable images in a folder or a list. Bounds, looked at before anything is read: sources.MAX_IMAGE_BYTES of an
    image, tables.MAX_RATIO of a parquet row group, data.parquet.MAX_TEXT_BYTES of a file's names and labels.

    Raises:
        ValueError: in one line: anything that is no source; a truncated or otherwise damaged tar archive or parquet
            file, which is refused as a whole. RemoteError: what is elsewhere and cannot be read.
    """
    if isinstance(path, ImageSource):
        return path
    if not isinstance(path, str | os.PathLike):
        check_kind("images", path, (list, tuple), "a path, a list of images, or what open_images gives")
        return GivenImages(path)
    if is_url(path):
        url, _, split = url_of(path).partition("::")
        return open_remote_images(url, _expand_braces(url), split)
    if os.fspath(path).startswith(hub_datasets.PREFIX) and not os.path.exists(path):
        return hub_datasets.open_hub_dataset(os.fspath(path))
    name, split = _split_of(os.fspath(path))
    if name.startswith(PREFIX) and not os.path.exists(name):
        refuse_split(name, split)
        return open_scenes(name)
    if os.path.isdir(name):
        return _open_directory(name, split)
    files = sorted(set(_expand(name)))
    for file in files:
        require_regular(file)
    if all(file.lower().endswith(".parquet") for file in files):
        return open_parquet(files, name, split)
    refuse_split(name, split)
    if len(files) == 1 and name.lower().endswith(".txt"):
        return open_list(files[0])
    if len(files) == 1 and name.lower().endswith((".csv", ".jsonl")):
        return open_fields(files[0])
    if all(re.search(r"\.tar(\.\w+)?$|\.tgz$", file.lower()) for file in files):
        return open_tars(files, name)
    raise ValueError(f"images: {path}: not a folder, a list (.txt, .csv, .jsonl), .tar or .parquet files")


def open_held_out(images: str | None, trained_on: str) -> ImageSource | None:
    """The images that an SAE is evaluated on, none of None.

    ValueError: what open_images refuses; the images that are `trained_on`.
    """
    if images is None:
        return None
    with renamed("validation_images", "images"):
        here = os.path.exists(images) and os.path.exists(trained_on)
        same = os.path.samefile(images, trained_on) if here else images == trained_on != ""  # "": of a list
        require(not same, f"{images}: are what is trained on; without these the SAE is evaluated on such rows too")
        return open_images(images)


def _split_of(path: str) -> tuple[str, str]:
    """DIR::SPLIT -> (DIR, SPLIT); a file that is really called so stays whole."""
    name, separator, split = path.rpartition("::")
    return (path, "") if os.path.exists(path) or not separator else (name, split)


def _open_directory(folder: str, split: str) -> ImageSource:
    if os.path.isfile(os.path.join(folder, "dataset_dict.json")) or os.path.isfile(os.path.join(folder, "state.json")):
        return open_saved_dataset(folder, split)
    found = _scan(folder)
    n_other = sum(map(len, found.values())) - len(found["images"])
    used = next((kind for kind in ("images", "tars", "tables") if found[kind]), None)
    if used is None:
        raise ValueError(f"images: {folder}: no image among its {n_other} files; {_what_works(found['packed'])}")
    if used != "tables":
        refuse_split(folder, split)
    if used == "images":
        source: FolderSource | TarSource | ParquetSource = FolderSource(folder, found["images"], n_other)
    else:
        shards = [os.path.join(folder, file) for file in sorted(found[used])]
        for shard in shards:
            require_regular(shard)
        source = open_tars(shards, folder) if used == "tars" else open_parquet(shards, folder, split)
    for kind, what in (("tars", ".tar"), ("tables", ".parquet"), ("packed", "compressed archives")):
        if kind != used and found[kind]:
            source.notes += (f"beside the {used} in {folder}, not used: {what} ({len(found[kind]):,})",)
    return source


def _what_works(packed: list[str]) -> str:
    if packed:
        return f"{len(packed)} are compressed archives ({min(packed)}, ...): unpack them, or uncompress them to .tar"
    return f"looked for {' '.join(IMAGE_SUFFIXES)}, .tar, .parquet"


def _scan(folder: str) -> dict[str, list[str]]:
    """All files below a folder as relative POSIX paths, by kind: images, tars, tables, packed (archives), others."""
    found: dict[str, list[str]] = {"images": [], "tars": [], "tables": [], "packed": [], "others": []}
    for file in walk(folder, "", ()):
        found[_kind(file)].append(file)
    return found


def _kind(file: str) -> str:
    name = file.rpartition("/")[2].lower()
    if is_image(file):
        return "images"
    if name.startswith("."):
        return "others"
    return next((kind for ending, kind in _KINDS.items() if name.endswith(ending)), "others")


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
