"""The step after the encoder on a GPU: losses, clip factor and update in a dozen kernels, nothing asked of the device.

    rows     decoder, losses, gradient of every prefix, dacts          kernels/step_rows_triton.py
    entries  the codes' entries in latent order                        kernels/step_entries_triton.py
    totals   db_enc, idle counters, bound of the norm                  kernels/gradient_norm_triton.py
    clip     by the bound, or by the norm where the bound fails        the same; b_dec
    update   Adam on W_dec, then on W_enc and b_enc                    kernels/latent_update_triton.py

Imported for a GPU's tensors only: these modules load Triton. What changes from step to step is read from the device, so
that a captured CUDA graph can be replayed. docs/kernels.md section 4
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from saevlm_fast.kernels.gradient_norm_triton import launch_clip, launch_decide, launch_totals
from saevlm_fast.kernels.latent_update_triton import Scalars, launch_update
from saevlm_fast.kernels.step_entries_triton import launch_entries, launch_order
from saevlm_fast.kernels.step_rows_triton import launch_rows

Moments = tuple[Tensor, Tensor]

_side_streams: dict[int, torch.cuda.Stream] = {}  # of every device: one for all steps


class Trained(NamedTuple):
    """What a step changes in place: parameters (W_enc latent-major [d_sae, d_in]) and moments by name, idle_S, low."""

    parameters: dict[str, Tensor]
    moments: dict[str, Moments]
    idle_S: Tensor
    low: tuple[Tensor, Tensor, Tensor] | None

    def state(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        """A parameter with its moments."""
        return self.parameters[name], *self.moments[name]


class Recipe(NamedTuple):
    """Constants of a step; threshold: (beta, start) where one is moved."""

    clip_norm: float
    auxk_alpha: float
    betas: tuple[float, float]
    eps: float
    threshold: tuple[float, int] | None


class Counters(NamedTuple):
    """0-d on the device: step_index is read, bad_step and threshold are moved on; Adam's schedule [2] is read."""

    step_index: Tensor
    bad_step: Tensor
    threshold: Tensor
    schedule: Tensor


class Auxiliary(NamedTuple):
    """The auxiliary loss and its gradients, those of W_dec projected: rows of latents_A (d_sae: padding, zero rows)."""

    loss: Tensor
    latents_A: Tensor
    W_enc_AD: Tensor
    b_enc_A: Tensor
    W_dec_AD: Tensor


def gpu_step(
    trained: Trained,
    x_BD: Tensor,
    codes: tuple[Tensor, Tensor, Tensor | None],
    centred: tuple[Tensor, Tensor] | None,
    group_ends_G: Tensor,
    recipe: Recipe,
    counters: Counters,
    auxiliary: Callable[[Tensor], Auxiliary | None],
) -> tuple[Tensor, Tensor]:
    """x_hat_BD of the last prefix and the losses [3] (overall, mse, aux); `trained` and `counters` are moved on.

    Args:
        trained: moved on in place.
        x_BD: the batch.
        codes: acts, latents and row_offsets as kernels/reference.py has them.
        centred: (x - b_dec, its norms [B]), if the encoder left them.
        group_ends_G: of the Matryoshka groups, int64 on the device.
        recipe: constants.
        counters: what the device knows of the run.
        auxiliary: the auxiliary loss given x_hat_BD; called once idle_S has moved on.
    """
    acts, latents, row_offsets = codes
    n_latents, parameters = len(trained.idle_S), trained.parameters
    with _beside(x_BD) as side:
        with side:
            order = launch_order(latents, row_offsets, n_latents)
        rows = launch_rows(
            x_BD, acts, latents, row_offsets, group_ends_G, parameters["W_dec"], parameters["b_dec"], centred
        )
    entries = launch_entries(acts, rows, order)
    totals = launch_totals(entries, rows, parameters["W_enc"], trained.idle_S)
    aux = auxiliary(rows.x_hat_BD)
    aux_dec, aux_enc, aux_numbers, aux_db_D = _aux_inputs(aux, parameters["W_enc"], totals.db_enc_S)
    decision = launch_decide(rows, totals, counters[:3], _settings(recipe), aux_numbers, aux_db_D)
    clip = launch_clip(
        entries,
        totals,
        decision,
        recipe.clip_norm,
        counters.schedule,
        recipe.betas,
        recipe.eps,
        trained.state("b_dec"),
    )
    scalars = Scalars(clip, counters.schedule, recipe.betas, recipe.eps)
    launch_update(entries, totals.parallel_S, scalars, trained.state("W_dec"), None, aux_dec)
    W_enc, b_enc = trained.state("W_enc"), trained.state("b_enc")
    launch_update(entries, totals.db_enc_S, scalars, W_enc, b_enc, aux_enc, trained.low)
    return rows.x_hat_BD, decision.losses


@contextmanager
def _beside(x_BD: Tensor) -> Iterator[AbstractContextManager[object]]:
    """A context whose kernels run beside those outside it: sorting keeps few of a GPU's processors busy.

    Memory is safe without record_stream: either stream goes on only when the other is done with what it has been given.
    """
    if not x_BD.is_cuda:
        yield nullcontext()
        return
    stream = torch.cuda.current_stream()
    if x_BD.device.index not in _side_streams:
        _side_streams[x_BD.device.index] = torch.cuda.Stream(x_BD.device)
    side = _side_streams[x_BD.device.index]
    side.wait_stream(stream)
    yield torch.cuda.stream(side)
    stream.wait_stream(side)


def _settings(recipe: Recipe) -> dict[str, float]:
    settings = {"clip_norm": recipe.clip_norm, "auxk_alpha": recipe.auxk_alpha}
    if recipe.threshold is not None:
        settings |= {"threshold_beta": recipe.threshold[0], "threshold_start": recipe.threshold[1]}
    return settings


Rows = tuple[Tensor, Tensor]


def _aux_inputs(
    aux: Auxiliary | None, W_enc_SD: Tensor, db_enc_S: Tensor
) -> tuple[Rows | None, Rows | None, Tensor | None, Tensor | None]:
    """(rows, slots) of W_dec and of W_enc, (loss, squared norm), and W_enc^T db_enc of the auxiliary loss alone.

    Its db_enc is added to db_enc_S: dead latents have no entry that fires.
    """
    if aux is None:
        return None, None, None, None
    n_latents, n_dead = len(db_enc_S), len(aux.latents_A)
    rows_A = aux.latents_A.clamp(max=n_latents - 1)
    slots_S1 = torch.full((n_latents + 1,), -1, dtype=torch.int32, device=db_enc_S.device)  # the last is for padding
    slots_S1.scatter_(0, aux.latents_A, torch.arange(n_dead, dtype=torch.int32, device=db_enc_S.device))
    db_enc_S.index_add_(0, rows_A, aux.b_enc_A.to(db_enc_S.dtype))
    squares = [torch.linalg.vector_norm(g).square() for g in (aux.W_enc_AD, aux.W_dec_AD, aux.b_enc_A)]
    numbers = torch.stack([aux.loss, torch.stack(squares).sum()])
    slots_S = slots_S1[:n_latents]
    return (aux.W_dec_AD, slots_S), (aux.W_enc_AD, slots_S), numbers, aux.b_enc_A @ W_enc_SD[rows_A]
