"""A training step of which every rank takes the part of its own latents: the step of one process, docs/recipe.md.

Every rank sees the whole batch. A step of B rows over R ranks and G Matryoshka groups tells the others, in this order:

    offers      [B, k] activations (TopK), or the B k best of the rank and where rows begin (BatchTopK)     gather
    partial     reconstructions of the rank's latents [B, G, d_in]; each rank adds up B / R rows            exchange
    residuals   of these rows, as the gradient that entries receive                                         gather
    numbers     [d_in + 2]: b_dec's gradient, the squared error, the gradient's squared norm                gather

A relu or jumprelu SAE offers nothing: each rank knows what fires of its own, and tells one sum for the penalty. Where
latents are dead, digits of the choice among them travel (choice.py) and their reconstruction [B, d_in]. Nothing grows
with d_sae. Weights, moments and counters of a latent stay where they are; b_dec, the moving threshold and the
losses come out the same on every rank, sums being added rank after rank.

A GPU's step waits for nothing and has fixed shapes; its gradients of the rank's matrices are held whole. A CPU makes
them block by block (kernels/latent_update.py).

Shape suffixes: B rows of a batch, G groups, D d_in, S the rank's latents, M its entries, A its dead latents.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from saevlm_fast.config import CALIBRATED, TrainConfig
from saevlm_fast.kernels.grouping import entry_rows
from saevlm_fast.kernels.latent_gradient import EntryGradient, RowGradient, entry_gradient
from saevlm_fast.kernels.latent_update import adam_, latent_update_
from saevlm_fast.kernels.segment_sum import segment_sum, segment_sum_into
from saevlm_fast.kernels.sparse_decode import gather_dot_op, group_bag_offsets
from saevlm_fast.kernels.topk_encode import batch_topk_encode, topk_encode
from saevlm_fast.peers import Peers, in_order
from saevlm_fast.sae import SparseAutoencoder
from saevlm_fast.sparse_codes import SparseCodes
from saevlm_fast.training.choice import NOTHING, keep_of_batch, keep_of_rows
from saevlm_fast.training.penalty import Penalty, encode_penalised, totals
from saevlm_fast.training.sharded_dead import shared_auxiliary
from saevlm_fast.training.shards import Shard
from saevlm_fast.training.step import Losses, StepOutput, Stepper


class Chosen(NamedTuple):
    """The rank's part of the one choice: its codes in CSR form, and the smallest activation that any rank keeps."""

    codes: SparseCodes
    smallest: Tensor


def choose(sae: SparseAutoencoder, shard: Shard, peers: Peers, x_BD: Tensor) -> Chosen:
    """What training keeps of a batch [B, d_in], of topk, batch_topk and matryoshka. `sae` is the rank's part."""
    k, own_k, n_rows = shard.whole.known_k, shard.config.known_k, len(x_BD)
    weights = x_BD, sae.W_enc.detach(), sae.b_enc.detach(), sae.b_dec.detach(), own_k
    if shard.whole.architecture == "topk":
        acts_BK, latents_BK = topk_encode(*weights)
        kept = keep_of_rows(peers.gather(pad(acts_BK, (0, k - own_k), value=NOTHING)), peers.rank, k)
        codes = SparseCodes.from_flat(acts_BK, latents_BK, None, shard.size).rows()
        mask_M = kept.mask[:, :own_k].flatten()
        return Chosen(kept_entries(codes, mask_M, x_BD.is_cuda), kept.smallest)
    acts_M, latents_M, row_offsets = batch_topk_encode(*weights)
    missing = (0, n_rows * k - len(acts_M))
    acts_M, latents_M = pad(acts_M, missing), pad(latents_M, missing)
    offers_RM, offsets_RB1 = peers.gather(acts_M), peers.gather(row_offsets.int()).long()
    kept = keep_of_batch(offers_RM, offsets_RB1, entry_rows(latents_M, row_offsets), peers.rank, n_rows * k)
    codes = SparseCodes.from_flat(acts_M, latents_M, row_offsets, shard.size)
    return Chosen(kept_entries(codes, kept.mask, x_BD.is_cuda), kept.smallest)


def kept_entries(codes: SparseCodes, mask_M: Tensor, fixed: bool) -> SparseCodes:
    """The entries of a mask. fixed: in as many places as before, with padding behind: a GPU is not asked how many."""
    acts_M, latents_M, row_offsets = codes.csr()
    before_M1 = pad(mask_M.cumsum(0), (1, 0))
    offsets = before_M1[row_offsets]
    if not fixed:
        return SparseCodes.from_flat(acts_M[mask_M], latents_M[mask_M], offsets, codes.d_sae)
    n_places = len(acts_M)
    places_M = torch.where(mask_M, before_M1[:-1], n_places)  # one more, for what is not kept
    acts_M = acts_M.new_zeros(n_places + 1).scatter_(0, places_M, torch.where(mask_M, acts_M, 0))[:-1]
    latents_M = latents_M.new_zeros(n_places + 1).scatter_(0, places_M, torch.where(mask_M, latents_M, 0))[:-1]
    return SparseCodes.from_flat(acts_M, latents_M, offsets, codes.d_sae)


def bag_offsets_of(shard: Shard, codes: SparseCodes) -> Tensor:
    """Bag b * G + g is the run of row b's entries in Matryoshka group g of the whole SAE: [B * G + 1]."""
    _, latents_M, row_offsets = codes.csr()
    if len(shard.whole.group_ends) == 1:
        return row_offsets
    return group_bag_offsets(latents_M, row_offsets, shard.group_ends, shard.size)


def summed_over_ranks(peers: Peers, parts_ND: Tensor) -> tuple[Tensor, int]:
    """The ranks' parts of N rows [N, ...] added up, of a share of these rows: rank r has the r-th.

    Returns:
        The sums of this rank's share, and the rows of a share: ceil(N / R). The last shares may be shorter.
    """
    share = -(-len(parts_ND) // peers.world)
    padded = pad(parts_ND.flatten(1), (0, 0, 0, share * peers.world - len(parts_ND)))
    received = peers.exchange(padded.view(peers.world, share, *parts_ND.shape[1:]))
    first = min(peers.rank * share, len(parts_ND))
    return in_order(received)[: min(share, len(parts_ND) - first)], share


def shared_by_rows(peers: Peers, own_ND: Tensor, share: int, n_rows: int) -> Tensor:
    """The rows of all ranks' shares [n_rows, ...]."""
    padded = pad(own_ND.flatten(1), (0, 0, 0, share - len(own_ND)))
    return peers.gather(padded).flatten(0, 1)[:n_rows].view(n_rows, *own_ND.shape[1:])


class Residuals(NamedTuple):
    """Of a batch: the gradient of mse that the entries of every group receive [B, G, D]; of this rank's share of the
    rows its sum over rows in the first group [D], and the squared error of all prefixes (0-d)."""

    suffix_BGD: Tensor
    of_b_dec_D: Tensor
    squared: Tensor


def shared_residuals(sae: SparseAutoencoder, peers: Peers, x_BD: Tensor, codes: SparseCodes, bags: Tensor) -> Residuals:
    """step.py's _prefix_residuals: the same sums, whose terms the ranks have between them."""
    n_rows, d_in = x_BD.shape
    n_groups = (len(bags) - 1) // n_rows
    acts_M, latents_M, _ = codes.csr()
    if x_BD.is_cuda:
        parts_RD = segment_sum(acts_M, latents_M, bags, sae.W_dec.detach())
    else:
        parts_RD = x_BD.new_empty(n_rows * n_groups, d_in)
        segment_sum_into(parts_RD, acts_M, latents_M, bags, sae.W_dec.detach())
    own_BGD, share = summed_over_ranks(peers, parts_RD.view(n_rows, n_groups, d_in))
    own_BGD[:, 0] += sae.b_dec.detach()
    for g in range(1, n_groups):
        own_BGD[:, g] += own_BGD[:, g - 1]
    first = peers.rank * share
    own_BGD -= x_BD[first : first + share, None]
    squared = torch.linalg.vector_norm(own_BGD, dim=2).square_().sum()
    own_BGD *= 2 / (n_rows * n_groups)
    for g in reversed(range(n_groups - 1)):
        own_BGD[:, g] += own_BGD[:, g + 1]
    return Residuals(shared_by_rows(peers, own_BGD, share, n_rows), own_BGD[:, 0].sum(0), squared)


class ShardedStepper(Stepper):
    """A Stepper whose SAE is one rank's part of a larger one.

    Args:
        sae: the latents of `shard`, in normalised units. Its k and groups are the part's own (Shard.config).
        config: the recipe of the whole SAE.
        shard: which latents.
        peers: the ranks that have the others.

    Attributes:
        by_blocks: gradients of the matrices are made block by block as they are used; otherwise they are held whole.

    Of a step's output, codes are of the rank's latents; losses, x_hat and n_dead are of all.
    """

    def __init__(self, sae: SparseAutoencoder, config: TrainConfig, shard: Shard, peers: Peers):
        super().__init__(sae, config)
        self.shard, self.peers = shard, peers
        self.by_blocks = not sae.W_dec.is_cuda

    def learning_rate(self) -> float:
        """That of the whole SAE."""
        return self.config.lr_at(self.n_steps - 1, self.shard.whole.d_sae)

    def counted(self, output: StepOutput) -> tuple[int, int]:
        """Of all ranks, which all must ask."""
        counts = torch.tensor(super().counted(output), device=self.idle_S.device)
        n_fired, n_dead = self.peers.add_up(counts).tolist()
        return n_fired, n_dead

    def mean_threshold(self) -> float:
        if self.sae.threshold.ndim == 0:
            return super().mean_threshold()
        return float(self._of_all(self.sae.threshold.sum())) / self.shard.whole.d_sae

    def _of_all(self, number: Tensor) -> Tensor:
        """The sum of a number over ranks."""
        return in_order(self.peers.gather(number))

    @torch.no_grad()
    def device_step(self, x_BD: Tensor, e_BE: Tensor | None = None) -> StepOutput:
        """The step that was announced. e_BE: of no use, MonoLoss is of one process."""
        codes, penalty = self._codes(x_BD)
        bags = bag_offsets_of(self.shard, codes)
        residuals = shared_residuals(self.sae, self.peers, x_BD, codes, bags)
        suffix_BGD = residuals.suffix_BGD
        x_hat_BD = x_BD + suffix_BGD[:, -1] * (suffix_BGD[:, 0, 0].numel() * suffix_BGD.shape[1] / 2)
        gradient = self._own_gradients(x_BD, codes, bags, suffix_BGD, penalty)

        aux_loss, aux_enc, aux_dec = residuals.squared.new_zeros(()), [], []
        n_dead: int | Tensor = 0
        if self._some_can_be_dead():
            dead = self._dead_latents()
            aux, n_dead = shared_auxiliary(self.sae, self.peers, x_BD, x_hat_BD, dead, self.auxk_alpha)
            if aux is not None:
                aux_loss = aux.loss
                aux_enc, aux_dec = ([rows] if rows is not None else [] for rows in (aux.W_enc, aux.W_dec))
                latents_A = dead.latents_A.clamp(max=self.shard.size - 1)  # a GPU's padding has zero gradients
                gradient.b_enc.index_add_(0, latents_A, aux.b_enc_A)

        squared = self._update_shard(gradient, aux_enc, aux_dec, residuals)
        mse = squared / (len(x_BD) * suffix_BGD.shape[1])
        losses = Losses(mse + self.auxk_alpha * aux_loss, mse, aux_loss)
        if penalty is not None:
            losses = Losses(losses.overall + penalty.loss, mse, aux_loss, penalty.loss)
        self._note_bad(losses)
        return StepOutput(losses, x_hat_BD, codes, n_dead)

    def _codes(self, x_BD: Tensor) -> tuple[SparseCodes, Penalty | None]:
        """Of the rank's latents, after which counters and the moving threshold have moved on."""
        if self.penalised:
            codes, penalty = encode_penalised(self.sae, self.config, self.n_steps - 1, x_BD, self._of_all)
            self._track_shard(codes, codes.top_acts.new_zeros(()), len(x_BD))
            return codes, penalty
        codes, smallest = choose(self.sae, self.shard, self.peers, x_BD)
        codes = codes.to(dtype=self.sae.W_dec.dtype)
        self._track_shard(codes, smallest, len(x_BD))
        return codes, None

    def _track_shard(self, codes: SparseCodes, smallest: Tensor, n_rows: int) -> None:
        fired_S = torch.zeros_like(self.idle_S).index_add_(0, codes.top_indices, (codes.top_acts > 0).long())
        self.idle_S.copy_(torch.where(fired_S > 0, 0, self.idle_S + n_rows))
        if self.shard.whole.architecture in CALIBRATED:
            old, beta = self.sae.threshold, self.config.threshold_beta
            new = torch.where(old < 0, smallest.float(), beta * old + (1 - beta) * smallest.float())
            self.sae.threshold.copy_(torch.where(self.step_index > self.config.threshold_start, new, old))

    def _own_gradients(
        self, x_BD: Tensor, codes: SparseCodes, bags: Tensor, suffix_BGD: Tensor, penalty: Penalty | None
    ) -> "_OwnGradients":
        """Of the rank's latents, from one sort of its entries."""
        acts_M, latents_M, order_M, offsets_S1 = codes.by_latent()
        suffix_RD, n_groups = suffix_BGD.flatten(0, 1), suffix_BGD.shape[1]
        bags_M = entry_rows(codes.top_indices, bags).clamp_(max=len(suffix_RD) - 1)[order_M]
        rows_M = bags_M // n_groups
        dots_M = gather_dot_op(suffix_RD, bags_M, latents_M, self.sae.W_dec.detach())
        fired_M = torch.where(acts_M > 0, dots_M, 0)
        dacts_M, dtheta_S = fired_M, None
        if penalty is not None:
            dacts_M = penalty.of_acts(acts_M, dots_M)
            dtheta_S = penalty.band and penalty.band.threshold_gradient(dots_M, latents_M, order_M, offsets_S1)
        centred_BD = x_BD - self.sae.b_dec.detach()
        db_enc = totals(dacts_M, offsets_S1)
        if self.by_blocks:
            dW_enc = entry_gradient(dacts_M, rows_M, offsets_S1, centred_BD)
            dW_dec = entry_gradient(acts_M, bags_M, offsets_S1, suffix_RD, fired_M)
        else:
            dW_enc = EntryGradient(dacts_M, rows_M, offsets_S1, centred_BD, None)
            dW_dec = EntryGradient(acts_M, bags_M, offsets_S1, suffix_RD, totals(acts_M * fired_M, offsets_S1))
        return _OwnGradients(dW_enc, db_enc, dW_dec, dtheta_S)

    def _update_shard(
        self, own: "_OwnGradients", aux_enc: list[RowGradient], aux_dec: list[RowGradient], residuals: Residuals
    ) -> Tensor:
        """Clips by the norm over all ranks, and moves the rank's weights on. Returns the whole squared error."""
        of_b_dec_D = residuals.of_b_dec_D - self.sae.W_enc.detach() @ own.b_enc
        if self.by_blocks:
            parts: list[EntryGradient | RowGradient] = [own.W_enc, *aux_enc, own.W_dec, *aux_dec]
            bounds = [g.squared_norm_bound() if isinstance(g, EntryGradient) else g.squared_norm for g in parts]
            b_dec_D, squared, bound = self._over_ranks(of_b_dec_D, residuals.squared, _sum(bounds, own.vectors()))
            clip = torch.ones_like(bound)
            if bound.sqrt() >= 0.999 * self.config.clip_norm - 1e-6:
                local = _sum([gradient.squared_norm for gradient in parts], own.vectors())
                clip = self._clip(in_order(self.peers.gather(local)) + b_dec_D.square().sum())
            self._update_by_blocks(own, aux_enc, aux_dec, clip)
        else:
            whole = {"W_enc": _rows(own.W_enc, aux_enc, None)}
            whole["W_dec"] = _rows(own.W_dec, aux_dec, self.sae.W_dec.detach())
            norm = _sum([rows_SD.square().sum() for rows_SD in whole.values()], own.vectors())
            b_dec_D, squared, norm = self._over_ranks(of_b_dec_D, residuals.squared, norm)
            clip = self._clip(norm)
            self._update_whole(whole, clip)
        parameters, adam = self.parameters(), self._adam()
        for name, gradient_vector in (own.vectors() | {"b_dec": b_dec_D}).items():
            adam_(parameters[name], *self.moments[name], gradient_vector, clip, adam)
        self._clamp_threshold()
        return squared

    def _over_ranks(self, of_b_dec_D: Tensor, squared: Tensor, norm: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """b_dec's gradient, the squared error, and the squared norm with that of b_dec's gradient: of all ranks."""
        d_in = len(of_b_dec_D)
        numbers_V = in_order(self.peers.gather(torch.cat([of_b_dec_D, torch.stack([squared, norm])])))
        b_dec_D = numbers_V[:d_in].clone()
        return b_dec_D, numbers_V[d_in], numbers_V[d_in + 1] + b_dec_D.square().sum()

    def _clip(self, squared_norm: Tensor) -> Tensor:
        return (self.config.clip_norm / (squared_norm.sqrt() + 1e-6)).clamp(max=1.0)

    def _update_by_blocks(
        self, own: "_OwnGradients", aux_enc: list[RowGradient], aux_dec: list[RowGradient], clip: Tensor
    ) -> None:
        parameters, adam = self.parameters(), self._adam()
        for name, gradient, aux in (("W_enc", own.W_enc, aux_enc), ("W_dec", own.W_dec, aux_dec)):
            latent_update_(parameters[name], *self.moments[name], gradient, aux, clip, adam, name == "W_dec")

    def _update_whole(self, gradients: dict[str, Tensor], clip: Tensor) -> None:
        parameters, adam = self.parameters(), self._adam()
        for name, gradient_SD in gradients.items():
            adam_(parameters[name], *self.moments[name], gradient_SD, clip, adam)
        W_dec = parameters["W_dec"]
        W_dec /= torch.linalg.vector_norm(W_dec, dim=1, keepdim=True) + torch.finfo(W_dec.dtype).eps


class _OwnGradients(NamedTuple):
    W_enc: EntryGradient
    b_enc: Tensor
    W_dec: EntryGradient
    threshold: Tensor | None

    def vectors(self) -> dict[str, Tensor]:
        """Those of the rank's latents that are no matrix."""
        return {"b_enc": self.b_enc} if self.threshold is None else {"b_enc": self.b_enc, "threshold": self.threshold}


def _sum(squares: list[Tensor], vectors: dict[str, Tensor]) -> Tensor:
    wide = squares[0].dtype
    return torch.stack([*squares, *(vector.square().sum().to(wide) for vector in vectors.values())]).sum()


def _rows(gradient: EntryGradient, aux: list[RowGradient], unit_rows_SD: Tensor | None) -> Tensor:
    """All rows of a gradient [S, D], projected if unit rows are given. No device is waited for."""
    rows_SD = segment_sum(gradient.weights_M, gradient.ids_M, gradient.offsets_S1, gradient.source_RD)
    if unit_rows_SD is not None and gradient.parallel_S is not None:
        rows_SD.addcmul_(unit_rows_SD, gradient.parallel_S[:, None], value=-1)
    for each in aux:
        rows_SD.index_add_(0, each.latents_A.clamp(max=len(rows_SD) - 1), each.rows_AD)
    return rows_SD
