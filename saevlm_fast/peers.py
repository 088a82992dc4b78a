"""The ranks that share a piece of work, as the work sees them: what they tell each other, always in one order.

training/process_group.py has the ranks of a torchrun; tests have threads. Everybody calls the same methods in the same
order, or all wait until the timeout.
"""

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

Chunk = TypeVar("Chunk")
_CHUNKS_APART = 16  # chunks that a rank may be ahead of the slowest: a rank that is gone is missed this soon


class Peers(Protocol):
    """The ranks, as one of them sees them. All of them call the same methods in the same order.

    Attributes:
        rank: this one, from 0. world: how many there are.

    Raises:
        Interrupted: (of each method) a rank has ended, or has not answered within the timeout.
    """

    rank: int
    world: int

    def gather(self, x: Tensor) -> Tensor:
        """[R, *x.shape]: every rank's x, in order. All have one shape."""
        ...

    def exchange(self, x: Tensor) -> Tensor:
        """x [R, ...], of which piece r goes to rank r: the pieces that this rank was sent, in order, [R, ...]."""
        ...

    def add_up(self, x: Tensor) -> Tensor:
        """The sum of every rank's x, of whole numbers."""
        ...

    def share(self, value: Any = None) -> Any:
        """Rank 0's value, on every rank: anything that pickles, of our own making."""
        ...

    def collect(self, value: Any) -> list[Any]:
        """Every rank's value, in order; by way of the host."""
        ...

    def agree(self, *flags: bool) -> list[bool]:
        """Of each flag whether any rank has it. A GPU is not waited for."""
        ...


class Alone:
    """Peers of which there is one: nothing is told."""

    rank, world = 0, 1

    def gather(self, x: Tensor) -> Tensor:
        return x[None]

    def exchange(self, x: Tensor) -> Tensor:
        return x

    def add_up(self, x: Tensor) -> Tensor:
        return x

    def share(self, value: Any = None) -> Any:
        return value

    def collect(self, value: Any) -> list[Any]:
        return [value]

    def agree(self, *flags: bool) -> list[bool]:
        return list(flags)


class Ranks(NamedTuple):
    """The ranks as a step of training sees them: everyone; those that have the other latents of this one's rows; and
    those that have the other rows for this one's latents."""

    everyone: Peers
    latents: Peers
    rows: Peers

    @classmethod
    def of(cls, peers: Peers) -> "Ranks":
        """One replica."""
        return cls(peers, peers, Alone())

    def one_replica(self) -> "Ranks":
        """This one's, for itself."""
        return Ranks.of(self.latents)


def in_order(parts: Tensor) -> Tensor:
    """The sum over the first dimension, rank after rank: the same bits on every rank and in every run."""
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    return total


def summed(peers: Peers, x: Tensor) -> Tensor:
    """The sum of every rank's x, of one shape, rank after rank."""
    return in_order(peers.gather(x))


def laid_end_to_end(peers: Peers, x: Tensor) -> Tensor:
    """Every rank's rows of x, one rank's after the other's; their numbers may differ, and be 0."""
    known = peers.collect((len(x), x.shape[1:], x.dtype))
    lengths = [n for n, _, _ in known]
    _, shape, dtype = known[lengths.index(max(lengths))]  # who has no rows may not know what they look like
    padded = x.new_zeros(max(lengths), *shape, dtype=dtype)
    if padded.numel() == 0:
        return x.new_zeros(sum(lengths), *shape, dtype=dtype)
    if len(x):
        padded[: len(x)] = x
    return torch.cat([part[:n] for part, n in zip(peers.gather(padded), lengths)])


def share_of(peers: Peers | None, n: int) -> range:
    """The rank's of n things in order: neighbours, shares that differ by one at most, the first ones larger."""
    if peers is None:
        return range(n)
    start, stop = (-(-rank * n // peers.world) for rank in (peers.rank, peers.rank + 1))
    return range(start, stop)


def rows_of_share(peers: Peers | None, n: int, batch_rows: int) -> range:
    """The rank's of n rows, in whole batches: those of one process, so that what is made of a batch is the same."""
    batches = share_of(peers, -(-n // batch_rows))
    return range(batches.start * batch_rows, min(batches.stop * batch_rows, n))


def shared_chunks(
    peers: Peers | None, chunks: Callable[[int, range], Iterator[Chunk]], n: int, batch_rows: int
) -> Iterator[Chunk]:
    """chunks(batch_rows, rows) of the rank's rows of n, in step with the others."""
    n_batches = -(-n // batch_rows)
    most = n_batches if peers is None else len(range(0, n_batches, peers.world))
    return in_step(peers, chunks(batch_rows, rows_of_share(peers, n, batch_rows)), most)


def in_step(peers: Peers | None, chunks: Iterator[Chunk], most: int) -> Iterator[Chunk]:
    """The rank's chunks, of which no rank has more than `most`: every 16 of them the ranks wait for each other.

    So a rank is only ever waited for over a few chunks of work, however uneven the shares are.
    """
    if peers is None:
        yield from chunks
        return
    for _ in range(0, most, _CHUNKS_APART):
        yield from islice(chunks, _CHUNKS_APART)
        peers.agree(False)
    assert next(chunks, None) is None, "more chunks than was said"
