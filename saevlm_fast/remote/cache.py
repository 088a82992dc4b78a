"""Files at URLs, in the user's cache directory: fetched once, bounded, shared by the processes of a machine.

    remote/KEY/NAME        the file, whole. KEY is of its URL and its SHA-256, or else its version
    remote/KEY/info.json   {"url", "size", "version", "sha256", "mtime_ns"}, without secrets; its time is that of the
                           last use. A file that was changed since it was fetched is compared with its SHA-256 again
    remote/KEY/NAME.part   as far as it has come, with part.json; a later process goes on from there
    remote/users/...       one file a process: which keys it uses; locked as long as the process lives

A file is fetched by one process at a time under a lock of its own (outputs.py), and appears in one rename. Before a
fetch the files that were used longest ago are removed until the new one fits, but none that a process uses.
"""

import hashlib
import json
import os
import re
import secrets
import shutil
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, TextIO
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

from saevlm_fast.config.common import CACHE_GIB, CACHE_GIB_VARIABLE
from saevlm_fast.errors import ActivationError, first_line, require
from saevlm_fast.files import atomic_write, cache_directory, sha256_file
from saevlm_fast.outputs import output_lock
from saevlm_fast.remote.answers import Found, RemoteError
from saevlm_fast.remote.hub import is_hub, without_revision
from saevlm_fast.remote.reading import at_commit, copy_whole, digest_of, is_web, look_up, read_range
from saevlm_fast.urls import file_name, redacted

PIECE = 32 << 20  # bytes of one request
_PATIENCE = 3600.0  # seconds to wait for another process that fetches the same file
_ADVICE = f"--cache-gib, {CACHE_GIB_VARIABLE}"
_INFO, _PART_INFO = "info.json", "part.json"
# Of a query, what changes with every signature while the file stays the same.
_SIGNATURE = re.compile(
    r"x-amz-.*|x-goog-.*|signature|expires|key-pair-id|policy|awsaccesskeyid|googleaccessid|sig|se|sp|sv|sr|st|spr|token",
    re.IGNORECASE,
)

_threads: dict[str, threading.RLock] = {}
_threads_lock = threading.Lock()


def limit_bytes() -> int:
    """How much the cache may hold. ValueError: SAEVLM_FAST_CACHE_GIB is no positive number."""
    text = os.environ.get(CACHE_GIB_VARIABLE) or str(CACHE_GIB)
    try:
        gib = float(text)
    except ValueError:
        gib = 0.0
    require(0 < gib < 1 << 30, f"{CACHE_GIB_VARIABLE}: {text!r} is not a positive number of GiB")
    return int(gib * (1 << 30))


def remote_cache() -> Path:
    """The directory of what was fetched."""
    path = cache_directory() / "remote"
    path.mkdir(exist_ok=True)
    return path


class Cached(NamedTuple):
    """A file of a URL on this machine, which stays until `release(key)`. version: "" where a digest was given."""

    path: Path
    key: str
    version: str


def fetched(url: str, sha256: str | None = None) -> Cached:
    """The file at a URL, on this machine: from the cache, or fetched into it.

    Args:
        sha256: of what it must be, where that is known; then nobody is asked about a file that is there.

    Raises:
        RemoteError: it cannot be read, is not what it must be, or does not fit into the cache.
    """
    found, digest = None, sha256
    if sha256 is None:
        found = look_up(url := at_commit(url))
        sha256 = found.digest.removeprefix("sha256:") if found.digest.startswith("sha256:") else None
    key = _key(url, sha256 or (found.version if found is not None else ""))
    with _owned(key, _PATIENCE) as owned:
        if not owned:
            raise RemoteError(f"{redacted(url)}: another process has been fetching it for {_PATIENCE:.0f} s")
        folder = remote_cache() / key
        path = folder / file_name(url)
        if sha256 is None or not _is_there(path, sha256=sha256):
            found = found or look_up(url := at_commit(url))
            if not _is_there(path, found=found, sha256=sha256):
                _fetch_or_say(url, path, found, sha256)
        os.utime(folder / _INFO)
        _users.use(key)
    return Cached(path, key, found.version if found is not None and digest is None else "")


def release(key: str) -> None:
    """One who used that file has done with it."""
    _users.release(key)


@contextmanager
def telling_urls() -> Iterator[None]:
    """Around what reads fetched files: what is wrong with one is said of its URL, not of its place in the cache.

    Raises:
        ValueError: or ActivationError, as what is inside raised it, with the URL.
    """
    try:
        yield
    except ValueError as error:
        text = _with_urls(str(error))
        if text == str(error):
            raise
        raise (ActivationError if isinstance(error, ActivationError) else ValueError)(text) from error


def _with_urls(text: str) -> str:
    try:
        cache = remote_cache()
    except (OSError, ValueError):  # none can be made: nothing was fetched
        return text
    for key in re.findall(rf"{re.escape(str(cache))}/([0-9a-f]{{32}})/", text):
        url = str(_read(cache / key / _INFO).get("url", ""))
        text = text.replace(f"{cache / key / file_name(url)}", url) if url else text
    return text


def _key(url: str, version: str) -> str:
    """version: or SHA-256. Who has opened one version keeps it while others fetch the next."""
    if is_hub(url):  # a file that many commits have is one file
        return hashlib.sha256(f"{without_revision(url)}\n{version}".encode()).hexdigest()[:32]
    parts = urlsplit(url)
    query = urlencode([(name, value) for name, value in parse_qsl(parts.query) if not _SIGNATURE.fullmatch(name)])
    plain = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], query=query, fragment=""))
    return hashlib.sha256(f"{plain}\n{version}".encode()).hexdigest()[:32]


def _is_there(path: Path, found: Found | None = None, sha256: str | None = None) -> bool:
    """Whether the cache has that file, in that version."""
    info = _read(path.parent / _INFO)
    if not path.is_file() or info.get("size") != path.stat().st_size:
        return False
    if sha256 is not None:
        unchanged = info.get("mtime_ns") == path.stat().st_mtime_ns or sha256_file(path) == sha256
        return info.get("sha256") == sha256 and unchanged
    return (
        found is not None and bool(found.version) and (info["size"], info.get("version")) == (found.size, found.version)
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _write(path: Path, value: dict[str, Any]) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(value), encoding="utf-8")


# Fetching -------------------------------------------------------------------------------------------------------------


def _fetch_or_say(url: str, path: Path, found: Found, sha256: str | None) -> None:
    """RemoteError: it cannot be read, or the cache cannot be written (a full disk)."""
    try:
        _fetch(url, path, found, sha256)
    except RemoteError:
        raise
    except OSError as error:
        reason = f"cannot be written to the cache ({remote_cache()}): {error.strerror or first_line(error)}"
        raise RemoteError(f"{redacted(url)}: {reason}") from error


def _fetch(url: str, path: Path, found: Found, sha256: str | None) -> None:
    part = path.with_name(f"{path.name}.part")
    path.unlink(missing_ok=True)
    path.parent.mkdir(exist_ok=True)
    _make_room(url, found.size or 0, part)
    if found.size is not None and found.by_ranges:
        _fetch_ranges(url, part, found)
        unknown = sha256 is None and not found.digest and not is_web(url)
        if unknown and found.size > PIECE and look_up(url) != found:
            part.unlink()
            raise RemoteError(f"{redacted(url)}: it was replaced while it was read")
    else:
        _fetch_whole(url, part)
    size = part.stat().st_size
    _compare(url, part, f"sha256:{sha256}" if sha256 is not None else found.digest)
    with open(part, "rb+") as file:
        os.fsync(file.fileno())
    (path.parent / _PART_INFO).unlink(missing_ok=True)
    os.replace(part, path)
    said = {"url": redacted(url), "size": size, "version": found.version, "sha256": sha256}
    _write(path.parent / _INFO, said | {"mtime_ns": path.stat().st_mtime_ns})


def _compare(url: str, part: Path, digest: str) -> None:
    with open(part, "rb") as file:
        same = digest_of(file, part.stat().st_size, digest) == digest
    if not same:
        part.unlink()
        way = {"sha256": "SHA-256"}.get(digest.partition(":")[0], "checksum")
        raise RemoteError(f"{redacted(url)}: altered, its {way} is not the one that is told of it")


def _fetch_ranges(url: str, part: Path, found: Found) -> None:
    """Piece after piece; from where an earlier process came to, if it is of the same version."""
    assert found.size is not None
    note, state = part.with_name(_PART_INFO), {"size": found.size, "version": found.version}
    before = _read(note)
    done = before.get("done", 0) if part.is_file() and found.version and before.items() >= state.items() else 0
    with open(part, "r+b" if part.is_file() else "w+b") as file:
        file.truncate(found.size)  # what it will take is seen by others from now on
        while done < found.size:
            stop = min(done + PIECE, found.size)
            data = read_range(url, done, stop, found)
            file.seek(done)
            file.write(data)
            done = stop
            if done < found.size:
                file.flush()
                os.fsync(file.fileno())  # before the note of it
                _write(note, {**state, "done": done})


def _fetch_whole(url: str, part: Path) -> None:
    with open(part, "wb") as file:

        def begin() -> Any:
            file.seek(0)
            file.truncate()
            return write

        def write(piece: bytes) -> None:
            file.write(piece)
            if file.tell() > limit_bytes():
                raise RemoteError(f"{redacted(url)}: more than the cache may have ({_ADVICE})")

        copy_whole(url, begin)


# Room -----------------------------------------------------------------------------------------------------------------


def _make_room(url: str, size: int, part: Path) -> None:
    """Removes what was used longest ago, until `size` more bytes fit. RemoteError: they do not."""
    limit = limit_bytes()
    if size > limit:
        raise RemoteError(f"{redacted(url)}: {size} bytes; the cache may have {limit} ({_ADVICE})")
    with _owned("room", _PATIENCE):
        kept = sorted(_folders(), key=lambda each: each[1])
        used = sum(n_bytes for folder, _, n_bytes in kept if folder != part.parent)
        for folder, _, n_bytes in kept:
            if used + size <= limit:
                break
            if folder != part.parent and _removed(folder):
                used -= n_bytes
        if used + size > limit:
            raise RemoteError(
                f"{redacted(url)}: {size} bytes do not fit into the cache: of its {limit} bytes {used} are of files in "
                f"use; give it more ({_ADVICE})"
            )


def _folders() -> Iterator[tuple[Path, float, int]]:
    """Every key's folder, when it was used last, and its bytes."""
    for folder in remote_cache().iterdir():
        if re.fullmatch("[0-9a-f]{32}", folder.name):
            with suppress(FileNotFoundError):  # another process removes it
                files = list(folder.iterdir())
                info = folder / _INFO
                at = (info if info.exists() else folder).stat().st_mtime
                yield folder, at, sum(file.stat().st_size for file in files)


def _removed(folder: Path) -> bool:
    """Whether it could be: nobody is at it, or uses it. Who uses it is asked once nobody else can begin to."""
    with _owned(folder.name, 0.0) as owned:
        free = owned and folder.name not in _users.everybodys()
        if free:
            shutil.rmtree(folder, ignore_errors=True)
        return free and not folder.exists()


@contextmanager
def _owned(key: str, patience: float) -> Iterator[bool]:
    """A key is this thread's alone, on this machine; False if others have it and patience is at an end."""
    with _threads_lock:
        lock = _threads.setdefault(key, threading.RLock())
    if not lock.acquire(timeout=patience):
        yield False
        return
    try:
        with output_lock(remote_cache() / key, directory=False, patience=patience):
            yield True
    except ValueError as error:
        if patience or "is in use" not in str(error):
            raise
        yield False
    finally:
        lock.release()


class _Users:
    """Which keys the processes of this machine use. Where the system has no flock, nothing is known of others."""

    def __init__(self) -> None:
        self._file: TextIO | None = None
        self.forget()

    def forget(self) -> None:
        """Of a process that was forked: it has used nothing yet; what it inherits keeps the parent's files."""
        if self._file is not None:
            self._file.close()
        self._counts: Counter[str] = Counter()
        self._file = None
        self._lock = threading.Lock()

    def use(self, key: str) -> None:
        with self._lock:
            self._counts[key] += 1
            if self._counts[key] == 1:
                self._say()

    def release(self, key: str) -> None:
        with self._lock:
            if key not in self._counts:
                return
            self._counts[key] -= 1
            if not self._counts[key]:
                del self._counts[key]
                self._say()

    def everybodys(self) -> set[str]:
        """Keys of all processes that live; the files of others are removed."""
        with self._lock:
            found = set(self._counts)
        for path in (remote_cache() / "users").glob("[0-9]*"):
            with suppress(OSError), open(path, "r+", encoding="utf-8") as file:
                if _flock(file, exclusive=False):
                    path.unlink(missing_ok=True)
                else:
                    found.update(file.read().split())
        return found

    def _say(self) -> None:
        if self._file is None:
            folder = remote_cache() / "users"
            folder.mkdir(exist_ok=True)
            hidden = folder / f".{os.getpid()}-{secrets.token_hex(4)}"
            self._file = open(hidden, "w", encoding="utf-8")  # noqa: SIM115  # as long as the process lives
            _flock(self._file, exclusive=True)
            os.rename(hidden, folder / hidden.name[1:])  # others see it locked
        self._file.seek(0)
        self._file.write("".join(f"{key} " for key in self._counts))
        self._file.truncate()
        self._file.flush()


def _flock(file: TextIO, exclusive: bool) -> bool:
    """Whether the lock could be had. Unlike a record lock, children that were forked keep it."""
    if os.name == "nt":
        return False
    import fcntl

    try:
        fcntl.flock(file, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


_users = _Users()


def _after_fork() -> None:
    """Locks that another thread of the parent held would never be released here."""
    global _threads_lock
    _threads.clear()
    _threads_lock = threading.Lock()
    _users.forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
