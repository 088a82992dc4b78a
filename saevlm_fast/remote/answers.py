"""What reading elsewhere comes to, whoever is asked: what was found, and the three ways in which it fails."""

from typing import NamedTuple

TIMEOUT = 30.0  # seconds without a byte
MAY_RECOVER = (408, 425, 429, 500, 502, 503, 504)


class RemoteError(OSError):
    """What is elsewhere and cannot be read. The message is one line, with the URL and without its secrets."""


class NotThere(RemoteError):
    """Nothing is at that URL, or nothing that may be read."""


class Recoverable(Exception):
    """Worth another try. pause: seconds that the server asks for."""

    def __init__(self, reason: str, pause: float = 0.0):
        super().__init__(reason)
        self.pause = pause


class Found(NamedTuple):
    """What is at a URL: its size in bytes, None where the server does not say; and its version, "" likewise.

    by_ranges: whether a part of it can be asked for. digest: of the whole, "sha256:HEX", "md5:HEX" or git's "git:HEX"
    (SHA-1 of a header and the bytes), "" where none is told.
    """

    size: int | None
    version: str
    by_ranges: bool
    digest: str = ""


def check_range(url: str, status: int, said: str, start: int) -> None:
    """Whether an answer is of a range that begins there; said: its Content-Range. url: without secrets.

    Raises:
        RemoteError: of another. Recoverable: of none.
    """
    if status != 206:
        raise Recoverable(f"status {status} where a range was asked for")
    if said.partition(" ")[2].partition("-")[0] != str(start):
        raise RemoteError(f"{url}: it answers with another range than was asked for")
