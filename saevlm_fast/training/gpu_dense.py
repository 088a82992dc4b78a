"""A penalised step on a GPU while a great part of the latents fires: matrix products, at float32 accuracy.

    h  = (x - b_dec) W_enc      x_hat = z W_dec      dz = e W_dec^T      dW_dec = z^T e      dW_enc = dh^T (x - b_dec)

A float32 matrix is two of float16, hi + lo, times a power of two; a product of two such is hi lo + lo hi + hi hi, on
tensor cores, added up in float32: as exact as a float32 product, whose rounding is as large as what is left out (2^-22
of a term), in a quarter of the time. Scales come from bounds of norms (Cauchy-Schwarz), so no matrix is read for them.
What lies between the products is in kernels/dense_step_triton.py. The update is that of the other steps, with whole
gradients as its auxiliary rows. Nothing is asked of the device. docs/kernels.md section 4

Shape suffixes: B rows, R rows of a chunk, D d_in, S d_sae.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from saevlm_fast.config import TrainConfig
from saevlm_fast.kernels.dense_step_triton import launch_fired, launch_passed, launch_split
from saevlm_fast.kernels.latent_update_triton import Scalars, launch_bias, launch_update
from saevlm_fast.kernels.low_weights import LowWeights
from saevlm_fast.kernels.step_entries_triton import Entries
from saevlm_fast.sae import SparseAutoencoder
from saevlm_fast.training.dead_latents import DeadLatents, auxiliary
from saevlm_fast.training.gpu_step import State

_CHUNK_BYTES = 1 << 30  # of one float32 [R, S] matrix, of which there are two, and the halves of a third
_STRETCH = 1024  # terms
_TOP = 13  # numbers are scaled to below 2^13: float16 ends at 2^16


class Split(NamedTuple):
    """A matrix in halves beside each other, float16 [n, 3 width], and what it was multiplied by (0-d)."""

    halves: Tensor
    scale: Tensor

    def pair(self, left: bool) -> tuple[Tensor, Tensor]:
        """(hi, lo) of a left or a right factor."""
        first, second, _ = self.halves.chunk(3, dim=1)
        return (first, second) if left else (second, first)


def scale_below(bound: Tensor) -> Tensor:
    """The power of two that brings numbers up to a bound below 2^_TOP; that of 2^-50 or 2^76 beyond.

    Products of two scales and their reciprocals are then normal numbers of float32. Of rows 2^63 is the last power: of
    a norm of 2^64 float32 does not hold the square, and the loss is then told not to be finite.
    """
    exponent = torch.frexp(bound).exponent.clamp(-50, 76)
    return ((127 + _TOP - exponent) << 23).view(torch.float32)  # its bits: a power by torch need not be exact


def product(a: Tensor, b: Tensor, onto: Tensor | None = None) -> Tensor:
    """a @ b of float16, added up in float32; onto: what it is added to."""
    if not a.is_cuda:
        return a.float() @ b.float() if onto is None else torch.addmm(onto, a.float(), b.float())
    if onto is None:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.addmm(onto, a, b, out_dtype=torch.float32)


def product_of_halves(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> Tensor:
    """The product of (hi, lo) and (hi, lo), the small parts first; of the large ones stretch after stretch.

    Tensor cores cut what they add to a sum, so that a long one loses (at 16,384 terms of one sign 15 times what float32
    does, on an H200).
    """
    (a_hi, a_lo), (b_hi, b_lo) = a, b
    total = product(a_lo, b_hi, product(a_hi, b_lo))
    for start in range(0, len(b_hi), _STRETCH):
        total = product(a_hi[:, start : start + _STRETCH], b_hi[start : start + _STRETCH], total)
    return total


class DenseGradients:
    """Losses and gradients of a batch, micro-batch by micro-batch.

    Attributes:
        x_hat_BD, error_BD: reconstruction, and gradient of mse to it. squared, penalty: 0-d, sums so far.
        W_dec, W_enc: [S, D], None of frozen weights; W_dec's is not yet projected.
        sums_3S: of b_enc, of W_dec's part along its rows, of thresholds. fired_S: how often, int64.
    """

    def __init__(self, sae: SparseAutoencoder, config: TrainConfig, low: LowWeights, x_BD: Tensor):
        self.sae, self.config, self.x_BD = sae, config, x_BD
        W_enc_SD, W_dec, b_dec = sae.W_enc.detach().T, sae.W_dec.detach(), sae.b_dec.detach()
        self.b_enc_S, self.b_dec_D = sae.b_enc.detach(), b_dec
        self.jump = sae.config.architecture == "jumprelu"
        theta_S = sae.threshold.float() if self.jump else torch.zeros_like(self.b_enc_S)
        self.theta_S, self.threshold_S = theta_S, theta_S.clamp(min=0)
        self.centred_BD = x_BD - b_dec
        norm_B = torch.linalg.vector_norm(self.centred_BD, dim=1)
        most = norm_B.max()
        of_x, of_enc, of_dec = scale_below(most), scale_below(low.norm_S.max()), scale_below(torch.ones_like(most))
        self.x = Split(launch_split(self.centred_BD, of_x, left=True), of_x)
        self.enc = Split(launch_split(W_enc_SD, of_enc, left=False), of_enc)
        self.dec = Split(launch_split(W_dec, of_dec, left=False), of_dec)
        self.z_scale = scale_below(most * low.norm_S.max() * 1.001 + self.b_enc_S.abs().max())
        self.x_hat_BD, self.error_BD = torch.empty_like(x_BD), torch.empty_like(x_BD)
        self.W_dec: Tensor | None = None
        self.W_enc: Tensor | None = None
        self.sums_3S = torch.zeros(3, len(W_dec), dtype=torch.float32, device=x_BD.device)
        self.fired_S = torch.zeros(len(W_dec), dtype=torch.int64, device=x_BD.device)
        self.squared, self.penalty = most.new_zeros(()), most.new_zeros(())

    def add(self, piece: slice, sparsity: Tensor) -> None:
        """A micro-batch; sparsity: the penalty's share in this step (TrainConfig.sparsity_scale)."""
        n_rows, d_sae = piece.stop - piece.start, len(self.b_enc_S)
        chunk = max(1, min(n_rows, _CHUNK_BYTES // (4 * d_sae)))
        z_2RS = torch.empty(2, chunk, d_sae, dtype=torch.float16, device=self.x_BD.device)
        chunks = [slice(start, min(start + chunk, piece.stop)) for start in range(piece.start, piece.stop, chunk)]
        h_RS, fired_S, total = None, torch.zeros_like(self.fired_S), self.squared.new_zeros(())
        for rows in chunks:
            h_RS = self._h(rows)
            counts_S, sums_S = self._fired(h_RS, z_2RS[:, : len(h_RS)])
            fired_S, total = fired_S + counts_S, total + sums_S.sum()
        self.fired_S += fired_S
        share, config, band, l1 = n_rows / len(self.x_BD), self.config, None, torch.zeros_like(self.squared)
        if self.jump:
            target = config.wanted_l0
            excess = fired_S.sum().to(total.dtype) / n_rows / target - 1
            self.penalty += share * sparsity * excess.square()
            band = self.theta_S, share * 2 * sparsity * excess / (target * n_rows), config.ste_bandwidth
        else:
            l1 = sparsity * config.l1_weight / len(self.x_BD)
            self.penalty += l1 * total
        for rows in chunks:
            if len(chunks) > 1:
                h_RS = self._h(rows)
                self._fired(h_RS, z_2RS[:, : len(h_RS)])
            assert h_RS is not None
            self._add_chunk(rows, h_RS, z_2RS[:, : len(h_RS)], l1, band)

    def _h(self, rows: slice) -> Tensor:
        """[R, S] without bias, times the scales of x and W_enc."""
        return product(self.x.halves[rows], self.enc.halves.T)

    def _unscale(self, a: Tensor, b: Tensor) -> Tensor:
        return (a * b).reciprocal()

    def _fired(self, h_RS: Tensor, z_2RS: Tensor) -> tuple[Tensor, Tensor]:
        unscale = self._unscale(self.x.scale, self.enc.scale)
        return launch_fired(h_RS, unscale, self.b_enc_S, self.threshold_S, self.z_scale, z_2RS)

    def _add_chunk(
        self, rows: slice, h_RS: Tensor, z_2RS: Tensor, l1: Tensor, band: tuple[Tensor, Tensor, float] | None
    ) -> None:
        z, (x_hat_RD, error_RD) = (z_2RS[0], z_2RS[1]), (self.x_hat_BD[rows], self.error_BD[rows])
        of_x_hat = product_of_halves(z, self.dec.pair(left=False))
        torch.addcmul(self.b_dec_D, of_x_hat, self._unscale(self.z_scale, self.dec.scale), out=x_hat_RD)
        torch.sub(x_hat_RD, self.x_BD[rows], out=error_RD)
        self.squared += error_RD.square().sum()
        error_RD *= 2 / len(self.x_BD)
        most = torch.linalg.vector_norm(error_RD, dim=1).max()
        e_scale, dh_scale = scale_below(most), scale_below(most * 1.001 + l1)
        e = Split(launch_split(error_RD, e_scale, left=True), e_scale)
        dz_RS = product(e.halves, self.dec.halves.T)
        if self.config.frozen != "W_dec":
            gradient = product_of_halves((z[0].T, z[1].T), e.pair(left=True))
            self.W_dec = _added(self.W_dec, gradient.mul_(self._unscale(self.z_scale, e_scale)))
        unscales = self._unscale(self.x.scale, self.enc.scale), self._unscale(e_scale, self.dec.scale)
        given = self.b_enc_S, self.threshold_S, l1, band, dh_scale, z_2RS  # z is not needed again
        sums = launch_passed(h_RS, dz_RS, unscales, *given)
        self.sums_3S[: len(sums)] += sums
        if self.config.frozen != "W_enc":
            x_hi, x_lo = self.x.pair(left=True)
            gradient = product_of_halves((z[0].T, z[1].T), (x_hi[rows], x_lo[rows]))
            self.W_enc = _added(self.W_enc, gradient.mul_(self._unscale(dh_scale, self.x.scale)))


def _added(total: Tensor | None, more: Tensor) -> Tensor:
    return more if total is None else total.add_(more)


def dense_update(
    state: State, config: TrainConfig, gradients: DenseGradients, dead: DeadLatents, auxk_alpha: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Clip, Adam and unit rows, in place; (overall loss without bad steps noted, mse, auxiliary loss)."""
    sae, frozen, (of_b_S, along_S, of_theta_S) = gradients.sae, config.frozen, gradients.sums_3S
    aux = auxiliary(sae, gradients.x_BD, gradients.x_hat_BD, dead, auxk_alpha, frozen)
    if aux is not None:
        dead_A = dead.latents_A.clamp(max=sae.config.d_sae - 1)  # padding has zero gradients
        for whole, of_dead in ((gradients.W_enc, aux.W_enc), (gradients.W_dec, aux.W_dec)):
            if whole is not None and of_dead is not None:
                whole.index_add_(0, dead_A, of_dead.rows_AD)
        of_b_S.index_add_(0, dead_A, aux.b_enc_A)
    of_b_dec_D = gradients.error_BD.sum(0) - sae.W_enc.detach() @ of_b_S
    square = of_b_S.square().sum() + of_theta_S.square().sum() + of_b_dec_D.square().sum()
    for whole in (gradients.W_enc, gradients.W_dec):
        square = square if whole is None else square + torch.linalg.vector_norm(whole).square()
    if gradients.W_dec is not None:  # Pythagoras: rows of W_dec are unit
        square = (square - along_S.square().sum()).nan_to_num(torch.inf, torch.inf)  # too large for float32: clip is 0
    clip = (config.clip_norm / (square.clamp(min=0).sqrt() + 1e-6)).clamp(max=1.0).view(1)

    scalars = Scalars(clip, state.schedule, config.betas, config.eps)
    slots_S = torch.arange(len(of_b_S), dtype=torch.int32, device=of_b_S.device)
    entries = _no_entries(gradients)
    if gradients.W_dec is not None:
        rows = gradients.W_dec, slots_S
        launch_update(entries, along_S, scalars, state.of("W_dec"), None, rows, cone=state.cone)
    if gradients.W_enc is None:
        launch_bias(of_b_S, scalars, state.of("b_enc"))
    else:
        rows = gradients.W_enc, slots_S
        launch_update(entries, of_b_S, scalars, state.of("W_enc"), state.of("b_enc"), rows, state.low)
    launch_bias(of_b_dec_D, scalars, state.of("b_dec"))
    if gradients.jump:
        launch_bias(of_theta_S, scalars, state.of("threshold"))
    mse = gradients.squared / len(gradients.x_BD)
    aux_loss = torch.zeros_like(mse) if aux is None else aux.loss
    return mse + auxk_alpha * aux_loss + gradients.penalty, mse, aux_loss


def _no_entries(gradients: DenseGradients) -> Entries:
    """What the update adds nothing for."""
    error_BD, n_latents = gradients.error_BD, len(gradients.b_enc_S)
    nothing = torch.zeros(n_latents + 1, dtype=torch.int32, device=error_BD.device)
    weights, source = gradients.sums_3S[0], error_BD
    return Entries(weights, weights, nothing, nothing, nothing, source, source, source[None].expand(2, -1, -1))
