"""Images that are elsewhere: the same sources as of this machine, of files that are fetched when they are needed.

    s3://bucket/DIR                       folder of images, else of tars, else of parquet files
    URL of LIST.txt                       each line relative to the list, or a URL
    URL of a tar, {000..012}, *           an archive is fetched to be indexed, and again if the cache has let it go
    URL of a parquet file, the same       names and labels are read when it is opened, all of it with its first image
    hf://datasets/USER/NAME[::SPLIT]      the parquet shards of a data set on the Hub, in its own order, one after the
                                          other: what datasets calls streaming, but every row has its number

A web server has no list of its files: folders and * are for stores of objects and the Hub.
"""

import os
import posixpath
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq

from saevlm_fast.data.parquet import open_table, open_table_in
from saevlm_fast.errors import require
from saevlm_fast.images.sources import ImageSource, Names, directory_of, is_image, list_lines, read_image, refuse_split
from saevlm_fast.images.tables import open_parquet
from saevlm_fast.images.tars import open_tars
from saevlm_fast.remote.cache import telling_urls
from saevlm_fast.remote.files import RemoteFiles
from saevlm_fast.remote.hub import is_hub, place_of
from saevlm_fast.remote.ranges import RangeFile
from saevlm_fast.remote.reading import at_commits, listed, look_up, read_whole
from saevlm_fast.urls import child, redacted, sibling

MAX_LIST_BYTES = 1 << 30
SMALL = 1 << 20  # bytes of a parquet file that is fetched as a whole to be indexed
_HELD = 2  # archives that a process keeps: the one that is read, and the next


class RemoteFolder(Names):
    """Files below a folder of a store of objects."""

    def __init__(self, url: str, names: list[str], n_ignored: int, shown: str):
        self._url = url
        super().__init__(shown, names, [directory_of(name) for name in names], n_ignored)

    def read(self, i: int) -> bytes:
        return read_image(child(self._url, self.image_id(i)))


class RemoteList(Names):
    """Files that a list names, which is elsewhere."""

    def __init__(self, url: str, paths: list[str], labels: list[str | None]):
        self._url, self._paths = url, paths
        super().__init__(redacted(url), [redacted(path) for path in paths], labels)

    def read(self, i: int) -> bytes:
        return read_image(sibling(self._url, self._paths[i]))


def open_remote_images(url: str, names: list[str], split: str) -> ImageSource:
    """The images at a URL, without reading any; names: what its {000..012} stand for.

    Raises:
        ValueError: anything that is no source. RemoteError: it cannot be read.
    """
    urls = at_commits([each for name in names for each in _named(name)])
    with telling_urls():
        source = _open(urls, redacted(url), split)
    if is_hub(url):
        place = place_of(url)
        root = place._replace(revision="").url("")
        source.notes += tuple(filter(None, [unpinned_note(root, place.revision, urls[0])]))
    return source


def unpinned_note(repository: str, revision: str, pinned: str) -> str:
    """For the user: at which commit a repository on the Hub is read, unless that was said. pinned: a URL at it."""
    commit = place_of(pinned).revision
    again = f"{repository}@{commit[:10]}" if commit != revision else ""
    return f"{repository} is read as it is now; to read the same later, write {again}" if again else ""


def _open(urls: list[str], shown: str, split: str) -> ImageSource:
    ending = _path(urls[0]).lower()
    if len(urls) == 1 and ending.endswith(".txt"):
        refuse_split(shown, split)
        paths, labels = list_lines(read_whole(urls[0], MAX_LIST_BYTES), shown)
        return RemoteList(urls[0], paths, labels)
    if all(_path(each).lower().endswith((".tar", ".parquet")) for each in urls):
        return _open_archives(sorted(set(urls)), shown, split)
    require(len(urls) == 1, f"images: {shown}: not lists (.txt), .tar or .parquet files, nor one folder")
    return _open_folder(urls[0], shown, split)


@telling_urls()
def open_files(urls: list[str], shown: str, column: str = "") -> ImageSource:
    """The images in files of one kind, in their order: images, tars or parquet files. column: that of the images in a
    parquet file, where it has several. ValueError: a column of files that have none."""
    if not is_image(urls[0]):
        return _open_archives(urls, shown, None, column)
    require(column == "", f"images: {shown}: has no columns, but {column!r} was asked for")
    names = _relative(urls)
    return RemoteFolder(urls[0].removesuffix(f"/{names[0]}"), names, 0, shown)


def _named(url: str) -> list[str]:
    """The files of a pattern; anything else is itself. The ? of the web begins a query."""
    if url.startswith(("http://", "https://")) or not any(sign in url for sign in "*?["):
        return [url]
    found = listed(url)
    require(len(found) > 0, f"images: {redacted(url)}: no such file")
    return found


def _open_folder(url: str, shown: str, split: str) -> ImageSource:
    found, below = listed(url), f"{url.rstrip('/')}/"
    kinds = {
        "images": [each for each in found if is_image(each)],
        ".tar": [each for each in found if each.lower().endswith(".tar")],
        ".parquet": [each for each in found if each.lower().endswith(".parquet")],
    }
    used = next((kind for kind in kinds if kinds[kind]), None)
    if used is None:
        raise ValueError(f"images: {shown}: no image, .tar or .parquet among its {len(found)} files")
    if used == "images":
        refuse_split(shown, split)
        names = sorted(each.removeprefix(below) for each in kinds[used])
        return RemoteFolder(url, names, len(found) - len(names), shown)
    source = _open_archives(sorted(kinds[used]), shown, split)
    others = {kind: len(files) for kind, files in kinds.items() if kind != used and files}
    source.notes += tuple(f"beside the {used}, not used: {kind} ({n:,})" for kind, n in others.items())
    return source


def _open_archives(urls: list[str], shown: str, split: str | None, column: str = "") -> ImageSource:
    """split: None for all of them, whatever they are called."""
    relative = _relative(urls)
    files = RemoteFiles(urls, [None] * len(urls), _local, most=_HELD)
    if all(_path(each).lower().endswith(".parquet") for each in urls):
        return open_parquet(files, shown, split, relative, column, lambda number: _table(files, number))
    tars = all(_path(each).lower().endswith(".tar") for each in urls)
    require(tars, f"images: {shown}: .tar and .parquet files; one kind is needed")
    require(
        not split and not column,
        f"images: {shown}: has no {'splits' if split else 'columns'}, but {split or column!r} was asked for",
    )
    return open_tars(files, shown, relative)


def _table(files: RemoteFiles[str], number: int) -> pq.ParquetFile:
    """A file for its names and labels: by ranges, where it is large and that is possible."""
    url = files.urls[number]
    found = look_up(url)
    files.expect(number, found.version)
    if not found.by_ranges or found.size is None or found.size < SMALL:
        return open_table(files[number])
    return open_table_in(lambda: pa.PythonFile(RangeFile(url, found), mode="r"), found.size)


def _local(file: Path, number: int) -> str:
    return os.fspath(file)


def _path(url: str) -> str:
    return unquote(urlsplit(url).path)


def _relative(urls: list[str]) -> list[str]:
    """Paths below the folder that they have in common, as sources.relative_paths."""
    paths = [f"/{urlsplit(url).netloc.rpartition('@')[2]}{_path(url)}" for url in urls]
    common = posixpath.commonpath([posixpath.dirname(path) for path in paths])
    return [posixpath.relpath(path, common) for path in paths]
