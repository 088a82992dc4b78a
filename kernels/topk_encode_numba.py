"""Loops of topk_encode_screened.py: rounding to bfloat16, proposals, candidates, their float32 dots, the choice.

bfloat16 is held as the int16 of its bits, which order what is positive. Rows do not depend on each other. "Flat"
positions are those in pre_RP, the low pre-activations. docs/kernels.md "CPU path with matrix units, screened"
"""

# mypy: ignore-errors
# Loops are in Numba's language, whose own compiler checks their types.

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from numpy.typing import NDArray

from .common import GROUP
from .cpu_loops import compiled

Floats = NDArray[np.float32]
Bits = NDArray[np.int16]
Ints = NDArray[np.int64]

if GROUP != 64:  # compiled code is kept on disk, by this file alone
    raise ValueError(f"GROUP: {GROUP}, but this file is written for groups of 64, one bit of a mask each")
KNOWN = np.iinfo(np.int16).max  # marks what is proposed: a NaN's bits, and a NaN leaves its row no bound
LEAST, GREATEST = np.iinfo(np.int16).min, np.iinfo(np.int16).max
MAX_SLACK = 1e30  # with so small a slack |x| |w| + |b| is too small for sums to overflow or be NaN


@intrinsic
def _rounded(typing_context: Any, value: Any) -> Any:
    """The bits of a float32, to the nearest multiple of 2^16 and of equally near ones to the even: bfloat16's.

    In 32 bits: Numba computes with integers in 64, half as fast (measured). A NaN may become another number.
    """

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        i32 = ir.IntType(32)
        bits = builder.bitcast(arguments[0], i32)
        odd = builder.and_(builder.lshr(bits, i32(16)), i32(1))
        return builder.and_(builder.add(bits, builder.add(odd, i32(0x7FFF))), i32(-(1 << 16)))

    return types.int32(types.float32), code


@intrinsic
def _upper_half(typing_context: Any, bits: Any) -> Any:
    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.trunc(builder.lshr(arguments[0], ir.IntType(32)(16)), ir.IntType(16))

    return types.int16(types.int32), code


def _mask(comparison: str) -> Any:
    """(pre_NG, n, value) -> bit i is set where pre_NG[n, i] compares to value: one comparison of 64 numbers. Without
    branches many groups are on their way from memory at once: a quarter to a half of a plain loop's time (measured)."""

    def mask(typing_context: Any, pre_NG: Any, n: Any, value: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            group = ir.VectorType(ir.IntType(16), GROUP)
            pre = context.make_array(signature.args[0])(context, builder, arguments[0])
            first = builder.gep(pre.data, [builder.mul(arguments[1], arguments[1].type(GROUP))])
            values = builder.load(builder.bitcast(first, group.as_pointer()), align=2)
            one = builder.insert_element(
                ir.Constant(group, ir.Undefined), builder.trunc(arguments[2], ir.IntType(16)), ir.IntType(32)(0)
            )
            every = builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(ir.IntType(32), GROUP), [0] * GROUP))
            return builder.bitcast(builder.icmp_signed(comparison, values, every), ir.IntType(GROUP))

        return types.uint64(pre_NG, types.int64, types.int64), code

    return intrinsic(mask)


_at_least = _mask(">=")


@intrinsic
def _lowest_bit(typing_context: Any, mask: Any) -> Any:
    """The number of the lowest bit that is set."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.cttz(arguments[0], ir.IntType(1)(0))

    return types.int64(types.uint64), code


@intrinsic
def _count_bits(typing_context: Any, mask: Any) -> Any:
    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.ctpop(arguments[0])

    return types.int64(types.uint64), code


@compiled
def round_rows(source_RD: Floats, low_RP: Bits, norm_R: Floats, error_R: Floats, start: int, stop: int) -> None:
    """Rows to bfloat16, to the nearest and to even; norms of the rows and of what rounding took. In one pass."""
    for r in range(start, stop):
        square, lost = np.float32(0), np.float32(0)
        for d in range(source_RD.shape[1]):
            value = source_RD[r, d]
            bits = _rounded(value)
            low_RP[r, d] = _upper_half(bits)
            error = value - np.int32(bits).view(np.float32)
            square += value * value
            lost += error * error
        norm_R[r], error_R[r] = np.sqrt(square), np.sqrt(lost)


@compiled
def _count_from(values_N: Bits, least: int) -> int:
    """How many are at least that. In 32 bits, where Numba would count in 64: more at a time."""
    count, least = np.int32(0), np.int16(least)
    for n in range(len(values_N)):
        count = np.int32(count + (values_N[n] >= least))
    return count


@compiled
def nth_of_rows(values_RN: Bits, n: int, nth_R: Bits, start: int, stop: int) -> None:
    """The n-th largest of every row, found bit by bit; 1 where it is not above zero or there are fewer."""
    for r in range(start, stop):
        nth = 0
        for bit in range(14, -1, -1):
            if _count_from(values_RN[r], nth + (1 << bit)) >= n:
                nth += 1 << bit
        nth_R[r] = max(nth, 1)


@compiled
def count_from(pre_NG: Bits, maxima_RG: Bits, least_R: Bits, counts_R: Ints, start: int, stop: int) -> None:
    """Entries of every row that are at least that."""
    n_groups = maxima_RG.shape[1]
    for r in range(start, stop):
        count = 0
        for g in range(n_groups):
            if maxima_RG[r, g] >= least_R[r]:
                count += _count_bits(_at_least(pre_NG, r * n_groups + g, least_R[r]))
        counts_R[r] = count


@compiled
def list_from(
    pre_NG: Bits,
    maxima_RG: Bits,
    least_R: Bits,
    offsets_R1: Ints,
    positions_M: Ints,
    values_M: Bits,
    start: int,
    stop: int,
) -> None:
    """The same entries, in order, of rows with room between their offsets: flat positions and values."""
    n_groups, one = maxima_RG.shape[1], np.uint64(1)
    for r in range(start, stop):
        m = offsets_R1[r]
        if m == offsets_R1[r + 1]:
            continue
        for g in range(n_groups):
            if maxima_RG[r, g] < least_R[r]:
                continue
            n = r * n_groups + g
            mask = _at_least(pre_NG, n, least_R[r])
            while mask:
                i = _lowest_bit(mask)
                mask &= mask - one
                positions_M[m], values_M[m] = n * GROUP + i, pre_NG[n, i]
                m += 1


@compiled
def best_of_rows(values_M: Bits, offsets_R1: Ints, k: int, kept_M: NDArray[np.bool_], start: int, stop: int) -> None:
    """Which are the k largest of their row, ties to the earlier. Rows have none, or k and more; all are above zero."""
    nth_1 = np.empty(1, np.int16)
    for r in range(start, stop):
        first, end = offsets_R1[r], offsets_R1[r + 1]
        if first == end:
            continue
        nth_of_rows(values_M[first:end].reshape(1, -1), k, nth_1, 0, 1)
        above = 0 if nth_1[0] == GREATEST else _count_from(values_M[first:end], nth_1[0] + 1)  # which would wrap
        ties = k - above
        for m in range(first, end):
            is_tie = values_M[m] == nth_1[0]
            kept_M[m] = values_M[m] > nth_1[0] or (is_tie and ties > 0)
            ties -= is_tie


@compiled
def mark(pre_NG: Bits, positions_U: Ints, start: int, stop: int) -> None:
    """KNOWN at these flat positions."""
    for u in range(start, stop):
        pre_NG[positions_U[u] // GROUP, positions_U[u] % GROUP] = KNOWN


@compiled
def _cutoffs(bound: float, slack_G: Floats, kept: float, cutoff_G: Bits) -> None:
    """Below its group's cutoff a value v cannot reach the bound: v + rounding v + slack >= bound, solved for v.

    kept: 1 - rounding. A float's upper half is it, rounded down. Of a group so vague that v may be 0, all can.
    """
    for g in range(len(slack_G)):
        reach = bound - slack_G[g]
        cutoff_G[g] = np.float32(reach * kept).view(np.int32) >> 16 if reach > 0 else LEAST


@compiled
def _inside(n_latents: int) -> int:
    """The mask of that many entries of a group, which may be more than it has."""
    return np.uint64(-1) if n_latents >= GROUP else (np.uint64(1) << np.uint64(n_latents)) - np.uint64(1)


@compiled
def count_candidates(
    pre_NG: Bits,
    maxima_RG: Bits,
    slack_RG: Floats,
    bound_R: Floats,
    d_sae: int,
    kept: float,
    most: int,
    counts_R: Ints,
    start: int,
    stop: int,
) -> None:
    """Entries of every row that may reach its bound; -1 where no bound holds, or where they are more than `most`."""
    n_groups = maxima_RG.shape[1]
    cutoff_G = np.empty(n_groups, np.int16)
    for r in range(start, stop):
        _cutoffs(bound_R[r], slack_RG[r], kept, cutoff_G)
        sound, count = bound_R[r] > 0, 0
        for g in range(n_groups):
            sound &= slack_RG[r, g] < MAX_SLACK
        if not sound:
            counts_R[r] = -1
            continue
        for g in range(n_groups):
            if maxima_RG[r, g] >= cutoff_G[g]:
                count += _count_bits(_at_least(pre_NG, r * n_groups + g, cutoff_G[g]) & _inside(d_sae - g * GROUP))
        counts_R[r] = count if count <= most else -1


@compiled
def list_candidates(
    pre_NG: Bits,
    maxima_RG: Bits,
    slack_RG: Floats,
    bound_R: Floats,
    d_sae: int,
    kept: float,
    offsets_R1: Ints,
    proposed_U: Floats,
    proposed_at_U: Ints,
    proposed_offsets_R1: Ints,
    positions_M: Ints,
    values_M: Floats,
    is_new_M: NDArray[np.bool_],
    start: int,
    stop: int,
) -> None:
    """The same entries, in order, of rows with room between their offsets: flat positions, values of those that were
    proposed, and which were not."""
    n_groups = maxima_RG.shape[1]
    cutoff_G, one = np.empty(n_groups, np.int16), np.uint64(1)
    for r in range(start, stop):
        m, u = offsets_R1[r], proposed_offsets_R1[r]
        if m == offsets_R1[r + 1]:
            continue
        _cutoffs(bound_R[r], slack_RG[r], kept, cutoff_G)
        for g in range(n_groups):
            if maxima_RG[r, g] < cutoff_G[g]:
                continue
            n = r * n_groups + g
            mask = _at_least(pre_NG, n, cutoff_G[g]) & _inside(d_sae - g * GROUP)
            while mask:
                i = _lowest_bit(mask)
                mask &= mask - one
                positions_M[m] = n * GROUP + i
                is_new_M[m] = pre_NG[n, i] != KNOWN
                if not is_new_M[m]:
                    while proposed_at_U[u] != positions_M[m]:  # all of them are there, and in this order
                        u += 1
                    values_M[m] = proposed_U[u]
                m += 1


@compiled
def by_latent(positions_M: Ints, places_Q: Ints, width: int) -> Ints:
    """The places in the order of the latents of their positions; those of a latent keep theirs. A counting sort: a
    third of the time of NumPy's (measured)."""
    next_P, latents_Q, ordered_Q = np.zeros(width + 1, np.int64), np.empty_like(places_Q), np.empty_like(places_Q)
    for q in range(len(places_Q)):
        latents_Q[q] = positions_M[places_Q[q]] % width
        next_P[latents_Q[q] + 1] += 1
    for latent in range(width):
        next_P[latent + 1] += next_P[latent]
    for q in range(len(places_Q)):
        ordered_Q[next_P[latents_Q[q]]] = places_Q[q]
        next_P[latents_Q[q]] += 1
    return ordered_Q


@compiled
def dots_at(
    x_RD: Floats,
    W_SD: Floats,
    b_S: Floats,
    positions_M: Ints,
    places_Q: Ints,
    width: int,
    values_M: Floats,
    start: int,
    stop: int,
) -> None:
    """Pre-activations in float32 at the positions of these places. Equal latents have equal ones, to the bit."""
    for q in range(start, stop):
        row, latent = positions_M[places_Q[q]] // width, positions_M[places_Q[q]] % width
        x_D, w_D = x_RD[row], W_SD[latent]
        total = np.float32(0)
        for d in range(len(x_D)):
            total += x_D[d] * w_D[d]
        values_M[places_Q[q]] = total + b_S[latent]


@compiled
def best_entries(
    values_M: Floats,
    positions_M: Ints,
    offsets_R1: Ints,
    width: int,
    acts_RK: Floats,
    latents_RK: Ints,
    decided_R: NDArray[np.bool_],
    start: int,
    stop: int,
) -> None:
    """Of rows with k positive entries or more, the k largest, ties to the lower latent, in their order. The k-th
    largest is found bit by bit."""
    k = acts_RK.shape[1]
    for r in range(start, stop):
        values, positions = values_M[offsets_R1[r] : offsets_R1[r + 1]], positions_M[offsets_R1[r] : offsets_R1[r + 1]]
        least = 0
        for bit in range(30, -1, -1):
            higher, count = least | (1 << bit), 0
            for m in range(len(values)):
                count += np.float32(values[m]).view(np.int32) >= higher
            if count >= k:
                least = higher
        decided_R[r] = least > 0
        if least == 0:
            continue
        above = 0
        for m in range(len(values)):
            above += np.float32(values[m]).view(np.int32) > least
        ties, n = k - above, 0
        for m in range(len(values)):
            key = np.float32(values[m]).view(np.int32)
            if key > least or (key == least and ties > 0):
                acts_RK[r, n], latents_RK[r, n] = values[m], positions[m] % width
                n += 1
                ties -= key == least
