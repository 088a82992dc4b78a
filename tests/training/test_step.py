"""The sparse training step against the dense autograd trainer, and its parts against plain definitions."""

import pytest
import torch

from dense_trainer import DenseTrainer
from saevlm_fast.config import SAEConfig, TrainConfig
from saevlm_fast.kernels import cpu_loops
from saevlm_fast.kernels import latent_gradient as latent_gradient_module
from saevlm_fast.kernels.latent_gradient import (
    clip_coefficient,
    dense_gradient_rows,
    entry_gradient,
    latent_slots,
)
from saevlm_fast.kernels.sparse_decode import group_bag_offsets
from saevlm_fast.sae import SparseAutoencoder
from saevlm_fast.training import gradients as gradients_module
from saevlm_fast.training.dead_latents import DeadLatents, auxiliary, may_be_dead
from saevlm_fast.training.state import geometric_median
from saevlm_fast.training.step import Stepper, smallest_positive

GROUPS = {"topk": (), "batch_topk": (), "matryoshka": (5, 13, 30, 49)}


def make(architecture, *, d_in=24, d_sae=97, k=4, seed=0, dtype=torch.float32, groups=None, **train):
    recipe = {"steps": 100, "lr": 3e-3, "warmup_steps": 5, "threshold_start": 3, "seed": seed}
    config = TrainConfig(**recipe | train)
    sae = SparseAutoencoder(SAEConfig(d_in, d_sae, k, architecture, groups or GROUPS[architecture]), dtype=dtype)
    sae.reset_parameters(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    # Planted sparse structure with an offset: b_dec matters, some latents die, losses fall.
    features = torch.randn(40, d_in, generator=generator)
    mask = torch.rand(64 * 40, 40, generator=generator) < 0.1
    data = (mask * torch.rand(mask.shape, generator=generator)) @ features + 0.3
    sae.b_dec.data.copy_(geometric_median(data[:64]))
    dense = DenseTrainer(
        sae.W_dec.detach().clone(), sae.b_dec.detach().clone(), architecture=architecture, k=k,
        group_ends=sae.config.group_ends, config=config, d_sae=d_sae,
    )  # fmt: skip
    return Stepper(sae, config), dense, data.to(dtype)


@pytest.fixture(params=["loops", None, 500], ids=["loops", "one block", "blocks"])
def blocks(request, monkeypatch):
    """A CPU's step is in compiled loops. Without Numba it goes through its matrices in blocks of rows: all of these in
    one, or a few rows (or one) in each."""
    if request.param == "loops":
        if not cpu_loops.numba_is_here():
            pytest.skip("no numba on this machine")
        return
    monkeypatch.setattr(cpu_loops, "numba_is_here", lambda: False)
    if request.param is not None:
        monkeypatch.setattr(gradients_module, "_BLOCK_BYTES", request.param)
        monkeypatch.setattr(latent_gradient_module, "_BLOCK_BYTES", request.param)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("dead_after", [10_000_000, 150], ids=["no-dead", "auxk"])
@pytest.mark.parametrize("architecture", ["topk", "batch_topk", "matryoshka"])
@pytest.mark.parametrize(("dtype", "n_steps", "tolerance"), [(torch.float64, 30, 1e-9), (torch.float32, 8, 1e-5)])
def test_same_losses_and_weights_as_dense_autograd(architecture, dead_after, dtype, n_steps, tolerance):
    """Float64 over a run. Float32 over a few steps: sooner or later a rounding of its own turns a near tie."""
    stepper, dense, data = make(architecture, dead_after=dead_after, dtype=dtype)
    n_dead = []
    for start in range(0, n_steps * 61, 61):
        x = data[start : start + 61]
        output = stepper.step(x)
        expected = dense.step(x)
        assert float(output.losses.overall) == pytest.approx(expected, rel=tolerance)
        assert output.n_dead == dense.n_dead
        n_dead.append(output.n_dead)
    assert (max(n_dead) > 0) == (dead_after == 150), "the auxiliary loss is meant to be active in one case only"
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        torch.testing.assert_close(getattr(stepper.sae, name), getattr(dense, name), atol=tolerance, rtol=tolerance)
    assert torch.equal(stepper.idle_S, dense.idle)
    if architecture != "topk":  # kept in float32
        assert float(stepper.sae.threshold) == pytest.approx(dense.threshold, rel=1e-5)


def test_auxiliary_keeps_only_half_d_in_dead_latents():
    stepper, dense, data = make("batch_topk", d_sae=301, k=2, dead_after=61, auxk_alpha=0.5, dtype=torch.float64)
    for start in range(0, 12 * 61, 61):
        x = data[start : start + 61]
        assert float(stepper.step(x).losses.overall) == pytest.approx(dense.step(x), rel=1e-9)
    assert dense.n_dead > x.shape[1], "more dead latents than take part"
    torch.testing.assert_close(stepper.sae.W_dec, dense.W_dec, atol=1e-9, rtol=1e-9)


@pytest.mark.gpu
@pytest.mark.parametrize("architecture", ["topk", "batch_topk", "matryoshka"])
@pytest.mark.parametrize("dead_after", [10_000_000, 150], ids=["no-dead", "auxk"])
def test_gpu_step_is_the_dense_step(device, architecture, dead_after):
    """Float32 (IEEE) on the chip against dense float32 on the CPU, over steps with and without dead latents."""
    stepper, dense, data = make(architecture, dead_after=dead_after)
    stepper = Stepper(stepper.sae.to(device), stepper.config)
    for start in range(0, 20 * 61, 61):
        x = data[start : start + 61]
        assert float(stepper.step(x.to(device)).losses.overall) == pytest.approx(dense.step(x), rel=1e-4)
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        torch.testing.assert_close(getattr(stepper.sae, name).cpu(), getattr(dense, name), atol=1e-4, rtol=1e-4)
    assert torch.equal(stepper.idle_S.cpu(), dense.idle)


@pytest.mark.gpu
@pytest.mark.parametrize("architecture", ["topk", "batch_topk", "matryoshka"])
@pytest.mark.parametrize("dead_after", [10_000_000, 150], ids=["no-dead", "auxk"])
def test_gpu_step_does_not_wait_for_the_host(device, architecture, dead_after):
    stepper, _, data = make(architecture, dead_after=dead_after)
    stepper = Stepper(stepper.sae.to(device), stepper.config)
    x = data[:61].to(device)
    for _ in range(4):  # the first with dead latents has no earlier count to go by
        stepper.step(x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        stepper.step(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("architecture", ["topk", "batch_topk", "matryoshka"])
def test_gpu_step_in_a_cuda_graph_is_the_eager_step(device, architecture):
    eager, captured = (make(architecture)[0] for _ in range(2))
    data = make(architecture)[2].to(device)
    eager, captured = (Stepper(stepper.sae.to(device), stepper.config) for stepper in (eager, captured))
    x = data[:61].clone()
    for stepper in (eager, captured):  # compiles the kernels
        stepper.step(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = captured.device_step(x)
    for start in range(61, 9 * 61, 61):  # over the warm-up's end and the threshold's start
        x.copy_(data[start : start + 61])
        captured.announce(61)
        graph.replay()
        assert torch.equal(output.losses.overall, eager.step(x).losses.overall)
    for name, parameter in eager.parameters().items():
        assert torch.equal(captured.parameters()[name], parameter), name
    assert torch.equal(captured.idle_S, eager.idle_S)
    assert torch.equal(captured.sae.threshold, eager.sae.threshold)


@pytest.mark.parametrize("n_dead", [0, 1, 9, 60])
def test_padded_dead_latents_change_nothing(n_dead):
    """The list of a GPU, whose length is a bound, against the exact one."""
    stepper, _, data = make("topk", dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    x, residual = data[:61], torch.randn(61, 24, generator=generator, dtype=torch.float64)
    latents = torch.randperm(97, generator=generator)[:n_dead].sort().values
    padded = torch.nn.functional.pad(latents, (0, 30), value=97)
    results = []
    for dead in (DeadLatents(latents, n_dead), DeadLatents(padded, torch.tensor(n_dead))):
        aux = auxiliary(stepper.sae, x, residual, dead, 0.5)
        loss, db_enc, dense = torch.zeros((), dtype=torch.float64), torch.zeros(97, dtype=torch.float64), []
        if aux is not None:
            loss = aux.loss
            db_enc.index_add_(0, dead.latents_A.clamp(max=96), aux.b_enc_A)
        for gradient in [] if aux is None else [aux.W_enc, aux.W_dec]:
            slots = latent_slots(gradient.latents_A, 97)
            rows = torch.zeros(97, 24, dtype=torch.float64)
            rows[slots >= 0] = gradient.rows_AD[slots[slots >= 0].long()]
            torch.testing.assert_close(gradient.squared_norm, rows.square().sum())
            dense.append(rows)
        results.append((loss, db_enc, dense or [torch.zeros(97, 24, dtype=torch.float64)] * 2))
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-14)


def test_the_bound_on_dead_latents_holds_one_step_later():
    idle = torch.randint(0, 300, (1000,), generator=torch.Generator().manual_seed(2))
    fired = torch.rand(1000, generator=torch.Generator().manual_seed(3)) < 0.3
    later = torch.where(fired, 0, idle + 61)
    assert bool((may_be_dead(idle, 61, 200) >= (later >= 200)).all())
    assert torch.equal(may_be_dead(idle, 61, 200), idle + 61 >= 200)


def test_nan_names_the_first_bad_step():
    stepper, _, data = make("topk")
    for i in range(5):
        x = data[i * 61 : (i + 1) * 61].clone()
        if i >= 3:
            x[7, 3] = float("nan")
        stepper.step(x)
    assert int(stepper.bad_step) == 3


def test_decoder_rows_stay_unit():
    stepper, _, data = make("batch_topk")
    for start in range(0, 10 * 61, 61):
        stepper.step(data[start : start + 61])
    torch.testing.assert_close(stepper.sae.W_dec.norm(dim=1), torch.ones(97), atol=1e-6, rtol=0)


def test_constant_residual_gives_zero_auxiliary_loss():
    """One row has no variance around its own mean: the ratio is 0 / 0 upstream, defined as 0."""
    stepper, _, data = make("topk", dead_after=1)
    output = stepper.step(data[:1])
    assert output.n_dead > 0
    assert float(output.losses.aux) == 0.0
    assert float(output.losses.overall) == float(output.losses.mse)


def test_bags_are_rows_split_by_group():
    latents = torch.tensor([0, 4, 5, 9, 5, 5, 0, 0])  # two padding entries
    offsets = torch.tensor([0, 4, 4, 6])
    bags = group_bag_offsets(latents, offsets, [5, 10], 10)
    assert bags.tolist() == [0, 2, 4, 4, 4, 4, 6]


def test_smallest_positive():
    assert float(smallest_positive(torch.tensor([0.0, 3.0, 2.0]))) == 2.0
    assert float(smallest_positive(torch.zeros(3))) == 0.0
    assert float(smallest_positive(torch.zeros(0))) == 0.0


def test_dense_gradient_rows_are_orthogonal_to_their_latents():
    W = torch.nn.functional.normalize(torch.randn(9, 5), dim=1)
    latents, rows = torch.tensor([1, 4, 8]), torch.randn(3, 5)
    gradient = dense_gradient_rows(latents, rows.clone(), W)
    torch.testing.assert_close((gradient.rows_AD * W[latents]).sum(1), torch.zeros(3), atol=1e-6, rtol=0)
    expected = rows - (rows * W[latents]).sum(1, keepdim=True) * W[latents]
    torch.testing.assert_close(gradient.rows_AD, expected)
    torch.testing.assert_close(gradient.squared_norm, expected.square().sum())


def test_no_entry_is_no_gradient():
    empty = torch.zeros(0, dtype=torch.int64)
    gradient = entry_gradient(torch.zeros(0), empty, torch.zeros(8, dtype=torch.int64), torch.randn(3, 5))
    assert float(gradient.squared_norm) == 0.0


def test_an_sae_in_bfloat16_trains():
    stepper, _, data = make("matryoshka", dtype=torch.bfloat16)
    losses = [float(stepper.step(data[:61]).losses.mse) for _ in range(30)]
    assert losses[-1] < losses[0]


def test_a_decoder_without_unit_rows_is_refused():
    stepper, _, _ = make("topk")
    with torch.no_grad():
        stepper.sae.W_dec[4] *= 3
    with pytest.raises(ValueError, match=r"sae: row 4 of W_dec has norm 3, must be 1 \(within 0.01\)"):
        Stepper(stepper.sae, stepper.config)


def test_a_batch_without_rows_is_refused_before_anything_moves():
    stepper, _, data = make("topk")
    with pytest.raises(ValueError, match="x_BD: 0 rows; a step needs at least 1"):
        stepper.step(data[:0])
    assert stepper.n_steps == 0


def test_clip_coefficient_is_clip_grad_norm():
    parameters = [torch.zeros(7, requires_grad=True), torch.zeros(3, 4, requires_grad=True)]
    for p in parameters:
        p.grad = torch.randn(p.shape)
    gradients = [p.grad.clone() for p in parameters]
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    clip = clip_coefficient([dense_gradient_rows(torch.arange(3), gradients[1])], gradients[:1], 1.0)
    torch.testing.assert_close(gradients[1] * clip, parameters[1].grad)


def test_geometric_median_resists_an_outlier_and_survives_a_coincident_point():
    points = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0], [1e6, 1e6]])
    assert geometric_median(points).norm() < 2
    same = torch.ones(4, 3)
    torch.testing.assert_close(geometric_median(same), torch.ones(3))


def test_a_low_copy_is_made_anew_where_another_W_enc_comes():
    """Also where that would get the address and the version of the one before it."""
    stepper, _, _ = make("topk", d_in=10, dtype=torch.float32)
    low = stepper.low.current()
    assert stepper.low.is_current()
    address = stepper.sae.W_enc.data_ptr()
    for n in range(1, 9):
        stepper.sae.W_enc = torch.nn.Parameter(torch.full_like(stepper.sae.W_enc, n))
        assert stepper.sae.W_enc.data_ptr() != address
        assert not stepper.low.is_current()
    assert torch.equal(stepper.low.current().W_SD[:, :10], torch.full_like(low.W_SD[:, :10], 8))
    with torch.no_grad():
        stepper.sae.W_enc.mul_(2)
    assert not stepper.low.is_current()


@pytest.mark.parametrize(
    ("n_with_gradient", "d_sae"),
    [(0, 1009), (1, 1009), (63, 1009), (64, 1009), (65, 1009), (200, 1009), (1009, 1009), (5, 5), (200, 256), (0, 1)],
)
def test_encoder_is_read_where_there_is_a_gradient(n_with_gradient, d_sae):
    """W_enc @ db_enc, whichever latents are read; a NaN stays one."""
    generator = torch.Generator().manual_seed(n_with_gradient)
    W_SD, db_S = torch.randn(d_sae, 24, generator=generator), torch.zeros(d_sae)
    latents_A = torch.randperm(d_sae, generator=generator)[:n_with_gradient]
    db_S[latents_A] = torch.randn(n_with_gradient, generator=generator)
    for W_DS in (W_SD.t(), W_SD.t().contiguous()):  # latents after one another in memory, and not
        found_D = gradients_module._through_encoder(W_DS, db_S)
        torch.testing.assert_close(found_D.double(), W_DS.double() @ db_S.double(), rtol=1e-5, atol=1e-4)
    db_S[latents_A[:1]] = torch.nan
    assert bool(gradients_module._through_encoder(W_SD.t(), db_S).isnan().all()) == (n_with_gradient > 0)
