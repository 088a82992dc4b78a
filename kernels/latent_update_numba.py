"""The whole update of a latent in one pass: gradient, clip, Adam, unit norm. Loops of latent_update.py on a CPU.

A latent's rows (weights and both moments) are read once and written once; its gradient is a row that stays in the
first cache. docs/kernels.md section 4
"""

# mypy: ignore-errors
# Loops are in Numba's language, whose own compiler checks their types.

import numpy as np
from numpy.typing import NDArray

from .cpu_loops import compiled

Floats = NDArray[np.floating]
Ints = NDArray[np.int64]


@compiled
def update_rows(
    W_SD: Floats,
    exp_avg_SD: Floats,
    exp_avg_sq_SD: Floats,
    weights_M: Floats,
    ids_M: Ints,
    offsets_S1: Ints,
    source_RD: Floats,
    extra_A: Ints,
    extra_offsets_S1: Ints,
    extra_AD: Floats,
    parallel_S: Floats,
    clip: Floats,
    constants: Floats,
    unit_norm: bool,
    start: int,
    stop: int,
) -> None:
    """Latents start to stop. Of entry_gradient: weights, ids, offsets, source, parallel_S (none: empty), not clipped.

    Rows extra_AD[extra_A] are added to the gradient, those between extra_offsets_S1 of a latent. constants: of
    `AdamSettings.constants`.
    """
    lr, rate, kept_sq, rate_sq, correction, eps, tiny = constants
    zero, one = W_SD.dtype.type(0), W_SD.dtype.type(1)  # an integer would make float64 of float32
    d_in = W_SD.shape[1]
    g_D = np.empty(d_in, W_SD.dtype)
    for s in range(start, stop):
        w_D, mean_D, square_D = W_SD[s], exp_avg_SD[s], exp_avg_sq_SD[s]
        if len(parallel_S):
            parallel = -parallel_S[s] * clip[0]
            for d in range(d_in):
                g_D[d] = parallel * w_D[d]
        else:
            g_D[:] = zero
        for p in range(offsets_S1[s], offsets_S1[s + 1]):
            weight, row_D = weights_M[p] * clip[0], source_RD[ids_M[p]]
            for d in range(d_in):
                g_D[d] += weight * row_D[d]
        for p in range(extra_offsets_S1[s], extra_offsets_S1[s + 1]):
            row_D = extra_AD[extra_A[p]]
            for d in range(d_in):
                g_D[d] += row_D[d] * clip[0]
        square = zero
        for d in range(d_in):
            g = g_D[d]
            mean = mean_D[d] + (g - mean_D[d]) * rate
            sq = kept_sq * square_D[d] + rate_sq * g * g
            w = w_D[d] - lr * mean / (np.sqrt(sq) * correction + eps)
            mean_D[d], square_D[d], w_D[d] = mean, sq, w
            square += w * w
        if unit_norm:
            scale = one / (np.sqrt(square) + tiny)
            for d in range(d_in):
                w_D[d] *= scale
