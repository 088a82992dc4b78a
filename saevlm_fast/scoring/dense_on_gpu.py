"""Raw neurons on a GPU: a chunk is checked and its sums are made before the device is waited for, once.

Everything is launched at once: the range of its activations, and the sums of its first block by the closed form, which
are added unless something is wrong. Then one copy tells the host what is wrong, which is refused, and which neurons one
image dominates, whose pairs are made block by block. The chunk's kernels: kernels/dense_*_triton.py.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saevlm_fast.kernels.dense_prepared_triton import Block, launch_prepared
from saevlm_fast.kernels.dense_range_triton import Chunk, NewRange, launch_range, n_fault_rows
from saevlm_fast.kernels.dense_score_triton import launch_add
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


def add_on_gpu(
    seen: DenseRange, pairs: Pairs, acts_nK: Tensor, images: Embeddings, similarity: str | None, first_image: int
) -> None:
    """What DenseIntake.add does with n >= 1 images, errors too; embeddings are checked if there is a similarity."""
    told = _Told(acts_nK.shape[1], acts_nK.device)
    shares = _shares(pairs, len(acts_nK))
    chunk = launch_range(acts_nK, images.sqnorm_n)
    work = _Work(chunk, images.emb_nE, told, (seen.low_S, seen.high_S, seen.n_active_S, seen.n_low_S), seen.n_images)
    (reals_3K, counts_2K), block = work.prepared(shares[0] if shares else None, merging=True)
    low_K, high_K, drop_K = reals_3K
    if isinstance(pairs, ShiftedSums | HalvedSums):
        pairs.lower(drop_K, told.faults)
        work.add(shares[0][0], block)
    faults, dominated_K = told.read()
    least, unfit, bad = faults[:, 0].min(), faults[:, 1].sum(), faults[:, 2].sum()
    if similarity is not None:
        refuse_embeddings(images, similarity, first_image, least == 0, unfit > 0)
    if bad > 0:
        refuse_activations(acts_nK, first_image)
    seen.replace(low_K, high_K, counts_2K, seen.n_images + len(acts_nK))
    if not shares:
        pairs.lower(drop_K)
        pairs.add_dense(acts_nK, low_K, images)
        return
    _end(shares[0][0], block, dominated_K)
    for share in shares[1:]:
        del block  # no two of them are held
        block = work.prepared(share, merging=False)[1]
        work.add(share[0], block)
        _end(share[0], block, told.read()[1])


class _Work(NamedTuple):
    """A chunk, its embeddings, what the host will be told, and the range of the images before."""

    chunk: Chunk
    emb_nE: Tensor
    told: _Told
    before: tuple[Tensor, Tensor, Tensor, Tensor]
    n_before: int

    def prepared(self, share: tuple[ShiftedSums, slice] | None, *, merging: bool) -> tuple[NewRange, Block]:
        sums, rows = share or (None, None)
        cosine = sums is not None and sums.similarity == "cosine"
        before = self.before, self.n_before
        return launch_prepared(self.chunk, *before, self.told.faults, rows, self.emb_nE, cosine, merging)

    def add(self, sums: ShiftedSums, block: Block) -> None:
        added_KE = block.wide_bK.T @ block.unit_bE
        cosine = sums.similarity == "cosine"
        launch_add(sums.launched(), block, added_KE, self.told.faults, self.told.dominated_K, cosine)


def _end(sums: ShiftedSums, block: Block, dominated_K: NDArray[np.bool_]) -> None:
    """What the launches did not add: the number of images, and dominated neurons' pairs within the block."""
    sums.n_images += len(block.unit_bE)
    if dominated_K.any():
        some = torch.from_numpy(dominated_K.nonzero()[0]).to(block.wide_bK.device)
        sums.state.num_S[some] += inner_product_blocks(block.wide_bK[:, some], block.unit_bE)


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
