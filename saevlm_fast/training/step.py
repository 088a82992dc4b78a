"""One optimiser step of the paper's recipe, written out: sparse losses and gradients, then the per-latent update.

The dense [B, d_sae] matrix of activations is never formed: encoding returns sparse codes, and every gradient is a sum
over their entries. tests/helpers/dense_trainer.py is the same in dense autograd; the two agree to 1e-5 over runs.
"""

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from saevlm_fast.config import CALIBRATED, PENALISED, TrainConfig
from saevlm_fast.errors import require
from saevlm_fast.kernels.common import Cone
from saevlm_fast.kernels.latent_gradient import EntryGradient, RowGradient, clip_coefficient
from saevlm_fast.kernels.latent_update import AdamSettings, adam_, latent_update_
from saevlm_fast.kernels.topk_encode import batch_topk_encode, topk_encode
from saevlm_fast.kernels.topk_encode_cuda import in_one_chunk, screens_cuda
from saevlm_fast.runtime import exactly
from saevlm_fast.sae import SparseAutoencoder, first_rows
from saevlm_fast.sparse_codes import SparseCodes, smallest_positive
from saevlm_fast.training.accumulate import SummedGradients, in_turns, joined, joins
from saevlm_fast.training.any_device import is_dense, update_, whole_gradients
from saevlm_fast.training.dead_latents import DeadBound, DeadLatents, padded_size
from saevlm_fast.training.gradients import Gradients, Losses, loss_and_gradients
from saevlm_fast.training.low_copy import LowCopy
from saevlm_fast.training.mono import Embeddings, MonoTerm
from saevlm_fast.training.penalty import Penalty, encode_penalised

if TYPE_CHECKING:
    from saevlm_fast.training.gpu_codes import Asked
    from saevlm_fast.training.gpu_step import State


class StepOutput(NamedTuple):
    """What a step measured: losses, reconstruction x_hat [B, d_in] (all groups), codes, number of dead latents.

    n_dead is a 0-d tensor on a GPU, where some can be dead. codes are None of a step that goes by matrix products alone
    (gpu_dense.py) or sums gradients of micro-batches, n_fired then says how many of their entries fire (0-d).
    """

    losses: Losses
    x_hat_BD: Tensor
    codes: SparseCodes | None
    n_dead: int | Tensor
    n_fired: Tensor | None = None


class Stepper:
    """An SAE with the state that training needs, and the step that advances it.

    Attributes:
        sae: trained in place; sees activations already divided by the norm factor. On a GPU whose encoder screens,
            W_enc is also kept in float16: change it by torch's in-place methods or anew, not through `.data`.
        config: the recipe.
        moments: Adam's first and second moments by parameter name; W_enc's are latent-major [d_sae, d_in].
        idle_S: rows seen since each latent last fired, int64.
        n_steps: steps done. bad_step: first step with a non-finite loss, -1 if none (0-d, on the device).
        n_listed: on a GPU, length of the announced step's padded list of dead latents.
        asked: on a GPU, what the announced step of a relu or jumprelu SAE had to ask.
        sparsity: the share of their penalty in it, as the device knows it.
        low: W_enc in float16, on a GPU whose encoder screens.
        cone: where the decoder's rows are held, of a soft-frozen control: around those that config.seed begins with.

    What changes from step to step reaches the device in `announce` alone, and `device_step` reads nothing else that
    changes. On a GPU it can therefore be captured in a CUDA graph, with x_BD at a fixed address, and replayed after
    `announce`, as long as n_listed stays what it was; training/capture.py does so.

    How many latents fire of a relu or jumprelu SAE (penalised) has to be asked. On a GPU such a step is in two parts:
    `asked_first` makes the candidates, `answer` asks how many there are, and `device_step` goes on; what it launches
    depends on that. While a great part of them fires it goes by matrix products: gpu_dense.py, any_device.py on a CPU.

    Raises ValueError if rows of W_dec are not unit: projection and norms take that for granted; every step sees to it.
    Also if the recipe does not fit the SAE (TrainConfig.check_fits).
    """

    def __init__(self, sae: SparseAutoencoder, config: TrainConfig):
        config.check_fits(sae.config)
        sae.check_own_parameters()
        _check_unit_rows(sae.W_dec.detach())
        self.penalised = sae.config.architecture in PENALISED
        # A dead ReLU latent is below 0 on every row, where the auxiliary loss has no gradient.
        self.auxk_alpha = 0.0 if sae.config.architecture == "relu" else config.auxk_alpha
        self.sae = sae
        self.config = config
        self.moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in self.parameters().items()}
        device = sae.b_dec.device
        self.idle_S = torch.zeros(sae.config.d_sae, dtype=torch.int64, device=device)
        self.bad_step = torch.tensor(-1, dtype=torch.int64, device=device)
        self.n_steps = 0
        self.n_rows_seen = 0
        self.dead_bound = DeadBound()
        self.n_listed = 0
        self.low = LowCopy(sae)
        # As the device knows them, in one piece of memory: Adam's schedule, and n_steps.
        self._announced = torch.zeros(3, dtype=torch.int64, device=device)
        self.adam_schedule, self.step_index = self._announced[:2].view(torch.float64), self._announced[2]
        self.asked: Asked | None = None
        self.sparsity = torch.ones((), dtype=torch.promote_types(sae.W_dec.dtype, torch.float32), device=device)
        self.cone = self._cone()
        self.group_ends_G = torch.tensor(sae.config.group_ends, device=device)

    def _cone(self) -> Cone | None:
        """Kept beside the weights: to draw its rows anew takes most of a small step's time (docs/decisions.md)."""
        if self.config.control != "soft-frozen":
            return None
        rows_SD = first_rows(self.sae.config, self.config.seed)
        return Cone(rows_SD.to(self.sae.W_dec.device, self.sae.W_dec.dtype), self.config.least_cosine)

    def parameters(self) -> dict[str, Tensor]:
        """Parameters by name, detached views; W_enc as its latent-major memory [d_sae, d_in]."""
        sae = self.sae
        named = {"W_enc": sae.W_enc.T, "b_enc": sae.b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
        if sae.config.architecture == "jumprelu":
            named["threshold"] = sae.threshold
        return {name: parameter.detach() for name, parameter in named.items()}

    def counters(self) -> dict[str, Tensor]:
        """What else there is of latents, by the names that checkpoints have for it."""
        return {"idle": self.idle_S, "threshold": self.sae.threshold}

    @torch.no_grad()
    @exactly
    def step(self, x_BD: Tensor, e_BE: Tensor | None = None) -> StepOutput:
        """One training step on a batch [B, d_in] in normalised units. e_BE: embeddings of its rows for MonoLoss, which
        takes the batch itself if they are None."""
        self.announce(len(x_BD))
        if self.asks(x_BD):
            self.asked = self.asked_first(x_BD)
            self.answer()
        return self.device_step(x_BD, e_BE)

    def announce(self, n_rows: int) -> None:
        """Begin a step of n_rows rows: counters move on, and the device is told its number and Adam's schedule.

        ValueError: n_rows is 0, of which there is no mean loss.
        """
        require(n_rows > 0, f"x_BD: {n_rows} rows; a step needs at least 1")
        self.asked = None  # of a step that raised
        self.n_steps += 1
        self.n_rows_seen += n_rows
        self._tell_device(self._adam().schedule_values())
        if self.penalised:
            self.sparsity.fill_(self.config.sparsity_scale(self.n_steps - 1))
        if self.idle_S.is_cuda and self._some_can_be_dead():
            bound = self.dead_bound.latents(self.idle_S, n_rows, self.n_rows_seen, self.config.dead_after)
            self.n_listed = padded_size(bound, self.sae.config.d_sae)

    def asks(self, x_BD: Tensor) -> bool:
        """Whether a step on this batch asks for its size, and can do so at once."""
        whole = min(self.config.accumulate, len(x_BD)) == 1 and self.config.mono_weight is None
        if not (self.penalised and whole and screens_cuda(x_BD, self.sae.W_enc)):
            return False
        return not self._too_wide(x_BD) and in_one_chunk(len(x_BD), self.sae.config.d_sae)

    def can_be_captured(self, x_BD: Tensor) -> bool:
        """Whether a step on this batch asks the host nothing, but what `answer` asks at its beginning."""
        return self.asks(x_BD) if self.penalised else not (x_BD.is_cuda and self._too_wide(x_BD))

    def _too_wide(self, x_BD: Tensor) -> bool:
        """For the kernels of a GPU's step: of TopK and its like such rows are refused, others go another way."""
        from saevlm_fast.kernels.step_rows_triton import MAX_WIDTH

        return x_BD.shape[1] > MAX_WIDTH and (self.penalised or self.config.accumulate > 1)

    @torch.no_grad()
    def asked_first(self, x_BD: Tensor) -> "Asked":
        """What the announced step begins with, if it asks: for `answer`."""
        from saevlm_fast.training.gpu_codes import asked_first

        with torch.cuda.device_of(x_BD):
            return asked_first(self.sae, self.config, x_BD, self.low.current())

    def answer(self) -> int:
        """How many places there are for the entries of a step that has asked, 0: too many. The device is waited for."""
        assert self.asked is not None
        self.asked = self.asked.answered()
        return self.asked.n_places

    def _tell_device(self, schedule: tuple[float, float]) -> None:
        """The announced step's index, and Adam's schedule."""
        if self._announced.is_cuda:
            from saevlm_fast.kernels.latent_update_triton import launch_announce

            with torch.cuda.device_of(self._announced):
                launch_announce(self._announced, schedule, self.n_steps - 1)
            return
        self.step_index.fill_(self.n_steps - 1)
        self.adam_schedule.copy_(torch.tensor(schedule, dtype=torch.float64))

    @torch.no_grad()
    def device_step(self, x_BD: Tensor, e_BE: Tensor | None = None) -> StepOutput:
        """The step that was announced."""
        mono = self._mono(x_BD if e_BE is None else e_BE)
        output = self._gpu_step(x_BD, mono) if x_BD.is_cuda and not self._too_wide(x_BD) else None
        if output is not None:
            return output
        if self.config.accumulate > 1:
            return self._accumulated_step(x_BD)
        codes, penalty = self._encode(x_BD)
        self._track(codes.fired(), len(x_BD), self._smallest(codes))
        dead = self._dead_latents()
        if penalty is not None and (x_BD.is_cuda or is_dense(codes)):
            return self._whole_step(x_BD, codes, dead, penalty, mono)
        return self._sparse_step(x_BD, codes, dead, penalty, mono)

    def _sparse_step(
        self, x_BD: Tensor, codes: SparseCodes, dead: DeadLatents, penalty: Penalty | None, mono: MonoTerm | None = None
    ) -> StepOutput:
        """The same by the entries of the codes, on a CPU."""
        given = codes, dead, self.auxk_alpha, penalty, self.config.frozen, mono
        x_hat_BD, losses, gradients = loss_and_gradients(self.sae, x_BD, *given)
        self._note_bad(losses)
        self._update(gradients)
        return StepOutput(losses, x_hat_BD, codes, dead.number)

    def _mono(self, e_BE: Tensor) -> MonoTerm | None:
        weight = self.config.mono_weight
        return None if weight is None else MonoTerm(Embeddings.of(e_BE.to(self.sae.W_dec.dtype)), weight)

    def _note_bad(self, losses: Losses) -> None:
        first_bad = (self.bad_step < 0) & ~losses.overall.isfinite()
        self.bad_step.copy_(torch.where(first_bad, self.step_index, self.bad_step))

    def _whole_step(
        self, x_BD: Tensor, codes: SparseCodes, dead: DeadLatents, penalty: Penalty, mono: MonoTerm | None
    ) -> StepOutput:
        """The same on any device, of a penalised SAE."""
        given = codes, dead, self.auxk_alpha, penalty, self.config.frozen, mono
        x_hat_BD, numbers, gradients = whole_gradients(self.sae, x_BD, *given)
        losses = Losses(*numbers)
        self._note_bad(losses)
        update_(self.parameters(), self.moments, gradients, self.config.clip_norm, self._adam(), self.cone)
        self._clamp_threshold()
        return StepOutput(losses, x_hat_BD, codes, dead.number)

    def _accumulated_step(self, x_BD: Tensor) -> StepOutput:
        """The same in micro-batches. The rows of the codes are theirs, one after the other."""
        n = min(self.config.accumulate, len(x_BD))
        parts = [self._encode(x_BD[0::n].contiguous())]
        dense = parts[0][1] is not None and is_dense(parts[0][0])
        if x_BD.is_cuda or dense or not joins(self.sae.config, len(x_BD)):
            return self._summed_step(x_BD, n, parts)
        parts += [self._encode(x_BD[i::n].contiguous()) for i in range(1, n)]
        codes, penalty = joined(parts, len(x_BD))
        smallest = torch.stack([self._smallest(each) for each, _ in parts]).mean()
        self._track(codes.fired(), len(x_BD), smallest)
        ordered_BD = torch.cat([x_BD[i::n] for i in range(n)])
        output = self._sparse_step(ordered_BD, codes, self._dead_latents(), penalty)
        return output._replace(x_hat_BD=in_turns(output.x_hat_BD, n))

    def _summed_step(self, x_BD: Tensor, n: int, first: list[tuple[SparseCodes, Penalty | None]]) -> StepOutput:
        """The same, on any device, without what the whole batch takes. first: its first micro-batch, taken out: no two
        are held."""
        sums, smallest = SummedGradients(self.sae, x_BD, n), []
        for number in range(n):
            piece_BD = x_BD[number::n].contiguous()
            codes, penalty = first.pop() if first else self._encode(piece_BD)
            sums.add(number, piece_BD, codes, penalty)
            smallest.append(self._smallest(codes))
            del codes, penalty
        self._track(sums.fired_S, len(x_BD), torch.stack(smallest).mean())
        dead = self._dead_latents()
        losses = Losses(*sums.finish(dead, self.auxk_alpha))
        self._note_bad(losses)
        update_(self.parameters(), self.moments, sums.gradients, self.config.clip_norm, self._adam())
        self._clamp_threshold()
        return StepOutput(losses, sums.x_hat_BD, None, dead.number, sums.fired_S.sum())

    def _clamp_threshold(self) -> None:
        """Below 0 a threshold acts as 0 and has no gradient: it stays where it has one."""
        if self.sae.config.architecture == "jumprelu":
            self.sae.threshold.clamp_(min=0)

    def _gpu_step(self, x_BD: Tensor, mono: MonoTerm | None = None) -> StepOutput | None:
        """The same on a GPU, by the entries of the codes; None, and nothing is changed: these are too many."""
        from saevlm_fast.training.gpu_codes import gpu_codes
        from saevlm_fast.training.gpu_step import gpu_step

        sae, config, n = self.sae, self.config, min(self.config.accumulate, len(x_BD))
        with torch.cuda.device_of(x_BD):  # Triton launches on the current device, as for a low copy that is made here
            state = self._device_state(x_BD)
            low = state.low
            asked, self.asked = self.asked, None
            found = gpu_codes(sae, config, self.sparsity, x_BD, low, asked)
            if found is None:
                return self._dense_step(x_BD, state) if mono is None and low is not None else None
            given = found.codes, found.centred, self._dead_latents, mono, found.penalty
            x_hat_BD, losses, dead = gpu_step(sae, config, state, found.x_BD, *given)
            if mono is not None or found.penalty is not None:  # their losses come after the kernel that looks at others
                self._note_bad(losses)
            if found.smallest is not None:
                self._move_threshold(found.smallest)
            self._clamp_threshold()
        self.was_replayed()
        if n > 1:
            x_hat_BD = in_turns(x_hat_BD, n)
        return StepOutput(losses, x_hat_BD, found.codes, dead.number)

    def _dense_step(self, x_BD: Tensor, state: "State") -> StepOutput:
        """The same by matrix products, of a relu or jumprelu SAE of which many latents fire."""
        from saevlm_fast.training.gpu_dense import DenseGradients, dense_update

        config, n = self.config, min(self.config.accumulate, len(x_BD))
        assert state.low is not None
        pieces = [x_BD[i::n] for i in range(n)]
        sums, start = DenseGradients(self.sae, config, state.low, x_BD if n == 1 else torch.cat(pieces)), 0
        for piece_BD in pieces:
            sums.add(slice(start, start + len(piece_BD)), self.sparsity)
            start += len(piece_BD)
        self.idle_S.copy_(torch.where(sums.fired_S > 0, 0, self.idle_S + len(x_BD)))
        dead = self._dead_latents()
        overall, mse, aux_loss = dense_update(state, config, sums, dead, self.auxk_alpha)
        losses = Losses(overall, mse, aux_loss, sums.penalty)
        self._note_bad(losses)
        self._clamp_threshold()
        self.was_replayed()
        x_hat_BD = sums.x_hat_BD if n == 1 else in_turns(sums.x_hat_BD, n)
        return StepOutput(losses, x_hat_BD, None, dead.number, sums.fired_S.sum())

    def _device_state(self, x_BD: Tensor) -> "State":
        """What a GPU's step on this batch reads and moves on."""
        from saevlm_fast.training.gpu_step import State

        low = self.low.current() if screens_cuda(x_BD, self.sae.W_enc, self.sae.config.k or 1) else None
        counters = self.step_index, self.bad_step, self.adam_schedule
        return State(self.parameters(), self.moments, self.idle_S, *counters, self.group_ends_G, low, self.cone)

    def _encode(self, x_BD: Tensor) -> tuple[SparseCodes, Penalty | None]:
        """In CSR form, in the dtype of the weights; with the penalty of those that have one."""
        if self.penalised:
            return encode_penalised(self.sae, self.config, self.n_steps - 1, x_BD)
        sae, k = self.sae, self.sae.config.known_k
        W_enc, b_enc, b_dec = sae.W_enc.detach(), sae.b_enc.detach(), sae.b_dec.detach()
        if sae.config.architecture == "topk":
            topk = topk_encode(x_BD, W_enc, b_enc, b_dec, k)
            codes = SparseCodes.from_flat(*topk, None, sae.config.d_sae).rows()
        else:
            batch_topk = batch_topk_encode(x_BD, W_enc, b_enc, b_dec, k)
            codes = SparseCodes.from_flat(*batch_topk, sae.config.d_sae)
        return codes.to(dtype=sae.W_dec.dtype), None

    def was_replayed(self) -> None:
        """Kernels and CUDA graphs that write parameters move no version counter: moved here."""
        torch.autograd.graph.increment_version([*self.parameters().values(), self.sae.threshold])
        self.low.was_written()

    def _track(self, fired_S: Tensor, n_rows: int, smallest: Tensor) -> None:
        """Dead-latent counters and the moving threshold, as upstream: before the losses. smallest: activation kept."""
        self.idle_S.copy_(torch.where(fired_S > 0, 0, self.idle_S + n_rows))
        if self.sae.config.architecture in CALIBRATED:
            self._move_threshold(smallest)

    def _smallest(self, codes: SparseCodes) -> Tensor:
        """Activation that is kept, where the threshold follows it (0-d)."""
        follows = self.sae.config.architecture in CALIBRATED
        return smallest_positive(codes.top_acts).float() if follows else codes.top_acts.new_zeros(())

    def _move_threshold(self, smallest: Tensor) -> None:
        """Towards the smallest activation that was kept."""
        old, beta = self.sae.threshold, self.config.threshold_beta
        new = torch.where(old < 0, smallest, beta * old + (1 - beta) * smallest)
        self.sae.threshold.copy_(torch.where(self.step_index > self.config.threshold_start, new, old))

    def _some_can_be_dead(self) -> bool:
        return self.auxk_alpha > 0 and self.n_rows_seen >= self.config.dead_after

    def _dead_latents(self) -> DeadLatents:
        """Latents that are dead after this batch; on a GPU as many places as were announced."""
        if not self._some_can_be_dead():
            return DeadLatents(self.idle_S.new_empty(0), 0)
        if not self.idle_S.is_cuda:
            latents_A = torch.nonzero(self.idle_S >= self.config.dead_after).squeeze(1)
            return DeadLatents(latents_A, len(latents_A))
        if self.n_listed == 0:
            return DeadLatents(self.idle_S.new_empty(0), 0)
        from saevlm_fast.kernels.dead_list_triton import launch_dead_list

        with torch.cuda.device_of(self.idle_S):
            return DeadLatents(*launch_dead_list(self.idle_S, self.config.dead_after, self.n_listed))

    def _update(self, gradients: Gradients) -> None:
        rows = gradients.rows()
        parts: list[EntryGradient | RowGradient] = []
        for gradient, aux in rows.values():
            parts += [gradient, *aux]
        vectors = gradients.vectors()
        clip = clip_coefficient(parts, list(vectors.values()), self.config.clip_norm)
        adam, parameters = self._adam(), self.parameters()
        for name, (gradient, aux) in rows.items():
            decoder = name == "W_dec"
            cone = self.cone if decoder else None
            latent_update_(parameters[name], *self.moments[name], gradient, aux, clip, adam, decoder, cone)
        for name, gradient_vector in vectors.items():
            adam_(parameters[name], *self.moments[name], gradient_vector, clip, adam)
        self._clamp_threshold()

    def learning_rate(self) -> float:
        """Of the announced step, the n_steps-th."""
        return self.config.lr_at(self.n_steps - 1, self.sae.config.d_sae)

    def mean_threshold(self) -> Tensor:
        """Of all latents, or the one that all have (0-d)."""
        return self.sae.threshold.mean()

    def counted(self, output: StepOutput) -> tuple[Tensor, Tensor]:
        """Entries of a step's codes that fire, and latents that are dead after it (0-d)."""
        n_fired = output.n_fired if output.codes is None else (output.codes.top_acts > 0).sum()
        assert n_fired is not None
        return n_fired, (self.idle_S >= self.config.dead_after).sum()

    def batch_rows(self, x_BD: Tensor) -> int:
        """Rows of a step's batch."""
        return len(x_BD)

    def variance(self, x_BD: Tensor) -> Tensor:
        """x.var(0, correction=0).sum() of a step's batch, in half the time."""
        return (x_BD - x_BD.mean(0)).square_().sum() / len(x_BD)

    def _adam(self) -> AdamSettings:
        """Adam's settings in the announced step."""
        return AdamSettings(self.learning_rate(), self.config.betas, self.config.eps, self.n_steps)


def _check_unit_rows(W_dec_SD: Tensor) -> None:
    norm_S = torch.linalg.vector_norm(W_dec_SD.float(), dim=1)
    worst = int((norm_S - 1).abs().argmax())
    require(
        abs(float(norm_S[worst]) - 1) < 0.01,
        f"sae: row {worst} of W_dec has norm {float(norm_S[worst]):.4g}, must be 1 (within 0.01)",
    )
