"""The auxiliary loss on a GPU: launches of the kernels of dead_latents_triton.py and dead_rows_triton.py.

Shape suffixes: B rows of a batch, D d_in, A dead latents with padding, P parts of a sum.
"""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from . import dead_latents_triton as products
from . import dead_rows_triton as over_rows
from .topk_encode_screen_triton import multiprocessors

MOST_ELEMENTS = 64 << 20  # of one [rows, dead] block, 4 bytes each
MOST_IN_REGISTERS = 16384  # dead latents of a row
ROWS = 8  # of a program that adds up residuals
KEPT_A_WARP = 1024  # values in registers


class Split(NamedTuple):
    """A float32 matrix as two of float16: (hi + lo) * inverse, a power of two for every row."""

    hi: Tensor
    lo: Tensor
    inverse: Tensor

    @classmethod
    def empty(cls, n_rows: int, width: int, device: torch.device) -> "Split":
        hi, lo = torch.empty(2, n_rows, width, dtype=torch.float16, device=device)
        return cls(hi, lo, torch.empty(n_rows, dtype=torch.float32, device=device))

    def rows(self, rows: slice) -> "Split":
        return Split(*(t[rows] for t in self))


def tile_config(capability: tuple[int, int]) -> dict[str, Any]:
    """Of the products."""
    if capability[0] in (9, 10):
        return {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "BAND": 16, "num_warps": 8, "num_stages": 3}
    return {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 32, "BAND": 16, "num_warps": 8, "num_stages": 2}


def dacts_config(tile: dict[str, Any]) -> dict[str, Any]:
    """Of dacts_kernel, whose end needs more registers: Triton 3.6 spills on sm_80 with the tile of the others."""
    return tile if tile["BLOCK_K"] == 64 else tile | {"BLOCK_N": min(tile["BLOCK_N"], 64)}


def product_config(device: torch.device) -> dict[str, Any]:
    if device.type == "cpu":  # the interpreter
        return {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 32, "BAND": 2}
    return tile_config((0, 0) if torch.version.hip is not None else torch.cuda.get_device_capability(device))


def row_launch(width: int) -> dict[str, int]:
    """A program that holds a row."""
    block = triton.next_power_of_2(width)
    return {"BLOCK_D": block, "num_warps": min(max(block // 256, 4), 16)}


class Weights(NamedTuple):
    """Of an SAE."""

    W_enc_SD: Tensor
    b_enc_S: Tensor
    W_dec_SD: Tensor
    b_dec_D: Tensor


class AuxiliaryLoss(NamedTuple):
    """(loss, squared norm of all gradients) [2]; by name, (rows [A, D], squared norm) of W_enc's and W_dec's gradient,
    without a frozen one's; b_enc's gradient."""

    numbers: Tensor
    rows: dict[str, tuple[Tensor, Tensor]]
    b_enc_A: Tensor


class Batch(NamedTuple):
    """What products take of a batch: x - b_dec, rows of W_enc and W_dec of dead latents, b_enc."""

    x_BD: Tensor
    x_hat_BD: Tensor
    c: Split
    enc: Split
    dec: Split
    b_enc_A: Tensor


def keep_config(n_dead: int, hip: bool = torch.version.hip is not None) -> tuple[str, dict[str, int]]:
    """(kernel that keeps the largest of rows of n_dead, its launch)."""
    block = max(triton.next_power_of_2(n_dead), 1024)  # few sizes: each is compiled
    if n_dead > (MOST_IN_REGISTERS >> 2 * hip):
        return "keep_wide_kernel", {"BLOCK": 1024 if hip else 2048, "num_warps": 8}
    return "keep_kernel", {"BLOCK": block, "num_warps": min(max(block // KEPT_A_WARP, 4), 32)}


def launch_auxiliary(
    weights: Weights,
    x_BD: Tensor,
    x_hat_BD: Tensor,
    latents_A: Tensor,
    number: Tensor,
    alpha: float,
    frozen: str | None = None,
) -> AuxiliaryLoss:
    """training.dead_latents.auxiliary of float32 tensors.

    Args:
        weights: rows of W_dec are unit.
        x_BD: rows of any stride, their elements contiguous.
        x_hat_BD: contiguous.
        latents_A: ascending, their end padding: d_sae. Places, A times d_in, stay below 2^31.
        number: how many there are, 0-d.
        alpha: weight of the loss in the gradients.
        frozen: W_enc or W_dec, whose gradient is not made.
    """
    (n_rows, d_in), n_dead, device, tile = x_BD.shape, len(latents_A), x_BD.device, product_config(x_BD.device)
    size = min(n_rows, max(1, MOST_ELEMENTS // max(n_dead, d_in)))
    starts = range(0, n_rows, size)
    counts = torch.empty(1 + 2 * len(starts), dtype=torch.int32, device=device)
    batch, scalars = _prepared(weights, x_BD, x_hat_BD, latents_A, number, alpha, counts)
    largest = counts[1:]
    tiles_m = triton.cdiv(size, tile["BLOCK_M"])
    n_parts, part_size = parts_of(size, n_dead, d_in, tile, multiprocessors(device))
    sides = [name for name in ("W_dec", "W_enc") if name != frozen]
    parts_GPAD = torch.empty(len(sides), n_parts, n_dead, d_in, dtype=torch.float32, device=device)
    parts = dict(zip(sides, parts_GPAD))
    memory = _Memory.empty(size, n_dead, d_in, device)
    sums_TA = torch.empty(len(starts) * tiles_m, n_dead, dtype=torch.float32, device=device)
    row_squares_B = torch.empty(n_rows, dtype=torch.float32, device=device)
    for i, start in enumerate(starts):
        rows = slice(start, min(start + size, n_rows))
        part = batch._replace(x_BD=x_BD[rows], x_hat_BD=x_hat_BD[rows], c=batch.c.rows(rows))
        sums = sums_TA[i * tiles_m : (i + 1) * tiles_m]
        _block(part, memory, largest[2 * i :], row_squares_B[rows], sums, parts, part_size, i, tile)
    n_tiles = (len(starts) - 1) * tiles_m + triton.cdiv(n_rows - starts[-1], tile["BLOCK_M"])
    return _finished(weights, latents_A, parts_GPAD, scalars, sums_TA[:n_tiles], row_squares_B, sides)


def _prepared(
    weights: Weights,
    x_BD: Tensor,
    x_hat_BD: Tensor,
    latents_A: Tensor,
    number: Tensor,
    alpha: float,
    counts: Tensor,
) -> tuple[Batch, Tensor]:
    """What products take, and the scalars of scalars_kernel, which counts in the first of counts; the others are 0."""
    (n_rows, d_in), n_dead, device, row = x_BD.shape, len(latents_A), x_BD.device, row_launch(x_BD.shape[1])
    c, enc, dec = (Split.empty(n, d_in, device) for n in (n_rows, n_dead, n_dead))
    n_sums, block_d = triton.cdiv(n_rows, ROWS), 32
    n_programs = triton.cdiv(d_in, block_d)
    sums_PD = torch.empty(n_sums, d_in, dtype=torch.float64, device=device)
    squares_P, parts = torch.empty(n_sums + n_programs, dtype=torch.float64, device=device).split([n_sums, n_programs])
    sizes = x_BD.stride(0), n_rows, d_in, len(counts)
    over_rows.rows_kernel[(n_sums,)](
        x_BD, x_hat_BD, weights.b_dec_D, *c, sums_PD, squares_P, counts, *sizes, ROWS=ROWS, **row
    )
    scalars = torch.empty(2, dtype=torch.float64, device=device)
    over_rows.scalars_kernel[(n_programs,)](
        sums_PD,
        squares_P,
        number,
        parts,
        counts,
        scalars,
        n_sums,
        n_rows,
        d_in,
        alpha,
        BLOCK_P=128,
        BLOCK_D=block_d,
        PROGRAMS=triton.next_power_of_2(n_programs),
        num_warps=8,
    )
    b_enc_A = torch.empty(n_dead, dtype=torch.float32, device=device)
    W_enc_SD, b_enc_S, W_dec_SD, _ = weights
    over_rows.latents_kernel[(n_dead,)](
        latents_A, W_enc_SD, b_enc_S, W_dec_SD, *enc, b_enc_A, dec.hi, dec.lo, len(W_dec_SD), d_in, **row
    )
    return Batch(x_BD, x_hat_BD, c, enc, dec, b_enc_A), scalars


def parts_of(n_rows: int, n_dead: int, d_in: int, tile: dict[str, Any], processors: int) -> tuple[int, int]:
    """(parts, rows of each) into which sums over rows are cut, so that few dead latents keep all processors busy.

    Best is the fewest rounds of programs, each of a part; a part of all tiles costs as much as 1 / 1280 round a tile.
    """
    n_tiles = triton.cdiv(n_dead, tile["BLOCK_M"]) * triton.cdiv(d_in, tile["BLOCK_N"])

    def cost(n_parts: int) -> float:
        return triton.cdiv(n_tiles * n_parts, processors) / n_parts + n_tiles * n_parts / 1280

    n_parts = min(range(1, max(1, n_rows // 256) + 1), key=cost)
    size = triton.cdiv(triton.cdiv(n_rows, n_parts), tile["BLOCK_K"]) * tile["BLOCK_K"]
    return triton.cdiv(n_rows, size), size


class _Memory(NamedTuple):
    """Of a block of rows: acts, the same split (in their place where a row fits in registers; dacts take it over), the
    scales of their rows, the error, and the same split."""

    acts_BA: Tensor
    split_BA: Tensor
    inverse_B: Tensor
    error_BD: Tensor
    error: Split

    @classmethod
    def empty(cls, n_rows: int, n_dead: int, d_in: int, device: torch.device) -> "_Memory":
        acts_BA, inverse_B, error_BD = (
            torch.empty(shape, dtype=torch.float32, device=device)
            for shape in ((n_rows, n_dead), (n_rows,), (n_rows, d_in))
        )
        in_place = keep_config(n_dead)[0] == "keep_kernel"
        split_BA = acts_BA if in_place else torch.empty_like(acts_BA)
        return cls(acts_BA, split_BA, inverse_B, error_BD, Split.empty(n_rows, d_in, device))


def _block(
    batch: Batch,
    memory: _Memory,
    largest: Tensor,
    squares_B: Tensor,
    sums_TA: Tensor,
    parts: dict[str, Tensor],
    part_size: int,
    add: int,
    tile: dict[str, Any],
) -> None:
    """Writes a block's part of squares, sums and gradients."""
    (n_rows, d_in), n_dead, (acts_BA, split_BA, inverse_B, error_BD, error) = (
        batch.x_BD.shape,
        len(batch.b_enc_A),
        memory,
    )
    sizes, row = (n_rows, n_dead, d_in), row_launch(d_in)
    tiles_b = triton.cdiv(n_rows, tile["BLOCK_M"])
    tiles_a, tiles_d = (triton.cdiv(n, tile["BLOCK_N"]) for n in (n_dead, d_in))
    products.acts_kernel[(tiles_b * tiles_a,)](*batch.c, *batch.enc, batch.b_enc_A, acts_BA, *sizes, **tile)
    keep, config = keep_config(n_dead)
    getattr(over_rows, keep)[(n_rows,)](acts_BA, split_BA, inverse_B, n_dead, min(d_in // 2, n_dead), **config)
    dec, stride_x = (batch.dec.hi, batch.dec.lo), batch.x_BD.stride(0)
    products.error_kernel[(tiles_b * tiles_d,)](
        split_BA, inverse_B, *dec, batch.x_BD, batch.x_hat_BD, error_BD, largest, stride_x, *sizes, **tile
    )
    halves, inverse = (error.hi, error.lo), batch.c.inverse
    over_rows.error_rows_kernel[(n_rows,)](error_BD, inverse_B, inverse, *halves, squares_B, largest, d_in, **row)
    for name, rows, found, top in (("W_dec", error, largest, 9), ("W_enc", batch.c, largest[1:], 14)):
        if name == "W_enc":
            own = dacts_config(tile)
            products.dacts_kernel[(tiles_b * triton.cdiv(n_dead, own["BLOCK_N"]),)](
                *halves, *dec, inverse_B, inverse, largest, split_BA, sums_TA, *sizes, **own
            )
        if name in parts:
            grid = triton.cdiv(n_dead, tile["BLOCK_M"]) * tiles_d, len(parts[name])
            products.gradient_kernel[grid](
                split_BA, rows.hi, rows.lo, found, parts[name], *sizes, part_size, add, TOP=top, **tile
            )


def _finished(
    weights: Weights,
    latents_A: Tensor,
    parts_GPAD: Tensor,
    scalars: Tensor,
    sums_TA: Tensor,
    row_squares_B: Tensor,
    sides: list[str],
) -> AuxiliaryLoss:
    n_sides, n_parts, n_dead, d_in = parts_GPAD.shape
    rows_GAD = parts_GPAD[:, 0] if n_parts == 1 else torch.empty_like(parts_GPAD[:, 0])
    squares_GA = torch.empty_like(parts_GPAD[:, 0, :, 0])
    b_enc_A, numbers = torch.empty_like(sums_TA[0]), torch.empty(4, dtype=torch.float32, device=sums_TA.device)
    W_dec_SD = weights.W_dec_SD
    over_rows.finish_kernel[(n_dead, n_sides)](
        parts_GPAD,
        latents_A,
        W_dec_SD,
        scalars,
        sums_TA,
        rows_GAD,
        squares_GA,
        b_enc_A,
        n_parts,
        len(sums_TA),
        n_dead,
        len(W_dec_SD),
        d_in,
        DECODER=sides.index("W_dec") if "W_dec" in sides else -1,
        TILES=32,
        **row_launch(d_in),
    )
    over_rows.numbers_kernel[(1,)](
        row_squares_B,
        squares_GA,
        b_enc_A,
        scalars,
        numbers,
        len(row_squares_B),
        n_dead,
        SIDES=n_sides,
        BLOCK=2048,
        num_warps=8,
    )
    rows = {name: (rows_GAD[i], numbers[2 + i]) for i, name in enumerate(sides)}
    return AuxiliaryLoss(numbers[:2], rows, b_enc_A)
