"""Many files at URLs, as if they were here: each fetched when it is first asked for, or ahead of that in threads.

Those that were asked for longest ago are given free for the cache to remove, once all that are held take more than a
third of it: a store may be larger than the cache, and a process that reads it in order never stops for room.
"""

import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeVar
from weakref import ref

from saevlm_fast.remote.answers import RemoteError
from saevlm_fast.remote.cache import Cached, fetched, limit_bytes, release
from saevlm_fast.urls import redacted

THREADS = 8  # that fetch ahead
_LEAST_HELD = 2
_STATE = ("urls", "_digests", "_opened", "_most", "_versions")
T = TypeVar("T")


class RemoteFiles(Sequence[T]):
    """Files at URLs, and what is made of each once it is here: a path, tensors mapped from it.

    Several threads may ask; a copy in another process begins anew.

    Args:
        urls: of the files. digests: SHA-256 of each, None where it is not known.
        opened: called with the local path and the number of a file, for what `self[number]` is. When the file is let
            go, what was made of it is too: what is mapped stays while somebody has it, a path may be gone later.
        most: files that are held, whatever their size; who asks for one after the other gets the next one ahead.
    """

    def __init__(
        self,
        urls: Sequence[str],
        digests: Sequence[str | None],
        opened: Callable[[Path, int], T],
        most: int | None = None,
    ):
        self.urls, self._digests, self._opened, self._most = urls, digests, opened, most
        self._versions: dict[int, str] = {}
        self._begin()

    def expect(self, number: int, version: str) -> None:
        """From now on a file has to be of this version; of each that is fetched this is so from then on.

        Raises:
            RemoteError: it was fetched in another version.
        """
        if self._versions.setdefault(number, version) != version:
            raise RemoteError(f"{redacted(self.urls[number])}: it was replaced since it was opened")

    def content(self) -> str:
        """16 hexadecimal digits, others as soon as a file is of another version; "" if one has no known version."""
        versions = [self._versions.get(number, "") for number in range(len(self))]
        return hashlib.sha256(repr(versions).encode()).hexdigest()[:16] if all(versions) else ""

    def _begin(self) -> None:
        self._pid, self._last = os.getpid(), -1
        self._held: OrderedDict[int, tuple[Cached, int, T]] = OrderedDict()
        self._coming: dict[int, Future[T]] = {}
        self._lock = threading.Lock()
        self._waiting: SimpleQueue[tuple[int, Future[T]]] = SimpleQueue()
        self._threads: list[threading.Thread] = []

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name in _STATE}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._begin()

    def __len__(self) -> int:
        return len(self.urls)

    def __getitem__(self, number: int) -> T:  # type: ignore[override]  # no slices
        """What is made of a file, which is fetched now if it is not here. RemoteError: it cannot be read."""
        self._after_fork()
        if self._most is not None and number != self._last:
            follows, self._last = number == self._last + 1, number
            if follows and number + 1 < len(self):
                self.ahead([number, number + 1])
        with self._lock:
            if number in self._held:
                self._held.move_to_end(number)
                return self._held[number][2]
            coming, new = self._coming.get(number), number not in self._coming
            if coming is None:
                coming = self._coming[number] = Future()
        if new:
            self._fetch(number, coming)
        return coming.result()

    def __iter__(self) -> Iterator[T]:
        return (self[number] for number in range(len(self)))

    def ahead(self, numbers: Iterable[int]) -> None:
        """Have these fetched in the background. What goes wrong is raised where they are asked for."""
        self._after_fork()
        with self._lock:
            for number in numbers:
                if number not in self._held and number not in self._coming:
                    self._coming[number] = coming = Future[T]()
                    self._waiting.put((number, coming))
            while len(self._threads) < THREADS and not self._waiting.empty():
                # As daemons: nothing waits for them at the end of the process, as it would for an executor's.
                self._threads.append(threading.Thread(target=_work, args=(ref(self), self._waiting), daemon=True))
                self._threads[-1].start()

    def _after_fork(self) -> None:
        """Threads do not come along, nor what they were at."""
        if self._pid != os.getpid():
            self._begin()

    def _fetch(self, number: int, coming: "Future[T]") -> None:
        cached = None
        try:
            cached = fetched(self.urls[number], self._digests[number])
            self.expect(number, cached.version)
            made, size = self._opened(cached.path, number), cached.path.stat().st_size
        except BaseException as error:
            if cached is not None:
                release(cached.key)
            with self._lock:
                del self._coming[number]  # who asks next tries again
            coming.set_exception(error)
            return
        with self._lock:
            self._held[number] = cached, size, made
            del self._coming[number]
            free = self._let_go()
        coming.set_result(made)
        for key in free:
            release(key)

    def _let_go(self) -> list[str]:
        keys, held = [], sum(size for _, size, _ in self._held.values())
        most = len(self._held) if self._most is None else self._most
        while len(self._held) > most or (held > limit_bytes() // 3 and len(self._held) > _LEAST_HELD):
            _, (cached, size, _) = self._held.popitem(last=False)
            keys.append(cached.key)
            held -= size
        return keys


def _work(files: "ref[RemoteFiles[Any]]", waiting: "SimpleQueue[tuple[int, Future[Any]]]") -> None:
    while True:
        number, coming = waiting.get()
        if (owner := files()) is None:
            return
        owner._fetch(number, coming)
        del owner
