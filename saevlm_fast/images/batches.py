"""Preprocessed batches of images, made ahead of the tower by worker processes."""

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from saevlm_fast.errors import ImageError, first_line, require
from saevlm_fast.images.decode import decode
from saevlm_fast.images.pairs import caption
from saevlm_fast.images.sources import ImageSource

MAX_ASPECT_RATIO = 100  # a 1 x 100,000 image, resized so that its short side is 336, would not fit in memory
_PIXELS_AT_A_TIME = 50_000_000  # decoded photos that wait in a worker: 150 MB, however large photos and batches are


class Batch(NamedTuple):
    """inputs: preprocessed tensors of the images (numbers) that could be used, None for none; the others, and why.

    failure: what went wrong with the whole batch.
    """

    inputs: dict[str, Tensor] | None
    images: list[int]
    skipped: list[tuple[int, str]]
    failure: str | None = None


class _Batches(Dataset):
    """Batch j of a list of batches of images, for a DataLoader's worker processes."""

    def __init__(
        self, source: ImageSource, preprocess: Callable[..., dict[str, Tensor]], ranges: Sequence[Sequence[int]]
    ):
        self.source, self.preprocess, self.ranges = source, preprocess, ranges
        self._reads_pairs = getattr(preprocess, "reads_pairs", False)  # towers.language.PairPreprocess

    def __len__(self) -> int:
        return len(self.ranges)

    def __getitem__(self, j: int) -> Batch:
        try:
            return self._batch(self.ranges[j])
        # Raised in a worker these would arrive with a traceback in their text; what is a fault of the code is to.
        except (OSError, ValueError, RuntimeError, MemoryError) as error:
            return Batch(None, [], [], f"{type(error).__name__}: {first_line(error)}")

    def _batch(self, images: Sequence[int]) -> Batch:
        pieces: list[dict[str, Tensor]] = []
        kept: list[int] = []
        skipped: list[tuple[int, str]] = []
        waiting: list[tuple[int, Any]] = []
        n_pixels = 0
        for i in images:
            try:
                picture = _checked_picture(self.source.read(i))
                sample = (picture, caption(self.source, i)) if self._reads_pairs else picture
            except ImageError as error:
                skipped.append((i, str(error)))
                continue
            waiting.append((i, sample))
            n_pixels += picture.width * picture.height
            if n_pixels > _PIXELS_AT_A_TIME:
                self._preprocess(waiting, pieces, kept, skipped)
                waiting, n_pixels = [], 0
        if waiting:
            self._preprocess(waiting, pieces, kept, skipped)
        return Batch(getattr(self.preprocess, "join", _joined)(pieces), kept, sorted(skipped))

    def _preprocess(
        self,
        pictures: list[tuple[int, Any]],
        pieces: list[dict[str, Tensor]],
        kept: list[int],
        skipped: list[tuple[int, str]],
    ) -> None:
        """All at once; if one of them upsets the library's preprocessing, one by one, and that one is skipped."""
        try:
            pieces.append(self.preprocess([picture for _, picture in pictures]))
            kept.extend(i for i, _ in pictures)
        except (ValueError, RuntimeError) as error:
            if "memory" in str(error):  # torch has no kind of its own for it; that is no fault of the image
                raise
            if len(pictures) == 1:
                skipped.append((pictures[0][0], f"preprocessing failed: {first_line(error)}"))
                return
            for numbered in pictures:
                self._preprocess([numbered], pieces, kept, skipped)


def _joined(pieces: list[dict[str, Tensor]]) -> dict[str, Tensor] | None:
    if len(pieces) <= 1:
        return pieces[0] if pieces else None
    return {name: _cat([piece[name] for piece in pieces]) for name in pieces[0]}


def _cat(tensors: list[Tensor]) -> Tensor:
    """One after the other. Pixels of pieces whose largest images differ are filled up with zeros, as the processor that
    gives images their own sizes does within a piece (Pixtral's)."""
    if tensors[0].ndim < 4 or len({tensor.shape[1:] for tensor in tensors}) == 1:
        return torch.cat(tensors)
    sizes = [max(each) for each in zip(*(tensor.shape[1:] for tensor in tensors))]
    filled = tensors[0].new_zeros(sum(len(tensor) for tensor in tensors), *sizes)
    start = 0
    for tensor in tensors:
        filled[start : start + len(tensor)][(slice(None), *(slice(size) for size in tensor.shape[1:]))] = tensor
        start += len(tensor)
    return filled


def _checked_picture(data: bytes) -> Any:
    picture = decode(data)
    require(
        max(picture.size) <= MAX_ASPECT_RATIO * min(picture.size),
        f"{picture.width} x {picture.height} pixels; sides may differ {MAX_ASPECT_RATIO} fold at most",
        ImageError,
    )
    return picture


def image_batches(
    source: ImageSource,
    preprocess: Callable[..., dict[str, Tensor]],
    ranges: Sequence[Sequence[int]],
    workers: int,
    on_gpu: bool,
) -> Generator[Batch, None, None]:
    """The batch of every range in order. The workers begin at once.

    Args:
        workers: processes, 0 for none.
        on_gpu: into page-locked memory.

    Raises:
        OSError: a batch failed for a reason that is not one of its images.
    """
    loader = DataLoader(
        _Batches(source, preprocess, ranges),
        batch_size=None,
        collate_fn=_as_is,
        num_workers=workers,
        multiprocessing_context="fork" if workers and _forks() else None,
        worker_init_fn=_ignore_interrupts if on_gpu else _step_back,
        pin_memory=on_gpu,
        generator=torch.Generator("cpu"),  # of workers' seeds, which else come from the user's generator
    )
    return _checked(iter(loader))


def _checked(batches: Iterator[Batch]) -> Generator[Batch, None, None]:
    for batch in batches:
        if batch.failure is not None:
            raise OSError(f"images: {batch.failure}")
        yield batch


def default_workers(on_gpu: bool, processes: int) -> int:
    """Beside a CPU tower 1, since both share the cores, or none where it is no fork; else up to 8, of the cores that
    each of `processes` has."""
    if not (on_gpu or _forks()):
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(8, cores // processes)) if on_gpu else 1


def _forks() -> bool:
    """Whether workers are forks of this process: on Linux, unless somebody has chosen another way than Python's own,
    which from 3.14 on is no longer forks. Others import the user's script, which would harvest once more unless it is
    guarded by `if __name__ == "__main__"`; and all that a worker needs, anew (docs/decisions.md)."""
    by_itself = multiprocessing.get_all_start_methods()[0]  # what any lock of multiprocessing's makes of None
    chosen = multiprocessing.get_start_method(allow_none=True)
    return sys.platform == "linux" and chosen in (None, "fork", by_itself)


@contextmanager
def dead_workers_in_one_line() -> Iterator[None]:
    """torch raises a worker's death wherever the main thread happens to be."""
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker (pid" not in str(error):
            raise
        raise OSError(f"workers: {first_line(error)} (out of memory? try fewer --workers)") from error


def _as_is(batch: Any) -> Any:
    return batch


def _ignore_interrupts(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends Ctrl-C to workers too; the main process decides


def _step_back(worker: int) -> None:
    """Beside a tower on the CPU workers take the moments that its threads leave."""
    _ignore_interrupts(worker)
    os.nice(19)
