"""The CPU encoders where bfloat16 products are faster (low_product_speed.py): one screens, float32 decides. Exact.

Such a product says of every pre-activation z within which bounds it lies. With x~, w~ the rounded factors of one
product, v its value and |.| of vectors their norms (Cauchy-Schwarz),

    |z - v| <= slack + r |v|,    slack = |x - x~| |w~| + |x| |w - w~| + 3 gamma (|x| |w| + |b|) + 2^-16 |b|

where gamma = (d_in + 2) 2^-24, three times for the sums in float32 of two products, one of which may cut digits off,
and r is two roundings to bfloat16 (2^-8 each), one more than a library needs. |x - x~| and |w - w~| are measured by the
pass that rounds. The bias is part of the product, in two columns that meet ones: its value in bfloat16, and what that
leaves.

The k best latents by v are proposed. These get float32 dot products, and the least of them, T, is at most the k-th
largest z. Only latents whose upper bound reaches T can be among the top k: some more than k. They get float32 dot
products too, and the top k is chosen among them. So the codes are exactly the top k of those float32 values over all
latents. A dot adds in one order wherever its rows lie: equal latents have equal ones.

All but the product is in compiled loops (topk_encode_numba.py).

Rows for which that does not work are left to the float32 product: with a T that is not above zero, with values that
are not finite, or (TopK) with so many candidates that nothing is gained. So is a whole chunk with so many, and a whole
BatchTopK or threshold batch if one of its rows is.
"""

from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from .common import GROUP, Workspace
from .cpu_loops import compiles, even_bounds, in_parts
from .low_product_speed import low_products_pay
from .topk_encode_cpu import (
    BUFFER_BYTES,
    PANEL,
    batch_topk_encode_cpu,
    keys,
    largest,
    nonzero,
    offsets_of_rows,
    threshold_encode_cpu,
    topk_encode_cpu,
    workspace,
)

LOW = torch.bfloat16
UNIT_ROUNDOFF = 2.0**-8  # of LOW
ROUNDING = 2.01 * UNIT_ROUNDOFF  # of an output: once, and once more for a library that cuts off instead
MIN_ROWS = 64  # below, reading W takes longer than multiplying with it
MIN_PRODUCT = 2**27  # multiplications, a few milliseconds in float32: below, there is little to win
MAX_SHARE = 1 / 12  # of the latents as candidates: a dot takes 5 to 20 times its share of a float32 product (measured)
MIN_LATENTS_PER_K = 32  # with fewer, dots take longer than what the product saves
_BIAS_COLUMNS = 2  # more of the product, for b in two parts: 3 to 6 % less than addmm with AVX-512 BF16 (measured)
_TINY = 2.0**-50  # more than all that underflow and flushing to zero can take from a norm
_low, _centred = Workspace(), Workspace()


class Chunk(NamedTuple):
    """Low pre-activations of some rows [R, P]; the maximum of every group and its slack, [R, P / 64].

    pre and maxima are held as the integers of bfloat16's bits: they order what is positive, and a maximum of integers
    takes a quarter of the time (measured). If nothing in a group is positive, "maximum" is one of its values.
    """

    start: int
    x_RD: Tensor
    pre_RP: Tensor
    maxima_RG: Tensor
    slack_RG: Tensor

    @property
    def width(self) -> int:
        """P."""
        return self.pre_RP.shape[1]

    def groups(self) -> Tensor:
        """pre as [R * P / 64, 64]."""
        return self.pre_RP.view(-1, GROUP)


def screens(x_BD: Tensor, W_enc_DS: Tensor, k: int = 1) -> bool:
    """Whether the low product is the faster way here: float32, W_enc in [d_sae, d_in] order in memory, a large product
    of many rows, low products that pay on this CPU (which the first such call may have to measure); and Numba.
    """
    float32 = x_BD.dtype == W_enc_DS.dtype == torch.float32 and W_enc_DS.t().is_contiguous()
    d_sae = W_enc_DS.shape[1]
    large = len(x_BD) >= MIN_ROWS and d_sae >= MIN_LATENTS_PER_K * k and x_BD.numel() * d_sae >= MIN_PRODUCT
    return float32 and large and compiles(W_enc_DS.t()) and low_products_pay()


def topk_encode_screened(
    x_BD: Tensor,
    W_enc_DS: Tensor,
    b_enc_S: Tensor,
    b_dec_D: Tensor,
    k: int,
    buffer_bytes: int | None,
) -> tuple[Tensor, Tensor]:
    acts_BK, latents_BK = x_BD.new_empty(len(x_BD), k), torch.empty(len(x_BD), k, dtype=torch.int64)
    decided_B = torch.zeros(len(x_BD), dtype=torch.bool)
    for chunk in _chunks(x_BD, W_enc_DS, b_enc_S, b_dec_D, buffer_bytes):
        best, has_R = _best_of_rows(chunk, k)
        proposed = _proposed(chunk, best, W_enc_DS, b_enc_S)
        bound_R = x_BD.new_zeros(len(has_R))
        bound_R[has_R] = proposed.values_U.view(-1, k).amin(1)
        found = _candidates(chunk, bound_R, W_enc_DS, b_enc_S, proposed, int(chunk.width * MAX_SHARE))
        rows = slice(chunk.start, chunk.start + len(chunk.x_RD))
        chosen = acts_BK[rows], latents_BK[rows], decided_B[rows]
        entries = found.values_M, found.positions_M, found.offsets_R1
        in_parts(_loops().best_entries, even_bounds(len(chunk.x_RD)), *entries, chunk.width, *chosen)
    rest = nonzero(~decided_B)
    if len(rest):
        acts_BK[rest], latents_BK[rest] = topk_encode_cpu(x_BD[rest], W_enc_DS, b_enc_S, b_dec_D, k, buffer_bytes)
    return acts_BK, latents_BK


def batch_topk_encode_screened(
    x_BD: Tensor,
    W_enc_DS: Tensor,
    b_enc_S: Tensor,
    b_dec_D: Tensor,
    k: int,
    buffer_bytes: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The first of several chunks proposes B * k entries by itself, so that there is a bound from then on.

    A batch of so many chunks that these are too many is left to float32.
    """
    capacity = len(x_BD) * k
    if MIN_LATENTS_PER_K * capacity > _chunk_rows(x_BD, W_enc_DS, buffer_bytes) * W_enc_DS.shape[1]:
        return batch_topk_encode_cpu(x_BD, W_enc_DS, b_enc_S, b_dec_D, k, buffer_bytes)
    acts, positions, width = x_BD.new_empty(0), torch.empty(0, dtype=torch.int64), _width(W_enc_DS.shape[1])
    for chunk in _chunks(x_BD, W_enc_DS, b_enc_S, b_dec_D, buffer_bytes):
        bound, proposed = x_BD.new_zeros(()), None
        if len(acts) == capacity:
            bound = acts.amin()
        elif len(best := _best_of_all(chunk, capacity)):
            proposed = _proposed(chunk, best, W_enc_DS, b_enc_S)
            bound = proposed.values_U.amin()
        found = _candidates(chunk, bound.expand(len(chunk.x_RD)), W_enc_DS, b_enc_S, proposed)
        if not found.sure_R.all():
            return batch_topk_encode_cpu(x_BD, W_enc_DS, b_enc_S, b_dec_D, k, buffer_bytes)
        acts = torch.cat([acts, found.values_M])
        positions = torch.cat([positions, found.positions_M + chunk.start * width])
        kept = largest(keys(acts), capacity)
        acts, positions = acts[kept], positions[kept]
    return acts, positions % width, offsets_of_rows(positions // width, len(x_BD))


def threshold_encode_screened(
    x_BD: Tensor, W_enc_DS: Tensor, b_enc_S: Tensor, b_dec_D: Tensor, threshold: float, buffer_bytes: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    acts, latents, rows = [x_BD.new_empty(0)], [torch.empty(0, dtype=torch.int64)], [torch.empty(0, dtype=torch.int64)]
    for chunk in _chunks(x_BD, W_enc_DS, b_enc_S, b_dec_D, buffer_bytes):
        bound_R = torch.tensor(threshold, dtype=torch.float64).to(torch.float32).expand(len(chunk.x_RD))
        found = _candidates(chunk, bound_R, W_enc_DS, b_enc_S)
        if not found.sure_R.all():
            return threshold_encode_cpu(x_BD, W_enc_DS, b_enc_S, b_dec_D, threshold, buffer_bytes)
        above = found.values_M > threshold
        positions = found.positions_M[above]
        acts.append(found.values_M[above])
        latents.append(positions % chunk.width)
        rows.append(positions // chunk.width + chunk.start)
    return torch.cat(acts), torch.cat(latents), offsets_of_rows(torch.cat(rows), len(x_BD))


# --- the low product and its bounds ----------------------------------------------------------------------------------


def _chunks(
    x_BD: Tensor,
    W_enc_DS: Tensor,
    b_enc_S: Tensor,
    b_dec_D: Tensor,
    buffer_bytes: int | None,
) -> Iterator[Chunk]:
    """Chunks of rows, in memory that the next chunk overwrites; columns from d_sae on are the lowest integer."""
    n_rows, d_sae = len(x_BD), W_enc_DS.shape[1]
    width = _width(d_sae)
    chunk_rows = _chunk_rows(x_BD, W_enc_DS, buffer_bytes)
    # W is rounded once: panel by panel in memory that stays in cache or, for several chunks, into memory for all of it.
    several, (norm_S, error_S) = chunk_rows < n_rows, x_BD.new_empty(2, d_sae)
    n_low, d_low = d_sae if several else min(PANEL, d_sae), x_BD.shape[1] + _BIAS_COLUMNS
    low_SD = _low.get(n_low * d_low, LOW).view(n_low, d_low)
    bias_S2 = _low_bias(b_enc_S)
    for start in range(0, n_rows, chunk_rows):
        x_RD = x_BD[start : start + chunk_rows]
        x_RD = torch.sub(x_RD, b_dec_D, out=_centred.get(x_RD.numel(), x_RD.dtype).view(x_RD.shape))
        low_RD = torch.ones(len(x_RD), d_low, dtype=LOW)  # a 1 for each part of the bias
        norm_R, error_R = x_RD.new_empty(2, len(x_RD))
        _round(x_RD, low_RD, norm_R, error_R)
        pre_RP = workspace.get(len(x_RD) * width, LOW).view(len(x_RD), width)
        pre_bits_RP = pre_RP.view(torch.int16)
        pre_bits_RP[:, d_sae:] = torch.iinfo(torch.int16).min
        maxima_RG = torch.empty(len(x_RD), width // GROUP, dtype=torch.int16)
        for o in range(0, d_sae, PANEL):
            end = min(o + PANEL, d_sae)
            low_PD = low_SD[o:end] if several else low_SD[: end - o]
            if start == 0:
                _round(W_enc_DS.t()[o:end], low_PD, norm_S[o:end], error_S[o:end])
                low_PD[:, -_BIAS_COLUMNS:] = bias_S2[o:end]
            torch.mm(low_RD, low_PD.t(), out=pre_RP[:, o:end])
        # Of the whole chunk: a panel's groups are strided and take three times as long, though in cache (measured).
        torch.amax(pre_bits_RP.view(-1, GROUP), dim=1, out=maxima_RG.view(-1))
        slack_RG = _slack(norm_R, error_R, norm_S, error_S, b_enc_S.abs(), x_RD.shape[1])
        yield Chunk(start, x_RD, pre_bits_RP, maxima_RG, slack_RG)


def _width(d_sae: int) -> int:
    """Whole groups."""
    return -(-d_sae // GROUP) * GROUP


def _slack(norm_R: Tensor, error_R: Tensor, norm_S: Tensor, error_S: Tensor, bias_S: Tensor, d_in: int) -> Tensor:
    """[R, S / 64]: the largest in every group, rounded up to whole groups. Of the norms of rows, of latents, and of
    what rounding took from both."""
    gamma = (d_in + _BIAS_COLUMNS) * 2.0**-24
    of_latents = norm_S + error_S, error_S + 3 * gamma * norm_S, bias_S
    low_G, lost_G, bias_G = (
        torch.nn.functional.pad(t, (0, -len(t) % GROUP)).view(-1, GROUP).amax(1) for t in of_latents
    )
    slack_RG = error_R[:, None] * low_G  # not `@`, which autocast would round
    slack_RG += norm_R[:, None] * lost_G
    slack_RG += bias_G * (UNIT_ROUNDOFF**2 + 3 * gamma) + _TINY
    return slack_RG.mul_(1.001 + 3 * gamma)  # the roundings of the bounds themselves, and that |x~| may exceed |x|


def _chunk_rows(x_BD: Tensor, W_enc_DS: Tensor, buffer_bytes: int | None) -> int:
    """Rows of a chunk, about equal in all of them: what is kept of a row is its pre-activations, or itself."""
    n_bytes = len(x_BD) * max(W_enc_DS.shape[1] * LOW.itemsize, x_BD.shape[1] * x_BD.element_size())
    n_chunks = -(-n_bytes // (buffer_bytes or BUFFER_BYTES))
    return max(1, -(-len(x_BD) // max(1, n_chunks)))


def _low_bias(b_S: Tensor) -> Tensor:
    """[S, 2]: in two parts."""
    low_S2 = torch.empty(len(b_S), _BIAS_COLUMNS, dtype=LOW)  # not `stack`, which float16 autocast refuses
    low_S2[:, 0] = b_S
    low_S2[:, 1] = b_S - low_S2[:, 0]
    return low_S2


def _round(source_RD: Tensor, low_RD: Tensor, norm_R: Tensor, error_R: Tensor) -> None:
    """Rows to low_RD, which may be longer; upper bounds of their norms, and of the norms of what rounding took.

    W is rounded in every encode: a rounded one that is kept and written in the update takes as long, and memory
    (measured).
    """
    in_parts(_loops().round_rows, even_bounds(len(source_RD)), source_RD, low_RD.view(torch.int16), norm_R, error_R)
    norm_R += _TINY
    error_R += _TINY


# --- candidates -------------------------------------------------------------------------------------------------------


class Proposed(NamedTuple):
    """Entries that are likely among the best, in order of position: float32 values and flat positions in pre."""

    values_U: Tensor
    positions_U: Tensor


def _best_of_rows(chunk: Chunk, k: int) -> tuple[Tensor, Tensor]:
    """Flat positions, ascending, of every row's k best entries by the low product, ties to the lower; and which rows
    have them, [R]: those with fewer than k above zero have none."""
    n_rows = len(chunk.x_RD)
    rows, least_R = even_bounds(n_rows), torch.empty(n_rows, dtype=torch.int16)
    # What k groups reach, k entries do. With fewer groups than k, the k-th best entry itself.
    values_RN = chunk.maxima_RG if chunk.maxima_RG.shape[1] >= k else chunk.pre_RP
    in_parts(_loops().nth_of_rows, rows, values_RN, k, least_R)
    values_M, positions_M, offsets_R1 = _entries_from(chunk, least_R, k)
    kept_M = torch.empty(len(values_M), dtype=torch.bool)
    in_parts(_loops().best_of_rows, rows, values_M, offsets_R1, k, kept_M)
    return positions_M[nonzero(kept_M)], offsets_R1.diff() > 0


def _best_of_all(chunk: Chunk, n: int) -> Tensor:
    """Flat positions, ascending, of the n best entries of all rows, and of those that tie with the last; or none, where
    fewer are above zero, or so many tie that nothing is gained."""
    least = nth_largest(chunk.maxima_RG.view(-1), n) if chunk.maxima_RG.numel() >= n else 1
    least_R = torch.full((len(chunk.x_RD),), max(least, 1), dtype=torch.int16)
    values_M, positions_M, _ = _entries_from(chunk, least_R, 1)
    if len(values_M) < n:
        return positions_M[:0]
    best = positions_M[nonzero(values_M >= nth_largest(values_M, n))]
    return best if len(best) <= chunk.pre_RP.numel() * MAX_SHARE else best[:0]


def _entries_from(chunk: Chunk, least_R: Tensor, min_count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Values, flat positions and offsets [R + 1] of the entries from their row's least up, of rows with so many.

    Of a BatchTopK batch with fewer groups than entries these are all above zero: 10 bytes each.
    """
    n_rows = len(least_R)
    rows, counts_R = even_bounds(n_rows), torch.empty(n_rows, dtype=torch.int64)
    given = chunk.groups(), chunk.maxima_RG, least_R
    in_parts(_loops().count_from, rows, *given, counts_R)
    offsets_R1 = torch.nn.functional.pad(counts_R.masked_fill_(counts_R < min_count, 0).cumsum(0), (1, 0))
    n = int(offsets_R1[-1])
    positions_M, values_M = torch.empty(n, dtype=torch.int64), torch.empty(n, dtype=torch.int16)
    in_parts(_loops().list_from, rows, *given, offsets_R1, positions_M, values_M)
    return values_M, positions_M, offsets_R1


def nth_largest(values_M: Tensor, n: int) -> int:
    """Of M int16, n within 1 to M. Counted by value, of which there are 65,536: a tenth to two fifths of a partition's
    time (measured)."""
    least = torch.iinfo(values_M.dtype).min
    counts = torch.bincount(values_M.int() - least, minlength=1 << 16)
    return int(torch.searchsorted(counts.cumsum(0), len(values_M) - n, right=True)) + least


def _proposed(chunk: Chunk, positions_U: Tensor, W_enc_DS: Tensor, b_enc_S: Tensor) -> Proposed:
    """These entries, marked in pre. Which they are is a guess, their values are not: the least of n of them or more is
    at most the n-th largest."""
    in_parts(_loops().mark, even_bounds(len(positions_U)), chunk.groups(), positions_U)
    values_U = chunk.x_RD.new_empty(len(positions_U))
    _exact(chunk, positions_U, torch.arange(len(positions_U)), W_enc_DS, b_enc_S, values_U)
    return Proposed(values_U, positions_U)


class Candidates(NamedTuple):
    """Float32 values and flat positions in pre, in order; those of row r from offsets[r] to offsets[r + 1]. Rows that
    are not sure have none."""

    values_M: Tensor
    positions_M: Tensor
    offsets_R1: Tensor
    sure_R: Tensor


def _candidates(
    chunk: Chunk,
    bound_R: Tensor,
    W_enc_DS: Tensor,
    b_enc_S: Tensor,
    proposed: Proposed | None = None,
    most: int | None = None,
) -> Candidates:
    """All that may reach its row's bound.

    Rows with a bound that is not above 0, without sound ones, or with more than `most` candidates are not sure.
    All that is proposed, of this chunk, must reach its row's bound.
    """
    proposed = proposed or Proposed(bound_R.new_empty(0), torch.empty(0, dtype=torch.int64))
    n_rows, rows = len(bound_R), even_bounds(len(bound_R))
    found = chunk.groups(), chunk.maxima_RG, chunk.slack_RG, bound_R.contiguous(), len(b_enc_S), 1 - ROUNDING
    counts_R = torch.empty(n_rows, dtype=torch.int64)
    in_parts(_loops().count_candidates, rows, *found, chunk.width if most is None else most, counts_R)
    sure_R, n_candidates = counts_R >= 0, int(counts_R.clamp_(min=0).sum())
    if n_candidates > chunk.pre_RP.numel() * MAX_SHARE:
        sure_R, n_candidates = torch.zeros_like(sure_R), int(counts_R.zero_().sum())
    offsets_R1 = torch.nn.functional.pad(counts_R.cumsum(0), (1, 0))
    values_M, positions_M = bound_R.new_empty(n_candidates), torch.empty(n_candidates, dtype=torch.int64)
    is_new_M = torch.empty(n_candidates, dtype=torch.bool)
    known = *proposed, offsets_of_rows(proposed.positions_U // chunk.width, n_rows)
    in_parts(_loops().list_candidates, rows, *found, offsets_R1, *known, positions_M, values_M, is_new_M)
    _exact(chunk, positions_M, nonzero(is_new_M), W_enc_DS, b_enc_S, values_M)
    return Candidates(values_M, positions_M, offsets_R1, sure_R)


def _exact(
    chunk: Chunk, positions_M: Tensor, places_Q: Tensor, W_enc_DS: Tensor, b_enc_S: Tensor, values_M: Tensor
) -> None:
    """Pre-activations in float32 at the positions of these places, made latent by latent: W is read once (40 % less
    time)."""
    places_Q = torch.from_numpy(_loops().by_latent(positions_M.numpy(), places_Q.numpy(), chunk.width))
    inputs = chunk.x_RD, W_enc_DS.t(), b_enc_S.contiguous(), positions_M, places_Q, chunk.width
    in_parts(_loops().dots_at, even_bounds(len(places_Q)), *inputs, values_M)


def _loops() -> ModuleType:
    from . import topk_encode_numba

    return topk_encode_numba
