"""The processes that share a harvest: torchrun's ranks, which only ever wait for each other.

A rank may wait long for the slowest, as long as that one goes on. So each leaves signs of life in torchrun's store, and
one that has left none within the timeout ends those that wait for it.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from saevlm_fast.errors import Interrupted, first_line
from saevlm_fast.torchrun import meet, rank_store, speaks, world_size

_SIGN_SECONDS = 1.0  # between two signs of a rank
_POLL_SECONDS = 0.05
_EVER = timedelta(days=7)  # for a collective, in which a rank may wait long for the slowest


class Signs:
    """What ranks leave in a store of c10d: numbers that rise while they go on."""

    def __init__(self, store: Any, rank: int, world: int, timeout: float):
        self.store, self.timeout = store, timeout
        self._keys = [f"saevlm_fast/signs/{each}" for each in range(world)]
        self._own, self._left = self._keys[rank], 0.0
        self._work: Any = None
        self.leave()

    @property
    def waits(self) -> bool:
        """Whether a collective goes on that this rank has ceased to wait for."""
        return self._work is not None and not self._work.is_completed()

    def leave(self) -> None:
        """One a second at most."""
        now = time.monotonic()
        if self._left == 0.0 or now - self._left > _SIGN_SECONDS:
            self._left = now
            self.store.add(self._own, 1)

    def wait(self, work: Any, stop_if: Callable[[], None]) -> None:
        """For the end of a collective. Interrupted: a rank has left no sign for as long as the timeout."""
        self._work = work
        seen: list[Any] = [None] * len(self._keys)
        since, looked = [0.0] * len(seen), 0.0
        while not work.is_completed():
            stop_if()
            now = time.monotonic()
            if now - looked > _SIGN_SECONDS:
                looked = now
                try:
                    self.leave()
                    known = self.store.multi_get(self._keys)
                except RuntimeError:
                    break  # it has gone, as after the last collective: work knows whether in time
                since = [now if sign != old else at for sign, old, at in zip(known, seen, since)]
                seen = known
            for rank, at in enumerate(since):
                if now - at > self.timeout:
                    said = f"another of the {len(seen)} ranks has not answered for {self.timeout:g} s"
                    raise Interrupted(f"{said} (collective_timeout): rank {rank}; continue with --resume")
            time.sleep(_POLL_SECONDS)
        work.wait(timedelta(seconds=self.timeout))


@dataclass(frozen=True)
class Ranks:
    """The processes of a torchrun, or the only one."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    signs: Signs | None = None
    group: Any = None

    def barrier(self, stop_if: Callable[[], None] = lambda: None) -> None:
        """Waits for all. stop_if: called meanwhile; what it raises ends the waiting.

        Raises:
            Interrupted: a rank has ended, or has left no sign for as long as the timeout.
        """
        if self.signs is None:
            return
        with _in_words():
            work = dist.barrier(self.group, async_op=True)
            self.signs.wait(work, stop_if)

    def goes_on(self) -> None:
        """To be called while this rank works. Interrupted: nobody is there who could see it."""
        if self.signs is not None:
            with _in_words():
                self.signs.leave()

    def collect(self, value: Any) -> list[Any]:
        """Every rank's value, in order. Interrupted: as `barrier`."""
        values: list[Any] = [value] * self.world
        self.barrier()
        if self.world > 1:
            with _in_words():
                dist.all_gather_object(values, value)
        return values

    def device(self, name: str) -> str:
        """`auto` and `cuda` are the rank's own GPU."""
        own = self.world > 1 and name in ("auto", "cuda") and torch.cuda.is_available()
        return f"cuda:{self.local_rank}" if own else name


ALONE = Ranks()


@contextmanager
def torchrun_ranks(timeout: float) -> Iterator[Ranks]:
    """This process among those that torchrun started; joins them with gloo (ranks only wait for each other).

    timeout: seconds that ranks wait for each other when they meet, and later for a sign.

    Raises:
        Interrupted: they do not come, or one has ended before.
    """
    world = world_size()
    if world == 1:
        yield ALONE
        return
    local_rank, local_world = (int(os.environ.get(name, "0")) for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    with _in_words():
        meet(timeout)
        dist.init_process_group("gloo", timeout=timedelta(seconds=timeout))
        rank, group = dist.get_rank(), dist.new_group(timeout=_EVER)
        signs = Signs(rank_store(timeout), rank, world, timeout)
        ranks = Ranks(rank, world, local_rank, max(1, local_world), signs, group)
    try:
        yield ranks
    except BaseException:
        speaks()
        raise
    finally:
        if not signs.waits:  # or this would wait for a collective that nobody answers
            with suppress(RuntimeError):
                dist.destroy_process_group()


@contextmanager
def _in_words() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        what = f"another of the {world_size()} ranks has ended, or did not come"
        raise Interrupted(f"{what}: {first_line(error)}") from error
