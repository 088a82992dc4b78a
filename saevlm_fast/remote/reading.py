"""Bytes at a URL, by ranges: http and https by Python's own means, everything else by fsspec's file systems.

Every read is tried again a few times, with growing pauses, where the network or the server may recover: no answer, a
connection that breaks, an answer that is cut short, status 408, 429 and 5xx. What will not change is said at once.
Logins are the affair of the libraries (AWS_PROFILE, GOOGLE_APPLICATION_CREDENTIALS, HF_TOKEN, ~/.netrc ...).
"""

import http.client
import netrc
import random
import threading
import time
import urllib.error
import urllib.request
from base64 import b64encode
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar
from urllib.parse import unquote, urlsplit, urlunsplit

from saevlm_fast import __version__
from saevlm_fast.errors import Interrupted, first_line
from saevlm_fast.urls import redacted, redacted_text

TRIES = 6
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 20.0  # seconds; each pause is twice the one before
TIMEOUT = 30.0  # seconds without a byte
_MAY_RECOVER = (408, 425, 429, 500, 502, 503, 504)
_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "hf": "huggingface_hub"}
T = TypeVar("T")


class RemoteError(OSError):
    """What is elsewhere and cannot be read. The message is one line, with the URL and without its secrets."""


class NotThere(RemoteError):
    """Nothing is at that URL, or nothing that may be read."""


class _Recoverable(Exception):
    """Worth another try. pause: seconds that the server asks for."""

    def __init__(self, reason: str, pause: float = 0.0):
        super().__init__(reason)
        self.pause = pause


class Found(NamedTuple):
    """What is at a URL: its size in bytes, None where the server does not say; and its version, "" likewise.

    by_ranges: whether a part of it can be asked for.
    """

    size: int | None
    version: str
    by_ranges: bool


def look_up(url: str) -> Found:
    """What is at a URL. RemoteError: nothing, or it cannot be read."""
    return _retried(url, lambda: _web_found(url) if _is_web(url) else _stored_found(url))


def read_range(url: str, start: int, stop: int, found: Found) -> bytes:
    """Bytes start .. stop - 1 of what was found there. RemoteError: it cannot be read, or is another by now."""
    read = _web_range if _is_web(url) else _stored_range
    return _retried(url, lambda: read(url, start, stop, found))


def read_whole(url: str, at_most: int) -> bytes:
    """All bytes at a URL, of a small file. RemoteError: more than at_most, or it cannot be read."""
    found = look_up(url)
    if found.size is not None and found.size > at_most:
        raise RemoteError(f"{redacted(url)}: {found.size} bytes; at most {at_most} are read")
    if found.size is not None and found.by_ranges:
        return read_range(url, 0, found.size, found)
    return _retried(url, lambda: _web_whole(url, at_most))


def copy_whole(url: str, begin: Callable[[], Callable[[bytes], object]]) -> None:
    """All bytes at a URL of the web, in pieces, of a server that knows no ranges.

    begin: called at the start of every try, for what takes the pieces.

    Raises:
        RemoteError: it cannot be read.
    """

    def copy() -> None:
        write, size = begin(), 0
        with _answer(url, {}) as answer:
            while piece := _received(lambda: answer.read(1 << 20)):
                write(piece)
                size += len(piece)
            said = answer.headers.get("Content-Length") or ""
        if said.isdigit() and size != int(said):
            raise _Recoverable(f"{size} bytes came of {said}")

    _retried(url, copy)


def listed(url: str) -> list[str]:
    """URLs of all files below a folder, or of those that a pattern with * ? [] names, sorted.

    Raises:
        RemoteError: nothing is there, or the web, which has no lists of files.
    """
    if _is_web(url):
        raise NotThere(f"{redacted(url)}: a web server has no list of files; name each, as {{000..012}} does")
    files, path = _file_system(url)
    pattern = any(sign in path for sign in "*?[")
    find = files.glob if pattern else files.find
    found = _retried(url, lambda: _of_library(url, lambda: list(find(path))))
    protocol = urlsplit(url).scheme
    return sorted(f"{protocol}://{name}" for name in found)


def _is_web(url: str) -> bool:
    return url.startswith(("http://", "https://"))


def _retried(url: str, read: Callable[[], T]) -> T:
    """read(), a few times. RemoteError: what it failed at last, or at once where that is no use."""
    pause = FIRST_PAUSE
    for left in reversed(range(TRIES)):
        try:
            return read()
        except _Recoverable as error:
            if not left:
                raise RemoteError(f"{redacted(url)}: {error}, {TRIES} times") from None
            time.sleep(min(LONGEST_PAUSE, max(error.pause, pause * random.uniform(0.5, 1.0))))
            pause *= 2
    raise AssertionError("the last try has returned or raised")


# The web --------------------------------------------------------------------------------------------------------------


def _web_found(url: str) -> Found:
    """By asking for the first byte: of a signed URL nothing but GET is allowed."""
    with _answer(url, {"Range": "bytes=0-0"}) as answer:
        if answer.status == 416:  # no first byte: an empty file
            return Found(0, "", True)
        version = answer.headers.get("ETag") or answer.headers.get("Last-Modified") or ""
        if answer.status == 206:
            size = (answer.headers.get("Content-Range") or "").rpartition("/")[2]
            return Found(int(size) if size.isdigit() else None, version, True)
        size = answer.headers.get("Content-Length") or ""
        return Found(int(size) if size.isdigit() else None, version, False)


def _web_range(url: str, start: int, stop: int, found: Found) -> bytes:
    if start >= stop:
        return b""
    with _answer(url, {"Range": f"bytes={start}-{stop - 1}"}) as answer:
        version = answer.headers.get("ETag") or answer.headers.get("Last-Modified") or ""
        if version != found.version:
            raise RemoteError(f"{redacted(url)}: it was replaced while it was read")
        if answer.status != 206:
            raise _Recoverable(f"status {answer.status} where a range was asked for")
        said = (answer.headers.get("Content-Range") or "").partition(" ")[2].partition("-")[0]
        if said != str(start):
            raise RemoteError(f"{redacted(url)}: it answers with another range than was asked for")
        return _exactly(answer, stop - start)


def _web_whole(url: str, at_most: int) -> bytes:
    with _answer(url, {}) as answer:
        data = _received(lambda: answer.read(at_most + 1))
        said = answer.headers.get("Content-Length") or ""
    if len(data) > at_most:
        raise RemoteError(f"{redacted(url)}: more than {at_most} bytes; at most these are read")
    if said.isdigit() and len(data) != int(said):
        raise _Recoverable(f"{len(data)} bytes came of {said}")
    return data


def _exactly(answer: Any, size: int) -> bytes:
    data = _received(lambda: answer.read(size + 1))
    if len(data) != size:
        raise _Recoverable(f"{len(data)} bytes came of {size}")
    return data


def _received(read: Callable[[], bytes]) -> bytes:
    try:
        return read()
    except http.client.IncompleteRead as error:
        raise _Recoverable(f"the answer was cut short after {len(error.partial)} bytes") from None
    except (OSError, http.client.HTTPException) as error:
        raise _Recoverable(f"no answer ({_reason(error)})") from None


def _answer(url: str, headers: dict[str, str]) -> Any:
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    clean = urlunsplit(parts._replace(netloc=host, fragment=""))
    request = urllib.request.Request(clean, headers={"User-Agent": f"saevlm-fast/{__version__}", **headers})
    if (login := _login(url)) is not None:
        # "unredirected": not sent on to where a server redirects.
        request.add_unredirected_header("Authorization", "Basic " + b64encode(":".join(login).encode()).decode())
    try:
        return urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416 and (error.headers.get("Content-Range") or "").endswith("/0"):
            return error  # which is an answer, too
        error.close()
        raise _refusal(url, error.code, error.headers.get("Retry-After") or "") from None
    except ValueError as error:
        raise NotThere(f"{redacted(url)}: no URL ({redacted_text(first_line(error))})") from None
    except (OSError, http.client.HTTPException) as error:
        raise _Recoverable(f"no answer ({_reason(error)})") from None


def _login(url: str) -> tuple[str, str] | None:
    """User and password: those of the URL, else those of ~/.netrc."""
    parts = urlsplit(url)
    if parts.username is not None:
        return unquote(parts.username), unquote(parts.password or "")
    try:
        known = netrc.netrc().authenticators(parts.hostname or "")
    except (OSError, netrc.NetrcParseError):
        return None
    return None if known is None else (known[0], known[2] or "")


def _refusal(url: str, status: int, retry_after: str) -> Exception:
    if status in _MAY_RECOVER:
        return _Recoverable(f"status {status}", float(retry_after) if retry_after.isdigit() else 0.0)
    known = {
        401: "it asks for a login",
        403: "you may not read it, or the signature of the URL is no longer good",
        404: "nothing is there",
        410: "nothing is there any more",
    }
    return NotThere(f"{redacted(url)}: {known.get(status, 'refused')} (status {status})")


def _reason(error: BaseException) -> str:
    reason = getattr(error, "reason", None)
    return redacted_text(first_line(reason if isinstance(reason, BaseException) else error, 120))


# Stores of objects ----------------------------------------------------------------------------------------------------

_making = threading.Lock()


def _file_system(url: str) -> tuple[Any, str]:
    """fsspec's file system of a URL, and the path in it. RemoteError: its package is not installed."""
    protocol = urlsplit(url).scheme
    try:
        import fsspec
        from fsspec.core import strip_protocol

        with _making:
            return fsspec.filesystem(protocol), str(strip_protocol(url))
    except ImportError as error:
        package = _PACKAGES.get(protocol, "adlfs")
        raise NotThere(
            f"{redacted(url)}: {protocol}:// needs the package {package} ({first_line(error)}): "
            f"pip install 'saevlm-fast[remote]'" + ("" if protocol in _PACKAGES else f" {package}")
        ) from None
    except (OSError, ValueError) as error:
        raise NotThere(f"{redacted(url)}: {redacted_text(first_line(error))}") from None


def _stored_found(url: str) -> Found:
    files, path = _file_system(url)

    def info() -> dict[str, Any]:
        files.invalidate_cache()
        return dict(files.info(path))

    said = _of_library(url, info)
    if said.get("type") == "directory":
        raise NotThere(f"{redacted(url)}: a folder, where a file is needed")
    version = next(
        (str(said[name]) for name in ("ETag", "etag", "generation", "blob_id", "mtime") if said.get(name)), ""
    )
    size = said.get("size")
    return Found(int(size) if size is not None else None, version, True)


def _stored_range(url: str, start: int, stop: int, found: Found) -> bytes:
    files, path = _file_system(url)
    data = _of_library(url, lambda: files.cat_file(path, start=start, end=stop)) if stop > start else b""
    if len(data) != stop - start:
        raise _Recoverable(f"{len(data)} bytes came of {stop - start}")
    return bytes(data)


def _of_library(url: str, call: Callable[[], T]) -> T:
    """What a library returns; its errors, of whatever kinds, as ours."""
    try:
        return call()
    except Interrupted:
        raise
    except FileNotFoundError:
        raise NotThere(f"{redacted(url)}: nothing is there") from None
    except PermissionError as error:
        raise NotThere(f"{redacted(url)}: you may not read it ({redacted_text(first_line(error))})") from None
    except Exception as error:
        text = f"{type(error).__name__}: {redacted_text(first_line(error))}"
        if (
            "redential" in text
            or "nauthenticated" in text
            or isinstance(error, TypeError | AttributeError | ImportError)
        ):
            raise NotThere(f"{redacted(url)}: {text}") from None
        raise _Recoverable(text) from None
