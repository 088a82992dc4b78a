"""The CPU path of topk_encode, batch_topk_encode, threshold_encode: panelled GEMM, exact selection by group maxima.

Rows go in chunks. A chunk's pre-activations are made 2048 latents at a time in one buffer that this thread keeps and
reuses (a first touch of fresh memory costs ten times the write), and the maximum of every 64 contiguous latents, a
group, is taken while the panel is in cache. The lemma of docs/kernels.md section 1 then leaves few candidates: the k-th
best group maximum bounds the k-th best value from below, so only entries at or above it, in the k best groups, compete.

Comparisons that decide ties work on integer keys (`keys`): float bits of the ReLU'd value, monotone because nothing is
negative, one key for every NaN, above infinity.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .common import GROUP, Workspace

PANEL = 2048
BUFFER_BYTES = 64 * 2**20
_PAGE_BYTES = 4096
_SORTED_COLUMNS = 512  # that NumPy sorts in vector registers
KEY_DTYPES = {2: torch.int16, 4: torch.int32, 8: torch.int64}


workspace = Workspace()


def topk_encode_cpu(
    x_BD: Tensor, W_enc_DS: Tensor, b_enc_S: Tensor, b_dec_D: Tensor, k: int, buffer_bytes: int | None
) -> tuple[Tensor, Tensor]:
    n_rows, d_sae = x_BD.shape[0], W_enc_DS.shape[1]
    acts_BK = x_BD.new_empty(n_rows, k)
    latents_BK = torch.empty(n_rows, k, dtype=torch.int64)
    for start, pre_RP, maxima_RG in _chunks(x_BD, W_enc_DS, b_enc_S, b_dec_D, buffer_bytes):
        rows = slice(start, start + len(pre_RP))
        acts_BK[rows], latents_BK[rows] = _topk_rows(pre_RP, maxima_RG, d_sae, k)
    return acts_BK, latents_BK


def batch_topk_encode_cpu(
    x_BD: Tensor, W_enc_DS: Tensor, b_enc_S: Tensor, b_dec_D: Tensor, k: int, buffer_bytes: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Chunk by chunk, the best B * k entries so far: memory stays one chunk and a few lists of B * k."""
    (n_rows, _), d_sae = x_BD.shape, W_enc_DS.shape[1]
    capacity = n_rows * k
    acts, positions = x_BD.new_empty(0), torch.empty(0, dtype=torch.int64)
    for start, pre_RP, maxima_RG in _chunks(x_BD, W_enc_DS, b_enc_S, b_dec_D, buffer_bytes):
        bound = acts.amin() if len(acts) == capacity else acts.new_zeros(())
        new_acts, new_positions = _best_of_chunk(pre_RP, maxima_RG, bound, capacity)
        acts = torch.cat([acts, new_acts])
        positions = torch.cat([positions, new_positions + start * pre_RP.shape[1]])
        kept = largest(keys(acts), capacity)
        acts, positions = acts[kept], positions[kept]
    width = _width(d_sae, x_BD)
    padding = capacity - len(acts)
    return (
        torch.nn.functional.pad(acts, (0, padding)),
        torch.nn.functional.pad(positions % width, (0, padding)),
        offsets_of_rows(positions // width, n_rows),
    )


def threshold_encode_cpu(
    x_BD: Tensor,
    W_enc_DS: Tensor,
    b_enc_S: Tensor,
    b_dec_D: Tensor,
    threshold: float | Tensor,
    buffer_bytes: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """threshold: one for all latents, or [d_sae]."""
    acts, latents, rows = [x_BD.new_empty(0)], [torch.empty(0, dtype=torch.int64)], [torch.empty(0, dtype=torch.int64)]
    bounds = _bounds(threshold, W_enc_DS.shape[1], _width(W_enc_DS.shape[1], x_BD))
    for start, pre_RP, maxima_RG in _chunks(x_BD, W_enc_DS, b_enc_S, b_dec_D, buffer_bytes):
        groups = nonzero(~(maxima_RG <= bounds.least()))
        values, positions, _ = _entries(pre_RP, groups, partial(_above, bounds.of(groups)))
        acts.append(values)
        latents.append(positions % pre_RP.shape[1])
        rows.append(positions // pre_RP.shape[1] + start)
    return torch.cat(acts), torch.cat(latents), offsets_of_rows(torch.cat(rows), x_BD.shape[0])


def _above(bound: float | Tensor, values: Tensor) -> Tensor:
    """NaN counts as above."""
    return ~(values <= bound)


class _Bounds(NamedTuple):
    """What a value must be above: one number, or one for every latent, group by group [G, 64]."""

    one: float
    each_GG: Tensor | None

    def least(self) -> float | Tensor:
        """Of every group [G]."""
        return self.one if self.each_GG is None else self.each_GG.amin(1)

    def of(self, groups_U: Tensor) -> float | Tensor:
        """[U, 64] of groups of a chunk, flat."""
        return self.one if self.each_GG is None else self.each_GG[groups_U % len(self.each_GG)]


def _bounds(threshold: float | Tensor, d_sae: int, width: int) -> _Bounds:
    if not isinstance(threshold, Tensor):
        return _Bounds(max(threshold, 0.0), None)
    bound_S = threshold.clamp(min=0).nan_to_num(torch.inf, torch.inf)
    return _Bounds(0.0, torch.nn.functional.pad(bound_S, (0, width - d_sae), value=torch.inf).view(-1, GROUP))


# --- pre-activations -------------------------------------------------------------------------------------------------


def _width(d_sae: int, like_BD: Tensor) -> int:
    """Columns of a row of pre-activations: whole groups, and one more where rows would be whole pages apart.

    The same columns of such rows share few places in a cache, which costs 3 to 15 % of the product (docs/decisions.md).
    """
    width = _whole_groups(d_sae)
    return width if width * like_BD.element_size() % _PAGE_BYTES else width + GROUP


def _whole_groups(d_sae: int) -> int:
    return -(-d_sae // GROUP) * GROUP


def _chunks(
    x_BD: Tensor, W_enc_DS: Tensor, b_enc_S: Tensor, b_dec_D: Tensor, buffer_bytes: int | None
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(first row, pre-activations before the ReLU [R, P], their group maxima [R, P / 64]) of every row chunk.

    P is `_width`; the columns beyond d_sae are -inf. Both tensors are overwritten by the next chunk.
    """
    n_rows, d_sae = x_BD.shape[0], W_enc_DS.shape[1]
    width = _width(d_sae, x_BD)
    n_bytes = n_rows * _whole_groups(d_sae) * x_BD.element_size()
    n_chunks = -(-n_bytes // (buffer_bytes or BUFFER_BYTES))
    chunk_rows = -(-n_rows // max(min(n_chunks, n_rows), 1))
    for start in range(0, n_rows, max(chunk_rows, 1)):
        x_RD = x_BD[start : start + chunk_rows] - b_dec_D
        pre_RP = workspace.get(len(x_RD) * width, x_BD.dtype).view(len(x_RD), width)
        maxima_RG = x_BD.new_full((len(x_RD), width // GROUP), -torch.inf)
        pre_RP[:, d_sae:] = -torch.inf
        for o in range(0, d_sae, PANEL):
            end = min(o + PANEL, d_sae)
            torch.addmm(b_enc_S[o:end], x_RD, W_enc_DS[:, o:end], out=pre_RP[:, o:end])
            groups = pre_RP[:, o : o + PANEL].unflatten(1, (-1, GROUP))
            torch.amax(groups, dim=2, out=maxima_RG[:, o // GROUP : (o + PANEL) // GROUP])
        yield start, pre_RP, maxima_RG


def relu(values: Tensor) -> Tensor:
    """ReLU that keeps NaN and turns -0 into +0 (its sum with 0), whose bits are 0."""
    return values.clamp(min=0).add_(0)


def keys(values: Tensor) -> Tensor:
    """Integers that order ReLU'd values, NaN last and all equal."""
    integers = KEY_DTYPES[values.element_size()]
    return relu(values).view(integers).masked_fill_(values.isnan(), torch.iinfo(integers).max)


def nonzero(mask: Tensor) -> Tensor:
    """Flat indices of what is True, ascending. NumPy's is 5 times as fast as torch's on one thread (measured)."""
    return torch.from_numpy(np.flatnonzero(mask.numpy()))


def few_nonzero(mask_UG: Tensor) -> Tensor:
    """The same where few are True: eights of entries first. Rows are contiguous and of whole eights.

    Of some million entries, 2 to 3 % of them True, it takes half the time (measured).
    """
    eights = mask_UG.numpy().view(np.uint64).reshape(-1)
    some = np.flatnonzero(eights != 0)
    if 2 * len(some) > len(eights):  # not few, as after a ReLU: one by one takes a quarter of the time
        return nonzero(mask_UG)
    found = np.flatnonzero(eights[some].view(np.bool_))
    return torch.from_numpy((some[found >> 3] << 3) + (found & 7))


def taken(values_N: Tensor, indices_M: Tensor) -> Tensor:
    """values[indices]. NumPy's takes a third of torch's time for tens of thousands (measured)."""
    return torch.from_numpy(values_N.numpy()[indices_M.numpy()])


def kth_largest(keys_RN: Tensor, k: int) -> Tensor:
    """[R, 1]. Up to 512 columns NumPy sorts with vector instructions, 4 times as fast as torch.topk. Above, it takes 10
    to 30 times as long where most keys are equal, as those of latents that do not fire (docs/decisions.md)."""
    n = keys_RN.shape[1]
    if n > _SORTED_COLUMNS:
        return torch.topk(keys_RN, k, dim=1, sorted=False).values.amin(1, keepdim=True)
    return torch.from_numpy(np.partition(keys_RN.numpy(), n - k, axis=1)[:, n - k, None])


# --- selection -------------------------------------------------------------------------------------------------------


def _entries(pre_RP: Tensor, groups_U: Tensor, inside: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Entries of these groups (flat, ascending) for which `inside(values [U, 64])` holds, in order of position.

    Returns their values, their flat positions in pre, and the index of each one's group in groups_U.
    """
    candidates_UG = pre_RP.view(-1, GROUP).index_select(0, groups_U)
    found = few_nonzero(inside(candidates_UG))
    units = found // GROUP
    return candidates_UG.view(-1)[found], taken(groups_U, units) * GROUP + found % GROUP, units


def topk_mask(keys_RN: Tensor, k: int) -> Tensor:
    """True at exactly k entries of every row: the largest keys, ties to the lower index. k is at most N."""
    threshold = kth_largest(keys_RN, k)
    kept = keys_RN >= threshold
    if int(kept.count_nonzero()) == kept.shape[0] * k:
        return kept
    above, equal = keys_RN > threshold, keys_RN == threshold
    needed = k - above.sum(1, keepdim=True)
    return above | (equal & (equal.cumsum(1) <= needed))


def _topk_rows(pre_RP: Tensor, maxima_RG: Tensor, d_sae: int, k: int) -> tuple[Tensor, Tensor]:
    """(acts, latents), both [R, k], of a chunk."""
    n_rows, n_groups = maxima_RG.shape
    if n_groups <= 2 * k:  # the groups would hardly narrow the search
        return _topk_rows_dense(pre_RP[:, :d_sae], k)
    groups_RK = nonzero(topk_mask(keys(maxima_RG), k)).view(n_rows, k)
    bound_R = maxima_RG.view(-1)[groups_RK].amin(1)
    short_R = bound_R <= 0
    if not short_R.any():
        return _topk_rows_grouped(pre_RP, groups_RK, bound_R)
    # Fewer than k groups above zero: such a row may need zeros, which are filled from its lowest latents on.
    short, full = nonzero(short_R), nonzero(~short_R)
    acts_RK, latents_RK = pre_RP.new_empty(n_rows, k), torch.empty(n_rows, k, dtype=torch.int64)
    acts_RK[short], latents_RK[short] = _topk_rows_dense(pre_RP[short, :d_sae], k)
    if len(full):
        acts_RK[full], latents_RK[full] = _topk_rows_grouped(pre_RP, groups_RK[full], bound_R[full])
    return acts_RK, latents_RK


def _topk_rows_dense(pre_RS: Tensor, k: int) -> tuple[Tensor, Tensor]:
    flat = nonzero(topk_mask(keys(pre_RS), k)).view(len(pre_RS), k)
    latents_RK = flat % pre_RS.shape[1]
    return relu(pre_RS.gather(1, latents_RK)), latents_RK


def _topk_rows_grouped(pre_RP: Tensor, groups_RK: Tensor, bound_R: Tensor) -> tuple[Tensor, Tensor]:
    """Top k of rows whose k best groups all reach bound_R > 0 (or NaN): at least k entries a row do too."""
    n_rows, k = groups_RK.shape
    bound_U1 = bound_R.repeat_interleave(k)[:, None]
    values, positions, units = _entries(pre_RP, groups_RK.flatten(), lambda values: (values < bound_U1).logical_not_())
    kept = topk_of_entries(values, units // k, n_rows, k).view(n_rows, k)
    return relu(values[kept]), positions[kept] % pre_RP.shape[1]


def topk_of_entries(values_M: Tensor, rows_M: Tensor, n_rows: int, k: int) -> Tensor:
    """Ascending indices of every row's k largest entries, ties to the earlier. Entries in row order; none, or k up."""
    counts = torch.bincount(rows_M, minlength=n_rows)
    slots_M = torch.arange(len(rows_M)) - taken(counts.cumsum(0) - counts, rows_M)
    keys_M = keys(values_M)
    padded_keys = keys_M.new_full((n_rows, int(counts.max())), -1)
    places_M = rows_M * padded_keys.shape[1] + slots_M
    padded_keys.numpy().reshape(-1)[places_M.numpy()] = keys_M.numpy()
    return nonzero(taken(topk_mask(padded_keys, k).view(-1), places_M))


def _best_of_chunk(pre_RP: Tensor, maxima_RG: Tensor, bound: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """(values, flat positions) of positive entries from `bound` up, the chunk's part of the batch's best among them."""
    maxima = maxima_RG.view(-1)
    if len(maxima) >= capacity:
        # In keys, because a NaN maximum must count as the largest.
        key = kth_largest(keys(maxima)[None], capacity)
        bound = torch.maximum(bound, key.view(maxima.dtype).squeeze())

    def inside(values: Tensor) -> Tensor:
        return (values < bound if bound > 0 else values <= 0).logical_not_()

    return _entries(pre_RP, nonzero(inside(maxima)), inside)[:2]


def largest(keys_M: Tensor, n: int) -> Tensor:
    """Ascending indices of the n largest keys (all, if fewer), ties to the lower index."""
    if len(keys_M) <= n:
        return torch.arange(len(keys_M))
    return nonzero(topk_mask(keys_M[None], n))


def offsets_of_rows(rows_M: Tensor, n_rows: int) -> Tensor:
    return torch.cat([torch.zeros(1, dtype=torch.int64), torch.bincount(rows_M, minlength=n_rows).cumsum(0)])
