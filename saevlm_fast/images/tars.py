"""Webdataset shards: members of uncompressed tar archives, read in place."""

import os
import tarfile
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np

from saevlm_fast.errors import ImageError, first_line, require
from saevlm_fast.images.sources import Names, directory_of, is_image, not_empty, relative_paths

MAX_CLASS_BYTES = 1 << 16  # of a .cls member: a label, not a file
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
TAR_BLOCK = 512


class TarSource(Names):
    """Members of uncompressed tar archives, read in place by their offset."""

    def __init__(self, name: str, shards: list[str], members: list["_Sample"], shard_M: np.ndarray, n_ignored: int):
        self._shards = [os.path.abspath(shard) for shard in shards]
        self._shard_M = shard_M
        self._offset_M = np.array([member.offset for member in members], np.int64)
        self._size_M = np.array([member.size for member in members], np.int64)
        self._open: tuple[int, _Descriptor] | None = None
        prefixes = [f"{shard}/" for shard in relative_paths(shards)] if len(shards) > 1 else [""]
        ids = [prefixes[shard] + member.name for shard, member in zip(shard_M.tolist(), members)]
        super().__init__(name, ids, [member.label for member in members], n_ignored)

    def read(self, i: int) -> bytes:
        shard, size = int(self._shard_M[i]), int(self._size_M[i])
        opened = self._open
        if opened is None or opened[0] != shard:
            # One at a time: thousands of shards must not mean thousands of open files.
            opened = self._open = (shard, _Descriptor(self._shards[shard]))
        data = os.pread(opened[1].number, size, int(self._offset_M[i]))
        require(len(data) == size, "the archive has become shorter since it was indexed", ImageError)
        return not_empty(data)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": None}


class _Descriptor:
    """A file descriptor that is closed when its last user, in whatever thread, lets go of it."""

    def __init__(self, path: str):
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


class _Sample:
    """What a webdataset key stands for."""

    __slots__ = ("label", "name", "offset", "size")

    def __init__(self) -> None:
        self.name, self.offset, self.size = "", 0, 0
        self.label: str | None = None


def open_tars(shards: list[str], name: str) -> TarSource:
    members: list[_Sample] = []
    counts: list[int] = []
    n_ignored = 0
    for shard in shards:
        samples, n_others = _index_tar(shard)
        members += samples
        counts.append(len(samples))
        n_ignored += n_others
    return TarSource(name, shards, members, np.repeat(np.arange(len(shards), dtype=np.int32), counts), n_ignored)


def _index_tar(shard: str) -> tuple[list[_Sample], int]:
    """The samples of one archive in its order, and the number of members that are not in them."""
    _refuse_compressed(shard)
    samples: dict[str, _Sample] = {}
    n_ignored = 0
    with open(shard, "rb") as file:
        for member in _members(shard, file):
            name = member.name.removeprefix("./")
            directory, _, base = name.rpartition("/")
            sample = samples.setdefault(f"{directory}/{base.partition('.')[0]}", _Sample())
            if not member.isreg() or member.issparse():
                n_ignored += 1
            elif is_image(name) and not sample.name:
                sample.name, sample.offset, sample.size = name, member.offset_data, member.size
            elif base.endswith(".cls") and not base.startswith(".") and member.size <= MAX_CLASS_BYTES:
                text = os.pread(file.fileno(), member.size, member.offset_data)
                sample.label = text.decode(errors="backslashreplace").strip()
            else:
                n_ignored += 1
    for sample in samples.values():
        sample.label = directory_of(sample.name) if sample.label is None else sample.label or None
    return [sample for sample in samples.values() if sample.name], n_ignored


def _refuse_compressed(shard: str) -> None:
    with open(shard, "rb") as file:
        start = file.read(8)
    for magic, method in COMPRESSED.items():
        require(
            not start.startswith(magic),
            f"images: {shard}: compressed ({method}); uncompress it first: images are read from the middle of it",
        )


def _members(shard: str, file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """All but directories. tarfile takes both the end of the file and a damaged header for the end of the archive."""
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            while (member := archive.next()) is not None:
                if not member.isdir():
                    yield member
                archive.members = []  # type: ignore[attr-defined]  # it keeps every member it ever met
            end = os.pread(file.fileno(), TAR_BLOCK, archive.offset)
    except tarfile.TarError as error:
        raise ValueError(f"images: {shard}: damaged or truncated tar archive: {first_line(error)}") from error
    require(
        end == bytes(TAR_BLOCK),
        f"images: {shard}: damaged or truncated tar archive: no end-of-archive mark where one belongs",
    )
