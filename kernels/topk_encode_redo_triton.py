"""Triton kernels for what screening could not decide: float32 FMA products, on the device, nothing to do as a rule.

    z = relu(x @ W + b)        of the failed rows, or of the whole chunk        redo_product_kernel
    acts, latents = z.topk(k)  of those rows                                    redo_topk_kernel

The whole chunk is done again if its pool overflowed; for BatchTopK and a threshold also if any row failed, and the
batch's selection (topk_encode_largest_triton.py) then reads z. The grids are small and persistent: they leave at once.
"""

import triton
import triton.language as tl
from torch import Tensor

from .topk_encode_list_triton import Pool
from .topk_encode_rows_triton import topk_of_row
from .topk_encode_screen_triton import Screen, multiprocessors


@triton.jit
def rows_to_redo(counters_ptr, capacity, n_rows, BATCH: tl.constexpr):
    """(how many, whether they are all): otherwise they are listed."""
    n_failed = tl.load(counters_ptr + 1)
    whole = tl.load(counters_ptr) > capacity
    if BATCH:
        whole = whole | (n_failed > 0)
    return tl.where(whole, n_rows, n_failed).to(tl.int32), whole


@triton.jit(do_not_specialize=["capacity", "n_rows"])
def redo_product_kernel(
    x_ptr,
    W_ptr,
    b_enc_ptr,
    failed_ptr,
    counters_ptr,
    z_ptr,
    capacity,
    n_rows,
    d_in,
    d_sae,
    BATCH: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """z [n, d_sae] of the n rows to be done again, in their order in the list; NaN kept."""
    n, whole = rows_to_redo(counters_ptr, capacity, n_rows, BATCH)
    n_blocks_s = tl.cdiv(d_sae, BLOCK_S)
    n_tiles = tl.cdiv(n, BLOCK_B) * n_blocks_s
    for tile in range(tl.program_id(0), n_tiles, tl.num_programs(0)):
        o_f = (tile // n_blocks_s) * BLOCK_B + tl.arange(0, BLOCK_B)
        o_s = (tile % n_blocks_s) * BLOCK_S + tl.arange(0, BLOCK_S)
        m_f, m_s = o_f < n, o_s < d_sae
        listed = tl.load(failed_ptr + o_f, mask=m_f & (whole == 0), other=0)
        row = tl.where(whole, o_f, listed).to(tl.int64)
        acc = tl.zeros([BLOCK_B, BLOCK_S], dtype=tl.float32)
        for d in range(0, d_in, BLOCK_D):
            o_d = d + tl.arange(0, BLOCK_D)
            m_d = o_d < d_in
            x = tl.load(x_ptr + row[:, None] * d_in + o_d[None, :], mask=m_f[:, None] & m_d[None, :], other=0.0)
            p_W = W_ptr + o_s.to(tl.int64)[None, :] * d_in + o_d[:, None]
            w = tl.load(p_W, mask=m_d[:, None] & m_s[None, :], other=0.0)
            acc = tl.dot(x, w, acc, input_precision="ieee")
        acc += tl.load(b_enc_ptr + o_s, mask=m_s, other=0.0)[None, :]
        acc = tl.where(acc <= 0, 0.0, acc)  # tl.maximum would swallow NaN
        p_z = z_ptr + o_f.to(tl.int64)[:, None] * d_sae + o_s[None, :]
        tl.store(p_z, acc, mask=m_f[:, None] & m_s[None, :])


@triton.jit(do_not_specialize=["capacity", "n_rows", "k"])
def redo_topk_kernel(
    z_ptr,
    failed_ptr,
    counters_ptr,
    acts_ptr,
    latents_ptr,
    capacity,
    n_rows,
    d_sae,
    k,
    BLOCK: tl.constexpr,
):
    """The codes of the rows that were done again."""
    n, whole = rows_to_redo(counters_ptr, capacity, n_rows, False)
    for f in range(tl.program_id(0).to(tl.int64), n, tl.num_programs(0)):  # int64: f * d_sae may pass 2^31
        p_z = z_ptr + f * d_sae
        row = f
        if whole == 0:
            row = tl.load(failed_ptr + f).to(tl.int64)
        topk_of_row(p_z, d_sae, k, acts_ptr + row * k, latents_ptr + row * k, BLOCK)


def launch_redo_product(screen: Screen, pool: Pool, W_SD: Tensor, b_enc_S: Tensor, batch: bool) -> None:
    """Writes z of the screen, in the memory of pre, if there is anything to do."""
    redo_product_kernel[(8 * multiprocessors(W_SD.device),)](
        screen.x_RD,
        W_SD,
        b_enc_S,
        pool.failed_R,
        pool.counters,
        screen.z_RS,
        pool.capacity,
        *screen.x_RD.shape,
        screen.d_sae,
        BATCH=batch,
        BLOCK_B=32,
        BLOCK_S=128,
        BLOCK_D=16,
        num_warps=4,
        num_stages=3,
    )


def launch_redo_topk(screen: Screen, pool: Pool, acts_RK: Tensor, latents_RK: Tensor) -> None:
    """Writes the codes of the rows that launch_redo_product has done again."""
    redo_topk_kernel[(4 * multiprocessors(acts_RK.device),)](
        screen.z_RS,
        pool.failed_R,
        pool.counters,
        acts_RK,
        latents_RK,
        pool.capacity,
        len(acts_RK),
        screen.d_sae,
        acts_RK.shape[1],
        BLOCK=2048,
        num_warps=8,
    )
