"""Gradients of the latents that a rank has, of the rows of its replica: gradients.py's, of entries.

Shape suffixes: B rows of a replica, G groups, R = B * G, D d_in, S the rank's latents, M its entries.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from saevlm_fast.kernels.grouping import entry_rows
from saevlm_fast.kernels.latent_gradient import EntryGradient, RowGradient, entry_gradient
from saevlm_fast.kernels.segment_sum import segment_sum
from saevlm_fast.kernels.sparse_decode import gather_dot_op
from saevlm_fast.sae import SparseAutoencoder
from saevlm_fast.sparse_codes import SparseCodes
from saevlm_fast.training.dead_latents import Auxiliary
from saevlm_fast.training.penalty import Penalty, totals
from saevlm_fast.training.sharded_mono import SharedMono

Terms = EntryGradient | RowGradient


@dataclass
class OwnGradients:
    """Of a rank's latents. Of a matrix that learns, the entries whose sums its rows are, or the rows; and what the
    auxiliary loss adds. mono: MonoLoss (0-d), if there is one."""

    matrices: dict[str, EntryGradient | Tensor]
    vectors: dict[str, Tensor]
    mono: Tensor | None = None
    aux: dict[str, list[RowGradient]] = field(default_factory=dict)

    def add_auxiliary(self, aux: Auxiliary, latents_A: Tensor) -> None:
        """latents_A: of aux; a GPU's padding has zero gradients."""
        added = {"W_enc": aux.W_enc, "W_dec": aux.W_dec}
        self.aux = {name: [rows] for name, rows in added.items() if rows is not None}
        last = len(self.vectors["b_enc"]) - 1
        self.vectors["b_enc"].index_add_(0, latents_A.clamp(max=last), aux.b_enc_A)

    def terms(self) -> list[Terms]:
        """Of all matrices, whose entries no other rank has any of."""
        found: list[Terms] = []
        for name, gradient in self.matrices.items():
            assert not isinstance(gradient, Tensor)
            found += [gradient, *self.aux.get(name, [])]
        return found

    def rows(self, name: str, W_dec_SD: Tensor) -> Tensor:
        """All rows of a matrix's gradient [S, D], the decoder's projected. No device is waited for."""
        found = self.matrices[name]
        if isinstance(found, Tensor):
            rows_SD = found
        else:
            rows_SD = segment_sum(found.weights_M, found.ids_M, found.offsets_S1, found.source_RD)
            if found.parallel_S is not None:
                rows_SD.addcmul_(W_dec_SD, found.parallel_S[:, None], value=-1)
        for each in self.aux.get(name, []):
            rows_SD.index_add_(0, each.latents_A.clamp(max=len(rows_SD) - 1), each.rows_AD)
        return rows_SD

    def add_rows_of(self, other: "OwnGradients", W_dec_SD: Tensor) -> "OwnGradients":
        """The sum of both, of other rows of a batch; as rows."""
        for name in self.matrices:
            self.matrices[name] = self.rows(name, W_dec_SD).add_(other.rows(name, W_dec_SD))
        for name, vector in self.vectors.items():
            vector += other.vectors[name]
        return self


def own_gradients(
    sae: SparseAutoencoder,
    x_BD: Tensor,
    codes: SparseCodes,
    bags: Tensor,
    suffix_BGD: Tensor,
    penalty: Penalty | None,
    mono: SharedMono | None,
    frozen: str | None,
    projected_by_blocks: bool,
) -> OwnGradients:
    """From one sort of the rank's entries.

    Args:
        sae: its part. x_BD, codes: the rows, and what they keep of it.
        bags, suffix_BGD: where entries lie by row and group, and the gradient that those of each receive.
        penalty, mono: of the architecture and the recipe, if there are any.
        frozen: W_enc or W_dec, whose gradient is not made.
        projected_by_blocks: a CPU's entries, that latent_update.py makes rows of.
    """
    grouped = codes.by_latent()
    acts_M, latents_M, order_M, offsets_S1 = grouped
    suffix_RD, n_groups = suffix_BGD.flatten(0, 1), suffix_BGD.shape[1]
    bags_M = entry_rows(codes.top_indices, bags).clamp_(max=len(suffix_RD) - 1)[order_M]
    rows_M = bags_M // n_groups
    dots_M = gather_dot_op(suffix_RD, bags_M, latents_M, sae.W_dec.detach())
    fired_M = torch.where(acts_M > 0, dots_M, 0)
    dacts_M, vectors, mono_loss = fired_M, dict[str, Tensor](), None
    if penalty is not None:
        dacts_M = penalty.of_acts(acts_M, dots_M)
        if penalty.band is not None:
            vectors["threshold"] = penalty.band.threshold_gradient(dots_M, latents_M, order_M, offsets_S1)
    if mono is not None:
        mono_loss, of_acts_M = mono.of_entries(codes, grouped)
        dacts_M = dacts_M + of_acts_M
    vectors["b_enc"] = totals(dacts_M, offsets_S1)
    matrices: dict[str, EntryGradient | Tensor] = {}
    centred_BD = x_BD - sae.b_dec.detach()
    if frozen != "W_enc":
        matrices["W_enc"] = (
            entry_gradient(dacts_M, rows_M, offsets_S1, centred_BD)
            if projected_by_blocks
            else EntryGradient(dacts_M, rows_M, offsets_S1, centred_BD, None)
        )
    if frozen != "W_dec":
        matrices["W_dec"] = (
            entry_gradient(acts_M, bags_M, offsets_S1, suffix_RD, fired_M)
            if projected_by_blocks
            else EntryGradient(acts_M, bags_M, offsets_S1, suffix_RD, totals(acts_M * fired_M, offsets_S1))
        )
    return OwnGradients(matrices, vectors, mono_loss)
