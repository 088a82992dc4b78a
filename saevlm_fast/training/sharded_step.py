"""A training step of which every rank takes the part of its own latents: the step of one process, docs/recipe.md.

Every rank sees the rows of its replica, the whole batch if there is one replica. A step of B rows over R = D * L ranks
and G Matryoshka groups tells the others, in this order:

    offers      [B / D, k] activations (TopK), to the L ranks of the replica                                gather
                counts of the B k best of every rank by size (BatchTopK), to all                            add up
    partial     reconstructions of the rank's latents [B / D, G, d_in]; each rank adds up B / R rows        exchange
    residuals   of these rows, as the gradient that entries receive                                         gather
    gradients   of the part's latents among its D replicas, if there are several (sharded_replicas.py)      exchange
    scores      of MonoLoss: rows [B, d_in] and entries of the part's latents, among its D replicas         gather
    numbers     [d_in + 2]: b_dec's gradient, the squared error, the gradient's squared norm                gather
    weights     of the part's latents among its D replicas                                                  gather

A relu or jumprelu SAE offers nothing: each rank knows what fires of its own, and tells one sum for the penalty. Where
latents are dead, digits of the choice among them travel (choice.py) and their reconstruction. With one replica nothing
grows with d_sae, and weights, moments and counters of a latent stay where they are; b_dec, the moving threshold and the
losses come out the same on every rank, sums being added rank after rank.

A GPU's step waits for nothing and has fixed shapes. Of one replica it is made of one process' kernels
(sharded_gpu_step.py); otherwise the gradients of the rank's matrices are held whole. A CPU makes them block by block
(kernels/latent_update.py), unless replicas need them.

Shape suffixes: B rows of a replica, G groups, D d_in, S the rank's latents, M its entries, A its dead latents.
"""

from typing import NamedTuple, cast

import torch
from torch import Tensor

from saevlm_fast.config import CALIBRATED, TrainConfig
from saevlm_fast.errors import require
from saevlm_fast.kernels.common import Cone
from saevlm_fast.kernels.latent_gradient import EntryGradient
from saevlm_fast.kernels.latent_update import adam_, latent_update_
from saevlm_fast.peers import Ranks, in_order
from saevlm_fast.sae import SparseAutoencoder
from saevlm_fast.sparse_codes import SparseCodes
from saevlm_fast.training.dead_latents import DeadBound
from saevlm_fast.training.gradients import Losses
from saevlm_fast.training.mono import MonoTerm
from saevlm_fast.training.penalty import Penalty, encode_penalised
from saevlm_fast.training.sharded_dead import shared_auxiliary
from saevlm_fast.training.sharded_gradients import OwnGradients, own_gradients
from saevlm_fast.training.sharded_mono import SharedMono
from saevlm_fast.training.sharded_replicas import spread_, summed_slice
from saevlm_fast.training.sharded_rows import bag_offsets_of, choose, gathered, shared_residuals
from saevlm_fast.training.shards import Shard, cut, own_first_rows
from saevlm_fast.training.step import StepOutput, Stepper


class ShardedStepper(Stepper):
    """A Stepper whose SAE is one rank's part of a larger one.

    Args:
        sae: the latents of `shard`, in normalised units. Its k and groups are the part's own (Shard.config).
        config: the recipe of the whole SAE.
        shard: which latents.
        ranks: those that have the others, and other rows.
        n_batch_rows: of all replicas, if there are several.

    Attributes:
        by_blocks: gradients of the matrices are made block by block as they are used; otherwise they are held whole.

    Of a step's input, x is of the replica's rows; of its output, codes are of the rank's latents and x_hat of these
    rows; losses and n_dead are of all. Parameters and moments are those that the rank moves on: Shard.own.
    """

    def __init__(
        self,
        sae: SparseAutoencoder,
        config: TrainConfig,
        shard: Shard,
        ranks: Ranks,
        n_batch_rows: int | None = None,
    ):
        self.shard, self.ranks, self._n_batch_rows = shard, ranks, n_batch_rows
        assert n_batch_rows is not None or ranks.rows.world == 1
        super().__init__(sae, config)
        self.group_ends_G = torch.tensor(shard.group_ends, device=sae.W_dec.device)
        self.by_blocks = not sae.W_dec.is_cuda and ranks.rows.world == 1 and config.accumulate == 1
        self.rows_announced = 0
        self.dead_bound = DeadBound(ranks.latents.add_up)

    def parameters(self) -> dict[str, Tensor]:
        """Those that the rank moves on, of its part's."""
        named = super().parameters()
        return {name: each if name == "b_dec" else each[self.shard.own] for name, each in named.items()}

    def counters(self) -> dict[str, Tensor]:
        """Of the latents that the rank moves on."""
        return {name: each[self.shard.own] if each.ndim else each for name, each in super().counters().items()}

    def batch_rows(self, x_BD: Tensor) -> int:
        """Of all replicas."""
        return len(x_BD) if self._n_batch_rows is None else self._n_batch_rows

    def announce(self, n_rows: int) -> None:
        """n_rows: of this replica."""
        require(n_rows > 0, f"x_BD: {n_rows} rows; a step needs at least 1")
        self.rows_announced = self._n_batch_rows or n_rows
        super().announce(self.rows_announced)

    def learning_rate(self) -> float:
        """That of the whole SAE."""
        return self.config.lr_at(self.n_steps - 1, self.shard.whole.d_sae)

    def counted(self, output: StepOutput) -> tuple[Tensor, Tensor]:
        """Of all ranks, which all must ask."""
        n_fired, n_dead = super().counted(output)
        return self.ranks.everyone.add_up(n_fired), self.ranks.latents.add_up(n_dead)

    def variance(self, x_BD: Tensor) -> Tensor:
        """Of all replicas' rows."""
        n_rows = self.batch_rows(x_BD)
        mean_D = in_order(self.ranks.rows.gather(x_BD.sum(0))) / n_rows
        return in_order(self.ranks.rows.gather((x_BD - mean_D).square_().sum())) / n_rows

    def mean_threshold(self) -> Tensor:
        if self.sae.threshold.ndim == 0:
            return super().mean_threshold()
        return in_order(self.ranks.latents.gather(self.sae.threshold.sum())).double() / self.shard.whole.d_sae

    def spread(self) -> None:
        """Gives the replicas what this rank has moved on, and takes what they have."""
        for name, whole_S in super().parameters().items():
            if name != "b_dec":
                spread_(self.ranks.rows, whole_S, self.shard.slices)

    def spread_counters(self) -> None:
        """The same of what all replicas count, after each has read its own."""
        for whole_S in super().counters().values():
            if whole_S.ndim:
                spread_(self.ranks.rows, whole_S, self.shard.slices)

    def _cone(self) -> Cone | None:
        """Of the decoder's rows that the rank moves on."""
        if self.config.control != "soft-frozen":
            return None
        rows_SD = torch.empty_like(self.sae.W_dec.detach()[self.shard.own])
        for place, first_SD in own_first_rows(self.shard, self.config.seed, *self.shard.owned):
            rows_SD[place].copy_(first_SD)
        return Cone(rows_SD, self.config.least_cosine)

    def _of_all(self, number: Tensor) -> Tensor:
        """The sum of some numbers over ranks."""
        return in_order(self.ranks.everyone.gather(number))

    def asks(self, x_BD: Tensor) -> bool:
        """No: ranks ask one another."""
        return False

    def can_be_captured(self, x_BD: Tensor) -> bool:
        """While no latent can be dead: what is told of them depends on all ranks' bound, of which no graph knows."""
        return not self.penalised and not self._some_can_be_dead()

    @torch.no_grad()
    def device_step(self, x_BD: Tensor, e_BE: Tensor | None = None) -> StepOutput:
        """The step that was announced. e_BE: as Stepper's, of the whole batch."""
        n_rows = self.batch_rows(x_BD)
        mono = self._shared_mono(x_BD, e_BE)
        if x_BD.is_cuda and not self.penalised and self.ranks.rows.world == 1 and self.config.accumulate == 1:
            return self._gpu_step(x_BD, None if mono is None else mono.term)
        own, x_hat_BD = self._all_pieces(x_BD, mono)
        self._track_shard(own.codes, own.smallest, n_rows)

        aux_loss, n_dead = own.squared.new_zeros(()), cast("int | Tensor", 0)
        if self._some_of_all_can_be_dead():
            dead, frozen = self._dead_latents(), self.config.frozen
            given = dead, self.auxk_alpha, n_rows, frozen, self.dead_bound.of_all
            aux, n_dead = shared_auxiliary(self.sae, self.ranks, x_BD, x_hat_BD, *given)
            if aux is not None:
                aux_loss = aux.loss
                own.gradients.add_auxiliary(aux, dead.latents_A)

        squared = self._update_shard(own.gradients, own.of_b_dec_D, own.squared)
        mse = squared / (n_rows * len(self.shard.whole.group_ends))
        overall = mse + self.auxk_alpha * aux_loss
        for more in (own.penalty, own.gradients.mono):
            overall = overall if more is None else overall + more
        losses = Losses(overall, mse, aux_loss, own.penalty, own.gradients.mono)
        self._note_bad(losses)
        return StepOutput(losses, x_hat_BD, own.codes, n_dead)

    def _gpu_step(self, x_BD: Tensor, mono: MonoTerm | None = None) -> StepOutput:
        """The same by a GPU's kernels, of one replica."""
        from saevlm_fast.training.sharded_gpu_step import own_codes, sharded_gpu_step

        with torch.cuda.device_of(x_BD):
            state = self._device_state(x_BD)
            own = own_codes(self.sae, self.shard, self.ranks, x_BD, state)
            dead, most = self._dead_latents if self._some_of_all_can_be_dead() else None, self.dead_bound.of_all
            found = sharded_gpu_step(self.sae, self.config, self.ranks, state, x_BD, own, dead, mono, most)
            x_hat_BD, losses, n_dead = found
            if mono is not None:  # whose loss comes after the kernel that looked at the others
                self._note_bad(losses)
        self.was_replayed()
        return StepOutput(losses, x_hat_BD, own.codes, n_dead)

    def _some_of_all_can_be_dead(self) -> bool:
        """Of all ranks' latents: who has none helps with the others'. All ranks say the same."""
        return self._some_can_be_dead() and self.dead_bound.of_all != 0

    def _shared_mono(self, x_BD: Tensor, e_BE: Tensor | None) -> SharedMono | None:
        """By the rows of all replicas, with sums over the latents of all ranks."""
        if self.config.mono_weight is None:
            return None
        rows, n_rows = self.ranks.rows, self.batch_rows(x_BD)
        counts = [each.stop - each.start for each in cut(n_rows, rows.world)]
        term = self._mono(gathered(rows, x_BD, counts) if e_BE is None else e_BE)
        assert term is not None

        def of_all(numbers: Tensor) -> Tensor:
            return in_order(self.ranks.latents.gather(numbers))

        return SharedMono(term._replace(of_all=of_all), rows, counts)

    def _all_pieces(self, x_BD: Tensor, mono: SharedMono | None) -> "tuple[_Piece, Tensor]":
        """Of the batch's micro-batches (accumulate.py), of which there is one as a rule: their sum, and x_hat."""
        n_rows = self.batch_rows(x_BD)
        n = min(self.config.accumulate, n_rows)
        if n == 1:
            return self._piece(x_BD, n_rows, mono)
        first, x_hat_BD = cut(n_rows, self.ranks.rows.world)[self.ranks.rows.rank].start, torch.empty_like(x_BD)
        pieces: list[_Piece] = []
        for number in range(n):
            rows = slice((number - first) % n, None, n)  # every n-th row of the whole batch
            of_piece, x_hat_BD[rows] = self._piece(x_BD[rows].contiguous(), len(range(number, n_rows, n)), mono)
            if pieces:
                pieces[0].gradients.add_rows_of(of_piece.gradients, self.sae.W_dec.detach())
            pieces.append(of_piece._replace(gradients=pieces[0].gradients) if pieces else of_piece)
        penalties = [each.penalty for each in pieces if each.penalty is not None]
        summed = _Piece(
            SparseCodes.join([each.codes for each in pieces], self.shard.size),
            torch.stack([each.smallest.float() for each in pieces]).mean(),
            torch.stack(penalties).sum() if penalties else None,
            pieces[0].gradients,
            torch.stack([each.of_b_dec_D for each in pieces]).sum(0),
            torch.stack([each.squared for each in pieces]).sum(),
        )
        return summed, x_hat_BD

    def _piece(self, x_BD: Tensor, n_rows: int, mono: SharedMono | None) -> "tuple[_Piece, Tensor]":
        """Of some rows, which are the replica's of n_rows, as parts of the whole batch's loss; and their x_hat."""
        codes, penalty, smallest = self._codes(x_BD, n_rows)
        bags, n_batch_rows = bag_offsets_of(self.shard, codes), self.rows_announced
        residuals = shared_residuals(self.sae, self.ranks.latents, x_BD, codes, bags, n_batch_rows)
        suffix_BGD = residuals.suffix_BGD
        x_hat_BD = x_BD + suffix_BGD[:, -1] * (n_batch_rows * suffix_BGD.shape[1] / 2)
        penalty = None if penalty is None else penalty.times(n_rows / n_batch_rows)
        given = bags, suffix_BGD, penalty, mono, self.config.frozen, self.by_blocks
        gradients = own_gradients(self.sae, x_BD, codes, *given)
        loss = None if penalty is None else penalty.loss
        piece = _Piece(codes, smallest, loss, gradients, residuals.of_b_dec_D, residuals.squared)
        return piece, x_hat_BD

    def _codes(self, x_BD: Tensor, n_rows: int) -> tuple[SparseCodes, Penalty | None, Tensor]:
        """Of the rank's latents, their penalty, and the smallest activation that any rank keeps."""
        if self.penalised:
            codes, penalty = encode_penalised(self.sae, self.config, self.n_steps - 1, x_BD, self._of_all, n_rows)
            return codes, penalty, codes.top_acts.new_zeros(())
        codes, smallest = choose(self.sae, self.shard, self.ranks, x_BD, self.shard.whole.known_k * n_rows)
        smallest = codes.top_acts.new_zeros(()) if smallest is None else smallest
        return codes.to(dtype=self.sae.W_dec.dtype), None, smallest

    def _track_shard(self, codes: SparseCodes, smallest: Tensor, n_rows: int) -> None:
        fires_M = (codes.top_acts > 0).int()
        fired_S = torch.zeros_like(self.idle_S, dtype=torch.int32).index_add_(0, codes.top_indices, fires_M)
        fired_S = self.ranks.rows.add_up(fired_S)
        self.idle_S.copy_(torch.where(fired_S > 0, 0, self.idle_S + n_rows))
        if self.shard.whole.architecture in CALIBRATED:
            old, beta = self.sae.threshold, self.config.threshold_beta
            new = torch.where(old < 0, smallest.float(), beta * old + (1 - beta) * smallest.float())
            self.sae.threshold.copy_(torch.where(self.step_index > self.config.threshold_start, new, old))

    def _update_shard(self, own: OwnGradients, of_b_dec_D: Tensor, squared: Tensor) -> Tensor:
        """Clips by the norm over all ranks, and moves the rank's weights on. Returns the whole squared error."""
        W_dec = self.sae.W_dec.detach()
        of_b_dec_D = of_b_dec_D - self.sae.W_enc.detach() @ own.vectors["b_enc"]
        if self.by_blocks:
            terms, vectors = own.terms(), own.vectors
            bounds = [
                term.squared_norm_bound() if isinstance(term, EntryGradient) else term.squared_norm for term in terms
            ]
            b_dec_D, squared, bound = self._over_ranks(of_b_dec_D, squared, _sum(bounds, vectors))
            clip = torch.ones_like(bound)
            if bound.sqrt() >= 0.999 * self.config.clip_norm - 1e-6:
                local = _sum([term.squared_norm for term in terms], vectors)
                clip = self._clip(self._of_all(local) + b_dec_D.square().sum())
            self._update_by_blocks(own, clip)
        else:
            whole = {name: self._summed(own.rows(name, W_dec)) for name in own.matrices}
            vectors = {name: self._summed(gradient_S) for name, gradient_S in own.vectors.items()}
            norm = _sum([rows_SD.square().sum() for rows_SD in whole.values()], vectors)
            b_dec_D, squared, norm = self._over_ranks(of_b_dec_D, squared, norm)
            clip = self._clip(norm)
            self._update_whole(whole, clip)
        parameters, adam = self.parameters(), self._adam()
        for name, gradient_vector in (vectors | {"b_dec": b_dec_D}).items():
            adam_(parameters[name], *self.moments[name], gradient_vector, clip, adam)
        self._clamp_threshold()
        self.spread()
        return squared

    def _summed(self, gradient_S: Tensor) -> Tensor:
        """Over replicas, of the latents that the rank moves on."""
        return summed_slice(self.ranks.rows, gradient_S, self.shard.slices)

    def _over_ranks(self, of_b_dec_D: Tensor, squared: Tensor, norm: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """b_dec's gradient, the squared error, and the squared norm with that of b_dec's gradient: of all ranks."""
        d_in = len(of_b_dec_D)
        numbers_V = self._of_all(torch.cat([of_b_dec_D, torch.stack([squared, norm])]))
        b_dec_D = numbers_V[:d_in].clone()
        return b_dec_D, numbers_V[d_in], numbers_V[d_in + 1] + b_dec_D.square().sum()

    def _clip(self, squared_norm: Tensor) -> Tensor:
        return (self.config.clip_norm / (squared_norm.sqrt() + 1e-6)).clamp(max=1.0)

    def _update_by_blocks(self, own: OwnGradients, clip: Tensor) -> None:
        parameters, adam = self.parameters(), self._adam()
        for name, gradient in own.matrices.items():
            assert not isinstance(gradient, Tensor)
            decoder, aux = name == "W_dec", own.aux.get(name, [])
            cone = self.cone if decoder else None
            latent_update_(parameters[name], *self.moments[name], gradient, aux, clip, adam, decoder, cone)

    def _update_whole(self, gradients: dict[str, Tensor], clip: Tensor) -> None:
        parameters, adam = self.parameters(), self._adam()
        for name, gradient_SD in gradients.items():
            adam_(parameters[name], *self.moments[name], gradient_SD, clip, adam)
        if "W_dec" not in gradients:
            return
        W_dec = parameters["W_dec"]
        W_dec /= torch.linalg.vector_norm(W_dec, dim=1, keepdim=True) + torch.finfo(W_dec.dtype).eps
        if self.cone is not None:
            self.cone.hold_(W_dec)


class _Piece(NamedTuple):
    """Of some rows of a batch: codes and gradients of the rank's latents, the smallest activation that any rank keeps,
    the penalty; of this rank's share of the rows the gradient of b_dec [D], and the squared error."""

    codes: SparseCodes
    smallest: Tensor
    penalty: Tensor | None
    gradients: OwnGradients
    of_b_dec_D: Tensor
    squared: Tensor


def _sum(squares: list[Tensor], vectors: dict[str, Tensor]) -> Tensor:
    """Of a rank's squares, and of those of vectors."""
    several = [*squares, *(vector.square().sum() for vector in vectors.values())]
    wide = several[0].dtype
    return torch.stack([each.to(wide) for each in several]).sum()
