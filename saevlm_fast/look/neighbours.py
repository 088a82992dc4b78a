"""Latents beside latents: nearest by the direction they write, firing on the same images, or wherever another does.

Shape suffixes: S latents, N images, D d_in, L latents of a block.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from saevlm_fast.look.spill import Spill

_BLOCK = 1024
_WORK = 4e11  # multiplications that a table of co-firing may take
_PAIRS = 1e8
_WIDER, _SURE = 1.5, 0.5  # a parent's images by its child's; how surely it fires where the child does
_Z = 1.959964


class Neighbours(NamedTuple):
    """latents int64 [S, n], the nearest first, -1 for none; values float32 [S, n]."""

    latents: Tensor
    values: Tensor


def decoder_neighbours(W_dec_SD: Tensor, n: int, on_latents: Callable[[int], None] = lambda done: None) -> Neighbours:
    """By cosine of decoder directions; a latent is not its own neighbour, a zero direction has cosine 0 with all."""
    unit_SD = torch.nn.functional.normalize(W_dec_SD.detach().float().cpu(), dim=1)
    size = len(unit_SD)
    latents, values = [], []
    for start in range(0, size, _BLOCK):
        cosines_LS = unit_SD[start : start + _BLOCK] @ unit_SD.T
        rows = torch.arange(len(cosines_LS))
        cosines_LS[rows, rows + start] = -torch.inf
        top = cosines_LS.topk(min(n, size - 1), dim=1)
        latents.append(top.indices)
        values.append(top.values)
        on_latents(start + len(cosines_LS))
    return Neighbours(torch.cat(latents), torch.cat(values))


class CoFiring(NamedTuple):
    """Latents that fire on the same images.

    Attributes:
        together: by Jaccard index of the two sets of images.
        parents: that fire nearly wherever this one does, and on at least _WIDER times as many images; values: the share
            of this one's images, at least (Wilson, 95 %), less what chance would give: 1 for all of very many.
        children: that fire nearly only where this one does: those of which it is a parent.
        counted: images on which it was counted.
    """

    together: Neighbours
    parents: Neighbours
    children: Neighbours
    counted: int


def co_firing(codes: Spill, n: int) -> CoFiring:
    """On all images where that is cheap; else on an even choice of them. n: latents of each kind, at most."""
    size, n_images = codes.d_sae, codes.n_rows
    dense = size <= 1 << 13
    a_row = codes.n_entries / max(n_images, 1)
    affordable = _WORK / size**2 if dense else _PAIRS / max(a_row**2, 1)
    step = max(1, round(n_images / max(affordable, 1)))
    blocks, counted = (_dense_blocks if dense else _sparse_blocks)(codes, step)
    found: list[list[Neighbours]] = [[], [], []]
    for block in blocks:
        for kind, values in zip(found, _likeness(block, counted)):
            kind.append(block.best(values, min(n, size - 1)))
    together, parents, children = (Neighbours(*(torch.cat(parts) for parts in zip(*kind))) for kind in found)
    return CoFiring(together, parents, children, counted)


def _likeness(block: "_Block", counted: int) -> tuple[Tensor, Tensor, Tensor]:
    """Jaccard index; how surely the other fires where this one does, and this one where the other does."""
    both, mine, other = block.both, block.mine, block.other
    jaccard = both / (mine + other - both).clamp(min=1)
    parent = _above_chance(both, mine, other / max(counted, 1))
    child = _above_chance(both, other, mine / max(counted, 1))
    parent = torch.where((other >= _WIDER * mine) & (parent >= _SURE), parent, 0)
    child = torch.where((mine >= _WIDER * other) & (child >= _SURE), child, 0)
    return jaccard, parent, child


def _above_chance(both: Tensor, n: Tensor, chance: Tensor) -> Tensor:
    """The lower end of the interval of both / n, on a scale from chance, 0, to 1: three images say little."""
    n = n.clamp(min=1)
    share, z2 = both / n, _Z**2
    least = (share + z2 / (2 * n) - _Z * (share * (1 - share) / n + z2 / (4 * n * n)).sqrt()) / (1 + z2 / n)
    return (least - chance) / (1 - chance).clamp(min=1e-6)


class _Block(NamedTuple):
    """Some latents beside all: both [L, S], or [P] for the pairs (row_P, other_P) that fire together at all.

    first: of the L latents. both: images on which two fire. mine, other: on which each does, that broadcast to it.
    """

    first: int
    n_latents: int
    both: Tensor
    mine: Tensor
    other: Tensor
    row_P: Tensor | None = None
    other_P: Tensor | None = None

    def best(self, values: Tensor, n: int) -> Neighbours:
        """The n largest values above 0 of each of the L latents, without itself."""
        if self.row_P is None or self.other_P is None:
            rows = torch.arange(self.n_latents)
            values[rows, rows + self.first] = -1
            top = values.topk(n, dim=1)
            return Neighbours(torch.where(top.values > 0, top.indices, -1), top.values.clamp(min=0))
        kept_P = (values > 0) & (self.other_P != self.row_P + self.first)
        rows_P, others_P, values_P = self.row_P[kept_P], self.other_P[kept_P], values[kept_P]
        order_P = values_P.argsort(descending=True, stable=True)
        order_P = order_P[rows_P[order_P].argsort(stable=True)]
        rows_P = rows_P[order_P]
        starts_L = torch.searchsorted(rows_P, torch.arange(self.n_latents))
        rank_P = torch.arange(len(rows_P)) - starts_L[rows_P]
        near_P = rank_P < n
        latents, found = torch.full((self.n_latents, n), -1), torch.zeros(self.n_latents, n)
        places = rows_P[near_P], rank_P[near_P]
        latents[places], found[places] = others_P[order_P][near_P], values_P[order_P][near_P]
        return Neighbours(latents, found)


def _chosen(codes: Spill, step: int) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Of the images 0, step, 2 step ... of each chunk: latents and rows [M] of the entries, and how many images."""
    for start, chunk in codes.chunks(2048):
        latents_M, rows_M = chunk.csr()[1], chunk.entry_rows()
        kept_M = (rows_M + start) % step == 0
        kept_rows = -(-(start + chunk.n_rows) // step) - -(-start // step)
        yield latents_M[kept_M], (rows_M[kept_M] + start) // step - -(-start // step), kept_rows


def _dense_blocks(codes: Spill, step: int) -> tuple[Iterator[_Block], int]:
    size, counted = codes.d_sae, 0
    both_SS = torch.zeros(size, size)
    for latents_M, rows_M, n_rows in _chosen(codes, step):
        fires_NS = torch.zeros(n_rows, size)
        fires_NS[rows_M, latents_M] = 1
        both_SS.addmm_(fires_NS.T, fires_NS)
        counted += n_rows
    fires_S = both_SS.diagonal().clone()
    blocks = (
        _Block(start, len(both), both, fires_S[start : start + _BLOCK, None], fires_S[None])
        for start, both in zip(range(0, size, _BLOCK), both_SS.split(_BLOCK))
    )
    return blocks, counted


def _sparse_blocks(codes: Spill, step: int) -> tuple[Iterator[_Block], int]:
    """The pairs of each block that fire together at all, by a product of sparse matrices."""
    from scipy.sparse import csr_array

    size, n_rows = codes.d_sae, 0
    latents, rows = [torch.empty(0, dtype=torch.int64)], [torch.empty(0, dtype=torch.int64)]
    for latents_m, rows_m, n in _chosen(codes, step):
        latents.append(latents_m)
        rows.append(rows_m + n_rows)
        n_rows += n
    latents_M, rows_M = torch.cat(latents).numpy(), torch.cat(rows).numpy()
    fires_NS = csr_array((np.ones(len(rows_M), np.int32), (rows_M, latents_M)), shape=(n_rows, size))
    of_latents = fires_NS.T.tocsr()
    fires_S = torch.from_numpy(np.diff(of_latents.indptr)).float()

    def blocks() -> Iterator[_Block]:
        for start in range(0, size, _BLOCK):
            product = of_latents[start : start + _BLOCK] @ fires_NS
            row_P = torch.from_numpy(np.repeat(np.arange(product.shape[0]), np.diff(product.indptr)))
            other_P = torch.from_numpy(product.indices.astype(np.int64))
            both_P = torch.from_numpy(product.data).float()
            yield _Block(start, product.shape[0], both_P, fires_S[row_P + start], fires_S[other_P], row_P, other_P)

    return blocks(), n_rows
