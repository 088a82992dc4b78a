"""The order of training rows, and batches read in it.

Shape suffixes: N rows, B rows of a batch, D d_in.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from saevlm_fast.data.prefetch import prefetch
from saevlm_fast.data.rows import Activations
from saevlm_fast.errors import require

LEAST_MIXED = 8  # blocks of a window of rows that are elsewhere
_KEPT = 4  # permutations, and windows
_SLOW = 1 << 17  # rows whose permutation takes longer than a few steps of a GPU: the next one is made meanwhile


class Rows(Protocol):
    """What an order needs to know of the data; Activations is one. block_rows may be there as well: rows that are
    fetched together, of a store that is elsewhere."""

    @property
    def n_rows(self) -> int: ...

    @property
    def row_bytes(self) -> int:
        """Bytes of one row on disk."""
        ...


class ShuffledRows:
    """Which rows make up training step `step`: a pure function of the arguments, so resuming needs no state.

    Every epoch is a new permutation of all rows, cut into n_rows // batch_size batches. The rest, fewer rows than a
    batch, is dropped (other rows in every epoch); a data set smaller than one batch is one batch, whole, every step.
    Batch size does not enter the permutation. Within a batch rows ascend, which makes reading faster; a consumer that
    splits a batch should take every n-th row, since neighbours on disk are often of the same class.

    A set of at most exact_bytes is permuted exactly. A larger one is permuted in blocks of about block_bytes of
    neighbouring rows, and then row by row within windows of window_bytes of such blocks: a window is read when it
    begins (`blocks_begun`) and stays in the page cache while it is used, so the disk is read a block at a time.

    Rows that are elsewhere are permuted in blocks of block_rows, however few they are, and in windows of at least
    LEAST_MIXED blocks: the first step waits for one window, not for all of the data.

    Random numbers are raw Philox words, which numpy promises never to change (its permutations it does not).
    """

    def __init__(
        self,
        activations: Rows,
        batch_size: int,
        seed: int = 0,
        *,
        exact_bytes: int = 8 << 30,
        window_bytes: int = 512 << 20,
        block_bytes: int = 1 << 20,
    ):
        require(batch_size >= 1, f"batch_size is {batch_size}; at least 1 is needed")
        require(seed >= 0, f"seed is {seed}; at least 0 is needed")
        self.n_rows, self.batch_size, self.seed = activations.n_rows, batch_size, seed
        row_bytes = max(activations.row_bytes, 512)  # bounds the permutations' own memory when rows are tiny
        self._exact = self.n_rows * row_bytes <= exact_bytes
        self._block = max(1, block_bytes // row_bytes)  # rows in a block, blocks in a window
        least = 1
        block_rows = getattr(activations, "block_rows", None)
        if block_rows is not None:
            self._exact, self._block, least = False, min(block_rows, self.n_rows), LEAST_MIXED
        self._per_window = max(least, window_bytes // (self._block * row_bytes))

    @property
    def batches_per_epoch(self) -> int:
        return max(1, self.n_rows // self.batch_size)

    def batch(self, step: int) -> Tensor:
        """Rows of step `step` (counted from 0 over all epochs): int64 [min(batch_size, n_rows)], ascending."""
        epoch, start, stop = self._span(step)
        rows = self._exact_slice(epoch, start, stop) if self._exact else self._windowed_slice(epoch, start, stop)
        return torch.from_numpy(np.sort(rows))

    def blocks_begun(self, step: int, anew: bool = False) -> list[tuple[int, int]]:
        """The blocks (first row, row after its last), ascending, of the windows that begin in step `step`.

        anew: also of the window that was begun before. [] if the rows are permuted exactly.
        """
        if self._exact:
            return []
        epoch, start, stop = self._span(step)
        order, size = self._block_order(epoch), self._per_window
        windows = [window for window, first in self._windows(epoch, start, stop) if anew or first >= start]
        blocks = np.sort(
            np.concatenate([order[:0], *(order[window * size : (window + 1) * size] for window in windows)])
        )
        return [(first, min(first + self._block, self.n_rows)) for first in (blocks * self._block).tolist()]

    def blocks_after(self, step: int) -> list[tuple[int, int]]:
        """The blocks of the window after the last one that a step takes rows of."""
        epoch, start, stop = self._span(step)
        *_, (window, _) = self._windows(epoch, start, stop)
        order, size = self._block_order(epoch), self._per_window
        blocks = order[(window + 1) * size : (window + 2) * size]
        if not len(blocks):
            blocks = self._block_order(epoch + 1)[:size]
        return [(first, min(first + self._block, self.n_rows)) for first in (np.sort(blocks) * self._block).tolist()]

    def _span(self, step: int) -> tuple[int, int, int]:
        """The step's epoch, and its first and last + 1 position in that."""
        epoch, position = divmod(step, self.batches_per_epoch)
        start = position * self.batch_size
        return epoch, start, min(start + self.batch_size, self.n_rows)

    def _exact_slice(self, epoch: int, start: int, stop: int) -> np.ndarray:
        if self.n_rows >= _SLOW:
            _permutation.begin(self.n_rows, self.seed, epoch + 1)
        return _permutation(self.n_rows, self.seed, epoch)[start:stop]

    def _windowed_slice(self, epoch: int, start: int, stop: int) -> np.ndarray:
        """Positions start:stop of the epoch's windows laid end to end."""
        pieces = []
        for window, first in self._windows(epoch, start, stop):
            rows = _window(self.n_rows, self._block, self._per_window, self.seed, epoch, window)
            pieces.append(rows[max(start - first, 0) : max(stop - first, 0)])
            if len(rows) >= _SLOW:
                last = (window + 1) * self._per_window >= len(self._block_order(epoch))
                after = (epoch + 1, 0) if last else (epoch, window + 1)
                _window.begin(self.n_rows, self._block, self._per_window, self.seed, *after)
        return np.concatenate(pieces)

    def _block_order(self, epoch: int) -> np.ndarray:
        return _permutation(-(-self.n_rows // self._block), self.seed, epoch)

    def _windows(self, epoch: int, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """(window, position of its first row) of the windows that positions start:stop are in."""
        block, per_window, order = self._block, self._per_window, self._block_order(epoch)
        # All blocks are full but the last one, wherever the permutation put it: its window is shorter.
        missing = len(order) * block - self.n_rows
        short_window = int(np.flatnonzero(order == len(order) - 1)[0]) // per_window
        for window in range(start // (per_window * block), -(-len(order) // per_window)):
            first = window * per_window * block - (missing if window > short_window else 0)
            if first >= stop:
                return
            yield window, first


class _MadeOnce:
    """make(*args), of which the last few results are kept; who asks while one is made waits, whoever makes it."""

    def __init__(self, make: Callable[..., np.ndarray]):
        self._make = make
        self._kept: OrderedDict[tuple[int, ...], Future[np.ndarray]] = OrderedDict()
        self._asking = threading.Lock()

    def __call__(self, *args: int) -> np.ndarray:
        result, new = self._result(args)
        if new:
            self._fill(args, result)
        return result.result()

    def begin(self, *args: int) -> None:
        """Have it made in the background, if nobody has."""
        result, new = self._result(args)
        if new:
            threading.Thread(target=self._fill, args=(args, result), name="order", daemon=True).start()

    def _result(self, args: tuple[int, ...]) -> "tuple[Future[np.ndarray], bool]":
        """The result to be, and whether it is for the caller to fill it."""
        with self._asking:
            new = args not in self._kept
            result = self._kept.setdefault(args, Future())
            self._kept.move_to_end(args)
            while len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        return result, new

    def _fill(self, args: tuple[int, ...], result: "Future[np.ndarray]") -> None:
        try:
            result.set_result(self._make(*args))
        except BaseException as error:  # no memory, Ctrl-C: whoever asks next tries again
            with self._asking:
                self._kept.pop(args, None)
            result.set_exception(error)


@_MadeOnce
def _window(n_rows: int, block: int, per_window: int, seed: int, epoch: int, window: int) -> np.ndarray:
    """The rows of a window's blocks, permuted."""
    blocks = _permutation(-(-n_rows // block), seed, epoch)[window * per_window : (window + 1) * per_window]
    rows = (blocks[:, None] * block + np.arange(block)).ravel()
    rows = rows[rows < n_rows]
    return rows[_permutation(len(rows), seed, epoch, window)]


@_MadeOnce
def _permutation(n: int, *key: int) -> np.ndarray:
    """A random permutation of range(n) that depends on n and key alone, the same on every machine.

    Sorts random words that carry their index in the low bits: they are all different, so every way of sorting agrees.
    """
    bits = np.uint64(max(1, (n - 1).bit_length()))
    words = np.random.Philox(np.random.SeedSequence(key)).random_raw(n) >> bits << bits
    words |= np.arange(n, dtype=np.uint64)
    words.sort()
    return (words & ((np.uint64(1) << bits) - np.uint64(1))).astype(np.int64)


def permutation(n: int, *key: int) -> np.ndarray:
    """A random permutation of range(n), int64, that depends on n and the key alone, the same on every machine."""
    return _permutation(n, *key)


def batches(
    activations: Activations,
    order: ShuffledRows,
    start_step: int,
    n_steps: int,
    announce: bool = True,
) -> Generator[tuple[Tensor, Tensor], None, None]:
    """(rows int64 [B], float32 [B, d_in]) of steps start_step .. start_step + n_steps - 1, read ahead in threads.

    announce: have whole windows of blocks read from the disk when they begin; not worth it for a few steps of one.

    Raises:
        ValueError: an order over another number of rows. ActivationError: NaN or infinity, naming the row.
    """
    same = order.n_rows == activations.n_rows
    require(same, f"order is over {order.n_rows} rows; {activations.path} has {activations.n_rows}")

    def load(step: int) -> tuple[Tensor, Tensor]:
        if announce:
            announce_blocks(activations, order, step, anew=step == start_step)
        rows = order.batch(step)
        return rows, activations.rows(rows)

    return prefetch(load, range(start_step, start_step + n_steps), n_threads=4)  # each waits for its disk reads


def announce_blocks(activations: Activations, order: ShuffledRows, step: int, anew: bool) -> None:
    """Have the blocks of the windows that begin in a step read from the disk; anew: as blocks_begun.

    Of what is elsewhere the window after these, too: it is fetched while the steps of this one are taken.
    """
    begun = order.blocks_begun(step, anew)
    for start, stop in begun:
        activations.will_need(start, stop)
    if begun and activations.block_rows is not None:
        for start, stop in order.blocks_after(step):
            activations.will_need(start, stop)
