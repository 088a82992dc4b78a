"""URLs as paths: what is one, what is shown of one, what lies beside it.

A URL may carry a password (https://user:word@host/...) or a signature (?X-Amz-Signature=...). `str` of a RemotePath,
which messages, settings.toml and every other record have, shows neither; `url_of` gives the whole, to whoever reads it.
"""

import os
import re
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit, urlunsplit

# Those of fsspec that name objects in a store, and the web, which is read by Python's own means (reading.py).
PROTOCOLS = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "hf", "https", "http")
_URL = re.compile(rf"({'|'.join(PROTOCOLS)}):/{{1,2}}(?=[^/])")  # pathlib makes one slash of two
# hf:/home/me/model is a place on this machine.
_IN_TEXT = re.compile(rf"\b(?:{'|'.join(PROTOCOLS)}):(?:(?<!hf:)/|//)/?(?=[^/])[^\s'\"<>]+")
_HIDDEN = "***"


class RemotePath(type(Path())):  # type: ignore[misc]  # PosixPath or WindowsPath, which 3.11 does not let one call Path
    """A URL where a path is expected. Its text is for people: without a password or a query."""

    url: str

    def __str__(self) -> str:
        return redacted(getattr(self, "url", None) or _whole(super().__str__()))

    def __fspath__(self) -> str:
        return str(self)

    def absolute(self) -> "RemotePath":
        return self

    def resolve(self, strict: bool = False) -> "RemotePath":
        return self


def is_url(path: Any) -> bool:
    """Whether a path or a text names something elsewhere, of a protocol of PROTOCOLS."""
    text = path if isinstance(path, str) else os.fspath(path) if isinstance(path, os.PathLike) else ""
    return isinstance(text, str) and _URL.match(text) is not None


def url_of(path: str | os.PathLike[str]) -> str:
    """The whole URL, with whatever secret it carries: for reading, never for a message or a file."""
    text: str = getattr(path, "url", None) or os.fspath(path)
    return _whole(text)


def remote_path(url: str | os.PathLike[str]) -> RemotePath:
    """The URL as a path."""
    text = url_of(url)
    made = RemotePath(urlunsplit(urlsplit(text)._replace(query="", fragment="")))
    made.url = text
    return made


def redacted(text: str) -> str:
    """A URL without its password, its query and its fragment; any other text as it is."""
    if not is_url(text):
        return text
    parts = urlsplit(_whole(text))
    host = parts.netloc.rpartition("@")[2]
    secret = "@" in parts.netloc and not parts.scheme.startswith("ab")  # abfs://container@account...
    netloc = f"{_HIDDEN}@{host}" if secret else parts.netloc
    return urlunsplit(parts._replace(netloc=netloc, query=_HIDDEN if parts.query else "", fragment=""))


def redacted_text(text: str) -> str:
    """A text with every URL in it redacted: a command line, a library's message."""
    return _IN_TEXT.sub(lambda match: redacted(match[0]), text)


def child(url: str, name: str) -> str:
    """What is called `name` in the folder that a URL names. The folder's query goes with it: its signature."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{name}"))


def sibling(url: str, name: str) -> str:
    """What a path in the file at a URL means: relative to the folder of the file, or a URL of its own."""
    if is_url(name):
        return url_of(name)
    parts = urlsplit(url)
    return urlunsplit(parts._replace(path=f"{parts.path.rpartition('/')[0]}/{name}"))


def file_name(url: str) -> str:
    """The last part of a URL's path, as a name that any file system has."""
    name = PurePosixPath(urlsplit(url).path).name
    return re.sub(r"[^A-Za-z0-9._-]", "_", name)[-100:] or "file"


def _whole(text: str) -> str:
    """Two slashes where pathlib has left one."""
    return _URL.sub(lambda match: f"{match[1]}://", text, count=1)
