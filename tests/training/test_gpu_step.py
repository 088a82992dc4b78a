"""A GPU's whole step: against the dense trainer through the interpreter, and at real sizes on the chip."""

from contextlib import contextmanager

import pytest
import torch
from launches import counted_launches

from saevlm_fast.config import SAEConfig, TrainConfig
from saevlm_fast.sae import SparseAutoencoder
from saevlm_fast.training.sharded_step import ShardedStepper
from saevlm_fast.training.step import Stepper
from test_step import make

SMALL_GROUPS = {"topk": (), "batch_topk": (), "matryoshka": (1, 3, 5, 8)}


@pytest.mark.parametrize("dead_after", [10_000_000, 20], ids=["no-dead", "auxk"])
@pytest.mark.parametrize("architecture", ["topk", "batch_topk", "matryoshka"])
def test_steps_are_the_dense_steps(architecture: str, dead_after: int) -> None:
    """Float64 through the interpreter: losses, weights, idle counters and the threshold, with and without dead latents.

    On a GPU, the gpu tests of test_step run the same where it belongs.
    """
    if torch.cuda.is_available():
        pytest.skip("the tensors are on the CPU: only the interpreter takes them")
    groups = SMALL_GROUPS[architecture]
    stepper, dense, data = make(
        architecture, d_in=10, d_sae=17, k=1, groups=groups, dead_after=dead_after, dtype=torch.float64
    )
    n_dead = []
    for start in range(0, 3 * 11, 11):
        x = data[start : start + 11]
        stepper.announce(11)
        with torch.no_grad():
            output = stepper._gpu_step(x)
        assert float(output.losses.overall) == pytest.approx(dense.step(x), rel=1e-10)
        assert output.n_dead == dense.n_dead
        n_dead.append(dense.n_dead)
    assert (max(n_dead) > 0) == (dead_after == 20)
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        torch.testing.assert_close(getattr(stepper.sae, name), getattr(dense, name), atol=1e-10, rtol=1e-10)
    assert torch.equal(stepper.idle_S, dense.idle)
    if architecture != "topk":
        assert float(stepper.sae.threshold) == pytest.approx(dense.threshold, rel=1e-6)


def test_a_low_copy_is_made_on_the_device_of_the_batch(monkeypatch) -> None:
    """Of a step whose GPU is not the current one."""
    stepper, _, data = make("topk", d_in=10, d_sae=17, k=1)
    current, made_on = [], []

    @contextmanager
    def device_of(tensor):
        current.append(tensor)
        try:
            yield
        finally:
            current.pop()

    def made(x):
        made_on.extend(current)
        raise InterruptedError

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(stepper, "_device_state", made)
    for step in (Stepper._gpu_step, ShardedStepper._gpu_step):
        made_on.clear()
        with pytest.raises(InterruptedError):
            step(stepper, data[:3])
        assert len(made_on) == 1


def dense_step(parameters: dict[str, torch.Tensor], x_BD, codes, ends: list[int], clip_norm: float):
    """(loss, clipped gradients by name) in float64 autograd, the latents of the codes kept."""
    W_enc, b_enc, W_dec, b_dec = (parameters[n].double().requires_grad_() for n in ("W_enc", "b_enc", "W_dec", "b_dec"))
    _, latents, offsets = codes.csr()
    n = int(offsets[-1])
    rows = torch.arange(len(x_BD), device=x_BD.device).repeat_interleave(offsets.diff())
    kept = torch.zeros(len(x_BD), len(W_enc), dtype=torch.bool, device=x_BD.device)
    kept[rows, latents[:n]] = True
    x_BD = x_BD.double()
    z = torch.where(kept, ((x_BD - b_dec) @ W_enc.T + b_enc).relu(), 0)
    losses = [(z[:, :end] @ W_dec[:end] + b_dec - x_BD).square().sum(1).mean() for end in ends]
    loss = torch.stack(losses).mean()
    loss.backward()
    W = W_dec.detach()
    gradients = {"W_enc": W_enc.grad, "b_enc": b_enc.grad, "W_dec": W_dec.grad, "b_dec": b_dec.grad}
    gradients["W_dec"] = W_dec.grad - (W_dec.grad * W).sum(1, keepdim=True) * W
    norm = torch.stack([g.square().sum() for g in gradients.values()]).sum().sqrt()
    clip = (clip_norm / (norm + 1e-6)).clamp(max=1)
    return float(loss.detach()), {name: g * clip for name, g in gradients.items()}


def big(architecture: str, device, d_in: int, d_sae: int, **train) -> tuple[Stepper, torch.Tensor]:
    """A Stepper and a batch, half of whose rows are nearly one: latents of thousands of entries."""
    first = d_sae // 16, d_sae // 8, d_sae // 4
    sizes = (*first, d_sae - sum(first)) if architecture == "matryoshka" else ()
    sae = SparseAutoencoder(SAEConfig(d_in, d_sae, 20, architecture, sizes)).to(device)
    sae.reset_parameters(0)
    generator = torch.Generator(device=device).manual_seed(1)
    x = torch.randn(4096, d_in, device=device, generator=generator) / d_in**0.5
    x[:2048] = x[:1] + 0.05 * x[:2048]
    return Stepper(sae, TrainConfig(steps=100, warmup_steps=0, **train)), x


@pytest.mark.gpu
@pytest.mark.parametrize("clip_norm", [1e3, 1e-2], ids=["no-clip", "clip"])
@pytest.mark.parametrize(("d_in", "d_sae"), [(768, 6144), (1024, 16384), (500, 3001)])
@pytest.mark.parametrize("architecture", ["topk", "batch_topk", "matryoshka"])
def test_gpu_step_equals_float64(device, architecture: str, d_in: int, d_sae: int, clip_norm: float) -> None:
    """Every gradient to 1e-6 of its norm, by Adam's first moment; the idle counters; a repeat bit for bit."""
    results = []
    for _ in range(2):
        stepper, x = big(architecture, device, d_in, d_sae, clip_norm=clip_norm)
        before = {name: p.clone() for name, p in stepper.parameters().items()}
        output = stepper.step(x)
        moments = {name: m for name, (m, _) in stepper.moments.items()}
        results.append([*moments.values(), *stepper.parameters().values(), output.losses.overall])
    assert all(torch.equal(*pair) for pair in zip(*results))
    loss, gradients = dense_step(before, x, output.codes, stepper.sae.config.group_ends, clip_norm)
    assert float(output.losses.mse) == pytest.approx(loss, rel=1e-6)
    for name, g in gradients.items():
        assert float((moments[name].double() * 10 - g).norm()) < 2e-6 * float(g.norm()), name
    fired = torch.zeros(d_sae, dtype=torch.bool, device=device)
    fired[output.codes.top_indices[output.codes.top_acts > 0]] = True
    assert torch.equal(stepper.idle_S, torch.where(fired, 0, 4096))


@pytest.mark.gpu
@pytest.mark.parametrize("dead_after", [10_000_000, 8192], ids=["no-dead", "auxk"])
@pytest.mark.parametrize("architecture", ["topk", "batch_topk", "matryoshka"])
def test_gpu_captured_steps_are_the_eager_steps(device, architecture: str, dead_after: int) -> None:
    """At a real size, bit for bit, the norm needed in some steps and not in others."""
    eager, x = big(architecture, device, 768, 6144, dead_after=dead_after, clip_norm=0.05)
    captured, _ = big(architecture, device, 768, 6144, dead_after=dead_after, clip_norm=0.05)
    for stepper in (eager, captured):
        for _ in range(3):
            stepper.step(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    captured.announce(len(x))
    listed = captured.n_listed
    with torch.cuda.graph(graph):
        output = captured.device_step(x)
    graph.replay()
    assert torch.equal(output.losses.overall, eager.step(x).losses.overall)
    for scale in (1.0, 0.5, 1.5, 1.0):
        x.mul_(scale)
        captured.announce(len(x))
        if captured.n_listed != listed:
            break
        graph.replay()
        assert torch.equal(output.losses.overall, eager.step(x).losses.overall)
    for name, parameter in eager.parameters().items():
        assert torch.equal(captured.parameters()[name], parameter), name


@pytest.mark.skipif(torch.cuda.is_available(), reason="the tensors are on the CPU: only the interpreter takes them")
@pytest.mark.parametrize(("architecture", "most"), [("topk", 21), ("batch_topk", 27), ("matryoshka", 27)])
def test_a_step_is_so_many_launches(monkeypatch, architecture: str, most: int) -> None:
    """Of docs/gpu.md's table: copies and fills included; and what the host announces reaches the device in one."""
    from saevlm_fast.kernels.latent_update_triton import launch_announce

    monkeypatch.setattr("saevlm_fast.training.step.screens_cuda", lambda *_: True)
    sizes = (40, 88) if architecture == "matryoshka" else ()
    sae = SparseAutoencoder(SAEConfig(8, 128, 2, architecture, sizes))
    sae.reset_parameters(0)
    stepper = Stepper(sae, TrainConfig(steps=100, warmup_steps=0))
    x = torch.randn(17, 8, generator=torch.Generator().manual_seed(0))
    stepper.low.current()
    stepper.announce(17)
    written = torch.zeros_like(stepper._announced)
    with counted_launches() as counts:
        launch_announce(written, stepper._adam().schedule_values(), stepper.n_steps - 1)
        stepper._gpu_step(x)
    assert torch.equal(written, stepper._announced)
    assert sum(counts.values()) == most, counts


@pytest.mark.gpu
@pytest.mark.parametrize("architecture", ["topk", "batch_topk", "matryoshka"])
def test_gpu_step_is_at_most_40_launches(device, architecture: str) -> None:
    """Copies and fills of memory counted."""
    from torch.profiler import ProfilerActivity, profile

    stepper, x = big(architecture, device, 768, 6144)
    for _ in range(2):
        stepper.step(x)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        stepper.step(x)
        torch.cuda.synchronize()
    events = [event for event in profiled.key_averages() if "cuda" in str(event.device_type).lower()]
    counts = {event.key: event.count for event in events}
    assert 0 < sum(counts.values()) <= 40, counts


@pytest.mark.gpu
def test_gpu_an_sae_in_bfloat16_trains(device) -> None:
    stepper, _, data = make("batch_topk", dtype=torch.bfloat16)
    stepper = Stepper(stepper.sae.to(device), stepper.config)
    x = data[:61].to(device)
    losses = [float(stepper.step(x).losses.mse) for _ in range(30)]
    assert losses[-1] < losses[0]
