"""MonoLoss of ranks: mono.py's, where a latent's entries lie with several replicas.

A latent's score needs all rows on which it fires. So replicas tell each other the entries of their latents, and the
rows that score them; each finds the score of every latent of its part from the entries of one process in their order,
and keeps the gradient of its own.

Shape suffixes: B rows of the whole batch, M entries of a replica, U of all replicas, E embedding.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from saevlm_fast.kernels.grouping import entry_rows
from saevlm_fast.peers import Peers
from saevlm_fast.sparse_codes import GroupedCodes, SparseCodes
from saevlm_fast.training.mono import Mono, MonoTerm, mono_of_entries
from saevlm_fast.training.sharded_rows import gathered


class SharedMono(NamedTuple):
    """term: with the embeddings of the whole batch [B, E]. rows: the replicas. counts: how many rows each has."""

    term: MonoTerm
    rows: Peers
    counts: list[int]

    def of_entries(self, codes: SparseCodes, grouped: GroupedCodes) -> Mono:
        """Of this replica's codes; the gradient is in the order of grouped, codes.by_latent()."""
        acts_M, latents_M, row_offsets = codes.csr()
        if self.rows.world == 1:
            row_M = self._row_of(latents_M, row_offsets)[grouped.order_M]
            return mono_of_entries(grouped.acts_M, row_M, grouped.latents_M, grouped.offsets_S1, self.term)
        acts_M = torch.where(entry_rows(latents_M, row_offsets) < self.counts[self.rows.rank], acts_M, 0)
        own_M3 = torch.stack([acts_M.double().view(torch.int64), latents_M, self._row_of(latents_M, row_offsets)], 1)
        lengths = self.rows.collect(len(acts_M))  # between hosts
        bits_U, latents_U, row_U = gathered(self.rows, own_M3, lengths).unbind(1)
        acts_U = bits_U.contiguous().view(torch.float64).to(acts_M.dtype)
        inside = torch.arange(2, device=acts_M.device) * len(acts_U)
        found = SparseCodes.from_flat(acts_U, latents_U.contiguous(), inside, codes.d_sae).by_latent()
        mono = mono_of_entries(found.acts_M, row_U[found.order_M], found.latents_M, found.offsets_S1, self.term)
        of_acts_U = torch.empty_like(mono.of_acts_M)
        of_acts_U[found.order_M] = mono.of_acts_M
        first = sum(lengths[: self.rows.rank])
        return mono._replace(of_acts_M=of_acts_U[first : first + len(acts_M)][grouped.order_M])

    def _row_of(self, latents_M: Tensor, row_offsets: Tensor) -> Tensor:
        """Of every entry, among the rows of the whole batch; padding has the replica's last one."""
        own = self.rows.rank
        return entry_rows(latents_M, row_offsets).clamp_(max=self.counts[own] - 1) + sum(self.counts[:own])
