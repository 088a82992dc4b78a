"""Raw neurons on a GPU: a chunk is checked and its sums are made before the device is waited for, once.

Everything is launched as if the chunk were good: the range of its activations, and the sums of its first block by the
closed form. Then one copy tells the host what is wrong, which is refused before anything was added, and which neurons
one image dominates, whose pairs are made again block by block. The chunk's kernels: kernels/dense_score_triton.py.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saevlm_fast.kernels.dense_score_triton import Units, launch_range, launch_units, n_fault_rows
from saevlm_fast.kernels.pairwise_float64_triton import launch_inner_products
from saevlm_fast.kernels.pairwise_similarity import inner_product_blocks
from saevlm_fast.scoring.refusals import refuse_activations, refuse_embeddings
from saevlm_fast.scoring.sums import DenseRange, Embeddings, HalvedSums, Pairs, ShiftedSums

_BLOCK_ROWS = 16384  # images whose float64 copies are held


class _Told:
    """What the host is told in one copy: faults [R, 3] of launch_range; which neurons one image dominates [K]."""

    def __init__(self, n_neurons: int, device: torch.device) -> None:
        sizes = 24 * n_fault_rows(n_neurons), n_neurons
        self._packed = torch.empty(sum(sizes), dtype=torch.uint8, device=device)
        faults, dominated_K = self._packed.split(sizes)
        self.faults, self.dominated_K = faults.view(torch.float64).view(-1, 3), dominated_K.view(torch.bool)

    def read(self) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """Both on the host, which waits for them."""
        packed = self._packed.cpu().numpy()
        n_bytes = 24 * len(self.faults)
        return packed[:n_bytes].view(np.float64).reshape(-1, 3), packed[n_bytes:].view(np.bool_)


class _Block(NamedTuple):
    """Sums of a block of images, which nobody has yet."""

    wide_nK: Tensor
    units: Units
    sums_KE: Tensor
    added_4K: Tensor

    def add_to(self, sums: ShiftedSums, dominated_K: NDArray[np.bool_]) -> None:
        if dominated_K.any():
            some = torch.from_numpy(dominated_K.nonzero()[0]).to(self.wide_nK.device)
            self.added_4K[3, some] = inner_product_blocks(self.wide_nK[:, some], self.units.unit_nE)
        sums.add_launched(self.sums_KE, self.added_4K, self.units)


def add_on_gpu(
    seen: DenseRange, pairs: Pairs, acts_nK: Tensor, images: Embeddings, similarity: str | None, first_image: int
) -> None:
    """What DenseIntake.add does with n >= 1 images, errors too; embeddings are checked if there is a similarity."""
    told = _Told(acts_nK.shape[1], acts_nK.device)
    before = seen.low_S, seen.high_S, seen.n_active_S, seen.n_low_S
    reals_3K, counts_2K = launch_range(acts_nK, images.sqnorm_n, before, seen.n_images, told.faults)
    low_K, high_K, drop_K = reals_3K
    shares = _shares(pairs, len(acts_nK))
    block = _block(*shares[0], acts_nK, low_K, images, told.dominated_K) if shares else None
    faults, dominated_K = told.read()
    least, unfit, bad = faults[:, 0].min(), faults[:, 1].sum(), faults[:, 2].sum()
    if similarity is not None:
        refuse_embeddings(images, similarity, first_image, least == 0, unfit > 0)
    if bad > 0:
        refuse_activations(acts_nK, first_image)
    seen.replace(low_K, high_K, counts_2K, seen.n_images + len(acts_nK))
    pairs.lower(drop_K)
    if block is None:
        pairs.add_dense(acts_nK, low_K, images)
        return
    block.add_to(shares[0][0], dominated_K)
    for sums, rows in shares[1:]:
        del block  # no two of them are held
        block = _block(sums, rows, acts_nK, low_K, images, told.dominated_K)
        block.add_to(sums, told.read()[1])


def _shares(pairs: Pairs, n_images: int) -> list[tuple[ShiftedSums, slice]]:
    """Who gets which images, block by block; nobody if these pairs are not sums of a closed form."""
    if isinstance(pairs, ShiftedSums):
        halves = [(pairs, slice(0, None, 1))]
    elif isinstance(pairs, HalvedSums):
        halves = [(half, rows) for half, rows, _ in pairs.split(n_images)]
    else:
        return []
    return [
        (sums, slice(start, min(start + _BLOCK_ROWS * rows.step, n_images), rows.step))
        for sums, rows in halves
        for start in range(rows.start, n_images, _BLOCK_ROWS * rows.step)
    ]


def _block(
    sums: ShiftedSums, rows: slice, acts_nK: Tensor, low_K: Tensor, images: Embeddings, dominated_K: Tensor
) -> _Block:
    units = launch_units(images.emb_nE[rows], images.sqnorm_n[rows], sums.similarity == "cosine")
    found = launch_inner_products(acts_nK[rows], units.unit_nE, units.square_n, low_K, dominated_K)
    return _Block(found[0], units, *found[1:3])
