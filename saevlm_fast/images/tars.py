"""Webdataset shards: members of uncompressed tar archives, read in place."""

import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from saevlm_fast.errors import ImageError, first_line, require
from saevlm_fast.images.captions import MAX_CAPTION_BYTES, caption_of_file
from saevlm_fast.images.samples import Member, Sample, Samples
from saevlm_fast.images.sources import LABEL_NAMES, Names, check_size, not_empty, relative_paths, utf8
from saevlm_fast.remote.files import RemoteFiles

COMPRESSED = {
    b"\x1f\x8b": ("gzip", "gunzip"),
    b"BZh": ("bzip2", "bunzip2"),
    b"\xfd7zXZ": ("xz", "unxz"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd"),
}
TAR_BLOCK = 512


class TarSource(Names):
    """Members of uncompressed tar archives, read in place by their offset."""

    def __init__(
        self,
        name: str,
        shards: Sequence[str],
        relative: list[str],
        members: list[Member],
        labels: list[str | None],
        shard_M: np.ndarray,
        n_ignored: int,
        notes: list[str],
        captions: Sequence[Member | None] = (),
    ):
        """captions: of every image, the member that holds its caption, if there is one."""
        self._shards = [os.path.abspath(shard) for shard in shards] if isinstance(shards, list) else shards
        self._shard_M = shard_M
        self._offset_M = np.array([member.offset for member in members], np.int64)
        self._size_M = np.array([member.size for member in members], np.int64)
        self._captions = _Captions.of(captions)
        self._open: tuple[int, _Descriptor] | None = None
        prefixes = [f"{shard}/" for shard in relative] if len(shards) > 1 else [""]
        ids = [prefixes[shard] + member.name for shard, member in zip(shard_M.tolist(), members)]
        super().__init__(name, ids, labels, n_ignored, notes)

    def content(self) -> str:
        return self._shards.content() if isinstance(self._shards, RemoteFiles) else ""

    def read(self, i: int) -> bytes:
        size = int(self._size_M[i])
        check_size(size)
        return not_empty(self._bytes(i, size, int(self._offset_M[i])))

    def caption(self, i: int) -> str | None:
        """Of NAME.txt, NAME.caption, or a field of NAME.json."""
        size = int(self._captions.size_M[i]) if len(self._captions.size_M) else -1
        if not 0 <= size <= MAX_CAPTION_BYTES:
            return None
        data = self._bytes(i, size, int(self._captions.offset_M[i]))
        return caption_of_file(data, bool(self._captions.json_M[i]))

    def _bytes(self, i: int, size: int, offset: int) -> bytes:
        """Of the shard that image i is in."""
        shard, opened = int(self._shard_M[i]), self._open
        if opened is None or opened[0] != shard:
            # One at a time: thousands of shards must not mean thousands of open files.
            opened = self._open = (shard, _Descriptor(self._shards[shard]))
        data = os.pread(opened[1].number, size, offset)
        require(len(data) == size, "the archive has become shorter since it was indexed", ImageError)
        return data

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": None}


class _Captions(NamedTuple):
    """Where every image's caption lies in its archive, lean: size -1 for none; whether it is JSON."""

    offset_M: np.ndarray
    size_M: np.ndarray
    json_M: np.ndarray

    @classmethod
    def of(cls, members: Sequence[Member | None]) -> "_Captions":
        return cls(
            np.array([0 if member is None else member.offset for member in members], np.int64),
            np.array([-1 if member is None else member.size for member in members], np.int64),
            np.array([member is not None and member.name.lower().endswith(".json") for member in members], bool),
        )


class _Descriptor:
    """A file descriptor that is closed when its last user, in whatever thread, lets go of it."""

    def __init__(self, path: str):
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


def open_tars(shards: Sequence[str], name: str, relative: list[str] | None = None) -> TarSource:
    """The images of the archives, in their order (images/samples.py: which members are images, which are labels).

    shards: their paths; of some that are elsewhere what fetches each when it is asked for. relative: what ids call
    them; if None by their paths.

    Raises:
        ValueError: a compressed or damaged archive; archives that hold other archives and no image.
    """
    relative = relative_paths(shards) if relative is None else relative
    indexed = [_index_tar(shard) for shard in shards]
    samples = [sample for of_shard, _ in indexed for sample in of_shard]
    unused = sum((counted for _, counted in indexed), Counter[str]())
    if not samples:
        _refuse_tars_of_tars(name, unused)
    classes = _class_labels(relative, [of_shard for of_shard, _ in indexed])
    labels = classes or [sample.label for sample in samples]
    shard_M = np.repeat(np.arange(len(shards), dtype=np.int32), [len(of_shard) for of_shard, _ in indexed])
    notes = _notes(samples, labels, classes is not None, unused)
    images, captions = [sample.image for sample in samples], [sample.caption for sample in samples]
    return TarSource(name, shards, relative, images, labels, shard_M, unused.total(), notes, captions)


def _index_tar(shard: str) -> tuple[list[Sample], Counter[str]]:
    """The images of one archive in its order, and the members that are neither image nor label by extension."""
    _refuse_compressed(shard)
    samples = Samples()
    with open(shard, "rb") as file:
        for member in _members(shard, file):
            if member.isreg() and not member.issparse():
                samples.add(Member(member.name.removeprefix("./"), member.offset_data, member.size))
            else:
                samples.unused[""] += 1
        return list(samples.resolve(lambda m: os.pread(file.fileno(), m.size, m.offset))), samples.unused


def _class_labels(shards: list[str], samples: list[list[Sample]]) -> list[str | None] | None:
    """The archives' names, where images have no other label and are named after their archive.

    As ImageNet's are: n01440764.tar holds n01440764_10026.JPEG. Numbers alone (00012.tar) name shards, not classes.
    """
    if len(shards) < 2 or any(sample.label is not None for of_shard in samples for sample in of_shard):
        return None
    stems = [os.path.basename(shard).partition(".")[0] for shard in shards]
    for stem, of_shard in zip(stems, samples):
        named = (sample.image.name.rpartition("/")[2].partition(stem) for sample in of_shard)
        if not stem or stem.isdigit() or any(before or not after or after[0].isalnum() for before, _, after in named):
            return None
    return [utf8(stem) for stem, of_shard in zip(stems, samples) for _ in of_shard]


def _notes(samples: list[Sample], labels: list[str | None], classes: bool, unused: Counter[str]) -> list[str]:
    """What was chosen, for the user: where labels come from, what was met and not used."""
    used = Counter(f".{sample.used}" if sample.used else "directories" for sample in samples if sample.label)
    if classes:
        used = Counter({"the archives' names, as images are named after them": len(samples)})
    missing = sum(label is None for label in labels)
    looked_for = f"looked for .{', .'.join(LABEL_NAMES)}, .json with one of these, .txt, directories"
    notes = []
    if set(used) - {".cls", "directories"}:
        notes.append(f"labels come from {_listing(used)}")
    if missing:
        notes.append(f"{missing:,} of {len(labels):,} images have no label ({looked_for})")
    if not unused.total():
        return notes
    named = Counter({f".{extension}" if extension else "no extension": n for extension, n in unused.items()})
    return [*notes, f"not used: {_listing(named)}"]


def _listing(counted: Counter[str]) -> str:
    common = counted.most_common(5)
    more = f", {len(counted) - 5:,} other kinds" if len(counted) > 5 else ""
    return ", ".join(f"{name} ({n:,})" for name, n in common) + more


def _refuse_tars_of_tars(name: str, unused: Counter[str]) -> None:
    inner = sum(n for extension, n in unused.items() if re.search(r"(^|\.)(tar|tgz)(\.|$)", extension))
    advice = "unpack it first (mkdir DIR; tar -xf ARCHIVE -C DIR) and give DIR: archives in a folder are read in place"
    require(inner == 0, f"images: {name}: no image, but {inner:,} archives inside the archive; {advice}")


def _refuse_compressed(shard: str) -> None:
    with open(shard, "rb") as file:
        start = file.read(8)
    for magic, (method, command) in COMPRESSED.items():
        advice = f"uncompress it first ({command} {os.path.basename(shard)}): images are read from the middle of it"
        require(not start.startswith(magic), f"images: {shard}: compressed ({method}); {advice}")


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
