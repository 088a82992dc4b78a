"""What a step does with a row of the batch: decode, residuals, and what they pass back to the row's own entries, from
one gather of W_dec's rows. A loop of training/gradients.py on a CPU. docs/kernels.md section 4
"""

import numpy as np
from numpy.typing import NDArray

from .cpu_loops import compiled

Floats = NDArray[np.floating]
Ints = NDArray[np.int64]


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
    n_groups, d_in = suffix_BGD.shape[1:]
    zero = x_BD.dtype.type(0)  # an integer would make float64 of float32
    for b in range(start, stop):
        x_hat_D, square = x_hat_BD[b], zero
        for d in range(d_in):
            centred = x_BD[b, d] - b_dec_D[d]
            square += centred * centred
            centred_BD[b, d], x_hat_D[d] = centred, b_dec_D[d]
        centred_norm_B[b], squared_B[b] = np.sqrt(square), zero
        for g in range(n_groups):
            residual_D, square = suffix_BGD[b, g], zero
            for p in range(bag_offsets_R1[b * n_groups + g], bag_offsets_R1[b * n_groups + g + 1]):
                act, w_D = acts_M[p], W_dec_SD[latents_M[p]]
                for d in range(d_in):
                    x_hat_D[d] += act * w_D[d]
            for d in range(d_in):
                residual = x_hat_D[d] - x_BD[b, d]
                square += residual * residual
                residual_D[d] = residual * scale[0]
            squared_B[b] += square
        for g in range(n_groups - 1, -1, -1):
            passed_D, square = suffix_BGD[b, g], zero
            if g < n_groups - 1:
                for d in range(d_in):
                    passed_D[d] += suffix_BGD[b, g + 1, d]
            for d in range(d_in):
                square += passed_D[d] * passed_D[d]
            suffix_norm_BG[b, g] = np.sqrt(square)
            for p in range(bag_offsets_R1[b * n_groups + g], bag_offsets_R1[b * n_groups + g + 1]):
                w_D, total = W_dec_SD[latents_M[p]], zero
                for d in range(d_in):
                    total += passed_D[d] * w_D[d]
                dots_M[p] = total
