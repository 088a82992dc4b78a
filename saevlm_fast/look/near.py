"""What an SAE nearly says, and how much of the rows it explains: on an even choice of the images.

A near miss of a latent is an image on which it does not fire, and on one of whose rows its pre-activation is high: what
a little more would have let through. A pre-activation of all latents on all rows is the SAE's whole work again, so the
choice is as large as a fixed amount of work.

Shape suffixes: n images of a block, R rows, D d_in, S latents.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from saevlm_fast.data.rows import Activations
from saevlm_fast.measures.reconstruction import ReconstructionSums
from saevlm_fast.sae import SparseAutoencoder, inferred
from saevlm_fast.scoring.image_rows import ImageTable

N_MISSES = 5
_WORK = 1.5e11  # multiplications: some seconds of one core
_DENSE = 1 << 24  # numbers of a dense block of rows x latents
_FEWEST_IMAGES = 64


class Near(NamedTuple):
    """Of S latents on the images that were tried.

    Attributes:
        images_S5: int64 [S, N_MISSES], the near misses, the highest first; -1 where there are fewer.
        values_S5: float32, their pre-activations, the largest of each image's rows.
        n_images, n_rows: that were tried.
        explained: explained variance of the rows by each prefix of a Matryoshka SAE's groups, the last by all latents.
    """

    images_S5: Tensor
    values_S5: Tensor
    n_images: int
    n_rows: int
    explained: list[float]


def look_near(
    rows: Activations,
    sae: SparseAutoencoder,
    table: ImageTable,
    on_images: Callable[[int], None] = lambda done: None,
) -> Near:
    """One pass over an even choice of the images: all of them where that is cheap.

    on_images: called with a number that ends at the store's number of images.
    """
    size, ends = sae.config.d_sae, tuple(sae.config.group_ends)
    chosen = _chosen(table, sae.config.d_in * size)
    sums = ReconstructionSums(size, ends, sae.b_dec)
    images_5S, values_5S = torch.full((N_MISSES, size), -1), torch.full((N_MISSES, size), -torch.inf)
    n_at_once = max(1, _DENSE // (size * table.rows_per_image))
    for at in range(0, len(chosen), n_at_once):
        images = chosen[at : at + n_at_once]
        spans = [np.arange(*table.offsets_N1[image : image + 2]) for image in images]
        x_RD = rows.rows(torch.from_numpy(np.concatenate(spans))).to(sae.b_dec)
        sizes = torch.tensor([len(span) for span in spans])
        highest_nS = _highest_where_silent(sae, x_RD, sizes, sums)
        values_5S, images_5S = _better(values_5S, images_5S, highest_nS, torch.from_numpy(images))
        on_images(table.n_images * (at + len(images)) // len(chosen))
    misses = torch.where(values_5S > -torch.inf, images_5S, -1)
    return Near(misses.T.contiguous(), values_5S.T.contiguous(), len(chosen), sums.n_rows, sums.explained()[0])


def _chosen(table: ImageTable, work_a_row: int) -> np.ndarray:
    a_row = table.offsets_N1[-1] / table.n_images
    affordable = max(_FEWEST_IMAGES, int(_WORK / (work_a_row * a_row)))
    return np.unique(np.linspace(0, table.n_images - 1, min(table.n_images, affordable)).astype(np.int64))


def _highest_where_silent(sae: SparseAutoencoder, x_RD: Tensor, sizes: Tensor, sums: ReconstructionSums) -> Tensor:
    """The largest pre-activation on each image's rows [n, S], -inf where the latent fires on one; adds to the sums."""
    size = sae.config.d_sae
    with torch.no_grad():
        codes, statistics = inferred(sae, x_RD), sae.input_statistics(x_RD)
        prefixes_GRD = (
            sae.decode_prefixes(codes, statistics) if len(sums.group_ends) > 1 else sae.decode(codes, statistics)[None]
        )
        sums.add(x_RD, codes, prefixes_GRD)
        pre_RS = sae.pre_activations(x_RD).float().cpu()
    highest_nS = torch.stack([part.amax(0) for part in pre_RS.split(sizes.tolist())])
    fired = codes.to("cpu").compact()
    image_R = torch.arange(len(sizes)).repeat_interleave(sizes)
    highest_nS[image_R[fired.entry_rows()], fired.csr()[1]] = -torch.inf
    assert highest_nS.shape == (len(sizes), size)
    return highest_nS


def _better(values_5S: Tensor, images_5S: Tensor, new_nS: Tensor, new_images: Tensor) -> tuple[Tensor, Tensor]:
    """The N_MISSES highest of what was best and what is new."""
    top = new_nS.topk(min(N_MISSES, len(new_nS)), dim=0)
    values = torch.cat([values_5S, top.values])
    best = values.topk(N_MISSES, dim=0)
    return best.values, torch.cat([images_5S, new_images[top.indices]]).gather(0, best.indices)
