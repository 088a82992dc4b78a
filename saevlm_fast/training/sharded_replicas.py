"""What replicas of the same latents tell each other: gradients, of which each adds up a slice, and weights.

Each replica has the gradients of its own rows. Of a part of S latents, replica d receives the d-th slice of all others'
gradients, adds them up replica after replica, moves its slice on (Adam's moments of the others are nowhere here), and
gives all others the new weights. It is what an all-reduce of the gradients tells, in an order that is ours.

Shape suffixes: S latents of a part, D d_in.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from saevlm_fast.peers import Peers, in_order


def summed_slice(rows: Peers, gradient_S: Tensor, slices: list[slice]) -> Tensor:
    """Of the replicas' gradients [S, ...] the sum, of this one's slice."""
    if rows.world == 1:
        return gradient_S
    own = slices[rows.rank]
    return in_order(rows.exchange(_pieces(gradient_S, slices)))[: own.stop - own.start]


def spread_(rows: Peers, whole_S: Tensor, slices: list[slice]) -> None:
    """Every replica's slice of a tensor [S, ...] into all others', in place."""
    if rows.world == 1:
        return
    longest = max(each.stop - each.start for each in slices)
    own_S = whole_S[slices[rows.rank]]
    missing = longest - len(own_S)
    received = rows.gather(own_S if missing == 0 else torch.cat([own_S, own_S.new_zeros(missing, *own_S.shape[1:])]))
    for each, piece in zip(slices, received):
        whole_S[each].copy_(piece[: each.stop - each.start])


def _pieces(x_S: Tensor, slices: list[slice]) -> Tensor:
    """[D, longest slice, ...]: a view where all are as long."""
    longest = max(each.stop - each.start for each in slices)
    if longest * len(slices) == len(x_S):
        return x_S.reshape(len(slices), longest, *x_S.shape[1:])
    flat = x_S.reshape(len(x_S), -1)
    pieces = [pad(flat[each], (0, 0, 0, longest - (each.stop - each.start))) for each in slices]
    return torch.stack(pieces).view(len(slices), longest, *x_S.shape[1:])
