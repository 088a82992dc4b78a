"""The range of every latent's activations over a chunk of images, from sparse codes grouped by latent.

    high[s] = max of acts[offsets[s]:offsets[s + 1]], 0 if there are none
    low[s]  = their min if latent s fires on every image, else 0: an image on which it does not fire has activation 0
    n_low[s] = how many of its entries are at low[s] if it fires on every image, else 0

Activations are >= 0. Deterministic; not differentiable.
"""

import torch
from torch import Tensor

from .common import check, custom_op

# --- public functions ------------------------------------------------------------------------------------------------


def latent_range(acts_M: Tensor, offsets_S1: Tensor, n_images: int) -> tuple[Tensor, Tensor, Tensor]:
    """low_S, high_S (acts' dtype) and n_low_S (int64) of the module's docstring; a latent at most once an image.

    acts [M] float; offsets [S + 1] int64 ascend from 0, entries at or after offsets[S] are ignored. ValueError: shapes.
    """
    check(acts_M.ndim == 1, f"acts_M: shape {tuple(acts_M.shape)} is not [M]")
    fits = offsets_S1.ndim == 1 and len(offsets_S1) > 0
    check(fits, f"offsets_S1: shape {tuple(offsets_S1.shape)} is not [S + 1]")
    return latent_range_op(acts_M, offsets_S1, n_images)


# --- custom ops: CUDA ------------------------------------------------------------------------------------------------


@custom_op("latent_range")
def latent_range_op(acts_M: Tensor, offsets_S1: Tensor, n_images: int) -> tuple[Tensor, Tensor, Tensor]:
    from .latent_range_triton import launch_latent_range

    with torch.cuda.device_of(acts_M):  # Triton launches on the current device
        return launch_latent_range(acts_M, offsets_S1, n_images)


# --- CPU -------------------------------------------------------------------------------------------------------------


@latent_range_op.register_kernel("cpu")
def latent_range_cpu(acts_M: Tensor, offsets_S1: Tensor, n_images: int) -> tuple[Tensor, Tensor, Tensor]:
    lengths_S = offsets_S1.diff()
    always = torch.nonzero((lengths_S == n_images) & (lengths_S > 0)).squeeze(1)
    acts_An = acts_M[offsets_S1[always, None] + torch.arange(n_images)]
    low_S, high_S = acts_M.new_zeros(len(lengths_S)), acts_M.new_zeros(len(lengths_S))
    n_low_S = torch.zeros_like(lengths_S)
    if len(always) > 0:
        low_S[always] = acts_An.amin(1)
        n_low_S[always] = (acts_An == low_S[always, None]).sum(1)
    latents_M = torch.repeat_interleave(lengths_S)
    high_S.scatter_reduce_(0, latents_M, acts_M[: len(latents_M)], "amax")
    return low_S, high_S, n_low_S


# --- fakes -----------------------------------------------------------------------------------------------------------


@latent_range_op.register_fake
def latent_range_fake(acts_M: Tensor, offsets_S1: Tensor, n_images: int) -> tuple[Tensor, Tensor, Tensor]:
    low_S = acts_M.new_empty(offsets_S1.shape[0] - 1)
    return low_S, torch.empty_like(low_S), offsets_S1.new_empty(offsets_S1.shape[0] - 1)
