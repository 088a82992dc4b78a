"""The images on which a latent is most active, exactly, in one pass over the rows.

Shape suffixes: B rows of a chunk, S latents or neurons, L chosen ones, M entries.
"""

from collections.abc import Callable, Sequence
from contextlib import closing
from typing import NamedTuple

import torch
from torch import Tensor

from saevlm_fast.data.codes import Rows, as_rows
from saevlm_fast.data.pairing import check_images_once, checked_ids
from saevlm_fast.data.row_numbers import whole_numbers
from saevlm_fast.errors import require, whole_number
from saevlm_fast.runtime import own_defaults
from saevlm_fast.sae import SparseAutoencoder
from saevlm_fast.scoring.encoding import encoded_chunks, n_latents
from saevlm_fast.scoring.image_rows import image_chunks, image_table
from saevlm_fast.scoring.source import Pool, check_pool
from saevlm_fast.sparse_codes import SparseCodes


class TopImages(NamedTuple):
    """Of one latent, the most active first: images int64 [<= n], the numbers of their rows; acts float32 [<= n]."""

    images: Tensor
    acts: Tensor


@own_defaults()
def top_images(
    activations: Rows,
    latents: Sequence[int] | Tensor,
    n: int,
    sae: SparseAutoencoder | None = None,
    *,
    pool: Pool | None = None,
    batch_rows: int = 4096,
    on_rows: Callable[[int], None] = lambda done: None,
) -> list[TopImages]:
    """The n images on which each of `latents` is most active; of equally active ones the earlier first.

    What the paper's figures show, with n = 16 (arXiv 2504.02821 section 4; docs/recipe.md section 4). Memory:
    len(latents) * n, and one chunk of rows.

    Args:
        activations: N rows, row i of image i; or stored codes.
        latents: L different numbers. Only images on which a latent fires count, so it may have fewer than n; a raw
            neuron has the n largest activations, whatever their sign.
        n: images of each.
        sae: encodes the activations; without one their neurons are meant, or the latents of codes.
        pool: of stores with several rows an image, which lie together: an image's activation is its largest row's
            (max), or the mean of its rows' (mean). With an SAE or codes.
        batch_rows: rows read and encoded at a time.
        on_rows: called with the number of images done.

    Returns:
        One for each of `latents`, in their order; activations in the units of the data.

    Raises:
        ValueError: latents that are not there or listed twice, n below 1, an SAE of another width or for codes, several
            rows of one image without pool, rows of one image apart.
    """
    n, batch_rows = whole_number("n", n), whole_number("batch_rows", batch_rows)
    activations = as_rows(activations, "activations")
    latents_L = whole_numbers("latents", latents)
    slot_of_latent_S = _slots(latents_L, n_latents(activations, sae))
    best = BestImages(len(latents_L), n)
    if pool is not None:
        check_pool(pool)
        table = image_table(activations)
        with closing(image_chunks(activations, sae, table, pool, batch_rows)) as images:
            for chunk in images:
                acts_M, slots_M, images_M = _chosen_entries(chunk.codes, slot_of_latent_S)
                best.add(acts_M, slots_M, images_M + chunk.first)
                on_rows(chunk.first + chunk.codes.n_rows)
        return best.result()
    check_images_once(activations)
    ids = checked_ids(batch_rows, activations)
    with closing(encoded_chunks(activations, sae, batch_rows)) as chunks:
        for (start, values), _ in zip(chunks, ids):
            if isinstance(values, SparseCodes):
                n_rows, found = values.n_rows, _chosen_entries(values, slot_of_latent_S)
            else:
                n_rows, found = len(values), _top_of_columns(values[:, latents_L], n)
            acts_M, slots_M, images_M = found
            best.add(acts_M, slots_M, images_M + start)
            on_rows(start + n_rows)
    return best.result()


def _slots(latents_L: Tensor, n_latents: int) -> Tensor:
    """Where each of the S latents stands in latents_L; -1 for those that are not chosen."""
    outside_L = (latents_L < 0) | (latents_L >= n_latents)
    bad = int(latents_L[outside_L][0]) if bool(outside_L.any()) else 0
    require(not bool(outside_L.any()), f"latents: {bad} is not within 0 to {n_latents - 1}")
    slots_S = torch.full((n_latents,), -1)
    slots_S[latents_L] = torch.arange(len(latents_L))
    n_different = int((slots_S >= 0).sum())
    require(n_different == len(latents_L), f"latents: {len(latents_L)} are listed, but only {n_different} differ")
    return slots_S


def _chosen_entries(codes: SparseCodes, slot_of_latent_S: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(acts, slots, rows) of the chosen latents where they fire, rows ascending, on the host."""
    codes = codes.to("cpu", torch.float32)
    acts_M, latents_M, _ = codes.csr()
    rows_M, slots_M = codes.entry_rows(), slot_of_latent_S[latents_M]
    kept_M = (rows_M < codes.n_rows) & (slots_M >= 0) & (acts_M > 0)
    return acts_M[kept_M], slots_M[kept_M], rows_M[kept_M]


def _top_of_columns(acts_BL: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """(acts, slots, rows) of the n largest of every column; a stable sort, so of equal ones the first rows."""
    acts_BL, rows_BL = acts_BL.sort(dim=0, descending=True, stable=True)
    acts_BL, rows_BL = acts_BL[:n], rows_BL[:n]
    slots_BL = torch.arange(acts_BL.shape[1]).expand_as(rows_BL)
    return acts_BL.flatten(), slots_BL.flatten(), rows_BL.flatten()


class BestImages:
    """The n largest activations of each of L slots so far, sorted by slot, activation descending, image ascending."""

    def __init__(self, n_slots: int, n: int, dtype: torch.dtype = torch.float32):
        self.n_slots, self.n = n_slots, n
        self.acts_M, self.slots_M = torch.empty(0, dtype=dtype), torch.empty(0, dtype=torch.int64)
        self.images_M = torch.empty(0, dtype=torch.int64)
        self._floor_L = torch.full((n_slots,), -torch.inf, dtype=dtype)  # what does not exceed it comes too late

    def add(self, acts_M: Tensor, slots_M: Tensor, images_M: Tensor) -> None:
        """Later images than any before; in one slot, equal activations in the order of their images."""
        good_M = acts_M > self._floor_L[slots_M]
        acts_M, slots_M, images_M = acts_M[good_M], slots_M[good_M], images_M[good_M]
        acts_M, slots_M = torch.cat([self.acts_M, acts_M]), torch.cat([self.slots_M, slots_M])
        images_M = torch.cat([self.images_M, images_M])
        # Two stable sorts: what is equal in slot and activation stays in the order of images.
        order_M = acts_M.argsort(descending=True, stable=True)
        order_M = order_M[slots_M[order_M].argsort(stable=True)]
        slots_M = slots_M[order_M]
        ends_L = torch.bincount(slots_M, minlength=self.n_slots).cumsum(0)
        starts_L = torch.nn.functional.pad(ends_L[:-1], (1, 0))
        kept_M = torch.arange(len(slots_M)) - starts_L[slots_M] < self.n
        self.slots_M, order_M = slots_M[kept_M], order_M[kept_M]
        self.acts_M, self.images_M = acts_M[order_M], images_M[order_M]
        counts_L = torch.bincount(self.slots_M, minlength=self.n_slots)
        full_L = counts_L == self.n
        self._floor_L[full_L] = self.acts_M[counts_L.cumsum(0)[full_L] - 1]

    def result(self) -> list[TopImages]:
        counts = torch.bincount(self.slots_M, minlength=self.n_slots).tolist()
        return [TopImages(*pair) for pair in zip(self.images_M.split(counts), self.acts_M.split(counts))]
