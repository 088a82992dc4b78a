"""Triton kernels of batch_topk_encode and threshold_encode: exact selection over a batch, without asking the host.

    flat = pre.flatten().topk(n), zeros dropped, ties to the lower position

A `Source` is what is selected from: an int32 key matrix or a value matrix, cut into units of 64 contiguous entries of
one row, all of them or only those listed. Selecting the n largest takes
1. the n-th largest key, by radix: histogram_kernel counts the next digit (11, then 10, then 10 bits) of the keys that
   match the digits found so far, next_digit_kernel picks the digit where the count from above reaches n;
2. count_kernel: per unit, how many keys are above it and how many equal; torch.cumsum over units;
3. compact_kernel: every entry that is above, or equal and early enough, goes to its rank among the kept.
For a batch this runs on the group maxima first, with n = B * k: by the lemma (docs/kernels.md, section 1) no other
group can hold a winner. Then on the entries of those groups. Counts are integers: atomics on them keep the result
deterministic. Keys of 0 (a zero activation) are never kept.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import GROUP
from .topk_encode_triton import float_keys, preactivation_chunks

BLOCK_U = 32
BINS = 2048
SHIFTS = (20, 10, 0)  # digits of 11, 10 and 10 bits of a 31-bit key


@dataclass(frozen=True)
class Source:
    """Entries to select from: `data` [rows, width] contiguous, int32 keys or non-negative values."""

    data: Tensor
    units: Tensor | None = None  # int64 unit numbers, ascending, -1 for none; None: every unit
    unit_maxima: Tensor | None = None  # int32 [all units]: a unit whose maximum is not above the threshold is not read

    @property
    def units_per_row(self) -> int:
        return triton.cdiv(self.data.shape[1], GROUP)

    @property
    def n_units(self) -> int:
        return self.data.shape[0] * self.units_per_row if self.units is None else self.units.numel()

    def args(self) -> dict[str, Any]:
        return {
            "data_ptr": self.data,
            "units_ptr": self.data if self.units is None else self.units,
            "width": self.data.shape[1],
            "units_per_row": self.units_per_row,
            "n_units": self.n_units,
            "LISTED": self.units is not None,
            "KEYS": self.data.dtype == torch.int32,
            "GROUP": GROUP,
            "BLOCK_U": BLOCK_U,
        }


@triton.jit
def unit_offsets(units_ptr, width, units_per_row, o_u, m_u, LISTED: tl.constexpr, GROUP: tl.constexpr):
    """(offsets [U, 64] int64 into data, mask) of a block of units."""
    if LISTED:
        unit = tl.load(units_ptr + o_u, mask=m_u, other=-1)
    else:
        unit = tl.where(m_u, o_u.to(tl.int64), -1)
    row, column = unit // units_per_row, (unit % units_per_row) * GROUP
    columns = column[:, None] + tl.arange(0, GROUP)[None, :]
    return row[:, None] * width + columns, (unit >= 0)[:, None] & (columns < width)


@triton.jit
def load_keys(data_ptr, offsets, mask, KEYS: tl.constexpr):
    """Keys [U, 64]; 0, which is never kept, outside the mask."""
    if KEYS:
        keys = tl.load(data_ptr + offsets, mask=mask, other=0)
    else:
        keys = tl.where(mask, float_keys(tl.load(data_ptr + offsets, mask=mask, other=0.0)), 0)
    return keys


@triton.jit
def histogram_kernel(
    data_ptr,
    units_ptr,
    width,
    units_per_row,
    n_units,
    found_ptr,
    histogram_ptr,
    SHIFT: tl.constexpr,
    BITS: tl.constexpr,
    BINS: tl.constexpr,
    LISTED: tl.constexpr,
    KEYS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_U: tl.constexpr,
):
    """histogram[digit] += keys whose higher digits are those of found[0] and whose next digit is `digit`."""
    o_u = tl.program_id(0) * BLOCK_U + tl.arange(0, BLOCK_U)
    offsets, mask = unit_offsets(units_ptr, width, units_per_row, o_u, o_u < n_units, LISTED, GROUP)
    keys = tl.reshape(load_keys(data_ptr, offsets, mask, KEYS), [BLOCK_U * GROUP])
    prefix = tl.load(found_ptr)
    matches = (keys > 0) & ((keys >> (SHIFT + BITS)) == (prefix >> (SHIFT + BITS)))
    digits = (keys >> SHIFT) & ((1 << BITS) - 1)
    counts = tl.histogram(digits, BINS, mask=matches)
    o_bin = tl.arange(0, BINS)
    tl.atomic_add(histogram_ptr + o_bin, counts, mask=counts > 0)


@triton.jit
def next_digit_kernel(histogram_ptr, found_ptr, SHIFT: tl.constexpr, BINS: tl.constexpr):
    """found = (key digits so far, how many are still to be taken among the keys that match them), one digit further.

    With fewer keys than that in all, every digit is 0 and so is the key found: all keys are above it.
    """
    o_bin = tl.arange(0, BINS)
    counts = tl.load(histogram_ptr + o_bin)
    prefix, wanted = tl.load(found_ptr), tl.load(found_ptr + 1)
    from_above = tl.cumsum(counts, axis=0, reverse=True)
    digit = tl.maximum(tl.sum((from_above >= wanted).to(tl.int32), axis=0) - 1, 0)
    higher = tl.sum(tl.where(o_bin > digit, counts, 0), axis=0)
    tl.store(found_ptr, prefix | (digit << SHIFT))
    tl.store(found_ptr + 1, wanted - higher)


@triton.jit
def count_kernel(
    data_ptr,
    units_ptr,
    width,
    units_per_row,
    n_units,
    unit_maxima_ptr,
    found_ptr,
    above_ptr,
    equal_ptr,
    SKIP: tl.constexpr,
    LISTED: tl.constexpr,
    KEYS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_U: tl.constexpr,
):
    """above, equal [n_units]: keys above and equal to found[0]."""
    o_u = tl.program_id(0) * BLOCK_U + tl.arange(0, BLOCK_U)
    m_u = o_u < n_units
    threshold = tl.load(found_ptr)
    offsets, mask = unit_offsets(units_ptr, width, units_per_row, o_u, m_u, LISTED, GROUP)
    if SKIP:
        mask = mask & (tl.load(unit_maxima_ptr + o_u, mask=m_u, other=0) > threshold)[:, None]
    keys = load_keys(data_ptr, offsets, mask, KEYS)
    tl.store(above_ptr + o_u, tl.sum((keys > threshold).to(tl.int32), axis=1), mask=m_u)
    tl.store(equal_ptr + o_u, tl.sum((mask & (keys == threshold)).to(tl.int32), axis=1), mask=m_u)


@triton.jit
def compact_kernel(
    data_ptr,
    units_ptr,
    width,
    units_per_row,
    n_units,
    unit_maxima_ptr,
    found_ptr,
    above_until_ptr,
    equal_until_ptr,
    positions_ptr,
    SKIP: tl.constexpr,
    LISTED: tl.constexpr,
    KEYS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_U: tl.constexpr,
):
    """positions[rank] = offset into data of each kept entry: above found[0], or of the first found[1] equal to it."""
    o_u = tl.program_id(0) * BLOCK_U + tl.arange(0, BLOCK_U)
    m_u = o_u < n_units
    threshold, wanted = tl.load(found_ptr), tl.load(found_ptr + 1)
    wanted = tl.where(threshold > 0, wanted, 0)
    offsets, mask = unit_offsets(units_ptr, width, units_per_row, o_u, m_u, LISTED, GROUP)
    if SKIP:
        mask = mask & (tl.load(unit_maxima_ptr + o_u, mask=m_u, other=0) > threshold)[:, None]
    keys = load_keys(data_ptr, offsets, mask, KEYS)
    above = (mask & (keys > threshold)).to(tl.int32)
    equal = (mask & (keys == threshold)).to(tl.int32)
    above_before = tl.load(above_until_ptr + o_u, mask=m_u, other=0) - tl.sum(above, axis=1)
    equal_before = tl.load(equal_until_ptr + o_u, mask=m_u, other=0) - tl.sum(equal, axis=1)
    kept = (above > 0) | ((equal > 0) & (equal_before[:, None] + tl.cumsum(equal, axis=1) <= wanted))
    slot = above_before + tl.minimum(equal_before, wanted)
    slot = slot[:, None] + tl.cumsum(kept.to(tl.int32), axis=1) - 1
    tl.store(positions_ptr + slot, offsets, mask=kept)


# --- launch wrappers -------------------------------------------------------------------------------------------------


def launch_nth_largest_key(source: Source, n: int) -> Tensor:
    """found int32 [2]: the n-th largest key (0 if fewer than n are positive), and how many equal ones to take."""
    shifts = (
        SHIFTS if source.data.dtype in (torch.int32, torch.float32) else SHIFTS[:2]
    )  # 16-bit floats: low bits are 0
    found = torch.zeros(2, dtype=torch.int32, device=source.data.device)
    found[1].fill_(n)  # not a copy from the host, which a CUDA graph could not replay
    histograms = torch.zeros(len(shifts), BINS, dtype=torch.int32, device=source.data.device)
    for shift, histogram in zip(shifts, histograms):
        histogram_kernel[(triton.cdiv(source.n_units, BLOCK_U),)](
            found_ptr=found,
            histogram_ptr=histogram,
            SHIFT=shift,
            BITS=11 if shift == SHIFTS[0] else 10,
            BINS=BINS,
            **source.args(),
        )
        next_digit_kernel[(1,)](histogram, found, SHIFT=shift, BINS=BINS, num_warps=8)
    return found


def launch_counts(source: Source, found: Tensor) -> tuple[Tensor, Tensor]:
    """(above, equal) int32 [n_units], inclusive running counts over units of entries above and equal to found[0]."""
    above, equal = torch.empty(2, source.n_units, dtype=torch.int32, device=source.data.device)
    count_kernel[(triton.cdiv(source.n_units, BLOCK_U),)](
        unit_maxima_ptr=source.data if source.unit_maxima is None else source.unit_maxima,
        found_ptr=found,
        above_ptr=above,
        equal_ptr=equal,
        SKIP=source.unit_maxima is not None,
        **source.args(),
    )
    return above.cumsum(0, dtype=torch.int32), equal.cumsum(0, dtype=torch.int32)


def launch_compact(source: Source, found: Tensor, above: Tensor, equal: Tensor, capacity: int) -> Tensor:
    """positions int64 [capacity]: offsets into data of the kept entries, ascending, then -1."""
    positions = torch.full((capacity,), -1, dtype=torch.int64, device=source.data.device)
    compact_kernel[(triton.cdiv(source.n_units, BLOCK_U),)](
        unit_maxima_ptr=source.data if source.unit_maxima is None else source.unit_maxima,
        found_ptr=found,
        above_until_ptr=above,
        equal_until_ptr=equal,
        positions_ptr=positions,
        SKIP=source.unit_maxima is not None,
        **source.args(),
    )
    return positions


def launch_largest(source: Source, n: int) -> Tensor:
    """positions int64 [n] of the n largest positive entries, ties to the lower position, ascending, then -1."""
    found = launch_nth_largest_key(source, n)
    return launch_compact(source, found, *launch_counts(source, found), capacity=n)


def launch_batch_topk_encode(
    x_BD: Tensor, W_enc_DS: Tensor, b_enc_S: Tensor, b_dec_D: Tensor, k: int, buffer_bytes: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    (n_rows, _), d_sae = x_BD.shape, W_enc_DS.shape[1]
    capacity = n_rows * k
    acts, positions = [x_BD.new_empty(0)], [torch.empty(0, dtype=torch.int64, device=x_BD.device)]
    for start, pre_RS, maxima_RG in preactivation_chunks(x_BD, W_enc_DS, b_enc_S, b_dec_D, buffer_bytes):
        n = min(capacity, pre_RS.numel())
        groups = launch_largest(Source(maxima_RG.view(1, -1)), min(n, maxima_RG.numel()))
        found = launch_largest(Source(pre_RS, units=groups), n)
        acts.append(_values_at(pre_RS, found))
        positions.append(torch.where(found >= 0, found + start * d_sae, -1))
    return launch_merge(acts, positions, n_rows, d_sae, capacity)


def launch_merge(
    acts: list[Tensor], positions: list[Tensor], n_rows: int, d_sae: int, capacity: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of the `capacity` largest of what every chunk keeps: acts and flat positions, ascending, -1 for padding."""
    acts_M, positions_M = torch.cat(acts), torch.cat(positions)
    if len(acts) > 2:  # the first is empty
        kept = launch_largest(Source(acts_M.view(1, -1)), capacity)
        acts_M, positions_M = _values_at(acts_M, kept), torch.where(kept >= 0, positions_M[kept.clamp_min(0)], -1)
    return _csr(acts_M, positions_M, n_rows, d_sae)


def launch_threshold_encode(
    x_BD: Tensor, W_enc_DS: Tensor, b_enc_S: Tensor, b_dec_D: Tensor, threshold: float, buffer_bytes: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    d_sae = W_enc_DS.shape[1]
    # A number of x's dtype (topk_encode.py rounds it down); its float32 bits are its key.
    bound = torch.tensor([max(0.0, threshold)], dtype=x_BD.dtype).float().view(torch.int32)
    found = torch.cat([bound, torch.zeros(1, dtype=torch.int32)]).to(x_BD.device)
    acts, positions = [x_BD.new_empty(0)], [x_BD.new_empty(0, dtype=torch.int64)]
    for start, pre_RS, maxima_RG in preactivation_chunks(x_BD, W_enc_DS, b_enc_S, b_dec_D, buffer_bytes):
        source = Source(pre_RS, unit_maxima=maxima_RG)
        above, equal = launch_counts(source, found)
        kept = launch_compact(source, found, above, equal, capacity=int(above[-1]))
        acts.append(_values_at(pre_RS, kept))
        positions.append(kept + start * d_sae)
    return _csr(torch.cat(acts), torch.cat(positions), x_BD.shape[0], d_sae)


def _values_at(values: Tensor, positions_M: Tensor) -> Tensor:
    return torch.where(positions_M >= 0, values.view(-1)[positions_M.clamp_min(0)], 0)


def _csr(acts_M: Tensor, positions_M: Tensor, n_rows: int, d_sae: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of ascending flat positions, -1 (padding) at the end."""
    inside = positions_M >= 0
    rows_M = torch.where(inside, positions_M // d_sae, n_rows)
    latents_M = torch.where(inside, positions_M % d_sae, 0)
    return acts_M, latents_M, torch.searchsorted(rows_M, torch.arange(n_rows + 1, device=rows_M.device))
