"""A file at a URL as a file object, of which only what is read is fetched: a parquet file's end and some columns."""

import io
from typing import Any

from saevlm_fast.remote.answers import Found
from saevlm_fast.remote.reading import read_range

LEAST = 64 << 10  # bytes of a request: what Arrow reads first, at the end of a file


class RangeFile(io.RawIOBase):
    """What was found at a URL, for reading anywhere. One thread at a time. read: RemoteError."""

    def __init__(self, url: str, found: Found):
        assert found.size is not None
        self._url, self._found, self._size = url, found, found.size
        self._at, self._start, self._data = 0, 0, b""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence] + offset
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        stop = self._size if size is None or size < 0 else min(self._at + size, self._size)
        if stop <= self._at:
            return b""
        if not self._start <= self._at <= stop <= self._start + len(self._data):
            ahead = min(max(stop, self._at + LEAST), self._size)
            self._start = self._at
            self._data = read_range(self._url, self._start, ahead, self._found)
        piece = self._data[self._at - self._start : stop - self._start]
        self._at = stop
        return piece

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)
