"""A shuffle buffer for rows that come once and in an order of their own: what goes in one by one comes out mixed.

    buffer = MixingBuffer(n_steps=1000, batch_size=4096, capacity=262_144, width=1024, seed=0)
    for rows_MD in rows: yield from buffer.feed(rows_MD)      # batches [B, D], as soon as the buffer is full
    yield from buffer.drain()

The first n_steps * batch_size rows are taken, and each comes out exactly once. They are cut into windows of at most
`capacity` rows, of whole steps, equal to one step. A window comes out in a random order, while the next one takes the
places that become free: memory is one window. So the order is a pure function of (seed, n_steps, batch_size, capacity):

    row perm_w[e] of window w is the e-th to come out of it, perm_w a random permutation

Mixing, for windows of R rows: an output batch is a random sample of a window. The distance between a row's place in and
out, less the delay, is triangular on (-R, R) with mean absolute value R / 3; neighbours of one window end up R / 3
apart on average (tests/data/test_mixing.py). Nothing of what is in the buffer needs to be saved: to go on at a step,
feed the rows from the first of its window on, and let go of the batches that come before it.

Shape suffixes: M rows that arrive, B rows of a batch, D width, R rows of a window.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from saevlm_fast.data.order import permutation
from saevlm_fast.errors import require

_TAG = 0x6D6978  # keeps these permutations apart from those of epochs


class MixingBuffer:
    """One window of rows [R, D] in memory; see the module.

    Args:
        n_steps: batches that come out in all. batch_size: B. capacity: rows, at least B. width: D. seed: of the order.
        dtype, device: of the rows in it.
        first_window: that it begins with; what is fed first is its first row.

    Attributes:
        step: 0-based step of the next batch. n_places: rows of a window.
        n_in: rows fed so far, from the first of `first_window` on. n_wanted: that will be taken in all.

    Raises:
        ValueError: capacity below batch_size.
    """

    def __init__(
        self,
        n_steps: int,
        batch_size: int,
        capacity: int,
        width: int,
        seed: int = 0,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        first_window: int = 0,
    ):
        require(capacity >= batch_size, f"buffer: {capacity:,} rows must be at least batch_size = {batch_size:,}")
        self.n_steps, self.batch_size, self.seed = n_steps, batch_size, seed
        self.n_windows = -(-n_steps // (capacity // batch_size))
        self.step, self.n_in = self.first_step(first_window), 0
        self.n_wanted = (n_steps - self.step) * batch_size
        self.width, self.dtype, self.device = width, dtype, torch.device(device)
        self.n_places = self._rows_of(first_window)
        self._window, self._first = first_window, first_window
        # Where row j of the window lies; and the places as they come out, which the next window's rows then take.
        self._places_R = torch.arange(self.n_places, device=self._make_room(self.n_places))
        self._out_R = self._order_of(first_window)

    def _make_room(self, n_rows: int) -> torch.device:
        """For rows at so many places. Returns where places are counted."""
        self.rows_RD = self._empty(n_rows)
        return self.device

    def _empty(self, n_rows: int) -> Tensor:
        return torch.empty(n_rows, self.width, dtype=self.dtype, device=self.device)

    def first_step(self, window: int) -> int:
        """The step with which a window begins to come out."""
        steps, longer = divmod(self.n_steps, self.n_windows)  # the first windows are longer by a step
        return window * steps + min(window, longer)

    def window_of(self, step: int) -> int:
        """The window that a step's batch is of; of the last one after all steps."""
        step, (steps, longer) = min(step, self.n_steps - 1), divmod(self.n_steps, self.n_windows)
        short = step - longer * (steps + 1)
        return step // (steps + 1) if short < 0 else longer + short // steps

    @property
    def is_full(self) -> bool:
        """Whether its first window is there, so that batches come out."""
        return self.n_in >= self._rows_of(self._first)

    def feed(self, rows_MD: Tensor) -> Iterator[Tensor]:
        """Takes rows, as many as are wanted; batches [B, D] as their places are needed."""
        while len(rows_MD) and self.n_in < self.n_wanted:
            n = self.put(rows_MD)
            rows_MD = rows_MD[n:]
            if n == 0:
                yield self.take()

    def put(self, rows_MD: Tensor) -> int:
        """Takes as many of these rows as there are places for; how many they are. 0: a batch has to be taken first."""
        free_P = self._free()
        n = min(len(free_P), len(rows_MD))
        self._lay(free_P[:n], rows_MD[:n])
        self.n_in += n
        return n

    def _lay(self, places_M: Tensor, rows_MD: Tensor) -> None:
        self.rows_RD.index_copy_(0, places_M, rows_MD.to(self.rows_RD.device, self.rows_RD.dtype))

    def _rows_at(self, places_B: Tensor) -> Tensor:
        return self.rows_RD[places_B]

    def _taken(self, places_B: Tensor) -> Tensor:
        """What comes out of a step's places."""
        return self._rows_at(places_B)

    def drain(self) -> Iterator[Tensor]:
        """What is left. ValueError: not all rows that are wanted have been fed."""
        require(self.n_in == self.n_wanted, f"{self.n_wanted - self.n_in:,} rows have not been fed")
        while self.step < self.n_steps:
            yield self.take()

    def peek(self, step: int) -> Tensor:
        """The batch [B, D] of a step of the window that is in, before it comes out."""
        return self._rows_at(self._places_of(step))

    def _places_of(self, step: int) -> Tensor:
        start = (step - self.first_step(self._window)) * self.batch_size
        return self._out_R[start : start + self.batch_size]

    @property
    def n_last_rows(self) -> int:
        """Of the last window."""
        return len(self._places_R)

    def last_rows(self, n: int) -> Iterator[Tensor]:
        """After the last step, the rows of the last window, which are still there, n at a time."""
        for places_n in self._places_R.split(n):
            yield self._rows_at(places_n)

    def _steps_of(self, window: int) -> int:
        return self.first_step(window + 1) - self.first_step(window)

    def _rows_of(self, window: int) -> int:
        return self._steps_of(window) * self.batch_size if window < self.n_windows else 0

    def _order_of(self, window: int) -> Tensor:
        order_R = torch.from_numpy(permutation(self._rows_of(window), self.seed, _TAG, window))
        return self._places_R[order_R.to(self._places_R.device)]

    def _free(self) -> Tensor:
        """Places for the next rows, in their order."""
        there, rows = self.n_in - self._rows_before(self._window), self._rows_of(self._window)
        if there < rows:
            return self._places_R[there:]
        gone = (self.step - self.first_step(self._window)) * self.batch_size
        return self._out_R[there - rows : min(gone, self._rows_of(self._window + 1))]

    def _rows_before(self, window: int) -> int:
        """Of the rows fed, those before a window."""
        return (self.first_step(window) - self.first_step(self._first)) * self.batch_size

    def take(self) -> Tensor:
        """The next batch [B, D], whose places are then free."""
        batch_BD = self._taken(self._places_of(self.step))
        self.step += 1
        if self.step == self.first_step(self._window + 1) and self._window + 1 < self.n_windows:
            self._places_R = self._out_R[: self._rows_of(self._window + 1)]
            self._window += 1
            self._out_R = self._order_of(self._window)
        return batch_BD
