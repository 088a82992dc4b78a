"""Raw neurons on a GPU: a chunk is checked and its sums are made before the device is waited for, once.

Everything is launched at once: the range of its activations, and the sums of its first block by the closed form, which
are added unless something is wrong. Then one copy tells the host what is wrong, which is refused, and which neurons one
image dominates, whose pairs are made block by block. Of a first chunk of one block it also tells the scores: where no
other follows, nothing more is launched. The chunk's kernels: kernels/dense_*_triton.py.

What the host does before launch_prepared, and after it has been told, the device waits for; the rest is beside kernels.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saevlm_fast.kernels.common import cdiv
from saevlm_fast.kernels.dense_prepared_triton import Block, launch_prepared
from saevlm_fast.kernels.dense_range_triton import Chunk, NewRange, launch_range, n_fault_rows
from saevlm_fast.kernels.dense_score_triton import Sums, first_sums, launch_add
from saevlm_fast.kernels.pairwise_similarity import inner_product_blocks
from saevlm_fast.scoring.refusals import refuse_activations, refuse_embeddings
from saevlm_fast.scoring.sums import STATUSES, DenseRange, Embeddings, HalvedSums, Pairs, ShiftedSums

_BLOCK_ROWS = 16384  # images whose float64 copies are held
_STATUS_CODES = {name.upper(): number for number, name in enumerate(STATUSES)}


class _Told:
    """What the host is told in one copy: faults of launch_prepared; which neurons one image dominates; the scores.

    Numbers of 8 bytes: faults [R, 3], whether they are none, and if scored 3 for every neuron; then bytes: dominated
    [K], and statuses [K].
    """

    def __init__(self, n_neurons: int, device: torch.device, scored: bool) -> None:
        self._n_neurons, self._n_faults, self._scored = n_neurons, 3 * n_fault_rows(n_neurons), scored
        n_reals = self._n_faults + 1 + (3 * n_neurons if scored else 0)
        self._n_reals = n_reals + n_reals % 2  # bytes begin at a multiple of 16, or add_kernel is compiled anew
        n_bytes = n_neurons * (2 if scored else 1)
        self.reals = torch.empty(self._n_reals + cdiv(n_bytes, 8), dtype=torch.float64, device=device)

    def flags(self) -> Tensor:
        """int8 [K], or [2 K] with the statuses, and what fills it up."""
        return self.reals[self._n_reals :].view(torch.int8)

    def laid_out(self) -> "_Heard":
        """Memory for it on the host, which makes this while the device works."""
        numbers, n = torch.empty(len(self.reals), dtype=torch.float64), self._n_neurons
        heard, scores = numbers.numpy(), None
        if self._scored:
            ms_K, high_K, active_K = numbers[self._n_faults + 1 : self._n_faults + 1 + 3 * n].view(3, n)
            status_K = numbers[self._n_reals :].view(torch.int8)[n : 2 * n]
            scores = ms_K, high_K, active_K.view(torch.int64), status_K
        faults, dominated_K = heard[: self._n_faults].reshape(-1, 3), heard[self._n_reals :].view(np.bool_)[:n]
        return _Heard(numbers, faults, heard[self._n_faults : self._n_faults + 1], dominated_K, scores)

    def read(self, heard: "_Heard") -> None:
        """The host waits for it."""
        heard.numbers.copy_(self.reals)


class _Heard(NamedTuple):
    """What was told, and views of it: faults [R, 3], sound [1], dominated [K]; ms, maximum, n_active, status [K]."""

    numbers: Tensor
    faults: NDArray[np.float64]
    sound: NDArray[np.float64]
    dominated_K: NDArray[np.bool_]
    scores: tuple[Tensor, Tensor, Tensor, Tensor] | None


class Added(NamedTuple):
    """The range of all images; |e|^2 [n] of those that were added; scores of all images [K], if they were made."""

    range: DenseRange
    sqnorm_n: Tensor
    scores: tuple[Tensor, Tensor, Tensor, Tensor] | None


def add_on_gpu(
    seen: DenseRange | None,
    pairs: Pairs,
    acts_nK: Tensor,
    emb_nE: Tensor,
    sqnorm_n: Tensor | None,
    similarity: str | None,
    first_image: int,
) -> Added:
    """What DenseIntake.add does with n >= 1 images, errors too; embeddings are checked if there is a similarity.

    seen: of the images before, if there are any.
    """
    shares = _shares(pairs, len(acts_nK))
    chunk = launch_range(acts_nK, emb_nE, sqnorm_n)
    n_before = 0 if seen is None else seen.n_images
    n_images, scored = n_before + len(acts_nK), n_before == 0 and isinstance(pairs, ShiftedSums) and len(shares) == 1
    told = _Told(acts_nK.shape[1], acts_nK.device, scored)
    work = _Work(chunk, told, None if seen is None else seen.parts, n_before)
    found, block = work.prepared(shares[0] if shares else None, merging=True)
    low_K, high_K, drop_K = found.reals_3K
    sums = None
    if isinstance(pairs, ShiftedSums | HalvedSums):
        pairs.lower(drop_K, told.reals)
        sums = work.add(shares[0][0], block, found, n_images if scored else 0)
    n_active_K, n_low_K = found.counts_2K
    now, heard = DenseRange(low_K, high_K, n_active_K, n_low_K, n_images), told.laid_out()
    images = Embeddings(chunk.emb_nE, chunk.sqnorm_n)
    told.read(heard)
    if sums is None or not heard.sound[0]:
        _refuse(heard.faults, acts_nK, images, similarity, first_image)
    if sums is None:
        pairs.lower(drop_K)
        pairs.add_dense(acts_nK, low_K, images)
        return Added(now, chunk.sqnorm_n, None)
    dominated = _end(shares[0][0], sums, block, heard.dominated_K)
    for share in shares[1:]:
        del block  # no two of them are held
        block = work.prepared(share, merging=False)[1]
        sums = work.add(share[0], block, found, 0)
        told.read(heard)
        _end(share[0], sums, block, heard.dominated_K)
    return Added(now, chunk.sqnorm_n, None if dominated else heard.scores)


def _refuse(
    faults: NDArray[np.float64], acts_nK: Tensor, images: Embeddings, similarity: str | None, first_image: int
) -> None:
    least, unfit, bad = faults[:, 0].min(), faults[:, 1].sum(), faults[:, 2].sum()
    if similarity is not None:
        refuse_embeddings(images, similarity, first_image, least == 0, unfit > 0)
    if bad > 0:
        refuse_activations(acts_nK, first_image)


class _Work(NamedTuple):
    """A chunk, what the host will be told, and the range of the images before, if there are any."""

    chunk: Chunk
    told: _Told
    before: tuple[Tensor, Tensor, Tensor, Tensor] | None
    n_before: int

    def prepared(self, share: tuple[ShiftedSums, slice] | None, *, merging: bool) -> tuple[NewRange, Block]:
        sums, rows = share or (None, None)
        cosine = sums is not None and sums.similarity == "cosine"
        return launch_prepared(self.chunk, self.before, self.n_before, self.told.reals, rows, cosine, merging)

    def add(self, sums: ShiftedSums, block: Block, found: NewRange, n_scored: int) -> Sums:
        """What was added to, or made of a first block."""
        added_KE = block.wide_bK.T @ block.unit_bE
        into, told = sums.launched() if sums.n_images > 0 else first_sums(added_KE), self.told
        cosine, codes = sums.similarity == "cosine", _STATUS_CODES
        launch_add(into, sums.n_images, block, added_KE, found, told.reals, told.flags(), codes, n_scored, cosine)
        return into


def _end(sums: ShiftedSums, made: Sums, block: Block, dominated_K: NDArray[np.bool_]) -> bool:
    """What the launches did not add: the number of images, and dominated neurons' pairs; whether there are any."""
    if sums.n_images == 0:
        sums.begin(made)
    sums.n_images += len(block.unit_bE)
    dominated = bool(dominated_K.any())
    if dominated:
        some = torch.from_numpy(dominated_K.nonzero()[0]).to(block.wide_bK.device)
        sums.state.num_S[some] += inner_product_blocks(block.wide_bK[:, some], block.unit_bE)
    return dominated


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
