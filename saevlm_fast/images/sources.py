"""Folders and lists of images: numbered, named, labelled, read one by one; and what every source shares.

Ids and labels live in Arrow arrays: forked workers share them, for no reference count is ever touched. Sources open
their files lazily; they may be forked, pickled and read from several threads.
"""

import hashlib
import io
import os
import re
import stat
from collections.abc import Iterable, Iterator, Sequence
from typing import BinaryIO, Protocol, runtime_checkable

import pyarrow as pa
import pyarrow.compute as pc

from saevlm_fast.errors import ImageError, require
from saevlm_fast.images.captions import caption_beside
from saevlm_fast.remote.answers import NotThere
from saevlm_fast.remote.reading import read_whole
from saevlm_fast.urls import is_url, redacted

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

# How a label is called, wherever it stands: an extension in a tar, a field of JSON, a column of a table. First wins.
LABEL_NAMES = ("cls", "label", "labels", "class", "class_name", "class_label", "category", "target")
# Of one encoded image, looked at before it is read: decode.MAX_PIXELS pixels of 16-bit RGB without compression.
# The largest photos that people harvest are far below: a JPEG of 100 megapixels has 20 to 60 MiB.
MAX_IMAGE_BYTES = 512 << 20
MAX_LINE = 1 << 16  # characters of a list's line: a path has 4096 at most


@runtime_checkable
class ImageSource(Protocol):
    """N numbered images.

    Attributes:
        n_ignored: files or members that were met but are no images of this source.
        notes: lines for the user, each about a choice that was made in reading names and labels.
    """

    n_ignored: int
    notes: tuple[str, ...]

    def __len__(self) -> int: ...

    def image_id(self, i: int) -> str:
        """The unique, stable name of image i."""
        ...

    def label(self, i: int) -> str | None:
        """The class of image i, if it has one."""
        ...

    def read(self, i: int) -> bytes:
        """The encoded image i. Raises ImageError (missing, empty, damaged) or OSError."""
        ...

    def fingerprint(self) -> str:
        """SHA-256 (hexadecimal) of all ids and labels in order: the same again means the same images in that order."""
        ...


class Names:
    """Ids and labels of N images, lean."""

    def __init__(
        self,
        name: str,
        ids: Iterable[str],
        labels: Iterable[str | None],
        n_ignored: int = 0,
        notes: Iterable[str] = (),
    ):
        self.name, self.n_ignored, self.notes = name, n_ignored, tuple(notes)
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

    def content(self) -> str:
        """What tells whether the images' files have changed, where it is known without reading any; else ""."""
        return ""

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
    except UnicodeEncodeError:
        return pa.array([None if value is None else utf8(value) for value in values], pa.large_string())


def utf8(name: str) -> str:
    r"""A name as stores can hold it: bytes that are not UTF-8 (surrogates, for Python) are written as \xNN."""
    return name if name.isascii() else re.sub("[\ud800-\udfff]", _escaped_surrogate, name)


def _escaped_surrogate(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code - 0xDC00:02x}" if code >= 0xDC80 else f"\\u{code:04x}"


def is_image(name: str) -> bool:
    base = name.rpartition("/")[2]
    return base.lower().endswith(IMAGE_SUFFIXES) and not base.startswith(".")


def directory_of(path: str) -> str | None:
    return path.rpartition("/")[0] or None


def not_empty(data: bytes) -> bytes:
    require(len(data) > 0, "empty file", ImageError)
    return data


def read_file(path: str) -> bytes:
    """A file's bytes. It is looked at before it is opened: opening a named pipe would wait for ever.

    Raises:
        ImageError: missing, unreadable, empty, above MAX_IMAGE_BYTES, or not a regular file.
        OSError: what is not this file's fault (too many open files, a lost network drive).
    """
    try:
        status = os.stat(path)
    except (OSError, ValueError):  # ValueError: a NUL in the name
        raise ImageError("no such file") from None
    require(stat.S_ISREG(status.st_mode), f"{_kind(status.st_mode)}, not a regular file", ImageError)
    check_size(status.st_size)
    try:
        with open(path, "rb") as file:
            return not_empty(file.read(status.st_size))
    except PermissionError as error:
        raise ImageError(f"unreadable: {error.strerror or error}") from error


def read_image(url: str) -> bytes:
    """The encoded image at a URL. ImageError: there is none, an empty one, or one that is too large. RemoteError:
    what is not its fault."""
    try:
        return not_empty(read_whole(url, MAX_IMAGE_BYTES))
    except NotThere as error:
        raise ImageError(str(error)) from None


def check_size(n_bytes: int) -> None:
    """Raises ImageError for an image of more than MAX_IMAGE_BYTES, before they are read."""
    if n_bytes > MAX_IMAGE_BYTES:
        raise ImageError(f"{n_bytes} bytes; an image may have {MAX_IMAGE_BYTES} ({MAX_IMAGE_BYTES >> 20} MiB) at most")


def require_regular(path: str) -> None:
    """Refuses a named pipe, socket, device or folder where a list, an archive or a table should be.

    Raises:
        ValueError: naming what was met. OSError: nothing is there.
    """
    mode = os.stat(path).st_mode
    needed = "a regular file is needed, for it is read more than once"
    require(stat.S_ISREG(mode), f"images: {path}: {_kind(mode)}; {needed}")


def _kind(mode: int) -> str:
    kinds = {stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket", stat.S_IFDIR: "a folder"}
    return kinds.get(stat.S_IFMT(mode), "a device")


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
        # Ids are UTF-8; the few names that are not are kept beside them.
        self._names = {i: file for i, file in enumerate(files) if utf8(file) != file}
        super().__init__(folder, files, [directory_of(file) for file in files], n_ignored)

    def read(self, i: int) -> bytes:
        return read_file(self._path(i))

    def caption(self, i: int) -> str | None:
        """Of NAME.txt or NAME.json beside the image."""
        return caption_beside(self._path(i))

    def _path(self, i: int) -> str:
        return os.path.join(self._folder, self._names.get(i) or self.image_id(i))


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
    """Files and URLs named by a text list; those that are missing are found out by read."""

    def __init__(
        self,
        file: str,
        paths: list[str],
        labels: list[str | None],
        captions: list[str | None] | None = None,
        notes: Iterable[str] = (),
    ):
        """captions: None where the labels are them."""
        self._folder = os.path.dirname(os.path.abspath(file))
        self._urls = {i: path for i, path in enumerate(paths) if is_url(path)}
        super().__init__(file, [redacted(path) for path in paths], labels, notes=notes)
        self._captions = None if captions is None else _strings(captions)

    def caption(self, i: int) -> str | None:
        """What the list says of the image."""
        return self.label(i) if self._captions is None else self._captions[i].as_py()

    def read(self, i: int) -> bytes:
        if i in self._urls:
            return read_image(self._urls[i])
        return read_file(os.path.join(self._folder, self.image_id(i)))


def open_list(file: str) -> ListSource:
    with open(file, "rb") as data:
        return ListSource(file, *list_lines(data, file))


def list_lines(data: bytes | BinaryIO, name: str) -> tuple[list[str], list[str | None]]:
    """The paths and the labels of a list. ValueError: no UTF-8, a line that is no path."""
    stream = io.BytesIO(data) if isinstance(data, bytes) else data
    paths: list[str] = []
    labels: list[str | None] = []
    try:
        with io.TextIOWrapper(stream, encoding="utf-8-sig") as lines:
            for number, line in enumerate(iter(lambda: lines.readline(MAX_LINE), ""), 1):
                fits = len(line) < MAX_LINE
                require(fits, f"images: {name}: line {number} is no path: {MAX_LINE} characters or more")
                path, _, label = (part.strip() for part in line.partition("\t"))
                if path and not path.startswith("#"):
                    paths.append(path)
                    labels.append(label or None)
    except UnicodeDecodeError as error:
        raise ValueError(f"images: {name}: not UTF-8 text: {error.reason} at byte {error.start}") from error
    return paths, labels
