"""Triton kernels of a training step's rows where the latents are spread over ranks: step_rows_triton.py's, in three.

    parts       of every bag b * G + g the sum of act * W_dec[latent] over the rank's own entries      parts_kernel
                ranks exchange these: each has all parts of its share of the rows
    residuals   x_hat_g = b_dec + all parts of groups up to g; squared[b]; suffix_g                    residual_kernel
                ranks tell each other the suffixes of their shares
    dacts       <suffix_j, W_dec[latent]> of the rank's own entries, where act > 0                     passed_kernel

What x_hat_g, squared and suffix_g are is said there. Rows of W_dec are read twice, as their sums travel in between.
Parts are added rank after rank: all see the same bits. docs/kernels.md section 4
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gradient_norm_triton import WIDE_REGISTERS
from .segment_sum_triton import accumulator
from .step_entries_triton import register_limit
from .step_rows_triton import Rows, store_centred, whole_row_block


@triton.jit
def bag_of(latents_ptr, row_offsets_ptr, group_ends_ptr, row, g, PREFIXES: tl.constexpr):
    """Where the entries of a row, which ascend by latent, begin and end in Matryoshka group g."""
    start, end = tl.load(row_offsets_ptr + row), tl.load(row_offsets_ptr + row + 1)
    if PREFIXES:
        first = tl.load(group_ends_ptr + g - 1, mask=g > 0, other=0)
        bound = tl.load(group_ends_ptr + g)
        n_before, n_inside = tl.zeros([], dtype=tl.int32), tl.zeros([], dtype=tl.int32)
        for p in range(start, end, 32):
            o = p + tl.arange(0, 32)
            latents = tl.load(latents_ptr + o, mask=o < end, other=1 << 31)
            n_before += tl.sum((latents < first).to(tl.int32), axis=0)
            n_inside += tl.sum(((latents >= first) & (latents < bound)).to(tl.int32), axis=0)
        start += n_before
        end = start + n_inside
    return start, end


@triton.jit(do_not_specialize=["n_groups"])
def parts_kernel(
    acts_ptr,
    latents_ptr,
    row_offsets_ptr,
    group_ends_ptr,
    W_ptr,
    parts_ptr,
    n_groups,
    d_in,
    PREFIXES: tl.constexpr,
    STEP_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    """A bag's sum, of the rank's entries."""
    row, g = tl.program_id(0).to(tl.int64), tl.program_id(1)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < d_in
    start, end = bag_of(latents_ptr, row_offsets_ptr, group_ends_ptr, row, g, PREFIXES)
    acc = tl.zeros([BLOCK_D], dtype=ACC)
    for p in range(start, end, STEP_K):
        o = p + tl.arange(0, STEP_K)
        m = o < end
        at = W_ptr + tl.load(latents_ptr + o, mask=m, other=0)[:, None] * d_in + o_d[None, :]
        w = tl.load(at, mask=m[:, None] & m_d[None, :], other=0.0).to(ACC)
        acc += tl.sum(tl.load(acts_ptr + o, mask=m, other=0.0).to(ACC)[:, None] * w, axis=0)
    tl.store(parts_ptr + (row * n_groups + g) * d_in + o_d, acc, mask=m_d)


@triton.jit(do_not_specialize=["first", "n_ranks", "share", "n_batch_rows", "n_groups"])
def residual_kernel(
    parts_ptr,
    x_ptr,
    b_ptr,
    suffix_ptr,
    squared_ptr,
    first,
    n_ranks,
    share,
    n_batch_rows,
    n_groups,
    d_in,
    PREFIXES: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    """A row of the rank's share, the first + program-th of x: parts [R, share, G, D] to suffixes [share, G, D]."""
    row = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < d_in
    x = tl.load(x_ptr + (first + row) * d_in + o_d, mask=m_d, other=0.0).to(ACC)
    x_hat = tl.load(b_ptr + o_d, mask=m_d, other=0.0).to(ACC)
    scale = (tl.full([], 2.0, ACC) / n_batch_rows) / n_groups
    at = row * n_groups * d_in
    of_rank = share.to(tl.int64) * n_groups * d_in
    squared = tl.zeros([BLOCK_D], dtype=ACC)
    for g in range(n_groups):
        here = parts_ptr + at + g * d_in + o_d
        total = tl.load(here, mask=m_d, other=0.0)
        for rank in range(1, n_ranks):
            total += tl.load(here + rank * of_rank, mask=m_d, other=0.0)
        x_hat += total
        e = tl.where(m_d, x_hat - x, 0.0)
        squared += e * e
        tl.store(suffix_ptr + at + g * d_in + o_d, scale * e, mask=m_d)
    tl.store(squared_ptr + row, tl.sum(squared, axis=0))
    if PREFIXES:
        suffix = tl.zeros([BLOCK_D], dtype=ACC)
        for i in range(n_groups):
            here = suffix_ptr + at + (n_groups - 1 - i) * d_in + o_d
            suffix += tl.load(here, mask=m_d, other=0.0)
            tl.store(here, suffix, mask=m_d)


@triton.jit(do_not_specialize=["n_batch_rows", "n_groups"])
def passed_kernel(
    x_ptr,
    acts_ptr,
    latents_ptr,
    row_offsets_ptr,
    group_ends_ptr,
    W_ptr,
    b_ptr,
    x_hat_ptr,
    suffix_ptr,
    norms_ptr,
    centred_ptr,
    x_norms_ptr,
    dacts_ptr,
    bags_ptr,
    n_batch_rows,
    n_groups,
    d_in,
    PREFIXES: tl.constexpr,
    CENTRE: tl.constexpr,
    STEP_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    """A bag's entries, and the norm of its suffix; the last one of a row also has x_hat, and x - b_dec (CENTRE)."""
    row, g = tl.program_id(0).to(tl.int64), tl.program_id(1)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < d_in
    bag = row * n_groups + g
    suffix = tl.load(suffix_ptr + bag * d_in + o_d, mask=m_d, other=0.0)
    tl.store(norms_ptr + bag, tl.sqrt(tl.sum(suffix * suffix, axis=0)))
    start, end = bag_of(latents_ptr, row_offsets_ptr, group_ends_ptr, row, g, PREFIXES)
    for p in range(start, end, STEP_K):
        o = p + tl.arange(0, STEP_K)
        m = o < end
        at = W_ptr + tl.load(latents_ptr + o, mask=m, other=0)[:, None] * d_in + o_d[None, :]
        w = tl.load(at, mask=m[:, None] & m_d[None, :], other=0.0).to(ACC)
        dots = tl.sum(w * suffix[None, :], axis=1)
        tl.store(dacts_ptr + o, tl.where(tl.load(acts_ptr + o, mask=m, other=0.0) > 0, dots, 0.0), mask=m)
        tl.store(bags_ptr + o, tl.zeros_like(o).to(tl.int32) + bag.to(tl.int32), mask=m)
    if g == n_groups - 1:
        x = tl.load(x_ptr + row * d_in + o_d, mask=m_d, other=0.0).to(ACC)
        x_hat = x + suffix * (0.5 * n_batch_rows * n_groups).to(ACC)
        tl.store(x_hat_ptr + row * d_in + o_d, x_hat.to(x_hat_ptr.dtype.element_ty), mask=m_d)
        if CENTRE:
            store_centred(
                centred_ptr, x_norms_ptr, row, x, tl.load(b_ptr + o_d, mask=m_d, other=0.0).to(ACC), (d_in, o_d, m_d)
            )


# --- launch wrappers -------------------------------------------------------------------------------------------------

Codes = tuple[Tensor, Tensor, Tensor]  # acts and latents [M], row_offsets [B + 1]


def tile(d_in: int) -> dict[str, int]:
    """Constants of parts_kernel and passed_kernel, which take two entries at a time."""
    block_d, _ = whole_row_block(d_in, 4)
    return {"STEP_K": 2, "BLOCK_D": block_d, "num_warps": max(1, min(16, block_d // 256))}


def launch_parts(codes: Codes, group_ends_G: Tensor, W_dec_SD: Tensor, n_places: int) -> Tensor:
    """[n_places, G, D] in the sums' dtype, of which the first B rows are written. Codes of the rank's latents, whose
    Matryoshka groups end at group_ends_G among them."""
    d_in, n_rows, n_groups = W_dec_SD.shape[1], len(codes[2]) - 1, len(group_ends_G)
    sum_dtype, ACC = accumulator(W_dec_SD.dtype)
    parts = torch.empty(n_places, n_groups, d_in, dtype=sum_dtype, device=W_dec_SD.device)
    parts_kernel[(n_rows, n_groups)](
        *codes, group_ends_G, W_dec_SD, parts, n_groups, d_in, PREFIXES=n_groups > 1, ACC=ACC, **tile(d_in)
    )
    return parts


def launch_residuals(
    parts: Tensor, x_BD: Tensor, b_dec_D: Tensor, rows: Sequence[int], n_batch_rows: int
) -> tuple[Tensor, Tensor]:
    """(suffixes [share, G, D], squared residuals of every row of the share) of all ranks' parts [R, share, G, D].

    rows: of x_BD, those of the share; it may be shorter than the places, and what lies behind is undefined. Rows of the
    whole batch n_batch_rows, by which the loss is divided.
    """
    n_ranks, share, n_groups, d_in = parts.shape
    sum_dtype, ACC = parts.dtype, accumulator(parts.dtype)[1]
    suffix = torch.empty(share, n_groups, d_in, dtype=sum_dtype, device=parts.device)
    squared = torch.empty(len(rows), dtype=sum_dtype, device=parts.device)
    block_d, num_warps = whole_row_block(d_in, 4)
    if len(rows) > 0:
        numbers = rows[0], n_ranks, share, n_batch_rows, n_groups, d_in
        constants = {"PREFIXES": n_groups > 1, "BLOCK_D": block_d, "ACC": ACC, "num_warps": num_warps}
        residual_kernel[(len(rows),)](parts, x_BD.contiguous(), b_dec_D, suffix, squared, *numbers, **constants)
    return suffix, squared


def launch_passed(
    x_BD: Tensor,
    codes: Codes,
    group_ends_G: Tensor,
    W_dec_SD: Tensor,
    b_dec_D: Tensor,
    suffix_RD: Tensor,
    squared_B: Tensor,
    n_batch_rows: int,
    centred: tuple[Tensor, Tensor] | None = None,
) -> Rows:
    """Rows of a step, of the rank's entries. squared_B: of the rank's share of the rows, and given on.

    suffix_RD: [B * G, D], of all rows. centred: (x - b_dec, its norms) if at hand. smallest_B is not written.
    """
    (n_rows, d_in), n_groups, n_entries = x_BD.shape, len(group_ends_G), len(codes[0])
    sum_dtype, ACC = accumulator(W_dec_SD.dtype)
    new = lambda *shape: torch.empty(shape, dtype=sum_dtype, device=x_BD.device)  # noqa: E731
    rows = Rows(
        x_hat_BD=torch.empty_like(x_BD),
        suffix_RD=suffix_RD,
        norms_R=new(n_rows * n_groups),
        centred_BD=new(n_rows, d_in) if centred is None else centred[0],
        x_norms_B=new(n_rows) if centred is None else centred[1],
        dacts_M=new(n_entries),
        bags_M=torch.empty(n_entries, dtype=torch.int32, device=x_BD.device),
        squared_B=squared_B,
        smallest_B=squared_B,
    )
    constants = tile(d_in)
    passed_kernel[(n_rows, n_groups)](
        x_BD.contiguous(),
        *codes,
        group_ends_G,
        W_dec_SD,
        b_dec_D,
        *rows[:7],
        n_batch_rows,
        n_groups,
        d_in,
        PREFIXES=n_groups > 1,
        CENTRE=centred is None,
        ACC=ACC,
        **constants,
        **register_limit(constants["BLOCK_D"], sum_dtype, wide=WIDE_REGISTERS),
    )
    return rows
