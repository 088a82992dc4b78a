"""Sparse codes: the few latents of an SAE that fire on each row, and the same entries latent by latent.

One type has the two layouts that the kernels take (docs/kernels.md). Fixed k: activations and latents are [..., k].
CSR: the entries of all rows lie end to end, and row b owns row_offsets[b]:row_offsets[b + 1] of them. `csr` gives the
second of either, without a copy.

Shape suffixes: N rows, M entries, S d_sae.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from saevlm_fast.errors import ActivationError, require
from saevlm_fast.kernels import reference
from saevlm_fast.kernels.grouping import entry_rows, group_by_latent
from saevlm_fast.runtime import exactly


class SparseCodes(NamedTuple):
    """Sparse latent activations of x [..., d_in] (arXiv 2504.02821 section 3; docs/recipe.md section 1).

    Attributes:
        top_acts: activations in the units of x: [..., k] for `topk`, else flat [M].
        top_indices: int64 latents, same shape, ascending within a row.
        row_offsets: None for `topk`; else int64 [N + 1]: flattened row b owns entries row_offsets[b]:row_offsets[b+1].
            Entries after row_offsets[N] are padding (0 at latent 0).
        shape: the shape of the dense codes, (..., d_sae).
    """

    top_acts: Tensor
    top_indices: Tensor
    row_offsets: Tensor | None
    shape: tuple[int, ...]

    @classmethod
    def from_flat(cls, acts: Tensor, latents: Tensor, row_offsets: Tensor | None, d_sae: int) -> "SparseCodes":
        """Codes of N rows from what the kernels return: acts and latents [N, k] without row_offsets, or [M] with."""
        n_rows = len(latents) if row_offsets is None else len(row_offsets) - 1
        return cls(acts, latents, row_offsets, (n_rows, d_sae))

    @classmethod
    @exactly
    def join(cls, pieces: Sequence["SparseCodes"], d_sae: int, ends: Sequence[int] | None = None) -> "SparseCodes":
        """The rows of all pieces in order, in CSR form without padding, on their device; no pieces are no rows.

        ends: n_entries of the pieces, of somebody who knows them; else a device is waited for, unless all are of one k.

        Raises:
            ValueError: a piece of another d_sae.
        """
        for piece in pieces:
            require(piece.d_sae == d_sae, f"codes: of {piece.d_sae} latents; the others are of {d_sae}")
        if pieces and all(piece.row_offsets is None for piece in pieces):
            flat = [piece.flat()[:2] for piece in pieces]
            if len({latents.shape[1] for _, latents in flat}) == 1:
                acts, latents = flat[0] if len(flat) == 1 else (torch.cat(parts) for parts in zip(*flat))
                return cls.from_flat(acts, latents, None, d_sae).rows()
        parts = [piece.csr() for piece in pieces] or [_nothing()]
        if ends is None or not pieces:
            ends = torch.stack([offsets[-1] for _, _, offsets in parts]).tolist()  # one wait for a device
        if len(parts) == 1 and ends[0] == len(parts[0][0]):  # nothing to copy
            return cls.from_flat(*parts[0], d_sae)
        starts = [0, *itertools.accumulate(ends)]
        offsets = [offsets[:-1] + start for (_, _, offsets), start in zip(parts, starts)]
        last = parts[-1][2][-1:] + starts[-2]
        acts_M = torch.cat([acts_M[:end] for (acts_M, _, _), end in zip(parts, ends)])
        latents_M = torch.cat([latents_M[:end] for (_, latents_M, _), end in zip(parts, ends)])
        return cls.from_flat(acts_M, latents_M, torch.cat([*offsets, last]), d_sae)

    @property
    def n_rows(self) -> int:
        """N, over all leading dimensions."""
        return torch.Size(self.shape[:-1]).numel()

    @property
    def d_sae(self) -> int:
        return self.shape[-1]

    @property
    def n_entries(self) -> int:
        """Entries that belong to rows, without padding. In CSR form a device is waited for."""
        return self.top_indices.numel() if self.row_offsets is None else int(self.row_offsets[-1])

    def flat(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """(acts, latents, row_offsets) as the kernels take them: leading dimensions flattened."""
        if self.row_offsets is not None:
            return self.top_acts, self.top_indices, self.row_offsets
        k = self.top_indices.shape[-1]
        return self.top_acts.reshape(self.n_rows, k), self.top_indices.reshape(self.n_rows, k), None

    def csr(self) -> tuple[Tensor, Tensor, Tensor]:
        """(acts [M], latents int64 [M], row_offsets int64 [N + 1]) of either layout, without waiting for a device."""
        if self.row_offsets is not None:
            return self.top_acts, self.top_indices, self.row_offsets
        k = self.top_indices.shape[-1]
        row_offsets = torch.arange(self.n_rows + 1, device=self.top_indices.device) * k
        return self.top_acts.flatten(), self.top_indices.flatten(), row_offsets

    def rows(self) -> "SparseCodes":
        """The same codes as [N, d_sae] in CSR form."""
        return SparseCodes(*self.csr(), (self.n_rows, self.d_sae))

    def entry_rows(self) -> Tensor:
        """The row of every entry, int64 [M]; N, one past the last row, for padding. No device is waited for."""
        _, latents, row_offsets = self.flat()
        return entry_rows(latents, row_offsets)

    def by_latent(self) -> "GroupedCodes":
        """The same entries latent by latent.

        Raises:
            ValueError: on a CPU, a latent outside 0 .. d_sae - 1 (on a GPU that is undefined: `check` before).
        """
        acts_M, latents_M, row_offsets = self.csr()
        order_M, offsets_S1 = group_by_latent(latents_M, row_offsets, self.d_sae)
        return GroupedCodes(acts_M[order_M], latents_M[order_M], order_M, offsets_S1)

    def map(self, function: Callable[[Tensor], Tensor]) -> "SparseCodes":
        """Codes of `function` of each tensor; it must keep shapes."""
        offsets = None if self.row_offsets is None else function(self.row_offsets)
        return SparseCodes(function(self.top_acts), function(self.top_indices), offsets, self.shape)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "SparseCodes":
        """On that device, the activations in that dtype; None leaves it. What is there already is not copied."""
        moved = self if device is None else self.map(lambda tensor: tensor.to(device))
        return moved if dtype is None else moved._replace(top_acts=moved.top_acts.to(dtype))

    def compact(self) -> "SparseCodes":
        """In CSR form without the entries that are 0, and without padding. NaN is no zero. Waits for a device."""
        acts_M, latents_M, row_offsets = self.csr()
        end = self.n_entries
        acts_M, latents_M = acts_M[:end], latents_M[:end]
        kept_M = acts_M != 0
        if not bool(kept_M.all()):
            row_offsets = pad(kept_M.cumsum(0), (1, 0))[row_offsets]
            acts_M, latents_M = acts_M[kept_M], latents_M[kept_M]
        return SparseCodes.from_flat(acts_M, latents_M, row_offsets, self.d_sae)

    def dense(self) -> Tensor:
        """Dense codes [..., d_sae]: for small uses, it is N * d_sae numbers."""
        return reference.densify(*self.flat(), self.d_sae).view(self.shape)

    def l0(self) -> Tensor:
        """Latents that fire (act > 0) per row, int64 [...]."""
        acts, _, row_offsets = self.flat()
        if row_offsets is None:
            return (acts > 0).sum(1).view(self.shape[:-1])
        fired = torch.cat([row_offsets.new_zeros(1), (acts > 0).long().cumsum(0)])
        return (fired[row_offsets[1:]] - fired[row_offsets[:-1]]).view(self.shape[:-1])

    def fired(self) -> Tensor:
        """Rows on which each latent fires: int64 [d_sae]."""
        n_S = self.top_indices.new_zeros(self.d_sae)
        return n_S.index_add_(0, self.top_indices.flatten(), (self.top_acts > 0).flatten().long())

    def check(self, where: str, first_row: int = 0, *, as_stored: bool = False) -> None:
        """That these are sound codes: layout, latents within 0 .. d_sae - 1, activations finite and not below 0.

        Args:
            where: the argument, or the file, that messages begin with.
            first_row: the number of row 0, for messages.
            as_stored: also the form of a store of codes: activations above 0, latents ascending within a row and each
                at most once, no padding.

        Raises:
            ActivationError: naming the first bad row, its latent, the value and the rule. Waits for a device.
        """
        if not as_stored and self._sound_throughout():
            return
        self.check_layout(where, first_row, exact=as_stored)
        end = self.n_entries
        acts_M, latents_M = self.top_acts.flatten()[:end], self.top_indices.flatten()[:end]
        row_offsets = self.csr()[2]
        sign_M, least = (acts_M > 0, "above 0") if as_stored else (acts_M >= 0, "of at least 0")
        rules = [
            (sign_M & (acts_M < float("inf")), acts_M, f"is not a finite activation {least}"),
            ((latents_M >= 0) & (latents_M < self.d_sae), latents_M, f"is not a latent within 0 to {self.d_sae - 1}"),
        ]
        if as_stored:
            begins_M = torch.zeros(end + 1, dtype=torch.bool, device=acts_M.device)
            begins_M[row_offsets] = True
            ascends_M = pad(latents_M.diff() > 0, (1, 0), value=True)[:end] | begins_M[:-1]
            rules.append((ascends_M, latents_M, "comes after a latent that is not below it in its row"))
        if all(torch.stack([good_M.all() for good_M, _, _ in rules]).tolist()):
            return
        good_M, value_M, rule = next(each for each in rules if not bool(each[0].all()))
        entry = int((~good_M).nonzero()[0])
        row, latent = first_row + self.row_of(entry), int(latents_M[entry])
        raise ActivationError(f"{where}: row {row}, latent {latent}: {value_M[entry].item():g} {rule}")

    @exactly
    def _sound_throughout(self) -> bool:
        """Whether layout, entries and padding are sound, by extremes (NaN among them): one wait for a device.

        False also where that says too little: of no rows or entries, and of unsound padding, which is allowed.
        """
        if not self.fits_shape() or self.n_rows == 0 or self.top_acts.numel() == 0:
            return False
        whole = list(self.top_indices.aminmax())
        if self.row_offsets is not None:
            whole += [self.row_offsets[0], self.row_offsets[-1], self.row_offsets.diff().amin()]
        numbers = torch.stack(self.top_acts.aminmax()), torch.stack(whole)
        low, high, first, last, *offsets = torch.cat([each.to(torch.float64) for each in numbers]).tolist()
        start, end, least = offsets or (0, 0, 0)
        ascend = start == 0 and least >= 0 and end <= self.top_acts.numel()
        return ascend and low >= 0 and high < float("inf") and first >= 0 and last < self.d_sae

    def check_layout(self, where: str, first_row: int = 0, *, exact: bool = False) -> None:
        """That the tensors belong together, and that row_offsets ascend from 0 to at most (exact: to) their length.

        Raises:
            ActivationError: as `check`, of which this is the first part.
        """
        if not self.fits_shape():
            named = {"top_acts": self.top_acts, "top_indices": self.top_indices, "row_offsets": self.row_offsets}
            found = ", ".join(f"{name} {_kind(tensor)}" for name, tensor in named.items() if tensor is not None)
            layout = "of fixed k" if self.row_offsets is None else "in CSR form"
            raise ActivationError(f"{where}: {found} are not codes {list(self.shape)} {layout}")
        if self.row_offsets is None:
            return
        offsets, n_entries = self.row_offsets, len(self.top_acts)
        falls_N = offsets.diff() < 0
        start, end, falls = torch.stack([offsets[0], offsets[-1], falls_N.any()]).tolist()
        require(start == 0, f"{where}: row_offsets start at {start}, not at 0", ActivationError)
        if falls:
            row = int(falls_N.nonzero()[0])
            raise ActivationError(
                f"{where}: row {first_row + row} ends at entry {int(offsets[row + 1])}, before it begins at "
                f"{int(offsets[row])}; row_offsets must not descend"
            )
        within = end <= n_entries and (end == n_entries or not exact)
        require(within, f"{where}: row_offsets end at {end}, but there are {n_entries} entries", ActivationError)

    def fits_shape(self) -> bool:
        """Whether the tensors are of the shapes and dtypes that codes of this shape have. Nothing waits."""
        acts, latents, offsets = self.top_acts, self.top_indices, self.row_offsets
        if not (acts.shape == latents.shape and acts.is_floating_point() and latents.dtype == torch.int64):
            return False
        if offsets is None:
            return acts.ndim == len(self.shape) and acts.shape[:-1] == self.shape[:-1]
        return (
            acts.ndim == 1 and offsets.dtype == torch.int64 and len(offsets) > 0 and offsets.shape == (self.n_rows + 1,)
        )

    def row_of(self, entry: int) -> int:
        """The row that owns an entry, for messages."""
        offsets = self.csr()[2]
        return int(torch.searchsorted(offsets, torch.tensor(entry, device=offsets.device), right=True)) - 1


def _nothing() -> tuple[Tensor, Tensor, Tensor]:
    """No rows."""
    offsets = torch.zeros(1, dtype=torch.int64, device="cpu")
    return offsets.new_empty(0, dtype=torch.float32), offsets.new_empty(0), offsets


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


class GroupedCodes(NamedTuple):
    """Entries of sparse codes latent by latent, rows ascending within each (CSC), as the kernels of latents take them.

    Attributes:
        acts_M, latents_M: activations and latents in this order.
        order_M: int64, where each stands in the codes: x_M[order_M] brings anything else of the entries into this
            order. Padding comes last and belongs to no latent.
        offsets_S1: int64 [d_sae + 1]: latent s owns offsets_S1[s]:offsets_S1[s + 1].
    """

    acts_M: Tensor
    latents_M: Tensor
    order_M: Tensor
    offsets_S1: Tensor


def smallest_positive(acts_M: Tensor) -> Tensor:
    """The smallest activation above 0, or 0 if there is none (0-d)."""
    if acts_M.numel() == 0:
        return acts_M.new_zeros(())
    smallest = torch.where(acts_M > 0, acts_M, torch.inf).min()
    return torch.where(smallest.isinf(), torch.zeros_like(smallest), smallest)
