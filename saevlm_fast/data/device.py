"""Training batches on the device that trains: from rows that are all there, or from pinned blocks read ahead.

Both give the rows of ShuffledRows as they are kept (half precision stays that until it is used: half the traffic), so
that a run's bits do not depend on which it was. What has left this module is finite.

Shape suffixes: N rows, B rows of a batch, D d_in.
"""

import os
from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import closing

import torch
from torch import Tensor

from saevlm_fast.data.matrix import check_finite
from saevlm_fast.data.order import ShuffledRows, announce_blocks
from saevlm_fast.data.prefetch import prefetch
from saevlm_fast.data.rows import Activations

_LOADED_BYTES = 64 << 20  # rows that go to the device together
_STEPS_A_PIECE = 64  # batches whose row numbers go to the device together
_PINNED_BYTES = 256 << 20  # batches read ahead into page-locked memory: what hides that an epoch's order is being made
_UPLOADED = 3  # batches on the device: one in use, one complete, one on its way


class ResidentRows:
    """All rows [N, d_in] on one device, read when made; half precision as such. pieces: of some rows instead, which lie
    there one piece after the other.

    Raises:
        ActivationError: NaN or infinity in any of them, naming the first such row; a file that was altered.
        torch.OutOfMemoryError: they do not fit.
    """

    def __init__(self, activations: Activations, device: torch.device, pieces: Sequence[range] | None = None):
        self.device, self.path = device, activations.path
        if pieces is None:
            size = max(1, _LOADED_BYTES // (activations.d * activations.kept_dtype.itemsize))
            pieces = [range(a, min(a + size, activations.n_rows)) for a in range(0, activations.n_rows, size)]
        n_rows, width, dtype = sum(map(len, pieces)), activations.d, activations.kept_dtype
        self.rows_ND = torch.empty(n_rows, width, dtype=dtype, device=device)
        pin_memory = device.type == "cuda"

        def load(piece: range) -> tuple[range, Tensor]:
            piece_BD = torch.empty(len(piece), width, dtype=dtype, pin_memory=pin_memory)
            activations.copy_rows(piece.start, piece_BD)
            return piece, piece_BD

        finite, numbers, start = list[Tensor](), list[range](), 0
        with closing(prefetch(load, pieces, n_threads=4)) as loaded:
            for piece, piece_BD in loaded:
                there_BD = self.rows_ND[start : start + len(piece)]
                there_BD.copy_(piece_BD, non_blocking=pin_memory)
                finite.append(torch.stack(there_BD.aminmax()).isfinite().all())
                numbers.append(piece)
                start += len(piece)
        bad = (~torch.stack(finite)).nonzero().flatten().tolist() if finite else []  # the only time that the host waits
        for each in bad:
            start = sum(map(len, numbers[:each]))
            check_finite(self.rows_ND[start : start + len(numbers[each])].cpu(), numbers[each], self.path)

    def batches(
        self,
        order: ShuffledRows,
        start_step: int,
        n_steps: int,
        take: Callable[[Tensor, Tensor], Tensor] = lambda rows_ND, rows_B: rows_ND.index_select(0, rows_B),
    ) -> Generator[Tensor, None, None]:
        """[B, d_in] of the steps start_step .. start_step + n_steps - 1; the device is not waited for.

        take: makes a batch of all rows and the numbers of its own.
        """
        pin_memory = self.device.type == "cuda"

        def numbers(piece: range) -> Tensor:
            rows_PB = torch.stack([order.batch(step) for step in piece])
            return rows_PB.pin_memory() if pin_memory else rows_PB

        stop = start_step + n_steps
        starts = range(start_step, stop, _STEPS_A_PIECE)
        with closing(
            prefetch(numbers, [range(a, min(a + _STEPS_A_PIECE, stop)) for a in starts], n_threads=2)
        ) as pieces:
            for rows_PB in pieces:
                for rows_B in rows_PB.to(self.device, non_blocking=True):
                    yield take(self.rows_ND, rows_B)


def uploaded_batches(
    activations: Activations,
    order: ShuffledRows,
    start_step: int,
    n_steps: int,
    device: torch.device,
    announce: bool = True,
) -> Generator[Tensor, None, None]:
    """[B, d_in] on a GPU of the same steps, read from where they are in several threads into page-locked memory.

    A batch is copied on a stream of its own beside the steps before it, and is overwritten when the next but one is
    asked for. announce: as `batches`.

    Raises:
        ActivationError: NaN or infinity, naming the row.
    """
    n_rows, dtype = len(order.batch(start_step)), activations.kept_dtype
    n_threads = loaders()
    ahead = max(n_threads + 1, min(64, n_steps, _PINNED_BYTES // (n_rows * activations.d * dtype.itemsize)))
    n_slots = ahead + 2  # what prefetch hands over, what is being copied
    pinned = [torch.empty(n_rows, activations.d, dtype=dtype, pin_memory=True) for _ in range(n_slots)]
    there = [torch.empty(n_rows, activations.d, dtype=dtype, device=device) for _ in range(_UPLOADED)]
    copied = [torch.cuda.Event() for _ in range(n_slots)]
    used = [torch.cuda.Event() for _ in range(_UPLOADED)]
    steps, upload = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    upload.wait_stream(steps)  # which may have used this memory for something else

    def load(step: int) -> int:
        slot = step % n_slots
        copied[slot].synchronize()  # what was in it before has left
        if announce:
            announce_blocks(activations, order, step, anew=step == start_step)
        activations.rows(order.batch(step), out=pinned[slot])
        return slot

    def hand_over(place: int, arrived: torch.cuda.Event) -> Tensor:
        steps.wait_event(arrived)
        return there[place]

    waiting: deque[tuple[int, torch.cuda.Event]] = deque()
    try:
        with closing(prefetch(load, range(start_step, start_step + n_steps), n_threads, ahead)) as slots:
            for number, slot in enumerate(slots):
                place = number % _UPLOADED
                with torch.cuda.stream(upload):
                    upload.wait_event(used[place])
                    there[place].copy_(pinned[slot], non_blocking=True)
                    copied[slot].record(upload)
                waiting.append((place, copied[slot]))
                if len(waiting) > 1:
                    place, arrived = waiting.popleft()
                    yield hand_over(place, arrived)
                    used[place].record(steps)
            while waiting:
                yield hand_over(*waiting.popleft())
    finally:
        upload.synchronize()  # before its memory is anybody else's


def loaders() -> int:
    """Threads that read batches for a GPU; more than 8 have been slower."""
    return max(2, min(8, (os.cpu_count() or 1) // 2))
