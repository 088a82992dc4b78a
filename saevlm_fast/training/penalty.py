"""What makes ReLU and JumpReLU SAEs sparse: penalties, their gradients entry by entry, and what the encoder lists.

Of h = (x - b_dec) W_enc + b_enc, z = h where it fires and 0 elsewhere, B rows, decoder rows of norm 1:

    relu      fires: h > 0              penalty = l1 * mean_b sum_s z
    jumprelu  fires: h > theta, h > 0   penalty = (L0 / target - 1)^2,   L0 = mean_b sum_s 1[fires]

A step function has no gradient, so that theta is given the one of the step smoothed by a rectangle K of width eps, the
bandwidth: K = 1 where |h - theta| < eps / 2 and h > 0 (arXiv 2407.14435, equations 11 and 12; docs/recipe.md section 7)

    dz/dh = 1[fires]    dz/dtheta = -(theta / eps) K    d1[fires]/dtheta = -(1 / eps) K

so the encoder lists what is above theta - eps / 2, and all sums are over these entries. Theta is learned as it is, not
as its logarithm, and kept at 0 or above: below, it would act as 0 and have no gradient that brings it back.

Shape suffixes: B rows, S d_sae, M entries.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from saevlm_fast.config import TrainConfig
from saevlm_fast.kernels.segment_sum import segment_sum
from saevlm_fast.kernels.topk_encode import threshold_encode
from saevlm_fast.sae import SparseAutoencoder
from saevlm_fast.sparse_codes import SparseCodes

_UNNOTICED = 1e-37  # a normal number of float32


class Band(NamedTuple):
    """Where thresholds have a gradient.

    pre_M: h of every entry of the codes. threshold_S: theta. bandwidth: eps. of_step: d loss / d 1[fires], 0-d, or of
        every entry [M] where micro-batches are joined.
    """

    pre_M: Tensor
    threshold_S: Tensor
    bandwidth: float
    of_step: Tensor

    def threshold_gradient(self, dots_M: Tensor, latents_M: Tensor, order_M: Tensor, offsets_S1: Tensor) -> Tensor:
        """[S], in the dtype of theta, of entries latent by latent (`SparseCodes.by_latent`).

        dots_M: d loss / d z of every entry, in that order; whether it fires or not.
        """
        ordered = self._replace(of_step=self.of_step[order_M]) if self.of_step.ndim else self
        return totals(ordered.terms(dots_M, latents_M, self.pre_M[order_M]), offsets_S1)

    def terms(self, dots_M: Tensor, latents_M: Tensor, pre_M: Tensor) -> Tensor:
        """What every one of some entries adds to the gradient of its latent's theta, in theta's dtype."""
        threshold_M = self.threshold_S[latents_M]
        inside_M = pre_M < threshold_M + self.bandwidth / 2  # all that is listed is above the lower end
        terms_M = torch.where(inside_M, -(threshold_M * dots_M + self.of_step) / self.bandwidth, 0)
        return terms_M.to(self.threshold_S.dtype)


class Penalty(NamedTuple):
    """The penalty of one batch.

    loss: 0-d, as it is a part of the overall loss. of_act: its gradient to every act that fires. band: of jumprelu.
    """

    loss: Tensor
    of_act: float | Tensor
    band: Band | None

    def times(self, share: float) -> "Penalty":
        """That share of it, as a part of a larger batch's."""
        band = self.band and self.band._replace(of_step=self.band.of_step * share)
        return self if share == 1 else Penalty(self.loss * share, self.of_act * share, band)

    def shown(self, acts_M: Tensor) -> Tensor:
        """The acts for a kernel that keeps the dots of positive ones alone: where thresholds need those of entries that
        do not fire, an act that no sum notices."""
        if self.band is None:
            return acts_M
        return torch.where(acts_M == 0, _UNNOTICED, acts_M.to(torch.promote_types(acts_M.dtype, torch.float32)))

    def of_acts(self, acts_M: Tensor, dots_M: Tensor) -> Tensor:
        """d loss / d h of entries, of which dots_M have that of the reconstruction to z."""
        return torch.where(acts_M > 0, dots_M + self.of_act if self.band is None else dots_M, 0)


def joined_penalty(parts: Sequence[Penalty], join: Callable[[list[Tensor]], Tensor]) -> Penalty:
    """Of several micro-batches, each as a part of the whole (`times`). join: of what each has of every entry."""
    loss = torch.stack([each.loss for each in parts]).sum()
    bands = [each.band for each in parts if each.band is not None]
    if not bands:
        return Penalty(loss, parts[0].of_act, None)
    pre_M = join([band.pre_M for band in bands])
    of_step_M = join([band.of_step.expand_as(band.pre_M) for band in bands])
    return Penalty(loss, 0.0, Band(pre_M, bands[0].threshold_S, bands[0].bandwidth, of_step_M))


def totals(values_M: Tensor, offsets_S1: Tensor) -> Tensor:
    """The sum of every segment [S]."""
    ones = values_M.new_ones(1, 1)
    return segment_sum(values_M, torch.zeros_like(values_M, dtype=torch.int64), offsets_S1, ones).squeeze(1)


Entries = tuple[Tensor, Tensor, Tensor]  # as threshold_encode returns them; on a GPU padding may lie behind them


def encode_penalised(
    sae: SparseAutoencoder,
    config: TrainConfig,
    step: int,
    x_BD: Tensor,
    of_all: Callable[[Tensor], Tensor] = lambda number: number,
    n_rows: int | None = None,
) -> tuple[SparseCodes, Penalty]:
    """Codes of a batch in 0-based step `step`, and their penalty, of a relu or a jumprelu SAE: `penalised`."""
    weights = sae.W_enc.detach(), sae.b_enc.detach(), sae.b_dec.detach()
    entries = threshold_encode(x_BD, *weights, least_listed(sae, config))
    scale = config.sparsity_scale(step)
    return penalised(sae, config, scale, entries, len(x_BD) if n_rows is None else n_rows, of_all)


def least_listed(sae: SparseAutoencoder, config: TrainConfig) -> float | Tensor:
    """What pre-activations are listed above: 0, or thresholds [S] less half the bandwidth."""
    return sae.threshold - config.ste_bandwidth / 2 if sae.config.architecture == "jumprelu" else 0.0


def penalised(
    sae: SparseAutoencoder,
    config: TrainConfig,
    scale: float | Tensor,
    entries: Entries,
    n_rows: int,
    of_all: Callable[[Tensor], Tensor] = lambda number: number,
) -> tuple[SparseCodes, Penalty]:
    """Codes of the entries that are above `least_listed`, and their penalty.

    scale: the penalty's share in this step (TrainConfig.sparsity_scale); of a step that is captured on the device, 0-d.
    n_rows: of the whole batch, of which these may be some.
    of_all: makes of a sum over the SAE's latents and the batch's rows that over all, where others have some of them.

    Of jumprelu the codes also list entries within the band that do not fire: their act is 0. In the dtype of the
    weights.
    """
    pre_M, latents_M, row_offsets = entries
    if sae.config.architecture == "relu":
        codes = SparseCodes.from_flat(pre_M, latents_M, row_offsets, sae.config.d_sae)
        l1 = scale * config.l1_weight
        return codes, Penalty(l1 * of_all(pre_M.sum()) / n_rows, l1 / n_rows, None)
    threshold_S, bandwidth, target = sae.threshold, config.ste_bandwidth, config.wanted_l0
    fires_M = ~(pre_M <= threshold_S[latents_M])  # NaN counts as firing: it reaches the loss, which is looked at
    codes = SparseCodes.from_flat(torch.where(fires_M, pre_M, 0), latents_M, row_offsets, sae.config.d_sae)
    excess = of_all(fires_M.sum()).to(threshold_S.dtype) / n_rows / target - 1
    of_step = 2 * scale * excess / (target * n_rows)
    loss = (scale * excess.square()).to(pre_M.dtype)
    return codes, Penalty(loss, 0.0, Band(pre_M, threshold_S, bandwidth, of_step))
