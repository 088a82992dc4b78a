"""Whether data on disk is what was written: files compared with their digests before they are used, and the digest of
a matrix by which a resumed run knows its data.

A digest that was computed is remembered in the user's cache directory for a week, by the file's path, size, inode and
times of last change, so that runs on the same store read it once. One of these times is the file system's own, which
nobody sets back: what changes a file through the file system is noticed at once, and what does not (a disk that
forgets) within a week.
"""

import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saevlm_fast.data.matrix import will_need
from saevlm_fast.data.passes import Pass
from saevlm_fast.errors import ActivationError, require
from saevlm_fast.files import cache_directory, sha256_file

_WEEK = 7 * 24 * 3600.0
_WORTH_REMEMBERING = 8 << 20  # bytes; hashing less takes less time than looking it up
_SETTLED = 2.0  # seconds after its last change, before which a file's time may not tell it from its next version
_LOOKING = threading.Lock()
_AT_ONCE = 4  # files that are compared at the same time
_PIECE = 64 << 20  # bytes of a matrix that are hashed at a time, each by a thread


class CheckedFiles:
    """Files that are each compared with their SHA-256 before they are first used, once in this process.

    Several threads may ask: each file is read by one of them, different files at the same time.

    Args:
        files: their paths. digests: theirs, hexadecimal, in the same order.
    """

    def __init__(self, files: Sequence[Path], digests: Sequence[str]):
        self.files = files
        self._digests = digests
        self._sound = [False] * len(files)
        self._locks = [threading.Lock() for _ in files]

    def __reduce__(self) -> tuple[type["CheckedFiles"], tuple[Sequence[Path], Sequence[str]]]:
        """A copy, in this process or another, compares anew: locks are not copied."""
        return CheckedFiles, (self.files, self._digests)

    def check(self, numbers: Iterable[int]) -> None:
        """Compares those of these files that were not compared before. ActivationError: one that was altered."""
        waiting = [number for number in numbers if not self._sound[number]]
        for number in waiting:  # first those that no other thread is at
            if self._locks[number].acquire(blocking=False):
                try:
                    self._compare(number)
                finally:
                    self._locks[number].release()
        for number in waiting:
            if not self._sound[number]:
                with self._locks[number]:
                    self._compare(number)

    def check_all(self) -> None:
        """Compares all of them, in a few threads. ActivationError: as `check`. Ctrl-C ends it after a file each."""
        waiting = [number for number, sound in enumerate(self._sound) if not sound]
        self._check_in_threads(waiting, self._comparison(len(waiting)))

    def check_shared(self, rank: int, collect: Callable[[Any], list[Any]]) -> None:
        """The same by several processes that all ask: those that see the same files, by inode and times of last change,
        each compare some of them. After every few files all wait for each other, so that none is thought to hang.

        Copies on several disks have other times, unless the disks are clones, block by block: of such each file is
        compared on one of them.

        Args:
            rank: this one.
            collect: gives every process's value, in order.

        Raises:
            ActivationError: as `check`; in the process that finds it.
        """
        seen = collect([_identity(file.stat()) for file in self.files])
        sharing = [number for number, files in enumerate(seen) if files == seen[rank]]
        own = list(range(len(self.files)))[sharing.index(rank) :: len(sharing)]
        most = max(-(-len(files) // seen.count(files)) for files in seen)
        comparison = self._comparison(len(own))
        for start in range(0, most, _AT_ONCE):
            self._check_in_threads(own[start : start + _AT_ONCE], comparison)
            collect(None)
        self._sound = [True] * len(self.files)

    def _comparison(self, n_files: int) -> Pass:
        folder = self.files[0].parent if self.files else Path()
        return Pass(f"comparing {folder} with its digests", n_files, "files")

    def _check_in_threads(self, waiting: Sequence[int], comparison: Pass) -> None:
        if not waiting:
            return
        with ThreadPoolExecutor(min(_AT_ONCE, os.cpu_count() or 1, len(waiting)), "digests") as pool:
            compared = [pool.submit(self.check, [number]) for number in waiting]
            try:
                for each in compared:
                    each.result()
                    comparison.add(1)
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _compare(self, number: int) -> None:
        if self._sound[number]:
            return
        file = self.files[number]
        found = remembered(file, "", lambda: sha256_file(file))
        check_digest(file, found, self._digests[number])
        self._sound[number] = True


def _identity(found: os.stat_result) -> tuple[int, int, int, int]:
    """What tells a file from its next version, and from a copy of it on another disk, also one with the same mtime."""
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino


def check_digest(file: Path, found: str, recorded: str) -> None:
    """ActivationError: they differ."""
    message = f"{file}: altered, its SHA-256 is not the one in the store's index"
    require(found == recorded, message, ActivationError)


def matrix_digest(x_ND: Tensor, name: str = "the activations") -> str:
    """SHA-256 of a matrix [N, d_in] on the host: its dtype, its width, and the digests of its rows, piece by piece.

    name: what it is called while it is read, if that takes long.

    The same for the same rows, in whatever file they are or in memory. A few threads each hash pieces of 64 MB.
    """
    rows = max(1, _PIECE // (x_ND.shape[1] * x_ND.dtype.itemsize))

    def piece(start: int) -> bytes:
        part_ND = x_ND[start : start + rows]
        will_need(part_ND)
        return hashlib.sha256(part_ND.contiguous().view(torch.uint8).flatten().numpy().data).digest()

    digest = hashlib.sha256(f"{x_ND.dtype} {x_ND.shape[1]}".encode())
    reading = Pass(f"digest of {name}", x_ND.nbytes >> 20, "MB")
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1), "digests") as pool:
        for part in pool.map(piece, range(0, len(x_ND), rows)):
            digest.update(part)
            reading.add(_PIECE >> 20)
    return digest.hexdigest()


def remembered(file: Path, what: str, compute: Callable[[], str]) -> str:
    """compute(), a digest of `what` of a file; or what it was, if the file has not changed within a week."""
    file = Path(os.path.abspath(file))
    before = file.stat()
    if before.st_size < _WORTH_REMEMBERING:
        return compute()
    key = json.dumps([str(file), what, *_identity(before)])
    try:
        notes = cache_directory() / "digests" / f"{hashlib.sha256(os.fsencode(file.parent)).hexdigest()[:24]}.jsonl"
        with _LOOKING:  # threads that ask at once share what they find
            known = _known(notes)
    except (OSError, ValueError):  # no place to remember anything in
        return compute()
    if key in known:
        return known[key]
    digest = compute()
    same = _identity(before) == _identity(file.stat())
    if same and time.time() - max(before.st_mtime, before.st_ctime) > _SETTLED:
        known[key] = digest
        _note(notes, key, digest)
    return digest


@lru_cache(maxsize=64)  # once a process: what is found in it stays true
def _known(notes: Path) -> dict[str, str]:
    found = {}
    for line in notes.read_text(encoding="utf-8", errors="replace").splitlines() if notes.is_file() else ():
        try:
            when, key, digest = json.loads(line)
            if 0 <= time.time() - when < _WEEK:
                found[str(key)] = str(digest)
        except (ValueError, TypeError, RecursionError):
            continue  # a line that was half written
    return found


def _note(notes: Path, key: str, digest: str) -> None:
    try:
        notes.parent.mkdir(parents=True, exist_ok=True)
        with open(notes, "a", encoding="utf-8") as file:
            file.write(json.dumps([time.time(), key, digest]) + "\n")
    except OSError:
        pass
