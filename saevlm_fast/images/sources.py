"""Folders and lists of images: numbered, named, labelled, read one by one; and what every source shares.

Ids and labels live in Arrow arrays: forked workers share them, for no reference count is ever touched. Sources open
their files lazily; they may be forked, pickled and read from several threads.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import pyarrow as pa
import pyarrow.compute as pc

from saevlm_fast.errors import ImageError, require

_SUFFIXES = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "PNG": (".png", ".apng"),
    "WEBP": (".webp",),
    "AVIF": (".avif",),
    "GIF": (".gif",),
    "BMP": (".bmp", ".dib"),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm", ".pfm"),
    "JPEG2000": (".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"),
}
IMAGE_SUFFIXES = tuple(suffix for suffixes in _SUFFIXES.values() for suffix in suffixes)


class ImageSource(Protocol):
    """N numbered images. `n_ignored`: files or members that were met but are no images of this source."""

    n_ignored: int

    def __len__(self) -> int: ...

    def image_id(self, i: int) -> str:
        """The unique, stable name of image i."""

    def label(self, i: int) -> str | None:
        """The class of image i, if it has one."""

    def read(self, i: int) -> bytes:
        """The encoded image i. Raises ImageError (missing, empty, damaged) or OSError."""

    def fingerprint(self) -> str:
        """SHA-256 (hexadecimal) of all ids and labels in order: the same again means the same images in that order."""


class Names:
    """Ids and labels of N images, lean."""

    def __init__(self, name: str, ids: Iterable[str], labels: Iterable[str | None], n_ignored: int = 0):
        self.name, self.n_ignored = name, n_ignored
        self._ids = _strings(ids)
        self._labels = _strings(labels).dictionary_encode()
        require(len(self._ids) > 0, f"images: {name}: no images in it")
        if pc.count_distinct(self._ids).as_py() != len(self._ids):
            counts = pc.value_counts(self._ids)
            twice = counts.field("values").filter(pc.greater(counts.field("counts"), 1))
            raise ValueError(f"images: {name}: image ids must be unique; {twice[0].as_py()!r} comes more than once")

    def __len__(self) -> int:
        return len(self._ids)

    def image_id(self, i: int) -> str:
        return self._ids[i].as_py()

    def label(self, i: int) -> str | None:
        return self._labels[i].as_py()

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for strings in (self._ids, self._labels.cast(pa.large_string())):
            # Lengths before bytes: no two lists of strings look the same, whatever the strings hold.
            digest.update(pc.binary_length(strings).fill_null(-1).to_numpy(zero_copy_only=False).astype("<i8"))
            for start in range(0, len(strings), 1 << 16):
                digest.update("".join(s or "" for s in strings[start : start + (1 << 16)].to_pylist()).encode())
        return digest.hexdigest()


def _strings(values: Iterable[str | None]) -> pa.LargeStringArray:
    values = list(values) if not isinstance(values, list) else values
    try:
        return pa.array(values, pa.large_string())
    except UnicodeEncodeError as error:
        raise ValueError(f"images: a file name is not valid UTF-8: {error.object!r}; rename it") from error


def is_image(name: str) -> bool:
    base = name.rpartition("/")[2]
    return base.lower().endswith(IMAGE_SUFFIXES) and not base.startswith(".")


def directory_of(path: str) -> str | None:
    return path.rpartition("/")[0] or None


def not_empty(data: bytes) -> bytes:
    require(len(data) > 0, "empty file", ImageError)
    return data


def read_file(path: str) -> bytes:
    # Not is-it-there by trying: opening a named pipe would wait for ever.
    require(os.path.isfile(path), "no such file, or not a regular one", ImageError)
    try:
        with open(path, "rb") as file:
            return not_empty(file.read())
    except PermissionError as error:  # other errors (too many files, a lost network drive) are not this image's
        raise ImageError(f"unreadable: {error.strerror or error}") from error


def refuse_split(name: str, split: str) -> None:
    require(split == "", f"images: {name}: has no splits, but {split!r} was asked for")


def relative_paths(files: Sequence[str]) -> list[str]:
    """POSIX paths of the files below the directory that they have in common."""
    common = os.path.commonpath([os.path.dirname(os.path.abspath(file)) for file in files])
    return [os.path.relpath(file, common).replace(os.sep, "/") for file in files]


class FolderSource(Names):
    """Files below a folder."""

    def __init__(self, folder: str, files: list[str], n_ignored: int):
        self._folder = os.path.abspath(folder)
        files.sort()  # by code point, whatever the locale
        super().__init__(folder, files, [directory_of(file) for file in files], n_ignored)

    def read(self, i: int) -> bytes:
        return read_file(os.path.join(self._folder, self.image_id(i)))


def walk(folder: str, prefix: str, above: tuple[tuple[int, int], ...]) -> Iterator[str]:
    """Depth first. A directory that is its own ancestor, through a symbolic link, is not entered again."""
    status = os.stat(folder)
    here = (status.st_dev, status.st_ino)
    if here in above:
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if not _is_directory(entry):
                yield prefix + entry.name
            elif not entry.name.startswith("."):
                yield from walk(entry.path, f"{prefix}{entry.name}/", (*above, here))


def _is_directory(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself: whoever reads it will hear "no such file"
        return False


class ListSource(Names):
    """Files named by a text list; those that are missing are found out by read."""

    def __init__(self, file: str, paths: list[str], labels: list[str | None]):
        self._folder = os.path.dirname(os.path.abspath(file))
        super().__init__(file, paths, labels)

    def read(self, i: int) -> bytes:
        return read_file(os.path.join(self._folder, self.image_id(i)))


def open_list(file: str) -> ListSource:
    paths: list[str] = []
    labels: list[str | None] = []
    try:
        with open(file, encoding="utf-8-sig") as lines:
            for line in lines:
                path, _, label = (part.strip() for part in line.partition("\t"))
                if path and not path.startswith("#"):
                    paths.append(path)
                    labels.append(label or None)
    except UnicodeDecodeError as error:
        raise ValueError(f"images: {file}: not UTF-8 text: {error.reason} at byte {error.start}") from error
    return ListSource(file, paths, labels)
