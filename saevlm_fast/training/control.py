"""Activations whose dimensions have nothing to do with each other: what a `shuffled` control is trained on.

The other controls change the step (step.py) or take none (state.py).
"""

import numpy as np
import torch
from torch import Tensor

_SHUFFLED = 0x5AFF1ED  # beside (seed, step): other random numbers than those of the order of the rows


def shuffled(x_BD: Tensor, seed: int, step: int) -> Tensor:
    """The batch of a step with every dimension permuted over its rows: out[i, d] = x[p[(i + s_d) mod B], d].

    p is a random permutation of the rows and s_d a random shift of each dimension, functions of (seed, step). Rows of a
    batch are drawn at random from all rows, so a row made here has each of its dimensions from another row of the data
    (two of them from the same one as often as by independent permutations, once in B), and each number is used once an
    epoch. No more than the batch is held, whatever the size of the data; another epoch puts other rows together. On a
    GPU the device is not waited for.
    """
    n_rows, d_in = x_BD.shape
    words = np.random.Philox(np.random.SeedSequence((seed, step, _SHUFFLED))).random_raw(n_rows + d_in)
    order_B = torch.from_numpy(np.argsort(words[:n_rows], kind="stable"))
    shifts_D = torch.from_numpy((words[n_rows:] % np.uint64(n_rows)).astype(np.int64))
    if x_BD.is_cuda:
        order_B, shifts_D = (each.pin_memory().to(x_BD.device, non_blocking=True) for each in (order_B, shifts_D))
    places_BD = (torch.arange(n_rows, device=x_BD.device)[:, None] + shifts_D) % n_rows
    return x_BD.gather(0, order_B[places_BD])
