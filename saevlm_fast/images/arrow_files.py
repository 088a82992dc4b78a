"""Arrow files of others (datasets' save_to_disk), looked at before they are read: what they unpack to, and their rows.

datasets maps them into memory and writes them plain. One whose buffers are compressed is unpacked whole when it is
opened, a thousandfold where its images are of one colour, so what every buffer says of its size is summed up first.
"""

import os
import struct
from collections.abc import Iterator

import pyarrow as pa

from saevlm_fast.errors import first_line, require

MAX_UNPACKED_BYTES = 1 << 30  # of the compressed buffers of one file
_DICTIONARY, _RECORDS = 2, 3  # kinds of a message that have buffers


def check_arrow_file(path: str | os.PathLike[str]) -> None:
    """Looks through a stream of Arrow messages, without unpacking any of it.

    Raises:
        ValueError: compressed buffers above MAX_UNPACKED_BYTES, more rows than bits, damage.
    """
    try:
        rows, unpacked = _counted(path)
    except (pa.ArrowException, OSError, ValueError, struct.error) as error:
        raise ValueError(f"{path}: damaged Arrow file: {first_line(error)}") from error
    n_bytes = os.stat(path).st_size
    require(rows <= 8 * n_bytes, f"{path}: {rows} rows in {n_bytes} bytes")
    require(
        unpacked <= MAX_UNPACKED_BYTES,
        f"{path}: {n_bytes} bytes, whose compressed buffers unpack to {unpacked} in memory; at most "
        f"{MAX_UNPACKED_BYTES} are unpacked, so save it uncompressed, as save_to_disk does",
    )


def _counted(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Rows, and bytes that compressed buffers unpack to."""
    rows = unpacked = 0
    with pa.memory_map(os.fsencode(path)) as file:
        for message in pa.ipc.MessageReader.open_stream(file):
            batch = _batch(message.metadata)
            if batch is None:
                continue
            rows += batch.number(0, "q")
            if batch.child(3) is not None:  # a compression is declared
                unpacked += sum(_unpacked(message.body, *place) for place in batch.pairs(2))
    return rows, unpacked


def _unpacked(body: pa.Buffer, offset: int, length: int) -> int:
    """What a compressed buffer says that it becomes: its first eight bytes; -1 if it is stored as it is."""
    if length < 8:
        return 0
    (size,) = struct.unpack_from("<q", body, offset)
    require(size >= -1, f"a buffer that unpacks to {size} bytes")
    return max(size, 0)


class _Table:
    """A table of a flat buffer: a number, a table or an array of pairs in each of its slots."""

    def __init__(self, data: pa.Buffer, place: int):
        self.data, self.place = data, place
        self._slots = place - self._at("i", place)
        self._n_slots = (self._at("H", self._slots) - 4) // 2

    def _at(self, kind: str, place: int) -> int:
        require(place >= 0, "a place before the beginning")
        return int(struct.unpack_from(f"<{kind}", self.data, place)[0])

    def _slot(self, slot: int) -> int | None:
        offset = self._at("H", self._slots + 4 + 2 * slot) if slot < self._n_slots else 0
        return self.place + offset if offset else None

    def number(self, slot: int, kind: str) -> int:
        place = self._slot(slot)
        return 0 if place is None else self._at(kind, place)

    def child(self, slot: int) -> "_Table | None":
        place = self._slot(slot)
        return None if place is None else _Table(self.data, place + self._at("I", place))

    def pairs(self, slot: int) -> Iterator[tuple[int, int]]:
        """Of 64-bit numbers."""
        place = self._slot(slot)
        if place is not None:
            start = place + self._at("I", place)
            for i in range(self._at("I", start)):
                yield struct.unpack_from("<qq", self.data, start + 4 + 16 * i)


def _batch(metadata: pa.Buffer) -> _Table | None:
    """The record batch of a message, which a dictionary has as well. Of others None."""
    (root,) = struct.unpack_from("<I", metadata, 0)
    message = _Table(metadata, root)
    header, kind = message.child(2), message.number(1, "B")
    if header is None or kind not in (_DICTIONARY, _RECORDS):
        return None
    return header if kind == _RECORDS else header.child(1)
