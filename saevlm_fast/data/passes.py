"""Passes over data before any work is seen, such as the comparison of a store with its digests: who listens hears of
those that take long, so that nothing is silent for minutes.
"""

import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from saevlm_fast.urls import redacted_text

if TYPE_CHECKING:  # commands listen before they need torch
    from torch import Tensor

FIRST_SECONDS, SECONDS = 2.0, 5.0  # after which it is first spoken of a pass, and between two sentences

_listeners: list[Callable[[str], None]] = []
_speaking = threading.Lock()


@contextmanager
def told_of_passes(on_note: Callable[[str], None]) -> Iterator[None]:
    """While open: on_note is called with a sentence now and then, by whatever thread is at a pass."""
    _listeners.append(on_note)
    try:
        yield
    finally:
        _listeners.remove(on_note)


class Pass:
    """One pass. Several threads may tell how far it is.

    Args:
        what: it does, `comparing STORE with its digests`. total: of what it counts. unit: its plural.
    """

    def __init__(self, what: str, total: int, unit: str):
        self.what, self.total, self.unit, self.done = redacted_text(what), total, unit, 0
        self._begun, self._spoken = time.monotonic(), -math.inf

    def each(self, chunks: "Iterable[Tensor]") -> "Iterator[Tensor]":
        """Chunks of rows as they come."""
        for chunk in chunks:
            yield chunk
            self.add(len(chunk))

    def add(self, n: int) -> None:
        """So many more are done."""
        with _speaking:
            self.done += n
            now = time.monotonic()
            seconds = now - self._begun
            if seconds < FIRST_SECONDS or now - self._spoken < SECONDS or not 0 < self.done < self.total:
                return
            self._spoken = now
            rate, left = self.done / seconds, (self.total - self.done) * seconds / self.done
            counted = f"{self.done:,} of {self.total:,} {self.unit}"
            text = f"{self.what}: {counted}, {left:.0f} s left at {rate:.1f} {self.unit}/s"
            for each in list(_listeners):
                each(text)
