"""Latents beside latents: the nearest by the direction they write, and those that fire on the same images.

Shape suffixes: S latents, N images, D d_in, L latents of a block.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from saevlm_fast.look.spill import Spill

_BLOCK = 1024
_WORK = 4e11  # multiplications that a table of co-firing may take
_PAIRS = 2e8
_SPARSE_BLOCK = 256
_Pairs = tuple[int, Tensor, Tensor]  # first latent, images on which it and each other fire [L, S], and each alone [S]


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


def co_firing(codes: Spill, n: int) -> tuple[Neighbours, int]:
    """By Jaccard index of the sets of images on which two latents fire; and of how many images it was counted.

    All images where that is cheap; else an even choice of them.
    """
    size, n_images = codes.d_sae, codes.n_rows
    dense = size <= 1 << 13
    a_row = codes.n_entries / max(n_images, 1)
    affordable = _WORK / size**2 if dense else _PAIRS / max(a_row**2, 1)
    step = max(1, round(n_images / max(affordable, 1)))
    pairs, counted = (_dense_pairs if dense else _sparse_pairs)(codes, step)
    latents, values = [], []
    for start, both_LS, fires_S in pairs:
        rows = torch.arange(len(both_LS))
        either_LS = fires_S[start : start + len(both_LS), None] + fires_S[None] - both_LS
        jaccard_LS = both_LS / either_LS.clamp(min=1)
        jaccard_LS[rows, rows + start] = -1
        top = jaccard_LS.topk(min(n, size - 1), dim=1)
        latents.append(torch.where(top.values > 0, top.indices, -1))
        values.append(top.values.clamp(min=0))
    return Neighbours(torch.cat(latents), torch.cat(values)), counted


def _chosen(codes: Spill, step: int) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Of the images 0, step, 2 step ... of each chunk: latents and rows [M] of the entries, and how many images."""
    for start, chunk in codes.chunks(2048):
        latents_M, rows_M = chunk.csr()[1], chunk.entry_rows()
        kept_M = (rows_M + start) % step == 0
        kept_rows = -(-(start + chunk.n_rows) // step) - -(-start // step)
        yield latents_M[kept_M], (rows_M[kept_M] + start) // step - -(-start // step), kept_rows


def _dense_pairs(codes: Spill, step: int) -> tuple[Iterator[_Pairs], int]:
    size, counted = codes.d_sae, 0
    both_SS = torch.zeros(size, size)
    for latents_M, rows_M, n_rows in _chosen(codes, step):
        fires_NS = torch.zeros(n_rows, size)
        fires_NS[rows_M, latents_M] = 1
        both_SS.addmm_(fires_NS.T, fires_NS)
        counted += n_rows
    fires_S = both_SS.diagonal().clone()
    return ((start, both_SS[start : start + _BLOCK], fires_S) for start in range(0, size, _BLOCK)), counted


def _sparse_pairs(codes: Spill, step: int) -> tuple[Iterator[_Pairs], int]:
    """Latent block by block: the entries of all images that have one of the block's latents."""
    size = codes.d_sae
    latents, rows, n_rows = [], [], 0
    for latents_m, rows_m, n in _chosen(codes, step):
        latents.append(latents_m)
        rows.append(rows_m + n_rows)
        n_rows += n
    latents_M, rows_M = torch.cat(latents), torch.cat(rows)
    fires_S = torch.bincount(latents_M, minlength=size)
    per_row = torch.bincount(rows_M, minlength=n_rows)
    starts = torch.nn.functional.pad(per_row.cumsum(0), (1, 0))
    order_M = latents_M.argsort(stable=True)
    ends_S = torch.nn.functional.pad(fires_S.cumsum(0), (1, 0))

    def blocks() -> Iterator[_Pairs]:
        for start in range(0, size, _SPARSE_BLOCK):
            stop = min(start + _SPARSE_BLOCK, size)
            mine = order_M[ends_S[start] : ends_S[stop]]
            lengths = per_row[rows_M[mine]]
            slots = (latents_M[mine] - start).repeat_interleave(lengths)
            within = torch.arange(len(slots)) - (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
            others = latents_M[starts[rows_M[mine]].repeat_interleave(lengths) + within]
            both = torch.bincount(slots * size + others, minlength=(stop - start) * size)
            yield start, both.view(stop - start, size).float(), fires_S.float()

    return blocks(), n_rows
