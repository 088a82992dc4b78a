"""Rows that are spread over ranks, each of which holds some of them, and the batches that are put together of them.

Who holds which row is known to all without being told: of a buffer by who made the forward, of a store by its number.

Shape suffixes: B rows of a batch, N rows that a rank holds, R rows of a window, D width.
"""

import math
from typing import Any

import torch
from torch import Tensor

from saevlm_fast.data.device import ResidentRows
from saevlm_fast.data.mixing import MixingBuffer
from saevlm_fast.data.rows import Activations
from saevlm_fast.peers import Ranks
from saevlm_fast.training.shards import cut

_BLOCK_BYTES, _LEAST_BLOCKS = 1 << 20, 64  # of neighbouring rows, that are read together; for each rank


def put_together(
    ranks: Ranks, rows_ND: Tensor, owner_B: Tensor, place_B: Tensor, device: torch.device, whole: bool = False
) -> Tensor:
    """The replica's rows of a batch in its order, on the device. A rank receives about (R - 1) / R of them, and as many
    more as the share of one rank is larger than that of another.

    Args:
        ranks: all of them, which call this at once.
        rows_ND: what this rank holds.
        owner_B, place_B: who holds each row of the batch, and where those of this rank lie in rows_ND; on the host.
        whole: every rank has all rows of the batch.
    """
    everyone, n_replicas = ranks.everyone, 1 if whole else ranks.rows.world
    counts, numbers = [], []
    cuts = cut(len(owner_B), n_replicas)
    for rows in cuts:
        counts.append(torch.bincount(owner_B[rows], minlength=everyone.world))
        order_b = owner_B[rows].argsort(stable=True)
        first = counts[-1].cumsum(0) - counts[-1]
        within_b = torch.empty_like(order_b)
        within_b[order_b] = torch.arange(len(order_b)) - first[owner_B[rows][order_b]]
        numbers.append(within_b)
    most, own_B = int(torch.stack(counts).max()), owner_B == everyone.rank
    sent = torch.zeros(n_replicas, most, rows_ND.shape[1], dtype=rows_ND.dtype, device=device)
    for piece, rows in zip(sent, cuts):
        held_b = rows_ND[_at(place_B[rows][own_B[rows]], rows_ND.device)]
        piece[: len(held_b)] = held_b
    sent = sent.view(torch.uint8)  # which every backend carries
    if n_replicas == 1:
        parts, replica = everyone.gather(sent[0]), 0
    else:
        parts, replica = everyone.exchange(sent.repeat_interleave(ranks.latents.world, 0)), ranks.rows.rank
    found_b = owner_B[cuts[replica]] * most + numbers[replica]
    return parts.view(rows_ND.dtype).flatten(0, 1)[_at(found_b, device)]


def _at(numbers: Tensor, device: torch.device) -> Tensor:
    """On the device, which is not waited for."""
    return numbers.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else numbers.to(device)


class SharedResidentRows(ResidentRows):
    """ResidentRows of which each rank has its share on its device: blocks of neighbours, dealt in turn, so that every
    rank has some of every batch. Raises as ResidentRows, of the rank's own."""

    def __init__(self, activations: Activations, device: torch.device, ranks: Ranks):
        self.ranks, everyone = ranks, ranks.everyone
        n = activations.n_rows
        self.block = max(1, min(_BLOCK_BYTES // activations.row_bytes, n // (_LEAST_BLOCKS * everyone.world)))
        starts = range(everyone.rank * self.block, n, everyone.world * self.block)
        super().__init__(activations, device, [range(start, min(start + self.block, n)) for start in starts])

    def batch(self, rows_B: Tensor, whole: bool) -> Tensor:
        """These rows, or the replica's of them."""
        block_B = rows_B // self.block
        place_B = block_B // self.ranks.everyone.world * self.block + rows_B % self.block
        owner_B = block_B % self.ranks.everyone.world
        return put_together(self.ranks, self.rows_ND, owner_B, place_B, self.device, whole)


def places_of_rank(n_rows: int, world: int, forward_rows: int) -> int:
    """That a rank has at first for rows of a window of n_rows: its share, a forward, and what chance deals it besides.
    More are made if it happens to hold more."""
    fair = n_rows / world
    return min(n_rows, math.ceil(fair + 2 * math.sqrt(fair)) + forward_rows)


class SharedMixingBuffer(MixingBuffer):
    """A MixingBuffer whose rows stay with the ranks that made them: the same order, and batches of the same bits.

    All ranks put, take and peek alike; of rows that another rank has made, `put` is told the number alone (a tensor
    [M, 0]). A rank holds about 1 / R of a window, and up to a forward more (`places_of_rank`).
    """

    def __init__(self, ranks: Ranks, step_device: torch.device, *given: Any, **more: Any):
        self.ranks, self.step_device, self._maker, self._largest = ranks, step_device, 0, 0
        super().__init__(*given, **more)

    def announce(self, maker: int, n_rows: int) -> None:
        """What is put next is of a forward of so many rows, which this rank has made."""
        self._maker, self._largest = maker, max(self._largest, n_rows)

    def _make_room(self, n_rows: int) -> torch.device:
        """Later, when it is known how large a forward is: to grow is to have all rows twice for a moment."""
        self.rows_RD, self._unused_N = self._empty(0), torch.arange(0)
        self._owner_R, self._slot_R = torch.full((n_rows,), -1), torch.zeros(n_rows, dtype=torch.int64)
        return torch.device("cpu")

    def _lay(self, places_M: Tensor, rows_MD: Tensor) -> None:
        rank = self.ranks.everyone.rank
        left_m = self._slot_R[places_M[self._owner_R[places_M] == rank]]
        self._unused_N = torch.cat([self._unused_N, left_m])
        self._owner_R[places_M] = self._maker
        if self._maker != rank:
            return
        missing = len(places_M) - len(self._unused_N)
        if missing > 0:
            n = len(self.rows_RD)
            world, more = self.ranks.everyone.world, max(missing, n // 16)
            if n == 0:
                more = max(missing, places_of_rank(self.n_places, world, self._largest))
            self.rows_RD = torch.cat([self.rows_RD, self._empty(more)])
            self._unused_N = torch.cat([self._unused_N, torch.arange(n, n + more)])
        slots_M, self._unused_N = self._unused_N[: len(places_M)], self._unused_N[len(places_M) :]
        self._slot_R[places_M] = slots_M
        rows_MD = rows_MD.to(self.rows_RD.device, self.rows_RD.dtype)
        self.rows_RD.index_copy_(0, _at(slots_M, self.rows_RD.device), rows_MD)

    def _rows_at(self, places_B: Tensor, whole: bool = True) -> Tensor:
        given = self._owner_R[places_B], self._slot_R[places_B], self.step_device
        return put_together(self.ranks, self.rows_RD, *given, whole)

    def _taken(self, places_B: Tensor) -> Tensor:
        """The replica's rows."""
        return self._rows_at(places_B, whole=False)
