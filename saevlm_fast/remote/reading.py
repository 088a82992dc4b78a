"""Bytes at a URL, by ranges: http and https by Python's own means, everything else by fsspec's file systems.

Every read is tried again a few times, with growing pauses, where the network or the server may recover: no answer, a
connection that breaks, an answer that is cut short, status 408, 429 and 5xx. What will not change is said at once.
Logins are the affair of the libraries (AWS_PROFILE, GOOGLE_APPLICATION_CREDENTIALS, HF_TOKEN, ~/.netrc ...).
"""

import hashlib
import http.client
import io
import logging
import netrc
import random
import re
import threading
import time
import urllib.error
import urllib.request
from base64 import b64encode
from collections.abc import Callable
from typing import Any, BinaryIO, TypeVar
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from saevlm_fast import __version__
from saevlm_fast.errors import first_line
from saevlm_fast.remote.answers import MAY_RECOVER, TIMEOUT, Found, NotThere, Recoverable, RemoteError, check_range
from saevlm_fast.remote.hub import hub_found, hub_listed, hub_range, is_hub, pinned
from saevlm_fast.urls import redacted, redacted_text

TRIES = 6
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 20.0  # seconds; each pause is twice the one before
_TRIES_OF_DRIVERS = 2  # each of which tries 3 to 6 times by itself
LONGEST_ASKED = 300.0  # seconds of a pause that the server asks for: the Hub counts requests in windows of that length
_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "hf": "huggingface_hub"}
_LOGGERS = ("s3fs", "botocore", "aiobotocore", "gcsfs", "google", "adlfs", "azure", "asyncio", "fsspec")
T = TypeVar("T")


def at_commit(url: str) -> str:
    """The URL for reading more than once: of a repository on the Hub its commit of now, any other as it is.

    Raises:
        RemoteError: it cannot be known.
    """
    return at_commits([url])[0]


def at_commits(urls: list[str]) -> list[str]:
    """The same of many, where each repository is asked about once."""
    return _retried(urls[0], lambda: pinned(urls)) if all(is_hub(url) for url in urls) else urls


def look_up(url: str) -> Found:
    """What is at a URL. RemoteError: nothing, or it cannot be read."""
    read = _web_found if is_web(url) else hub_found if is_hub(url) else _stored_found
    return _retried(url, lambda: read(url))


def read_range(url: str, start: int, stop: int, found: Found) -> bytes:
    """Bytes start .. stop - 1 of what was found there. RemoteError: it cannot be read, or is another by now."""
    read = _web_range if is_web(url) else hub_range if is_hub(url) else _stored_range
    return _retried(url, lambda: read(url, start, stop, found))


def read_whole(url: str, at_most: int) -> bytes:
    """All bytes at a URL, of a small file. RemoteError: more than at_most, or it cannot be read."""
    url = at_commit(url)
    found = look_up(url)
    if found.size is not None and found.size > at_most:
        raise RemoteError(f"{redacted(url)}: {found.size} bytes; at most {at_most} are read")
    if found.size is not None and found.by_ranges:
        data = read_range(url, 0, found.size, found)
        if digest_of(io.BytesIO(data), found.size, found.digest) != found.digest:
            raise RemoteError(f"{redacted(url)}: altered on its way, its checksum is not the one that is told of it")
        return data
    return _retried(url, lambda: _web_whole(url, at_most))


def digest_of(data: BinaryIO, size: int, like: str) -> str:
    """The digest of what is there, in the way of another one (answers.Found); "" of none."""
    way = like.partition(":")[0]
    if not way:
        return ""
    digest = hashlib.new({"git": "sha1"}.get(way, way), usedforsecurity=False)
    if way == "git":
        digest.update(b"blob %d\0" % size)
    while piece := data.read(1 << 20):
        digest.update(piece)
    return f"{way}:{digest.hexdigest()}"


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
            raise Recoverable(f"{size} bytes came of {said}")

    _retried(url, copy)


def listed(url: str) -> list[str]:
    """URLs of all files below a folder, or of those that a pattern with * ? [] names, sorted.

    Raises:
        RemoteError: nothing is there, or the web, which has no lists of files.
    """
    if is_web(url):
        raise NotThere(f"{redacted(url)}: a web server has no list of files; name each, as {{000..012}} does")
    if is_hub(url):
        return _listed_on_the_hub(url)
    files, path = _file_system(url)
    find = files.glob if _is_pattern(path) else files.find
    found = _retried(url, lambda: _of_library(url, lambda: list(find(path))))
    parts = urlsplit(url)
    if "@" not in parts.netloc:
        return sorted(f"{parts.scheme}://{name}" for name in found)
    # abfs://container@account.dfs.core.windows.net/...: the account is not in the names.
    return sorted(urlunsplit(parts._replace(path=f"/{name.partition('/')[2]}")) for name in found)


def _listed_on_the_hub(url: str) -> list[str]:
    folder, name = url, ""
    while _is_pattern(folder):
        folder, _, last = folder.rpartition("/")
        name = f"{last}/{name}" if name else last
    folder = at_commit(folder)
    found = _retried(url, lambda: hub_listed(folder))
    if not name:
        return found
    matches = re.compile(_glob_pattern(name)).fullmatch
    return [each for each in found if matches(each[len(folder) + 1 :])]


def _is_pattern(path: str) -> bool:
    return any(sign in path for sign in "*?[")


def _glob_pattern(name: str) -> str:
    """The regular expression of a pattern: * and ? stay within a folder, **/ is any folders."""
    signs = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    parts = re.split(r"(\*\*/|\*\*|\*|\?|\[[^]/]+\])", name)
    return "".join(
        signs.get(part, part.replace("[!", "[^") if part.startswith("[") else re.escape(part)) for part in parts
    )


def is_web(url: str) -> bool:
    """Whether every answer tells the version of what it is a part of."""
    return url.startswith(("http://", "https://"))


def _retried(url: str, read: Callable[[], T]) -> T:
    """read(), a few times. RemoteError: what it failed at last, or at once where that is no use."""
    pause, tries = FIRST_PAUSE, TRIES if is_web(url) or is_hub(url) else min(TRIES, _TRIES_OF_DRIVERS)
    for left in reversed(range(tries)):
        try:
            return read()
        except Recoverable as error:
            if not left:
                raise RemoteError(f"{redacted(url)}: {error}, {tries} times") from None
            own = min(LONGEST_PAUSE, pause * random.uniform(0.5, 1.0))
            time.sleep(max(own, min(LONGEST_ASKED, error.pause)))
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
        check_range(redacted(url), answer.status, answer.headers.get("Content-Range") or "", start)
        return _exactly(answer, stop - start)


def _web_whole(url: str, at_most: int) -> bytes:
    with _answer(url, {}) as answer:
        data = _received(lambda: answer.read(at_most + 1))
        said = answer.headers.get("Content-Length") or ""
    if len(data) > at_most:
        raise RemoteError(f"{redacted(url)}: more than {at_most} bytes; at most these are read")
    if said.isdigit() and len(data) != int(said):
        raise Recoverable(f"{len(data)} bytes came of {said}")
    return data


def _exactly(answer: Any, size: int) -> bytes:
    data = _received(lambda: answer.read(size + 1))
    if len(data) != size:
        raise Recoverable(f"{len(data)} bytes came of {size}")
    return data


def _received(read: Callable[[], bytes]) -> bytes:
    try:
        return read()
    except http.client.IncompleteRead as error:
        raise Recoverable(f"the answer was cut short after {len(error.partial)} bytes") from None
    except (OSError, http.client.HTTPException) as error:
        raise Recoverable(f"no answer ({_reason(error)})") from None


def _answer(url: str, headers: dict[str, str]) -> Any:
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    # What is no URL strictly, but is meant: the names of a list, with blanks and letters of any language.
    path, query = (quote(part, safe="%/:=&?~+!$,;'@()*[]") for part in (parts.path, parts.query))
    clean = urlunsplit(parts._replace(netloc=host, path=path, query=query, fragment=""))
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
        raise Recoverable(f"no answer ({_reason(error)})") from None


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
    if status in MAY_RECOVER:
        return Recoverable(f"status {status}", float(retry_after) if retry_after.isdigit() else 0.0)
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
        from fsspec.core import url_to_fs

        with _making:
            _quiet()
            files, path = url_to_fs(url)
        return files, str(path)
    except ImportError as error:
        package = _PACKAGES.get(protocol, "adlfs")
        raise NotThere(
            f"{redacted(url)}: {protocol}:// needs the package {package} ({first_line(error)}): "
            f"pip install 'saevlm-fast[remote]'" + ("" if protocol in _PACKAGES else f" {package}")
        ) from None
    except (OSError, ValueError) as error:
        raise NotThere(f"{redacted(url)}: {redacted_text(first_line(error))}") from None


def _quiet() -> None:
    """The drivers log every try that fails, with its traceback and the whole request; who sets up logging sees it."""
    for name in _LOGGERS:
        logger = logging.getLogger(name)
        if not logger.handlers:
            logger.addHandler(logging.NullHandler())


def _stored_found(url: str) -> Found:
    files, path = _file_system(url)

    def info() -> dict[str, Any]:
        files.invalidate_cache()
        return dict(files.info(path))

    said = _of_library(url, info)
    if said.get("type") == "directory":
        raise NotThere(f"{redacted(url)}: a folder, where a file is needed")
    version = next(
        (str(said[name]) for name in ("ETag", "etag", "generation", "xet_hash", "mtime") if said.get(name)), ""
    )
    size = said.get("size")
    return Found(int(size) if size is not None else None, version, True)


def _stored_range(url: str, start: int, stop: int, found: Found) -> bytes:
    files, path = _file_system(url)
    data = _of_library(url, lambda: files.cat_file(path, start=start, end=stop)) if stop > start else b""
    if len(data) != stop - start:
        raise Recoverable(f"{len(data)} bytes came of {stop - start}")
    return bytes(data)


def _of_library(url: str, call: Callable[[], T]) -> T:
    """What a library returns; its errors, of whatever kinds, as ours."""
    try:
        return call()
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
        raise Recoverable(text) from None
