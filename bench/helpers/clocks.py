"""When named functions ran: what a whole run spends its time on, without a line of it in the run's own code."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

Spans = list[tuple[str, float, float]]


@contextmanager
def clocks(parts: Mapping[str, tuple[Any, str]]) -> Iterator[Spans]:
    """(name, start, end) of every call of the functions while it is open. parts: name -> (owner, attribute)."""
    spans: Spans = []

    def timed(name: str, function: Callable) -> Callable:
        def call(*args: object, **kwargs: object) -> object:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spans.append((name, start, time.perf_counter()))

        return call

    with ExitStack() as stack:
        for name, (owner, attribute) in parts.items():
            stack.enter_context(mock.patch.object(owner, attribute, timed(name, getattr(owner, attribute))))
        yield spans


def seconds_of(spans: Spans) -> dict[str, float]:
    """Sum of every part."""
    sums: dict[str, float] = {}
    for name, start, end in spans:
        sums[name] = sums.get(name, 0.0) + end - start
    return sums
