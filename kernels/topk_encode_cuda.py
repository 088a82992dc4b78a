"""Exact float32 encoders on a GPU: a float16 tensor-core product screens with a bound, float32 dots decide.

    product      v = fp16(x~ w~ + b) in the row's units, and its maximum over every group of latents
    candidates   latents whose upper bound reaches L, the k-th largest lower bound of a group (or 0): a pool of entries
    dots         float32 dot products of the candidates: the values that decide and that are returned
    choice       the top k of every row, the B k largest of the batch, or all above a threshold
    redo         float32 FMA product for rows (TopK) or a batch without a usable bound; nothing to do as a rule

The bound, the rule for the size of groups and why the codes are exact: docs/kernels.md, section 1. Nothing asks the
host (threshold: the size of its result, once a chunk), so all of it can be captured in a CUDA graph.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .common import MAX_K, TINY
from .low_weights import LowWeights, screening_is_sound

if TYPE_CHECKING:
    from .topk_encode_list_triton import Pool
    from .topk_encode_screen_triton import Screen

BUFFER_BYTES = 2**30  # float32 pre-activations of 4096 rows and 65536 latents; the screened ones take half of it
GROUPS = (64, 16)
BATCH_GROUPS = ((64, 8), (16, 2))  # of a batch: and at least how many there are for each entry
POOL_COUNTERS = 4  # int32: two of int64
_POOL_ENTRIES = 256  # of a row of threshold_encode, at least; and one in 64 of its latents


class Centred(NamedTuple):
    """What the encoder makes of x beside the codes, for callers who need it too: memory to be written.

    x_BD: float32 [B, D] contiguous, x - b_dec. norm_B: float32 [B], |x - b_dec| + 2^-40.
    """

    x_BD: Tensor
    norm_B: Tensor

    @staticmethod
    def empty(n_rows: int, d_in: int, device: torch.device | str) -> "Centred":
        return Centred(*(torch.empty(size, dtype=torch.float32, device=device) for size in ((n_rows, d_in), (n_rows,))))

    def write_(self, x_BD: Tensor, b_dec_D: Tensor) -> None:
        torch.sub(x_BD, b_dec_D, out=self.x_BD)
        torch.linalg.vector_norm(self.x_BD, dim=1, out=self.norm_B).add_(TINY)


def group_size(d_sae: int, k: int) -> int | None:
    """Latents a group: 64 where there are at least 2 k such groups, else 16 likewise, else None: the plain path.

    With fewer the k-th best group maximum says little of the k-th best value, and candidates are many. Also None for
    k above MAX_K.
    """
    return next((group for group in GROUPS if d_sae >= 2 * k * group and k <= MAX_K), None)


def screens_cuda(x_BD: Tensor, W_enc_DS: Tensor, k: int = 1) -> bool:
    """Whether the encoders below take these: float32 on a GPU whose float16 products the bound holds for, with a
    group_size. Otherwise topk_encode's ops do."""
    float32 = x_BD.dtype == W_enc_DS.dtype == torch.float32
    fits = float32 and x_BD.is_cuda and group_size(W_enc_DS.shape[1], k) is not None
    return fits and screening_is_sound(x_BD.device)


def topk_encode_screened_cuda(
    x_BD: Tensor,
    W_enc_DS: Tensor,
    b_enc_S: Tensor,
    b_dec_D: Tensor,
    k: int,
    buffer_bytes: int | None = None,
    low: LowWeights | None = None,
    centred: Centred | None = None,
) -> tuple[Tensor, Tensor]:
    """topk_encode: (acts [B, K], latents [B, K] int64). low: those of W_enc, if at hand; centred is written."""
    from .topk_encode_choose_triton import launch_topk_of_pool
    from .topk_encode_list_triton import launch_list
    from .topk_encode_redo_triton import launch_redo_product, launch_redo_topk

    acts_BK = x_BD.new_empty(len(x_BD), k)
    latents_BK = torch.empty(len(x_BD), k, dtype=torch.int64, device=x_BD.device)
    d_sae = W_enc_DS.shape[1]
    most = min(max(16 * k, 1024), d_sae)
    with torch.cuda.device_of(x_BD):
        encoder = Screening(W_enc_DS, b_enc_S, b_dec_D, _group(d_sae, k), low)
        for start, screen in encoder.chunks(x_BD, buffer_bytes, centred):
            rows = slice(start, start + len(screen.x_RD))
            pool, _ = _pool(len(screen.x_RD) * (4 * k + 64) + 4 * most, screen)
            launch_list(screen, pool, k, most)
            encoder.dots(screen, pool)
            launch_topk_of_pool(pool, acts_BK[rows], latents_BK[rows])
            launch_redo_product(screen, pool, encoder.W_SD, encoder.b_enc_S, batch=False)
            launch_redo_topk(screen, pool, acts_BK[rows], latents_BK[rows])
    return acts_BK, latents_BK


def batch_topk_encode_screened_cuda(
    x_BD: Tensor,
    W_enc_DS: Tensor,
    b_enc_S: Tensor,
    b_dec_D: Tensor,
    k: int,
    buffer_bytes: int | None = None,
    low: LowWeights | None = None,
    centred: Centred | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """batch_topk_encode: (acts [M], latents [M] int64, row_offsets [B + 1] int64), M = B k; else as above.

    A chunk has to have at least two groups of 16 for each of the B k entries, else the plain path is taken.
    """
    from .topk_encode_batch_triton import launch_batch_topk_encode, launch_merge
    from .topk_encode_largest_triton import (
        N_INTEGERS,
        launch_batch_bound,
        launch_counts,
        launch_nth_key,
        launch_write,
        split_integers,
    )
    from .topk_encode_list_triton import launch_list
    from .topk_encode_redo_triton import launch_redo_product

    n_rows, d_sae, n = len(x_BD), W_enc_DS.shape[1], len(x_BD) * k
    chunk_values = _chunk_rows(n_rows, d_sae, buffer_bytes) * d_sae
    group = next((size for size, times in BATCH_GROUPS if k <= MAX_K and times * n * size <= chunk_values), None)
    with torch.cuda.device_of(x_BD):
        if group is None:
            if centred is not None:
                centred.write_(x_BD, b_dec_D)
            return launch_batch_topk_encode(x_BD, W_enc_DS, b_enc_S, b_dec_D, k, buffer_bytes)
        encoder = Screening(W_enc_DS, b_enc_S, b_dec_D, group, low)
        codes = []
        for start, screen in encoder.chunks(x_BD, buffer_bytes, centred, N_INTEGERS):
            chunk_rows = len(screen.x_RD)
            capacity = 4 * n + 64 * chunk_rows
            pool, integers = _pool(capacity, screen)
            of_bound, of_key, bound, found = split_integers(integers)
            launch_batch_bound(screen, n, of_bound, bound)
            launch_list(screen, pool, k, capacity, bound)
            encoder.dots(screen, pool)
            launch_redo_product(screen, pool, encoder.W_SD, encoder.b_enc_S, batch=True)
            launch_nth_key(screen, pool, n, of_key, found)
            acts_M, latents_M = x_BD.new_empty(n), torch.empty(n, dtype=torch.int64, device=x_BD.device)
            counts = launch_counts(screen, pool, found)
            row_offsets = launch_write(screen, pool, found, counts, acts_M, latents_M)
            if chunk_rows == n_rows:
                return acts_M, latents_M, row_offsets
            codes.append((acts_M, _positions(start, latents_M, row_offsets, d_sae)))
        acts, positions = [x_BD.new_empty(0)], [torch.empty(0, dtype=torch.int64, device=x_BD.device)]
        return launch_merge(acts + [a for a, _ in codes], positions + [p for _, p in codes], n_rows, d_sae, n)


def _positions(start: int, latents_M: Tensor, row_offsets: Tensor, d_sae: int) -> Tensor:
    """Flat positions in the batch of a chunk's entries, -1 for padding."""
    places_M = torch.arange(len(latents_M), device=latents_M.device)
    rows_M = torch.searchsorted(row_offsets[1:].contiguous(), places_M, right=True)
    return torch.where(rows_M < len(row_offsets) - 1, (start + rows_M) * d_sae + latents_M, -1)


def threshold_encode_screened_cuda(
    x_BD: Tensor,
    W_enc_DS: Tensor,
    b_enc_S: Tensor,
    b_dec_D: Tensor,
    threshold: float,
    buffer_bytes: int | None = None,
    low: LowWeights | None = None,
    centred: Centred | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """threshold_encode; else as above. The host asks for the number of entries once a chunk."""
    from .topk_encode_largest_triton import launch_counts, launch_write
    from .topk_encode_list_triton import launch_list
    from .topk_encode_redo_triton import launch_redo_product

    d_sae = W_enc_DS.shape[1]
    per_row, width = min(d_sae, max(_POOL_ENTRIES, d_sae // 64)), _padded(d_sae)  # entries, pre-activations
    if buffer_bytes is not None:  # 12 bytes an entry beside 4 a pre-activation
        buffer_bytes = max(1, buffer_bytes * width // (width + 3 * per_row))
    # In this order: max(-0.0, 0.0) is -0.0, whose bits are below every key.
    key = int(torch.tensor(max(0.0, threshold), dtype=torch.float32).view(torch.int32))
    acts, latents, offsets = [x_BD.new_empty(0)], [torch.empty(0, dtype=torch.int64, device=x_BD.device)], []
    with torch.cuda.device_of(x_BD):
        encoder = Screening(W_enc_DS, b_enc_S, b_dec_D, GROUPS[0], low)
        for _, screen in encoder.chunks(x_BD, buffer_bytes, centred, n_integers=4):
            capacity = len(screen.x_RD) * per_row
            pool, found = _pool(capacity, screen)
            found[:1].fill_(key)  # not a copy from the host, which would wait
            launch_list(screen, pool, 1, capacity, found)
            encoder.dots(screen, pool)
            launch_redo_product(screen, pool, encoder.W_SD, encoder.b_enc_S, batch=True)
            counts = launch_counts(screen, pool, found)
            n = int(counts.parts_2P[0].sum())
            acts.append(x_BD.new_empty(n))
            latents.append(torch.empty(n, dtype=torch.int64, device=x_BD.device))
            row_offsets = launch_write(screen, pool, found, counts, acts[-1], latents[-1])
            offsets.append(row_offsets[1:] + sum(map(len, acts[:-1])))
    zero = torch.zeros(1, dtype=torch.int64, device=x_BD.device)
    return torch.cat(acts), torch.cat(latents), torch.cat([zero, *offsets])


class Candidates(NamedTuple):
    """Those of a chunk of rows for thresholds above [S], or of all latents (0-d): listed, not yet computed."""

    screen: "Screen"
    pool: "Pool"
    found: Tensor
    W_SD: Tensor
    b_enc_S: Tensor
    above: Tensor

    def counted(self) -> int | None:
        """How many there are, which the host has to ask. None: too many for the pool, or a row is not finite."""
        n_candidates, n_failed = self.pool.counters.tolist()
        return None if n_failed or n_candidates > self.pool.capacity else n_candidates

    def entries(self, n_places: int) -> tuple[Tensor, Tensor, Tensor]:
        """Codes of so many places, at least as there are candidates and one; padding (0 at latent 0) comes last."""
        from .topk_encode_largest_triton import launch_counts, launch_write
        from .topk_encode_list_triton import launch_dots

        launch_dots(self.screen, self.pool, self.W_SD, self.b_enc_S)
        values_M, above = self.pool.value_M[:n_places], self.above
        if above.ndim:  # behind the candidates latents are undefined
            above = above.index_select(0, self.pool.latent_M[:n_places].clamp(0, len(above) - 1))
        values_M.masked_fill_(values_M <= above, 0)
        acts_M = torch.empty(n_places, dtype=torch.float32, device=above.device)
        latents_M = torch.empty_like(acts_M, dtype=torch.int64)
        counts = launch_counts(self.screen, self.pool, self.found)
        return acts_M, latents_M, launch_write(self.screen, self.pool, self.found, counts, acts_M, latents_M)


def candidates_above(
    x_BD: Tensor,
    W_enc_DS: Tensor,
    b_enc_S: Tensor,
    b_dec_D: Tensor,
    threshold: float | Tensor,
    per_row: int,
    low: LowWeights,
    centred: Centred,
) -> Iterator[Candidates]:
    """Of threshold_encode, chunk after chunk; the next one overwrites what the entries of one are made from.

    Threshold: a number, or [S]. A chunk's pool holds per_row candidates a row, on average.

    A threshold for every latent is taken off its bias, so that the screen's bound is 0 for all of them. What rounding
    can take from that is less than 2^-22 of either, which is added. The float32 values decide, without that.
    """
    from .topk_encode_list_triton import launch_list

    above = threshold.clamp(min=0) if isinstance(threshold, Tensor) else b_enc_S.new_full((), max(threshold, 0.0))
    screened_S = b_enc_S - above + 2.0**-22 * (b_enc_S.abs() + above)
    with torch.cuda.device_of(x_BD):
        encoder = Screening(W_enc_DS, screened_S, b_dec_D, GROUPS[0], low)
        for _, screen in encoder.chunks(x_BD, None, centred, n_integers=4):
            capacity = len(screen.x_RD) * per_row
            pool, found = _pool(capacity, screen)  # found: a key of 0
            launch_list(screen, pool, 1, capacity, found)
            yield Candidates(screen, pool, found, encoder.W_SD, b_enc_S, above)


def _group(d_sae: int, k: int) -> int:
    return group_size(d_sae, k) or GROUPS[-1]


def _padded(d_sae: int) -> int:
    """Columns of the screened pre-activations: whole groups, and rows that begin where TMA asks."""
    return -(-d_sae // GROUPS[0]) * GROUPS[0]


def in_one_chunk(n_rows: int, d_sae: int) -> bool:
    """Whether the encoders take so many rows at a time."""
    return _chunk_rows(n_rows, d_sae, None) >= n_rows


def _chunk_rows(n_rows: int, d_sae: int, buffer_bytes: int | None) -> int:
    """Rows of a chunk, nearly equal in all of them, 4 bytes a pre-activation; at least 1."""
    most = max(1, (buffer_bytes or BUFFER_BYTES) // (4 * _padded(d_sae)))
    n_chunks = -(-n_rows // most)
    return max(1, -(-n_rows // max(n_chunks, 1)))


class Screening:
    """The weights' side of the screening product, and the chunks of rows it is made for."""

    def __init__(self, W_enc_DS: Tensor, b_enc_S: Tensor, b_dec_D: Tensor, group: int, low: LowWeights | None):
        from .topk_encode_screen_triton import launch_group_factors

        self.W_SD, self.b_enc_S, self.b_dec_D = W_enc_DS.t().contiguous(), b_enc_S.contiguous(), b_dec_D.contiguous()
        self.group = group
        if low is None:
            low = LowWeights.empty(len(self.W_SD), self.W_SD.shape[1], self.W_SD.device)
            low.write_(0, self.W_SD)
        self.W_low_SP = low.W_SD
        self.factors_3G = launch_group_factors(low.norm_S, low.error_S, self.b_enc_S, self.W_low_SP.shape[1], group)

    def chunks(
        self, x_BD: Tensor, buffer_bytes: int | None, centred: Centred | None, n_integers: int = 0
    ) -> "Iterator[tuple[int, Screen]]":
        """(first row, product) of every chunk of rows; the next one overwrites it. n_integers: zeros to ask for."""
        from .topk_encode_screen_triton import launch_centred_rows, launch_product

        width = _padded(len(self.W_SD))
        chunk_rows = _chunk_rows(len(x_BD), len(self.W_SD), buffer_bytes)
        buffer = torch.empty(chunk_rows * width, dtype=torch.float32, device=x_BD.device)
        x_BD = x_BD if x_BD.stride(1) == 1 else x_BD.contiguous()
        for start in range(0, len(x_BD), chunk_rows):
            x_RD = x_BD[start : start + chunk_rows]
            zeros = torch.empty(POOL_COUNTERS + n_integers, dtype=torch.int32, device=x_BD.device)
            screen = self._screen(buffer, start, len(x_RD), width, centred, zeros)
            low_RP = launch_centred_rows(x_RD, self.b_dec_D, self.W_low_SP.shape[1], screen)
            launch_product(low_RP, self.W_low_SP, self.b_enc_S, screen)
            yield start, screen

    def _screen(
        self, buffer: Tensor, start: int, n_rows: int, width: int, centred: Centred | None, zeros: Tensor
    ) -> "Screen":
        from .topk_encode_screen_triton import Screen

        d_sae, d_in = self.W_SD.shape
        if centred is None:
            x_RD, norm_R = Centred.empty(n_rows, d_in, buffer.device)
        else:
            x_RD, norm_R = (tensor[start : start + n_rows] for tensor in centred)
        error_R, inverse_R = torch.empty(2, n_rows, dtype=torch.float32, device=buffer.device)
        pre_RP = buffer.view(torch.float16)[: n_rows * width].view(n_rows, width)
        n_groups = self.factors_3G.shape[1]
        maxima_RG = torch.empty(n_rows, n_groups, dtype=torch.float16, device=buffer.device)
        z_RS = buffer[: n_rows * d_sae].view(n_rows, d_sae)
        sizes = self.group, d_sae
        return Screen(x_RD, norm_R, error_R, inverse_R, pre_RP, maxima_RG, self.factors_3G, *sizes, z_RS, zeros)

    def dots(self, screen: "Screen", pool: "Pool") -> None:
        from .topk_encode_list_triton import launch_dots

        launch_dots(screen, pool, self.W_SD, self.b_enc_S)


def _pool(capacity: int, screen: "Screen") -> "tuple[Pool, Tensor]":
    """An empty pool, and the int32 zeros asked for beside its own."""
    from .topk_encode_list_triton import Pool

    counters, integers = screen.zeros[:POOL_COUNTERS].view(torch.int64), screen.zeros[POOL_COUNTERS:]
    return Pool.empty(capacity, len(screen.x_RD), counters), integers
