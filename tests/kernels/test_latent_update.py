"""The optimiser step, a GPU's row kernels and the CPU's path: against torch.optim.Adam in float64, and compiled."""

import pytest
import torch
from torch import Tensor

import saevlm_fast.kernels.latent_gradient as latent_gradient
import saevlm_fast.training.step as step_module
from saevlm_fast.kernels import reference
from saevlm_fast.kernels.grouping import entry_rows, group_by_latent
from saevlm_fast.kernels.latent_gradient import (
    RowGradient,
    clip_coefficient,
    dense_gradient_rows,
    entry_gradient,
    latent_gradient_op,
    latent_slots,
)
from saevlm_fast.kernels.latent_update import (
    AdamSettings,
    adam_,
    latent_update_,
    latent_update_op,
    vector_update_op,
)
from saevlm_fast.kernels.topk_encode_screened import LowWeights
from sparse_codes import assert_near_truth, random_codes, segment_sum_magnitude
from static_compile import TARGETS, Case, assert_no_spills
from test_segment_sum import poison  # noqa: F401
from test_step import blocks, make  # noqa: F401

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


def settings(step: int, device) -> AdamSettings:
    adam = AdamSettings(LR, BETAS, EPS, step)
    return adam._replace(schedule=torch.tensor(adam.schedule_values(), dtype=torch.float64, device=device))


class RowKernels:
    """The three launch wrappers in the shape of the functions that training/step.py calls on the CPU."""

    @staticmethod
    def entry_gradient(weights_M, ids_M, offsets_S1, source_RD, unit_rows_SD=None, dots_M=None):
        from saevlm_fast.kernels.latent_gradient_triton import launch_latent_gradient

        rows_CD, slots_S, squared_norms_S = launch_latent_gradient(
            weights_M, ids_M, offsets_S1, source_RD, unit_rows_SD
        )
        return RowGradient(None, rows_CD, squared_norms_S.sum(), slots_S)

    @staticmethod
    def latent_update_(W_SD, exp_avg_SD, exp_avg_sq_SD, gradient, extra, clip, adam, unit_norm, low=None):
        from saevlm_fast.kernels.latent_update_triton import launch_latent_update

        rows = [tensor for g in (gradient, *extra) for tensor in (g.rows_AD, g.slots(len(W_SD)))]
        rows += [None] * (4 - len(rows))
        constants = clip, adam.schedule, adam.betas, adam.eps
        launch_latent_update(W_SD, exp_avg_SD, exp_avg_sq_SD, *rows, *constants, unit_norm, low)

    @staticmethod
    def adam_(p, exp_avg, exp_avg_sq, gradient, clip, adam):
        from saevlm_fast.kernels.latent_update_triton import launch_vector_update

        launch_vector_update(p, exp_avg, exp_avg_sq, gradient, clip, adam.schedule, adam.betas, adam.eps)


class CpuPath:
    """The functions that training/step.py calls on the CPU, the dot products of the entries made here."""

    latent_update_ = staticmethod(latent_update_)

    @staticmethod
    def entry_gradient(weights_M, ids_M, offsets_S1, source_RD, unit_rows_SD=None):
        dots_M = None
        if unit_rows_SD is not None:
            latents_M = torch.arange(len(unit_rows_SD)).repeat_interleave(offsets_S1.diff())
            dots_M = torch.full_like(weights_M, torch.nan)  # of the padding too, which nobody reads
            dots_M[: len(latents_M)] = (source_RD[ids_M[: len(latents_M)]] * unit_rows_SD[latents_M]).sum(1)
        return entry_gradient(weights_M, ids_M, offsets_S1, source_RD, unit_rows_SD, dots_M)

    @staticmethod
    def adam_(p, exp_avg, exp_avg_sq, gradient, clip, adam):
        adam_(p, exp_avg, exp_avg_sq, gradient.clone(), clip, adam)  # which is clipped in place


class Trained:
    """A decoder, an encoder and a bias in the hands of the row kernels, or of the CPU's path."""

    kernels: type = RowKernels

    def __init__(self, shape, dtype, device):
        _, _, d_sae, d_in = shape
        generator = torch.Generator().manual_seed(7)
        draw = lambda *size: torch.randn(*size, generator=generator, dtype=torch.float64)  # noqa: E731
        unit_rows = torch.nn.functional.normalize(draw(d_sae, d_in), dim=1)
        start = {"W_dec": unit_rows, "W_enc": draw(d_sae, d_in), "bias": draw(1500)}
        self.parameters = {name: p.to(device, dtype, copy=True) for name, p in start.items()}
        self.moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in self.parameters.items()}
        self.copy_SD = torch.full_like(self.parameters["W_enc"], torch.nan, dtype=torch.bfloat16)

    def step(self, n: int, inputs, d_bias: Tensor, aux: RowGradient | None) -> None:
        device = d_bias.device
        inputs = [tensor.to(device) for tensor in inputs]
        W_dec, W_enc, bias = self.parameters.values()
        dec = self.kernels.entry_gradient(*inputs, W_dec)
        enc = self.kernels.entry_gradient(*inputs)
        clip = clip_coefficient([dec, enc, *([aux] if aux else [])], [d_bias], CLIP_NORM)
        adam = settings(n, device)
        self.kernels.latent_update_(W_dec, *self.moments["W_dec"], dec, [], clip, adam, True)
        extra = [aux] if aux else []
        self.kernels.latent_update_(W_enc, *self.moments["W_enc"], enc, extra, clip, adam, False, self.copy_SD)
        self.kernels.adam_(bias, *self.moments["bias"], d_bias, clip, adam)


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


def auxiliary(shape, dtype, device, seed: int) -> RowGradient:
    """Rows of the last two latents. One that fires has a row already: as two losses, their norms would not add up."""
    d_sae, d_in = shape[2:]
    rows_AD = torch.randn(2, d_in, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    latents_A = torch.arange(d_sae - 2, d_sae, device=device)
    return RowGradient(latents_A, rows_AD.to(device, dtype), rows_AD.square().sum().to(device, dtype))


def run(shape, dtype, device, n_steps: int = 2, kernels: type = RowKernels) -> tuple[Trained, Truth]:
    trained = Trained(shape, dtype, device)
    trained.kernels = kernels
    truth = Truth(trained)
    for n in range(1, n_steps + 1):
        inputs = inputs_of_step(shape, dtype, seed=n)
        d_bias = torch.randn(1500, generator=torch.Generator().manual_seed(n), dtype=torch.float64).to(device, dtype)
        # Only where the last two latents do not fire.
        aux = auxiliary(shape, dtype, device, n) if shape[1] == 1 else None
        trained.step(n, inputs, d_bias, aux)
        truth.step(inputs, d_bias, aux)
    return trained, truth


@pytest.mark.parametrize(
    ("shape", "dtype"), [*((shape, torch.float64) for shape in SHAPES), (SHAPES[0], torch.float32)], ids=str
)
@pytest.mark.usefixtures("poison")
def test_steps_equal_optim_adam_in_float64(device, shape, dtype) -> None:
    trained, truth = run(shape, dtype, device)
    assert_same_state(trained, truth, TOLERANCE[dtype])


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_steps_on_the_cpu_equal_optim_adam_in_float64(shape, dtype) -> None:
    trained, truth = run(shape, dtype, torch.device("cpu"), kernels=CpuPath)
    assert_same_state(trained, truth, TOLERANCE[dtype])


def assert_same_state(trained: Trained, truth: Truth, tolerance: float) -> None:
    for name, p in trained.parameters.items():
        expected, state = truth.parameters[name].detach(), truth.optimizer.state[truth.parameters[name]]
        close = dict(rtol=tolerance, atol=tolerance, check_dtype=False)
        torch.testing.assert_close(p.cpu(), expected, **close)
        torch.testing.assert_close(trained.moments[name][0].cpu(), state["exp_avg"], **close)
        torch.testing.assert_close(trained.moments[name][1].cpu(), state["exp_avg_sq"], **close)
    W_enc = trained.parameters["W_enc"].double()
    # The interpreter cuts to bfloat16, a GPU rounds: both within one unit.
    assert bool(((trained.copy_SD.double() - W_enc).abs() <= W_enc.abs() * 2**-7).all())


@pytest.mark.usefixtures("blocks")
def test_the_update_writes_the_screening_copy_of_every_row() -> None:
    inputs, W = inputs_of_step((37, 5, 29, 24), torch.float32, 1), torch.randn(29, 24)
    gradient, low = CpuPath.entry_gradient(*inputs), LowWeights.empty(29, 24)
    moments = torch.zeros(2, 29, 24).unbind()
    CpuPath.latent_update_(W, *moments, gradient, [], torch.tensor(0.5), settings(1, "cpu"), False, low=low)
    expected = LowWeights.empty(29, 24)
    expected.write_(0, W)
    for written, whole in zip(low, expected):
        assert torch.equal(written, whole)


@pytest.mark.usefixtures("blocks")
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
        gradient = CpuPath.entry_gradient(*inputs, unit_rows)
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
    decoder = CpuPath.entry_gradient(weights * scale["decoder"], ids, offsets, source, W)
    encoder = CpuPath.entry_gradient(weights * scale["encoder"], ids, offsets, source)
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
    assert float(CpuPath.entry_gradient(*entries, W).squared_norm_bound()) >= 1.01**2


def test_a_loose_bound_does_not_clip() -> None:
    """Two entries that cancel: the bound is 4, the norm 0."""
    entries = torch.tensor([2.0, -2.0]), torch.tensor([0, 0]), torch.tensor([0, 2]), torch.eye(1, 3)
    assert float(clip_coefficient([CpuPath.entry_gradient(*entries)], [torch.zeros(1)], 1.0)) == 1.0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_is_not_taken_for_a_small_one(bad: float) -> None:
    entries = torch.tensor([bad]), torch.tensor([0]), torch.tensor([0, 1]), torch.ones(1, 3)
    assert float(clip_coefficient([CpuPath.entry_gradient(*entries)], [torch.zeros(1)], 1.0)) != 1.0


def test_repeats_bit_identically(device) -> None:
    (first, _), (second, _) = (run((70, 2, 3, 13), torch.float32, device) for _ in range(2))
    for name, p in first.parameters.items():
        for one, other in zip((p, *first.moments[name]), (second.parameters[name], *second.moments[name])):
            assert torch.equal(one, other)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_gradient_reaches_every_parameter(device, bad: float) -> None:
    """As in the dense step: the clip factor is NaN, or 0 times infinity is; nothing is hidden."""
    trained = Trained((37, 5, 11, 24), torch.float32, device)
    weights_M, ids_M, offsets_S1, source_BD = inputs_of_step((37, 5, 11, 24), torch.float32, 1)
    source_BD[3, 5] = bad
    trained.step(1, (weights_M, ids_M, offsets_S1, source_BD), torch.ones(1500, device=device), None)
    fired = torch.zeros(11, dtype=torch.bool)
    latent_of = torch.repeat_interleave(torch.arange(11), offsets_S1.diff())
    fired[latent_of[ids_M[: len(latent_of)] == 3]] = True
    assert bool(fired.any())
    assert not bool(fired.all())
    W_dec, W_enc, bias = (p.cpu() for p in trained.parameters.values())
    assert bool(W_dec[fired].isnan().all())
    assert bool(W_enc[fired][:, 5].isnan().all())
    if bad != bad:
        assert bool(W_dec.isnan().all())
        assert bool(W_enc.isnan().all())
        assert bool(bias.isnan().all())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.usefixtures("poison")
def test_gradient_rows_and_norms(device, shape) -> None:
    from saevlm_fast.kernels.latent_gradient_triton import launch_latent_gradient

    inputs = inputs_of_step(shape, torch.float32, 1)
    unit_SD = torch.nn.functional.normalize(torch.randn(shape[2], shape[3]), dim=1)
    for unit_rows_SD in (None, unit_SD):
        placed = [t if t is None else t.to(device) for t in (*inputs, unit_rows_SD)]
        rows_CD, slots_S, squared_norms_S = (t.cpu() for t in launch_latent_gradient(*placed))
        truth_SD = reference.latent_gradient(*truth_inputs(inputs), unit_rows_SD)
        active_S = inputs[2].diff() > 0
        assert len(rows_CD) == min(shape[2], inputs[0].numel())
        assert torch.equal(slots_S >= 0, active_S)
        assert slots_S[active_S].tolist() == list(range(int(active_S.sum())))
        magnitude_SD = segment_sum_magnitude(*truth_inputs(inputs))
        if unit_rows_SD is not None:
            magnitude_SD = magnitude_SD + magnitude_SD.sum(1, keepdim=True) * unit_SD.abs()
        assert_near_truth(rows_CD[slots_S[active_S].long()], truth_SD[active_S], magnitude_SD[active_S])
        torch.testing.assert_close(squared_norms_S.double(), truth_SD.square().sum(1), rtol=1e-5, atol=1e-5)


def test_gradients_of_two_losses_add_up(device) -> None:
    W, zeros = torch.randn(6, 3, dtype=torch.float64), torch.zeros(6, 3, dtype=torch.float64)
    first = RowGradient(torch.tensor([1, 2, 5]), torch.randn(3, 3, dtype=torch.float64), torch.zeros(()))
    second = RowGradient(torch.tensor([0, 2]), torch.randn(2, 3, dtype=torch.float64), torch.zeros(()))
    g = zeros.index_add(0, first.latents_A, first.rows_AD).index_add(0, second.latents_A, second.rows_AD)
    expected = reference.latent_update(W, zeros, zeros, g, 0.5, LR, BETAS, EPS, 1, False)
    state = [t.to(device, copy=True) for t in (W, zeros, zeros)]
    one, other = (RowGradient(*(t.to(device) for t in gradient[:3])) for gradient in (first, second))
    RowKernels.latent_update_(*state, one, [other], torch.tensor(0.5, device=device), settings(1, device), False)
    for out, truth in zip(state, expected):
        torch.testing.assert_close(out.cpu(), truth)


def test_too_wide_a_row_is_named(device) -> None:
    from saevlm_fast.kernels.latent_gradient_triton import MAX_WIDTH, whole_row_block

    with pytest.raises(ValueError, match=f"d_in: {MAX_WIDTH + 1} is above {MAX_WIDTH}"):
        whole_row_block(MAX_WIDTH + 1, 8)


def test_whole_steps_with_row_kernels_are_the_dense_steps(monkeypatch) -> None:
    """Row kernels in place of the CPU's blocks, with and without dead latents, against dense autograd and torch's Adam.

    On the CPU through the interpreter; on a GPU, test_step's gpu tests run them where they belong.
    """
    if torch.cuda.is_available():
        pytest.skip("the tensors are on the CPU: only the interpreter takes them")
    stepper, dense, data = make("batch_topk", d_in=12, d_sae=17, k=1, dead_after=60, dtype=torch.float64)

    monkeypatch.setattr(step_module, "entry_gradient", RowKernels.entry_gradient)
    monkeypatch.setattr(step_module, "latent_update_", RowKernels.latent_update_)
    monkeypatch.setattr(step_module, "adam_", RowKernels.adam_)
    n_dead = []
    for start in range(0, 4 * 31, 31):
        x = data[start : start + 31]
        output = stepper.step(x)
        assert float(output.losses.overall) == pytest.approx(dense.step(x), rel=1e-11)
        n_dead.append(output.n_dead)
    assert max(n_dead) > 0
    assert min(n_dead) == 0
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        torch.testing.assert_close(getattr(stepper.sae, name), getattr(dense, name), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("unit", [False, True])
def test_cpu_kernels_are_the_definition(unit: bool) -> None:
    shape = (37, 5, 11, 24)
    inputs = inputs_of_step(shape, torch.float64, 1)
    W_SD = torch.nn.functional.normalize(torch.randn(11, 24, dtype=torch.float64), dim=1)
    rows_CD, slots_S, squared_norms_S = latent_gradient_op(*inputs, W_SD if unit else None)
    g_SD = reference.latent_gradient(*truth_inputs(inputs), W_SD if unit else None)
    torch.testing.assert_close(squared_norms_S, g_SD.square().sum(1))
    state = [W_SD.clone(), torch.randn(11, 24).double(), torch.rand(11, 24).double()]
    expected = reference.latent_update(*state, g_SD, 0.3, LR, BETAS, EPS, 4, unit)
    bias = [t[0].clone() for t in state]
    schedule = settings(4, "cpu").schedule
    copy_SD = torch.empty(11, 24, dtype=torch.bfloat16)
    clip = torch.tensor(0.3, dtype=torch.float64)
    latent_update_op(*state, rows_CD, slots_S, None, None, clip, schedule, list(BETAS), EPS, unit, copy_SD)
    for out, truth in zip(state, expected):
        torch.testing.assert_close(out, truth)
    assert torch.equal(copy_SD, state[0].bfloat16())
    if not unit:
        vector_update_op(*bias, g_SD[0], clip, schedule, list(BETAS), EPS)
        torch.testing.assert_close(bias[0], expected[0][0])


def test_opcheck() -> None:
    inputs = inputs_of_step((37, 5, 11, 24), torch.float32, 1)
    weights_M, rest = inputs[0].nan_to_num(), inputs[1:]  # padding: NaN is not equal to NaN
    W, exp_avg, exp_avg_sq = torch.rand(3, 11, 24).unbind(0)
    torch.library.opcheck(latent_gradient_op, (weights_M, *rest, None))
    torch.library.opcheck(latent_gradient_op, (weights_M, *rest, W))
    rows_CD, slots_S, _ = latent_gradient_op(weights_M, *rest, None)
    numbers = torch.tensor(0.5), settings(1, "cpu").schedule, list(BETAS), EPS
    state = W.clone(), exp_avg.clone(), exp_avg_sq.clone()
    torch.library.opcheck(latent_update_op, (*state, rows_CD, slots_S, None, None, *numbers, True, None))
    aux = torch.rand(2, 24), latent_slots(torch.tensor([1, 4]), 11)
    copy_SD = torch.zeros(11, 24, dtype=torch.bfloat16)
    torch.library.opcheck(latent_update_op, (*state, rows_CD, slots_S, *aux, *numbers, False, copy_SD))
    torch.library.opcheck(vector_update_op, (*(t[0].clone() for t in state), torch.rand(24), *numbers))


@pytest.mark.gpu
@pytest.mark.parametrize("unit", [False, True], ids=["W_enc", "W_dec"])
def test_gpu_update_at_the_real_shape(device, unit: bool) -> None:
    """4096 rows, 65536 latents, one of them in nearly every row: float64 as the truth, repeated, no synchronisation."""
    n_rows, d_sae, d_in = 4096, 65536, 1024
    acts, latents, row_offsets = random_codes(n_rows, 20, d_sae, "csr", torch.float32)
    acts, latents, row_offsets = acts.nan_to_num().to(device), latents.to(device), row_offsets.to(device)
    W_SD = torch.nn.functional.normalize(torch.randn(d_sae, d_in, device=device), dim=1)
    source_BD = torch.randn(n_rows, d_in, device=device)
    clip, adam = torch.tensor(0.3, device=device), settings(3, device)
    order_M, offsets_S1 = group_by_latent(latents, row_offsets, d_sae)
    rows_M = entry_rows(latents, row_offsets).clamp(max=n_rows - 1)[order_M]
    inputs = acts[order_M], rows_M, offsets_S1, source_BD, W_SD if unit else None
    results = []
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            state = W_SD.clone(), torch.full_like(W_SD, 1e-3), torch.full_like(W_SD, 1e-3)
            rows_CD, slots_S, squared_norms_S = latent_gradient_op(*inputs)
            latent_update_op(
                *state, rows_CD, slots_S, None, None, clip, adam.schedule, list(BETAS), EPS, unit, None
            )  # fmt: skip
            results.append((*state, squared_norms_S))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for first, second in zip(*results):
        assert torch.equal(first, second)
    end = int(offsets_S1[-1])
    g_SD = torch.zeros(d_sae, d_in, device=device, dtype=torch.float64)
    latent_of = torch.repeat_interleave(torch.arange(d_sae, device=device), offsets_S1.diff())
    g_SD.index_add_(0, latent_of, acts[order_M][:end, None].double() * source_BD[rows_M[:end]].double())
    if unit:
        g_SD -= (g_SD * W_SD.double()).sum(1, keepdim=True) * W_SD.double()
    torch.testing.assert_close(results[0][3].double(), g_SD.square().sum(1), rtol=1e-4, atol=1e-4)
    moments = torch.full_like(g_SD, 1e-3)
    truth = reference.latent_update(W_SD.double(), moments, moments, g_SD, 0.3, LR, BETAS, EPS, 3, unit)
    for out, expected in zip(results[0], truth):
        torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)


def compile_cases(d_in: int, targets: tuple[str, ...]) -> list[Case]:
    from saevlm_fast.kernels.latent_gradient_triton import whole_row_block
    from saevlm_fast.kernels.latent_update_triton import BLOCK_V
    from saevlm_fast.kernels.segment_sum_triton import BLOCK_P, CHUNK

    module, fp32 = "saevlm_fast.kernels.latent_update_triton", "*fp32"
    gradient_module = "saevlm_fast.kernels.latent_gradient_triton"
    adam = {"BETA1": 0.9, "BETA2": 0.999, "EPS": 1e-8, "ACC": "tl.float32"}
    scalars = {"clip_ptr": fp32, "schedule_ptr": "*fp64"}
    state = {"exp_avg_ptr": fp32, "exp_avg_sq_ptr": fp32}
    block_d, gradient_warps = whole_row_block(d_in, 8)
    gradient = {
        "weights_ptr": fp32, "ids_ptr": "*i64", "offsets_ptr": "*i64", "source_ptr": fp32, "partials_ptr": fp32,
        "slots_ptr": "*i32", "unit_rows_ptr": fp32, "rows_ptr": fp32, "squared_norms_ptr": fp32, "d_in": "i32:16",
    }  # fmt: skip
    tiles = {"CHUNK": CHUNK, "BLOCK_P": BLOCK_P, "BLOCK_D": block_d, "ACC": "tl.float32", "PROJECT": True}
    update = {
        "W_ptr": fp32, "rows_ptr": fp32, "slots_ptr": "*i32", "aux_rows_ptr": fp32, "aux_slots_ptr": "*i32",
        "copy_ptr": "*bf16", "d_in": "i32:16",
    } | state | scalars  # fmt: skip
    row = {"NORM_EPS": 1e-7, "BLOCK_D": block_d, "UNIT_NORM": True, "HAS_AUX": True, "HAS_COPY": True}
    vector = {"p_ptr": fp32, "gradient_ptr": fp32, "n": "i32:16"} | state | scalars
    return [
        case
        for target in targets
        for case in (
            Case(gradient_module, "gradient_row_kernel", target, gradient, tiles, gradient_warps),
            Case(module, "update_row_kernel", target, update, row | adam, whole_row_block(d_in, 4)[1]),
            Case(module, "update_vector_kernel", target, vector, adam | {"BLOCK_V": BLOCK_V}, 4),
        )
    ]


def test_static_compile_without_spills() -> None:
    from saevlm_fast.kernels.latent_gradient_triton import MAX_WIDTH

    assert_no_spills(compile_cases(1024, TARGETS) + compile_cases(MAX_WIDTH, ("sm_90",))[:2])
