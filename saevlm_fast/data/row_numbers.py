"""Which rows are asked for: checks of their numbers, of ranges of them, and of the size of chunks."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from saevlm_fast.errors import require, shown, whole_number


def whole_numbers(name: str, values: Sequence[int] | Tensor) -> Tensor:
    """int64 [L]. A mask is refused: its True and False would be taken for 1 and 0. ValueError: no such numbers."""
    try:
        numbers_L = torch.as_tensor(values, device="cpu")
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise ValueError(f"{name}: {shown(values)} must be a list of whole numbers") from None
    if not numbers_L.numel() and numbers_L.ndim == 1:
        return numbers_L.new_empty(0, dtype=torch.int64)  # torch makes float32 of []
    whole = numbers_L.ndim == 1 and numbers_L.dtype != torch.bool
    whole = whole and not numbers_L.is_floating_point() and not numbers_L.is_complex()
    require(whole, f"{name}: {numbers_L.dtype} {list(numbers_L.shape)}, must be a list of whole numbers")
    return numbers_L.long()


def check_chunk(n: int) -> None:
    """ValueError: rows of a chunk are no whole number from 1 up."""
    whole_number("batch_rows", n)  # the name that callers give it


def bounds_of(rows: range | None, n_rows: int) -> tuple[int, int]:
    """The first of these rows and the one behind the last; of all if None. ValueError: some are not there."""
    if rows is None:
        return 0, n_rows
    require(isinstance(rows, range) and rows.step == 1, f"rows: {shown(rows)} is not a range of rows in order")
    require(rows.start >= 0 and rows.stop <= n_rows, f"rows: {rows} is beyond the {n_rows} rows that there are")
    return rows.start, rows.stop


def checked_rows(indices: Tensor, n_rows: int, path: Path) -> Tensor:
    """indices [B]. ValueError: not int64, not 1-D, or beyond the rows 0 .. n_rows - 1 of what is at the path."""
    require(
        indices.dtype == torch.int64 and indices.ndim == 1,
        f"indices are {indices.dtype} with {indices.ndim} dimensions; a 1-D int64 tensor is needed",
    )
    low, high = (int(bound) for bound in indices.aminmax()) if len(indices) else (0, 0)
    row, there = (low if low < 0 else high), low >= 0 and high < n_rows
    require(there, f"{path}: row {row} asked for; there are rows 0 to {n_rows - 1}")
    return indices
