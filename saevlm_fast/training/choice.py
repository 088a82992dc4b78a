"""The one exact choice of latents among the candidates of several ranks, of which each holds some of the latents.

A rank encodes its own latents and offers the best of them; whatever wins over all latents is among these. All ranks see
the values that all of them offer, and find the same winners: the largest, ties to the lower latent (over a batch to the
lower flat position), NaN before every number, as of one process (kernels/reference.py). Ranks hold latents in ascending
order, and offer theirs in ascending order, so the place of a value says which of two latents is the lower: latents
themselves need not travel.

Shape suffixes: R ranks, B rows, K places for candidates of a row, M of a batch, C of a row among dead latents.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

_DIGIT = 4  # bits of a key that one round settles
NOTHING = -1.0  # an offer where a rank has fewer latents than there are places: below every activation


class Kept(NamedTuple):
    """Which of a rank's own offers are kept (bool, in their shape), and the smallest activation above 0 that any rank
    keeps (0-d; 0 if there is none)."""

    mask: Tensor
    smallest: Tensor


def keep_of_rows(offers_RBK: Tensor, rank: int, k: int) -> Kept:
    """TopK: the k largest of every row. offers_RBK: activations, latents ascending; NOTHING where there is none."""
    n_ranks, n_rows, places = offers_RBK.shape
    values_BN = _ranked(offers_RBK).transpose(0, 1).reshape(n_rows, n_ranks * places)
    cut_B1 = torch.topk(values_BN, k, dim=1, sorted=False).values.amin(1, keepdim=True)
    above_BN, equal_BN = values_BN > cut_B1, values_BN == cut_B1
    needed_B1 = k - above_BN.sum(1, keepdim=True)
    kept_BN = above_BN | (equal_BN & (equal_BN.cumsum(1) <= needed_B1))
    smallest = _smallest(torch.where(kept_BN, values_BN, 0))
    return Kept(kept_BN.view(n_rows, n_ranks, places)[:, rank], smallest)


def keep_of_batch(offers_RM: Tensor, row_offsets_RB1: Tensor, rows_M: Tensor, rank: int, n_kept: int) -> Kept:
    """BatchTopK: the n_kept largest of the batch; zeros are never kept.

    Args:
        offers_RM: activations in CSR form, row after row, latents ascending within a row; 0 from the last offset on.
        row_offsets_RB1: where the rows of every rank's offers begin.
        rows_M: the row of each of this rank's own (`entry_rows`).
        rank: this rank.
        n_kept: k times the rows of the batch.
    """
    values_RM = _ranked(offers_RM)
    n_ranks, n_offers = values_RM.shape
    if n_offers * n_ranks > n_kept:
        cut = torch.topk(values_RM.flatten(), n_kept, sorted=False).values.amin().clamp(min=0)
    else:
        cut = values_RM.new_zeros(())
    above_RM = values_RM > cut
    equal_RM = (values_RM == cut) & (cut > 0)
    needed = n_kept - above_RM.sum()
    # Ties in flat order: by row, within a row by rank, within these by place.
    before_RM1 = torch.nn.functional.pad(equal_RM.cumsum(1), (1, 0))
    at_row_RB1 = before_RM1.gather(1, row_offsets_RB1)
    of_row_BR = at_row_RB1.diff(dim=1).T
    earlier_BR = (of_row_BR.flatten().cumsum(0) - of_row_BR.flatten()).view(of_row_BR.shape)
    row_M = rows_M.clamp(max=len(of_row_BR) - 1)
    number_M = earlier_BR[row_M, rank] + before_RM1[rank, 1:] - at_row_RB1[rank, row_M]
    mask_M = above_RM[rank] | (equal_RM[rank] & (number_M <= needed))
    smallest = _smallest(torch.where(values_RM >= cut, values_RM, 0))
    return Kept(mask_M, smallest)


def _ranked(offers: Tensor) -> Tensor:
    """NaN as infinity: above every number."""
    return torch.where(offers.isnan(), torch.inf, offers)


def _smallest(values: Tensor) -> Tensor:
    smallest = torch.where(values > 0, values, torch.inf).min()
    return torch.where(smallest.isinf(), torch.zeros_like(smallest), smallest)


def keep_largest_of_all(
    values_BC: Tensor,
    k: int,
    add_up: Callable[[Tensor], Tensor],
    gather: Callable[[Tensor], Tensor],
    rank: int,
) -> Tensor:
    """[B, C] bool: which of this rank's values are among the k largest of their row over all ranks.

    By the digits of the k-th largest value, the highest first: a round counts, and the ranks add up, how many values of
    a row go on with each digit. [B, 16] counts travel eight times (float32), however many values a rank has.

    Args:
        values_BC: not negative (NaN counts as the largest). Ranks may have different C, also none.
        k: at least 1.
        add_up: the sum of a tensor of whole numbers over all ranks.
        gather: a tensor of every rank, [R, ...].
        rank: this rank; ties go to the lower.
    """
    keys_BC, bits = _keys(values_BC)
    prefix_B1 = keys_BC.new_zeros(len(keys_BC), 1)
    left_B1 = torch.full_like(prefix_B1, k)
    for shift in range(bits - _DIGIT, -1, -_DIGIT):
        going_on_BC = (keys_BC >> (shift + _DIGIT)) == prefix_B1
        digits_BC = (keys_BC >> shift) & ((1 << _DIGIT) - 1)
        counts_BH = keys_BC.new_zeros(len(keys_BC), 1 << _DIGIT).scatter_add_(1, digits_BC, going_on_BC.long())
        counts_BH = add_up(counts_BH.to(torch.int32)).long()
        at_least_BH = counts_BH.flip(1).cumsum(1).flip(1)  # values whose digit is that one or a higher
        digit_B1 = ((at_least_BH >= left_B1).sum(1, keepdim=True) - 1).clamp(min=0)  # fewer than k in all: down to 0
        higher_B1 = torch.nn.functional.pad(at_least_BH, (0, 1)).gather(1, digit_B1 + 1)
        left_B1 = left_B1 - higher_B1
        prefix_B1 = (prefix_B1 << _DIGIT) | digit_B1
    equal_BC = keys_BC == prefix_B1
    of_ranks_RB1 = gather(equal_BC.sum(1, keepdim=True))
    earlier_B1 = of_ranks_RB1[:rank].sum(0)
    return (keys_BC > prefix_B1) | (equal_BC & (earlier_B1 + equal_BC.cumsum(1) <= left_B1))


def _keys(values_BC: Tensor) -> tuple[Tensor, int]:
    """Whole numbers in the order of values that are not negative, and how many of their bits are used."""
    if values_BC.dtype == torch.float64:
        return values_BC.view(torch.int64), 64
    return values_BC.float().view(torch.int32).long(), 32
