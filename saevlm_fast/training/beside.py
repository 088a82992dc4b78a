"""Somebody else's code at work beside a run: its calls are made in order, in a thread of its own that nobody must wait
for. Waiting for it has an end, and so has what it may be behind.
"""

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from time import monotonic
from typing import Any, Generic, TypeVar
from weakref import WeakSet

from saevlm_fast.errors import first_line

PATIENCE_SECONDS = 60.0  # for what gives no answer
MOST_BEHIND = 1000
T = TypeVar("T")

hanging: list[str] = []  # names of what was left in the middle of a call, of this process


class Beside(Generic[T]):
    """An object that is made and told things in a thread.

    Attributes:
        failure: what went wrong, in words, once something has; nothing is done from then on.
    """

    def __init__(self, name: str, make: Callable[[], T]):
        self._calls: SimpleQueue[tuple[str, Callable[[], None]]] = SimpleQueue()
        self._made: T | None = None
        self._name, self._now = name, "start"
        self._is_done = self._is_left = False
        self.failure: str | None = None
        self._calls.put(("start", lambda: self._make(make)))
        threading.Thread(target=self._work, daemon=True, name=f"log_to {name}").start()

    def _make(self, make: Callable[[], T]) -> None:
        self._made = make()

    def tell(self, when: str, act: Callable[[T], None]) -> None:
        """Something that is to be done after all that it was told before. when: in words, for messages."""
        if self.failure is None and self._calls.qsize() >= MOST_BEHIND:
            self.leave()
            self.failure = f"is {MOST_BEHIND:,} calls behind, still at {self._now}"
        self._is_done = False
        self._calls.put((when, lambda: act(self._made)))  # type: ignore[arg-type]

    def _work(self) -> None:
        while not self._is_left:
            when, act = self._calls.get()
            if self.failure is not None and when:
                continue
            self._now = when or self._now
            try:
                act()
            except BaseException as error:  # sys.exit() as well: what hears of it is the run
                self.failure = f"failed at {when} ({type(error).__name__}: {first_line(error)})"

    def asked(self) -> threading.Event:
        """What is set once all is done that it was told."""
        done = threading.Event()
        self._calls.put(("", done.set))
        return done

    def settle(self, done: threading.Event, deadline: float) -> bool:
        """Waits for what `asked` gave. False: it was not set by the deadline, and the rest is left undone."""
        self._is_done = done.wait(max(deadline - monotonic(), 0))
        if not self._is_done:
            self.leave()
            self.failure = self.failure or f"was still at {self._now} after {PATIENCE_SECONDS:g} s of waiting for it"
        return self._is_done

    def leave(self) -> None:
        """Nothing more is done, beside what it is in the middle of."""
        if not self._is_done and not self._is_left and self.failure is None:
            hanging.append(self._name)
        self._is_left = True
        self._calls.put(("", lambda: None))


class _OthersToStderr:
    """stdout, for the threads that were there when it was made; stderr for later ones: a logger's words are no result.

    A notebook may train in a thread, and print from others meanwhile.
    """

    def __init__(self) -> None:
        self._threads, self._stdout = WeakSet(threading.enumerate()), sys.stdout
        self._is_over = False

    def __getattr__(self, name: str) -> Any:
        mine = self._is_over or threading.current_thread() in self._threads
        return getattr(self._stdout if mine else sys.stderr, name)

    def end(self) -> None:
        """stdout is what it was. Whoever has put something in front of this since, as a run in another thread or a
        progress bar, may put this back: then it is as if it were not there."""
        self._is_over = True
        if sys.stdout is self:
            sys.stdout = self._stdout


@contextmanager
def quiet_stdout() -> Iterator[None]:
    """While it lasts, what threads print that begin meanwhile goes to stderr."""
    ours = _OthersToStderr()
    sys.stdout = ours
    try:
        yield
    finally:
        ours.end()
