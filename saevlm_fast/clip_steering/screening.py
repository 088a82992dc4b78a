"""Every unit's steerability to first order, from a few backward passes: which ones are worth a forward.

Moving a unit's value to its target changes the stream of image i by dx_i, and P_i(c) by J_ic . dx_i to first order.
With random signs e_c, g_i = sum_c e_c J_ic is one backward pass, and the mean of (g_i . dx_i)^2 over them is
sum_c (J_ic . dx_i)^2: what steerability is made of, for all units from the same passes. It is the limit for small
targets; a unit that saturates is overrated.

Shape suffixes: B images, T tokens, D width, S units, C words.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from saevlm_fast.clip_steering.stream import ImageBatch, Stream, Vocabulary
from saevlm_fast.clip_steering.units import Units


def screened(
    stream: Stream,
    batches: Sequence[ImageBatch],
    units: Units,
    target_S: Tensor,
    vocabulary: Vocabulary,
    n_signs: int = 16,
    seed: int = 0,
    on_images: Callable[[int], None] = lambda done: None,
) -> Tensor:
    """float64 [S]: an unbiased estimate of the mean over images of sum_c (J_ic . dx_i)^2.

    Args:
        target_S: that a unit is moved to. n_signs: backward passes of every batch; the relative standard error of one
            image and unit is at most sqrt(2 / n_signs).
    """
    generator = torch.Generator().manual_seed(seed)
    total_S, n_images = torch.zeros(units.n, dtype=torch.float64), 0
    for batch in batches:
        signs = torch.randint(0, 2, (n_signs, len(batch), len(vocabulary.words)), generator=generator).double() * 2 - 1

        def readings(out_BE: Tensor, signs: Tensor = signs) -> list[Tensor]:
            p_BC = vocabulary.probabilities(out_BE)
            return [(each.to(p_BC) * p_BC).sum() for each in signs]

        mask_BT1 = stream.mask(batch.x_BTD)
        image_N = torch.arange(len(batch)).repeat_interleave(batch.x_BTD.shape[1]).to(batch.x_BTD.device)
        tokens = units.read(batch.x_BTD.flatten(0, 1))
        for g_BTD in stream.gradients(batch, readings):
            g_BTD = g_BTD * mask_BT1
            if tokens.scale is not None:
                g_BTD = g_BTD * tokens.scale.view_as(mask_BT1)
            change_BS = units.along(g_BTD.sum(1)) * target_S.to(g_BTD)
            change_BS = change_BS - tokens.pulled(g_BTD.flatten(0, 1), image_N, len(batch))
            total_S += change_BS.double().pow(2).sum(0).cpu() / n_signs
        n_images += len(batch)
        on_images(n_images)
    return total_S / max(n_images, 1)
