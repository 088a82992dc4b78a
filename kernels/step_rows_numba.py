"""What a step does with a row of the batch: decode, residuals, and what they pass back to the row's own entries, from
one gather of W_dec's rows. A loop of training/gradients.py on a CPU. docs/kernels.md section 4
"""

# mypy: ignore-errors
# Loops are in Numba's language, whose own compiler checks their types.

import numpy as np
from numpy.typing import NDArray

from .cpu_loops import compiled

Floats = NDArray[np.floating]
Ints = NDArray[np.int64]


@compiled
def add_entries(sums_D: Floats, acts_M: Floats, latents_M: Ints, W_SD: Floats, p: int, end: int) -> None:
    """Entries p to end, added. Four at a time: their rows come from memory side by side. With dot_entries it takes
    three fifths of the time of one after another (measured)."""
    while p + 4 <= end:
        a, b, c, e = acts_M[p], acts_M[p + 1], acts_M[p + 2], acts_M[p + 3]
        a_D, b_D = W_SD[latents_M[p]], W_SD[latents_M[p + 1]]
        c_D, e_D = W_SD[latents_M[p + 2]], W_SD[latents_M[p + 3]]
        for d in range(len(sums_D)):
            sums_D[d] += (a * a_D[d] + b * b_D[d]) + (c * c_D[d] + e * e_D[d])
        p += 4
    while p < end:
        a, a_D = acts_M[p], W_SD[latents_M[p]]
        for d in range(len(sums_D)):
            sums_D[d] += a * a_D[d]
        p += 1


@compiled
def dot_entries(dots_M: Floats, row_D: Floats, latents_M: Ints, W_SD: Floats, p: int, end: int) -> None:
    """Of entries p to end with the row. Four at a time, which read it once."""
    zero = W_SD.dtype.type(0)  # an integer would make float64 of float32
    while p + 4 <= end:
        a_D, b_D = W_SD[latents_M[p]], W_SD[latents_M[p + 1]]
        c_D, e_D = W_SD[latents_M[p + 2]], W_SD[latents_M[p + 3]]
        a, b, c, e = zero, zero, zero, zero
        for d in range(len(row_D)):
            value = row_D[d]
            a += value * a_D[d]
            b += value * b_D[d]
            c += value * c_D[d]
            e += value * e_D[d]
        dots_M[p], dots_M[p + 1], dots_M[p + 2], dots_M[p + 3] = a, b, c, e
        p += 4
    while p < end:
        a, a_D = zero, W_SD[latents_M[p]]
        for d in range(len(row_D)):
            a += row_D[d] * a_D[d]
        dots_M[p] = a
        p += 1


@compiled
def difference(out_D: Floats, a_D: Floats, b_D: Floats, scale: float) -> float:
    """Writes scale (a - b). Returns the sum of the squares of a - b."""
    total = a_D.dtype.type(0)
    for d in range(len(a_D)):
        value = a_D[d] - b_D[d]
        out_D[d] = value * scale
        total += value * value
    return total


@compiled
def add_row(sums_D: Floats, row_D: Floats) -> None:
    for d in range(len(sums_D)):
        sums_D[d] += row_D[d]


@compiled
def squared(row_D: Floats) -> float:
    total = row_D.dtype.type(0)
    for d in range(len(row_D)):
        total += row_D[d] * row_D[d]
    return total


@compiled
def step_rows(
    acts_M: Floats,
    latents_M: Ints,
    bag_offsets_R1: Ints,
    x_BD: Floats,
    W_dec_SD: Floats,
    b_dec_D: Floats,
    scale: Floats,
    x_hat_BD: Floats,
    squared_B: Floats,
    centred_BD: Floats,
    centred_norm_B: Floats,
    suffix_BGD: Floats,
    suffix_norm_BG: Floats,
    dots_M: Floats,
    start: int,
    stop: int,
) -> None:
    """Rows start to stop of the batch. Of Matryoshka group g of row b are the entries of bag b * G + g.

    Written: x_hat of the last prefix; the squared residuals of all prefixes, summed; x - b_dec and its norm; the
    gradient that the entries of every group receive, scale (of one element) times a suffix sum of residuals, and its
    norm; its dot product with every entry's row of W_dec.
    """
    n_groups = suffix_BGD.shape[1]
    for b in range(start, stop):
        x_hat_D = x_hat_BD[b]
        for d in range(len(x_hat_D)):  # `x_hat_D[:] =` could raise, and brings the message along
            x_hat_D[d] = b_dec_D[d]
        centred_norm_B[b] = np.sqrt(difference(centred_BD[b], x_BD[b], b_dec_D, x_BD.dtype.type(1)))
        squared_B[b] = 0
        for g in range(n_groups):
            bag = b * n_groups + g
            add_entries(x_hat_D, acts_M, latents_M, W_dec_SD, bag_offsets_R1[bag], bag_offsets_R1[bag + 1])
            squared_B[b] += difference(suffix_BGD[b, g], x_hat_D, x_BD[b], scale[0])
        for g in range(n_groups - 1, -1, -1):
            bag, passed_D = b * n_groups + g, suffix_BGD[b, g]
            if g < n_groups - 1:
                add_row(passed_D, suffix_BGD[b, g + 1])
            suffix_norm_BG[b, g] = np.sqrt(squared(passed_D))
            dot_entries(dots_M, passed_D, latents_M, W_dec_SD, bag_offsets_R1[bag], bag_offsets_R1[bag + 1])
