"""The one exact choice of latents among the candidates of several ranks, of which each holds some of the latents.

A rank encodes its own latents and offers the best of them; whatever wins over all latents is among these. Of a row all
ranks see the values that all of them offer; of a batch they count how large they are. They find the same winners: the
largest, ties to the lower latent (over a batch to the lower flat position), NaN before every number, as of one process
(kernels/reference.py). Ranks hold latents in ascending order, and offer theirs in ascending order, so the place of a
value says which of two latents is the lower: latents themselves need not travel.

Shape suffixes: R ranks, B rows, K places for candidates of a row, M of a batch, C of a row among dead latents.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from saevlm_fast.peers import Peers, Ranks

_DIGIT = 4  # bits of a key that one round settles, of every row
_WIDE_DIGIT = 11  # of a whole batch
FEW_OFFERS = 256  # of a row by all ranks; a count of the digits of more is told in fewer bytes
NOTHING = -1.0  # an offer where a rank has fewer latents than there are places: below every activation


class Kept(NamedTuple):
    """Which of a rank's own offers are kept (bool, in their shape), and the smallest activation above 0 that any rank
    keeps (0-d; 0 if there is none)."""

    mask: Tensor
    smallest: Tensor


def keep_of_rows(acts_BC: Tensor, k: int, peers: Peers) -> Tensor:
    """TopK: which of the rank's own offers are among the k largest of their row, [B, C] bool.

    Ranks tell each other all offers, [B, k] each; or, of so many ranks that it is less, how large they are.

    Args:
        acts_BC: the rank's min(k, its latents) largest of every row, latents ascending.
        k: at most the latents of all ranks.
        peers: the ranks that have the other latents.
    """
    if peers.world * k > FEW_OFFERS:
        return keep_largest_of_all(_ranked(acts_BC), k, peers.add_up, peers.gather, peers.rank)
    n = acts_BC.shape[1]
    offers_RBK = peers.gather(torch.nn.functional.pad(acts_BC, (0, k - n), value=NOTHING))
    return _keep_of_offers(offers_RBK, peers.rank, k)[:, :n]


def _keep_of_offers(offers_RBK: Tensor, rank: int, k: int) -> Tensor:
    n_ranks, n_rows, places = offers_RBK.shape
    values_BN = _ranked(offers_RBK).transpose(0, 1).reshape(n_rows, n_ranks * places)
    cut_B1 = torch.topk(values_BN, k, dim=1, sorted=False).values.amin(1, keepdim=True)
    above_BN, equal_BN = values_BN > cut_B1, values_BN == cut_B1
    needed_B1 = k - above_BN.sum(1, keepdim=True)
    kept_BN = above_BN | (equal_BN & (equal_BN.cumsum(1) <= needed_B1))
    return kept_BN.view(n_rows, n_ranks, places)[:, rank]


def keep_of_batch(acts_M: Tensor, rows_M: Tensor, n_rows: int, n_kept: int, ranks: Ranks) -> Kept:
    """BatchTopK: the n_kept largest of the batch; zeros are never kept.

    Nobody is told the offers: three counts of their digits (float32) say which value is the n_kept-th, and another one
    of every row, if several are equal there, whose of these are kept (a GPU, which is not asked, counts always).

    Args:
        acts_M: the rank's own offers in CSR form, row after row, latents ascending within a row; 0 behind the last row.
        rows_M: the row of each, counted within the replica's rows (`entry_rows`).
        n_rows: the replica's rows, which follow those of the replicas before it.
        n_kept: k times the rows of the whole batch.
        ranks: all of them.
    """
    values_M = _ranked(acts_M)
    keys_1M, bits = _keys(values_M[None])
    cut = _cut(keys_1M, values_M[None] > 0, n_kept, bits, _WIDE_DIGIT, ranks.everyone.add_up)
    key, n_needed = cut.key_B1.view(()), cut.n_needed_B1.view(())
    mask_M, equal_M = (keys_1M[0] > key) & (values_M > 0), (keys_1M[0] == key) & (values_M > 0)
    if mask_M.is_cuda or bool(cut.n_equal_B1 > n_needed):
        mask_M |= equal_M & (_place_among_equals(equal_M, rows_M, n_rows, ranks) <= n_needed)
    else:
        mask_M |= equal_M
    smallest = torch.where(cut.n_kept_B1.view(()) > 0, _value(key, bits, acts_M.dtype), 0)
    return Kept(mask_M, smallest)


def _place_among_equals(equal_M: Tensor, rows_M: Tensor, n_rows: int, ranks: Ranks) -> Tensor:
    """Of each offer its number, from 1, among all that equal the cut: by row, within a row by rank, then by place."""
    row_M = rows_M.clamp(max=n_rows - 1)
    own_B = torch.zeros(n_rows, dtype=torch.int32, device=equal_M.device).index_add_(0, row_M, equal_M.int())
    of_ranks_RB = ranks.latents.gather(own_B).long()
    of_rows_B = of_ranks_RB.sum(0)
    before = ranks.rows.gather(of_rows_B.sum())[: ranks.rows.rank].sum()
    before_B = before + of_rows_B.cumsum(0) - of_rows_B + of_ranks_RB[: ranks.latents.rank].sum(0)
    within_M = equal_M.cumsum(0)
    before_row_B = own_B.cumsum(0) - own_B  # of the rank's own, in the rows above
    return before_B[row_M] + within_M - before_row_B[row_M]


def _ranked(offers: Tensor) -> Tensor:
    """NaN as infinity: above every number."""
    return torch.where(offers.isnan(), torch.inf, offers)


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
    cut = _cut(keys_BC, None, k, bits, _DIGIT, add_up)
    equal_BC = keys_BC == cut.key_B1
    of_ranks_RB1 = gather(equal_BC.sum(1, keepdim=True))
    earlier_B1 = of_ranks_RB1[:rank].sum(0)
    return (keys_BC > cut.key_B1) | (equal_BC & (earlier_B1 + equal_BC.cumsum(1) <= cut.n_needed_B1))


class _Cut(NamedTuple):
    """Of every row the key of the k-th largest value of all ranks (of the smallest, of fewer than k), how many are
    kept, how many equal it, and how many of these are kept."""

    key_B1: Tensor
    n_kept_B1: Tensor
    n_equal_B1: Tensor
    n_needed_B1: Tensor


def _cut(
    keys_BC: Tensor, counts_BC: Tensor | None, k: int, bits: int, digit_bits: int, add_up: Callable[[Tensor], Tensor]
) -> _Cut:
    """By the digits of that key, the highest first. counts_BC: which keys count; all if None."""
    prefix_B1 = keys_BC.new_zeros(len(keys_BC), 1)
    kept_B1 = left_B1 = equal_B1 = torch.full_like(prefix_B1, k)
    for shift in reversed(range(0, bits, digit_bits)):
        going_on_BC = (keys_BC >> (shift + digit_bits)) == prefix_B1 if shift + digit_bits < 64 else keys_BC >= 0
        if counts_BC is not None:
            going_on_BC &= counts_BC
        digits_BC = (keys_BC >> shift) & ((1 << digit_bits) - 1)
        counts_BH = keys_BC.new_zeros(len(keys_BC), 1 << digit_bits).scatter_add_(1, digits_BC, going_on_BC.long())
        counts_BH = add_up(counts_BH.to(torch.int32)).long()
        at_least_BH = counts_BH.flip(1).cumsum(1).flip(1)  # values whose digit is that one or a higher
        if shift + digit_bits >= bits:
            kept_B1 = left_B1 = at_least_BH[:, :1].clamp(max=k)
        digit_B1 = ((at_least_BH >= left_B1).sum(1, keepdim=True) - 1).clamp(min=0)
        higher_B1 = torch.nn.functional.pad(at_least_BH, (0, 1)).gather(1, digit_B1 + 1)
        equal_B1 = counts_BH.gather(1, digit_B1)
        left_B1 = left_B1 - higher_B1
        prefix_B1 = (prefix_B1 << digit_bits) | digit_B1
    return _Cut(prefix_B1, kept_B1, equal_B1, left_B1)


def _keys(values_BC: Tensor) -> tuple[Tensor, int]:
    """Whole numbers in the order of values that are not negative, and how many of their bits are used."""
    if values_BC.dtype == torch.float64:
        return values_BC.view(torch.int64), 64
    return values_BC.float().view(torch.int32).long(), 32


def _value(key: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """The value of a key."""
    value = key.view(torch.float64) if bits == 64 else key.to(torch.int32).view(torch.float32)
    return value.to(dtype)
