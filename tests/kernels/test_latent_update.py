"""The optimiser step on a CPU: against torch.optim.Adam in float64. A GPU's is in test_latent_step.py."""

import pytest
import torch
from torch import Tensor

import saevlm_fast.kernels.latent_gradient as latent_gradient
from saevlm_fast.kernels import reference
from saevlm_fast.kernels.grouping import entry_rows, group_by_latent
from saevlm_fast.kernels.latent_gradient import (
    EntryGradient,
    RowGradient,
    clip_coefficient,
    dense_gradient_rows,
    entry_gradient,
)
from saevlm_fast.kernels.latent_update import AdamSettings, adam_, latent_update_
from sparse_codes import random_codes
from test_step import blocks  # noqa: F401

pytestmark = pytest.mark.usefixtures("blocks")

BETAS, EPS, LR, CLIP_NORM = (0.9, 0.999), 1e-8, 1e-2, 1.0
# rows, k, d_sae, d_in. Latent 0 fires in nearly every row, k = 1 leaves all others without an entry.
SHAPES = [(37, 5, 9, 24), (101, 1, 3, 7), (0, 3, 7, 5), (40, 3, 7, 1), (9, 4, 6, 300)]
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5}


def inputs_of_step(shape: tuple[int, int, int, int], dtype: torch.dtype, seed: int):
    """weights, ids, latent offsets and source of one segment gradient per latent."""
    n_rows, k, d_sae, d_in = shape
    acts, latents, row_offsets = random_codes(n_rows, k, d_sae, "csr", dtype, seed)
    order_M, offsets_S1 = group_by_latent(latents, row_offsets, d_sae)
    rows_M = entry_rows(latents, row_offsets).clamp(max=max(n_rows - 1, 0))[order_M]
    source_BD = torch.randn(n_rows, d_in, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return acts.flatten()[order_M], rows_M, offsets_S1, source_BD.to(dtype)


def truth_inputs(inputs) -> tuple[Tensor, ...]:
    """In float64, without the padding (whose activations are NaN)."""
    weights_M, ids_M, offsets_S1, source_BD = inputs
    end = int(offsets_S1[-1])
    return weights_M[:end].double(), ids_M[:end], offsets_S1, source_BD.double()


def settings(step: int) -> AdamSettings:
    return AdamSettings(LR, BETAS, EPS, step)


def gradient_of(weights_M, ids_M, offsets_S1, source_RD, unit_rows_SD=None) -> EntryGradient:
    """entry_gradient, the dot products of the entries made here."""
    dots_M = None
    if unit_rows_SD is not None:
        latents_M = torch.arange(len(unit_rows_SD)).repeat_interleave(offsets_S1.diff())
        dots_M = torch.full_like(weights_M, torch.nan)  # of the padding too, which nobody reads
        dots_M[: len(latents_M)] = (source_RD[ids_M[: len(latents_M)]] * unit_rows_SD[latents_M]).sum(1)
    return entry_gradient(weights_M, ids_M, offsets_S1, source_RD, dots_M)


class Trained:
    """A decoder, an encoder and a bias in the hands of the engine."""

    def __init__(self, shape, dtype):
        _, _, d_sae, d_in = shape
        generator = torch.Generator().manual_seed(7)
        draw = lambda *size: torch.randn(*size, generator=generator, dtype=torch.float64)  # noqa: E731
        unit_rows = torch.nn.functional.normalize(draw(d_sae, d_in), dim=1)
        start = {"W_dec": unit_rows, "W_enc": draw(d_sae, d_in), "bias": draw(1500)}
        self.parameters = {name: p.to(dtype, copy=True) for name, p in start.items()}
        self.moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in self.parameters.items()}

    def step(self, n: int, inputs, d_bias: Tensor, aux: RowGradient | None) -> None:
        W_dec, W_enc, bias = self.parameters.values()
        dec = gradient_of(*inputs, W_dec)
        enc = gradient_of(*inputs)
        clip = clip_coefficient([dec, enc, *([aux] if aux else [])], [d_bias], CLIP_NORM)
        adam = settings(n)
        latent_update_(W_dec, *self.moments["W_dec"], dec, [], clip, adam, True)
        extra = [aux] if aux else []
        latent_update_(W_enc, *self.moments["W_enc"], enc, extra, clip, adam, False)
        adam_(bias, *self.moments["bias"], d_bias.clone(), clip, adam)  # which is clipped in place


class Truth:
    """The same with torch.optim.Adam and clip_grad_norm_ on dense float64 gradients."""

    def __init__(self, trained: Trained):
        copies = {name: p.to("cpu", torch.float64, copy=True) for name, p in trained.parameters.items()}
        self.parameters = {name: p.requires_grad_() for name, p in copies.items()}
        self.optimizer = torch.optim.Adam(self.parameters.values(), lr=LR, betas=BETAS, eps=EPS)

    def step(self, inputs, d_bias: Tensor, aux: RowGradient | None) -> None:
        W_dec, W_enc, bias = self.parameters.values()
        inputs = truth_inputs(inputs)
        W_dec.grad = reference.latent_gradient(*inputs, W_dec.detach())
        W_enc.grad, bias.grad = reference.latent_gradient(*inputs, None), d_bias.cpu().double()
        if aux:
            W_enc.grad[aux.latents_A.cpu()] += aux.rows_AD.cpu().double()
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), CLIP_NORM)
        self.optimizer.step()
        with torch.no_grad():
            W_dec /= W_dec.norm(dim=1, keepdim=True)


def auxiliary(shape, dtype, seed: int) -> RowGradient:
    """Rows of the last two latents. One that fires has a row already: as two losses, their norms would not add up."""
    d_sae, d_in = shape[2:]
    rows_AD = torch.randn(2, d_in, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    latents_A = torch.arange(d_sae - 2, d_sae)
    return RowGradient(latents_A, rows_AD.to(dtype), rows_AD.square().sum().to(dtype))


def run(shape, dtype, n_steps: int = 2) -> tuple[Trained, Truth]:
    trained = Trained(shape, dtype)
    truth = Truth(trained)
    for n in range(1, n_steps + 1):
        inputs = inputs_of_step(shape, dtype, seed=n)
        d_bias = torch.randn(1500, generator=torch.Generator().manual_seed(n), dtype=torch.float64).to(dtype)
        # Only where the last two latents do not fire.
        aux = auxiliary(shape, dtype, n) if shape[1] == 1 else None
        trained.step(n, inputs, d_bias, aux)
        truth.step(inputs, d_bias, aux)
    return trained, truth


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_steps_equal_optim_adam_in_float64(shape, dtype) -> None:
    trained, truth = run(shape, dtype)
    close = dict(rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype], check_dtype=False)
    for name, p in trained.parameters.items():
        expected, state = truth.parameters[name].detach(), truth.optimizer.state[truth.parameters[name]]
        torch.testing.assert_close(p, expected, **close)
        torch.testing.assert_close(trained.moments[name][0], state["exp_avg"], **close)
        torch.testing.assert_close(trained.moments[name][1], state["exp_avg_sq"], **close)


@pytest.mark.parametrize("lengths", [[0, 1, 1, 2, 0, 5, 1, 0], [1, 1, 1], [0, 0, 4], [0], [2, 3, 1, 4, 2] * 9], ids=str)
def test_squared_norm_of_entries_on_the_cpu(lengths: list[int]) -> None:
    """Single entries take a way of their own; so do latents without any."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *size: torch.randn(*size, generator=generator, dtype=torch.float64)  # noqa: E731
    n, d_in = sum(lengths), 6
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    inputs = draw(n), torch.randint(0, 4, (n,), generator=generator), offsets, draw(4, d_in)
    W = torch.nn.functional.normalize(draw(len(lengths), d_in), dim=1)
    for unit_rows in (None, W):
        truth = reference.latent_gradient(*inputs, unit_rows).square().sum()
        gradient = gradient_of(*inputs, unit_rows)
        torch.testing.assert_close(gradient.squared_norm, truth)
        assert float(gradient.squared_norm_bound()) >= float(truth) * (1 - 1e-12)
        if max(lengths) <= 1:
            torch.testing.assert_close(gradient.squared_norm_bound(), truth, rtol=1e-2, atol=0)


@pytest.mark.parametrize("largest", ["decoder", "encoder", "rows", "vector", "none"])
@pytest.mark.parametrize("norm", [0.5, 0.9985, 1.001, 4.0])
def test_the_clip_coefficient_with_and_without_making_rows(largest: str, norm: float, monkeypatch) -> None:
    """Whichever part has the norm, the factor is clip_grad_norm_'s; if it is known to be 1, no row is made for it."""
    offsets, ids, source = (
        torch.tensor([0, 1, 1, 3]),
        torch.tensor([0, 1, 1]),
        torch.eye(3, 4),
    )  # parallel: bound = norm
    W = torch.eye(4)[[3, 3, 3]]
    scale = {name: norm if name == largest else 1e-4 for name in ("decoder", "encoder", "rows", "vector")}
    weights = torch.tensor([0.6, 0.4, 0.4])  # of norm 1
    decoder = gradient_of(weights * scale["decoder"], ids, offsets, source, W)
    encoder = gradient_of(weights * scale["encoder"], ids, offsets, source)
    rows = dense_gradient_rows(torch.tensor([1]), torch.tensor([[0.0, scale["rows"], 0.0, 0.0]]))
    vector = torch.tensor([scale["vector"], 0.0])
    made, norms = [], latent_gradient._norms
    monkeypatch.setattr(latent_gradient, "_norms", lambda *inputs: made.append(1) or norms(*inputs))
    clip = clip_coefficient([decoder, encoder, rows], [vector], 1.0)
    true_norm = torch.tensor(list(scale.values())).norm()
    torch.testing.assert_close(clip, (1 / (true_norm + 1e-6)).clamp(max=1))
    assert (not made) == (float(true_norm) < 0.999)


@pytest.mark.parametrize("parallel", [1.0, 10.0, 100.0, 1000.0, 10_000.0])
def test_the_bound_holds_however_long_the_part_along_the_row(parallel: float) -> None:
    """512 equal entries in float32, 1.01 across the row, much more along it: what is taken off must not hide it."""
    source, W = torch.tensor([[parallel, 1.01]]) / 512, torch.tensor([[1.0, 0.0]])
    entries = torch.ones(512), torch.zeros(512, dtype=torch.int64), torch.tensor([0, 512]), source
    assert float(gradient_of(*entries, W).squared_norm_bound()) >= 1.01**2


def test_a_loose_bound_does_not_clip() -> None:
    """Two entries that cancel: the bound is 4, the norm 0."""
    entries = torch.tensor([2.0, -2.0]), torch.tensor([0, 0]), torch.tensor([0, 2]), torch.eye(1, 3)
    assert float(clip_coefficient([gradient_of(*entries)], [torch.zeros(1)], 1.0)) == 1.0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_is_not_taken_for_a_small_one(bad: float) -> None:
    entries = torch.tensor([bad]), torch.tensor([0]), torch.tensor([0, 1]), torch.ones(1, 3)
    assert float(clip_coefficient([gradient_of(*entries)], [torch.zeros(1)], 1.0)) != 1.0


def test_repeats_bit_identically() -> None:
    (first, _), (second, _) = (run((70, 2, 3, 13), torch.float32) for _ in range(2))
    for name, p in first.parameters.items():
        for one, other in zip((p, *first.moments[name]), (second.parameters[name], *second.moments[name])):
            assert torch.equal(one, other)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_gradient_reaches_every_parameter(bad: float) -> None:
    """As in the dense step: the clip factor is NaN, or 0 times infinity is; nothing is hidden."""
    trained = Trained((37, 5, 11, 24), torch.float32)
    weights_M, ids_M, offsets_S1, source_BD = inputs_of_step((37, 5, 11, 24), torch.float32, 1)
    source_BD[3, 5] = bad
    trained.step(1, (weights_M, ids_M, offsets_S1, source_BD), torch.ones(1500), None)
    fired = torch.zeros(11, dtype=torch.bool)
    latent_of = torch.repeat_interleave(torch.arange(11), offsets_S1.diff())
    fired[latent_of[ids_M[: len(latent_of)] == 3]] = True
    assert bool(fired.any())
    assert not bool(fired.all())
    W_dec, W_enc, bias = trained.parameters.values()
    assert bool(W_dec[fired].isnan().all())
    assert bool(W_enc[fired][:, 5].isnan().all())
    if bad != bad:
        assert bool(W_dec.isnan().all())
        assert bool(W_enc.isnan().all())
        assert bool(bias.isnan().all())


def test_gradients_of_two_losses_add_up() -> None:
    W, zeros = torch.randn(6, 3, dtype=torch.float64), torch.zeros(6, 3, dtype=torch.float64)
    draw = torch.randn(3, 3, dtype=torch.float64)
    entries = torch.ones(3, dtype=torch.float64), torch.arange(3), torch.tensor([0, 0, 1, 2, 2, 2, 3]), draw
    second = RowGradient(torch.tensor([0, 2]), torch.randn(2, 3, dtype=torch.float64), torch.zeros(()))
    g = zeros.index_add(0, torch.tensor([1, 2, 5]), draw).index_add(0, second.latents_A, second.rows_AD)
    expected = reference.latent_update(W, zeros, zeros, g, 0.5, LR, BETAS, EPS, 1, False)
    state = [t.clone() for t in (W, zeros, zeros)]
    clip = torch.tensor(0.5, dtype=torch.float64)
    latent_update_(*state, gradient_of(*entries), [second], clip, settings(1), False)
    for out, truth in zip(state, expected):
        torch.testing.assert_close(out, truth)
