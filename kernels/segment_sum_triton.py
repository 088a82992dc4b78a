"""Triton kernels of segment_sum: out[l] = sum over p in offsets[l]:offsets[l + 1] of weights[p] * source[ids[p]].

Two levels, so that a latent that fires on much of the batch does not leave one program walking thousands of rows:
entry positions are cut into fixed chunks of CHUNK, `whole_chunk_kernel` sums each chunk that lies inside one segment,
and `segment_kernel` adds, per segment, its head, its whole chunks' partial sums and its tail. A light segment has no
whole chunk and is summed directly. The cut depends on M alone: no host synchronisation, no atomics, and the same
order of additions every time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 32
BLOCK_P = 4  # entries whose row loads are in flight together
MAX_BLOCK_D = 1024


@triton.jit
def add_weighted_rows(acc, weights_ptr, ids_ptr, start, end, source_ptr, d_in, o_d, m_d, BLOCK_P: tl.constexpr):
    """acc [BLOCK_D] + sum over p in start:end of weights[p] * source[ids[p], o_d]."""
    for p in range(start, end, BLOCK_P):
        o_p = p + tl.arange(0, BLOCK_P)
        m_p = o_p < end
        ids = tl.load(ids_ptr + o_p, mask=m_p, other=0)
        weights = tl.load(weights_ptr + o_p, mask=m_p, other=0.0).to(acc.dtype)
        mask = m_p[:, None] & m_d[None, :]
        rows = tl.load(source_ptr + ids[:, None] * d_in + o_d[None, :], mask=mask, other=0.0).to(acc.dtype)
        acc += tl.sum(weights[:, None] * rows, axis=0)
    return acc


@triton.jit
def whole_chunk_kernel(
    weights_ptr,
    ids_ptr,
    offsets_ptr,
    chunk_segments_ptr,
    source_ptr,
    partials_ptr,
    n_segments,
    d_in,
    CHUNK: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    """partials[c] = sum over the entries of chunk c, if they all belong to one segment; otherwise left unwritten."""
    chunk = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < d_in
    start = chunk * CHUNK
    segment = tl.load(chunk_segments_ptr + chunk)
    inside = (segment >= 0) & (segment < n_segments)
    segment_end = tl.load(offsets_ptr + segment + 1, mask=inside, other=0)
    if segment_end >= start + CHUNK:
        acc = tl.zeros([BLOCK_D], dtype=ACC)
        acc = add_weighted_rows(acc, weights_ptr, ids_ptr, start, start + CHUNK, source_ptr, d_in, o_d, m_d, BLOCK_P)
        tl.store(partials_ptr + chunk * d_in + o_d, acc, mask=m_d)


@triton.jit
def segment_total(
    weights_ptr,
    ids_ptr,
    source_ptr,
    partials_ptr,
    start,
    end,
    d_in,
    o_d,
    m_d,
    CHUNK: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    """[BLOCK_D] of the sum over entries start:end: head entries, partial sums of the chunks wholly inside, tail."""
    first_chunk = (start + CHUNK - 1) // CHUNK
    end_chunk = end // CHUNK
    split = first_chunk < end_chunk
    head_end = tl.where(split, first_chunk * CHUNK, end)
    tail_start = tl.where(split, end_chunk * CHUNK, end)

    acc = tl.zeros([BLOCK_D], dtype=ACC)
    acc = add_weighted_rows(acc, weights_ptr, ids_ptr, start, head_end, source_ptr, d_in, o_d, m_d, BLOCK_P)
    for chunk in range(first_chunk, end_chunk, BLOCK_P):  # empty unless split
        o_c = chunk + tl.arange(0, BLOCK_P)
        mask = (o_c < end_chunk)[:, None] & m_d[None, :]
        acc += tl.sum(tl.load(partials_ptr + o_c[:, None] * d_in + o_d[None, :], mask=mask, other=0.0), axis=0)
    return add_weighted_rows(acc, weights_ptr, ids_ptr, tail_start, end, source_ptr, d_in, o_d, m_d, BLOCK_P)


@triton.jit
def segment_kernel(
    weights_ptr,
    ids_ptr,
    offsets_ptr,
    source_ptr,
    partials_ptr,
    out_ptr,
    d_in,
    CHUNK: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    """out[l] = the sum over segment l."""
    segment = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < d_in
    start = tl.load(offsets_ptr + segment)
    end = tl.load(offsets_ptr + segment + 1)
    acc = segment_total(
        weights_ptr, ids_ptr, source_ptr, partials_ptr, start, end, d_in, o_d, m_d, CHUNK, BLOCK_P, BLOCK_D, ACC
    )
    tl.store(out_ptr + segment * d_in + o_d, acc.to(out_ptr.dtype.element_ty), mask=m_d)


# --- launch wrappers -------------------------------------------------------------------------------------------------


def accumulator(dtype: torch.dtype) -> tuple[torch.dtype, tl.dtype]:
    """(torch, Triton) dtype of the sums."""
    return (torch.float64, tl.float64) if dtype == torch.float64 else (torch.float32, tl.float32)


def row_tiling(d_in: int) -> tuple[int, int]:
    """(BLOCK_D, num_warps) of a kernel whose program owns one tile of a row: 8 elements a thread at the full tile."""
    block_d = min(MAX_BLOCK_D, triton.next_power_of_2(d_in))
    return block_d, max(1, min(4, block_d // 256))


def launch_whole_chunks(weights_M: Tensor, ids_M: Tensor, offsets_L1: Tensor, source_RD: Tensor) -> Tensor:
    """partials [M // CHUNK, D] in the accumulator's dtype: the first level. All arguments contiguous."""
    d_in = source_RD.shape[1]
    sum_dtype, ACC = accumulator(source_RD.dtype)
    block_d, num_warps = row_tiling(d_in)
    n_chunks = weights_M.numel() // CHUNK
    partials = torch.empty(n_chunks, d_in, dtype=sum_dtype, device=source_RD.device)
    if n_chunks > 0:
        chunk_starts = torch.arange(n_chunks, device=offsets_L1.device) * CHUNK
        chunk_segments = torch.searchsorted(offsets_L1, chunk_starts, right=True) - 1
        whole_chunk_kernel[(n_chunks, triton.cdiv(d_in, block_d))](
            weights_M,
            ids_M,
            offsets_L1,
            chunk_segments,
            source_RD,
            partials,
            offsets_L1.numel() - 1,
            d_in,
            CHUNK=CHUNK,
            BLOCK_P=BLOCK_P,
            BLOCK_D=block_d,
            ACC=ACC,
            num_warps=num_warps,
        )
    return partials


def launch_segment_sum(weights_M: Tensor, ids_M: Tensor, offsets_L1: Tensor, source_RD: Tensor) -> Tensor:
    """Allocates out_LD and launches both levels."""
    n_segments, d_in = offsets_L1.numel() - 1, source_RD.shape[1]
    out_LD = torch.empty(n_segments, d_in, dtype=source_RD.dtype, device=source_RD.device)
    if out_LD.numel() == 0:
        return out_LD
    weights_M, ids_M, offsets_L1 = weights_M.contiguous(), ids_M.contiguous(), offsets_L1.contiguous()
    partials = launch_whole_chunks(weights_M, ids_M, offsets_L1, source_RD)
    _, ACC = accumulator(source_RD.dtype)
    block_d, num_warps = row_tiling(d_in)
    segment_kernel[(n_segments, triton.cdiv(d_in, block_d))](
        weights_M,
        ids_M,
        offsets_L1,
        source_RD,
        partials,
        out_LD,
        d_in,
        CHUNK=CHUNK,
        BLOCK_P=BLOCK_P,
        BLOCK_D=block_d,
        ACC=ACC,
        num_warps=num_warps,
    )
    return out_LD
