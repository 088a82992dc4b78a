"""A minute of work that has known answers: every op against its reference, a training, a score, a harvest.

Every check is by itself: one that fails, or ends in whatever error, hides no other. The ops run on the device that
work would be done on: on a GPU that is their Triton kernels.
"""

import tempfile
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saevlm_fast.doctor.words import said
from saevlm_fast.errors import require
from saevlm_fast.kernels import reference

_ROWS, _D, _S, _K, _STEPS = 96, 32, 512, 4, 20


class Checked(NamedTuple):
    """ok: whether it is right. said: why not, or what was found."""

    name: str
    ok: bool
    said: str
    seconds: float


def self_test(
    device: torch.device, checks: Collection[str] | None = None, on_check: Callable[[str], None] = lambda name: None
) -> list[Checked]:
    """All checks, or those named, in their order. on_check: told before each."""
    results = []
    for name, check in CHECKS.items():
        if checks is not None and name not in checks:
            continue
        on_check(name)
        start = time.perf_counter()
        try:
            ok, text = True, check(device)
        except Exception as error:  # a broken kernel ends in anything
            ok, text = False, said(error)
        results.append(Checked(name, ok, text, time.perf_counter() - start))
    return results


def _close(found: Tensor, expected: Tensor, tolerance: float = 1e-4) -> str:
    """The largest difference, of what the largest value is. ValueError: above the tolerance, or of another shape."""
    found, expected = found.detach().cpu().double(), expected.detach().cpu().double()
    require(found.shape == expected.shape, f"shape {list(found.shape)}, not {list(expected.shape)}")
    scale = max(float(expected.abs().max()), 1e-30) if expected.numel() else 1.0
    off = float((found - expected).abs().max()) / scale if found.numel() else 0.0
    require(off <= tolerance, f"off by {off:.2g} of the largest value, more than {tolerance:g}")
    return f"off by {off:.1g}"


class _Weights(NamedTuple):
    x_BD: Tensor
    W_enc_DS: Tensor
    b_enc_S: Tensor
    b_dec_D: Tensor

    def to(self, device: torch.device | str, dtype: torch.dtype = torch.float32) -> "_Weights":
        return _Weights(*(tensor.to(device, dtype) for tensor in self))


def _weights() -> _Weights:
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    return _Weights(draw(_ROWS, _D), draw(_S, _D).T, 0.1 * draw(_S), 0.1 * draw(_D))


def _topk_encode(device: torch.device) -> str:
    from saevlm_fast.kernels.topk_encode import topk_encode

    acts, latents = topk_encode(*_weights().to(device), _K)
    expected = reference.topk_encode(*_weights().to("cpu", torch.float64), _K)
    return _same_codes((acts, latents, None), (*expected, None))


def _screened_encode(device: torch.device) -> str:
    """Candidates by bfloat16 products, whether that pays here or not: the same codes."""
    from saevlm_fast.kernels.cpu_loops import compiles
    from saevlm_fast.kernels.topk_encode_screened import topk_encode_screened

    weights = _weights().to("cpu")  # on a GPU other kernels screen, which "topk encode" has run
    if not compiles(weights.W_enc_DS.t()):
        return "not run: there is no numba, and a CPU screens with its loops alone"
    acts, latents = topk_encode_screened(*weights, _K, None)
    return _same_codes((acts, latents, None), (*reference.topk_encode(*_weights().to("cpu", torch.float64), _K), None))


def _batch_topk_encode(device: torch.device) -> str:
    from saevlm_fast.kernels.topk_encode import batch_topk_encode

    found = batch_topk_encode(*_weights().to(device), _K)
    return _same_codes(found, reference.batch_topk_encode(*_weights().to("cpu", torch.float64), _K))


def _threshold_encode(device: torch.device) -> str:
    from saevlm_fast.kernels.topk_encode import threshold_encode

    found = threshold_encode(*_weights().to(device), 5.0)
    return _same_codes(found, reference.threshold_encode(*_weights().to("cpu", torch.float64), 5.0))


def _same_codes(found: tuple[Any, ...], expected: tuple[Any, ...]) -> str:
    return _close(_dense(*found), _dense(*expected))


def _dense(acts: Tensor, latents: Tensor, row_offsets: Tensor | None) -> Tensor:
    offsets = None if row_offsets is None else row_offsets.cpu()
    return reference.densify(acts.cpu(), latents.cpu(), offsets, _S)


def _codes(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    codes = reference.batch_topk_encode(*_weights().to("cpu"), _K)
    return codes[0].to(device), codes[1].to(device), codes[2].to(device)


def _sparse_decode(device: torch.device) -> str:
    from saevlm_fast.kernels.sparse_decode import sparse_decode

    W_dec_SD = _weights().W_enc_DS.T.contiguous().to(device).requires_grad_()
    acts, latents, offsets = _codes(device)
    bias = torch.zeros(_D, device=device)
    x_hat = sparse_decode(acts, latents, offsets, W_dec_SD, bias)
    (gradient,) = torch.autograd.grad(x_hat.square().sum(), W_dec_SD)
    plain = W_dec_SD.detach().cpu().double().requires_grad_()
    expected = reference.sparse_decode(acts.cpu().double(), latents.cpu(), offsets.cpu(), plain, bias.cpu().double())
    (expected_gradient,) = torch.autograd.grad(expected.square().sum(), plain)
    _close(x_hat, expected)
    return _close(gradient, expected_gradient)


def _gather_dot(device: torch.device) -> str:
    from saevlm_fast.kernels.sparse_decode import gather_dot

    W_SD, x_BD = _weights().W_enc_DS.T.contiguous(), _weights().x_BD
    _, latents, offsets = _codes(device)
    found = gather_dot(x_BD.to(device), latents, offsets, W_SD.to(device))
    return _close(found, reference.gather_dot(x_BD.double(), latents.cpu(), offsets.cpu(), W_SD.double()))


def _segment_sum(device: torch.device) -> str:
    from saevlm_fast.kernels.segment_sum import segment_sum

    generator = torch.Generator().manual_seed(1)
    lengths = torch.tensor([0, 1, 33, 64, 5, 100])
    offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    n = int(offsets[-1])
    weights, ids = torch.randn(n, generator=generator), torch.randint(0, _ROWS, (n,), generator=generator)
    inputs = weights, ids, offsets, _weights().x_BD
    found = segment_sum(*(each.to(device) for each in inputs))
    return _close(found, reference.segment_sum(weights.double(), ids, offsets, inputs[3].double()))


def _grouped(device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """acts, images and offsets by latent; dense activations [N, S] and embeddings [N, E] on the host, float64."""
    generator = torch.Generator().manual_seed(2)
    dense_NS = torch.rand(60, 24, generator=generator, dtype=torch.float64)
    dense_NS *= torch.rand(60, 24, generator=generator) < 0.3
    latents_M, images_M = dense_NS.T.nonzero().unbind(1)
    offsets_S1 = torch.nn.functional.pad((dense_NS > 0).sum(0).cumsum(0), (1, 0))
    acts_M = dense_NS.T[latents_M, images_M]
    emb_NE = torch.randn(60, 16, generator=generator, dtype=torch.float64)
    return acts_M.to(device), images_M.to(device), offsets_S1.to(device), dense_NS, emb_NE


def _latent_range(device: torch.device) -> str:
    from saevlm_fast.kernels.latent_range import latent_range

    acts_M, _, offsets_S1, dense_NS, _ = _grouped(device)
    low_S, high_S, _ = latent_range(acts_M, offsets_S1, len(dense_NS))
    _close(low_S, dense_NS.amin(0))
    return _close(high_S, dense_NS.amax(0), 1e-12)


def _streamed_cosine(device: torch.device) -> str:
    from saevlm_fast.kernels.streamed_cosine import streamed_cosine_state, streamed_cosine_update

    acts_M, images_M, offsets_S1, dense_NS, emb_NE = _grouped(device)
    state = streamed_cosine_state(dense_NS.shape[1], emb_NE.shape[1], device)
    scale_N = emb_NE.norm(dim=1).reciprocal().to(device)
    streamed_cosine_update(state, acts_M, images_M, offsets_S1, emb_NE.to(device), scale_N)
    num, den = reference.pairwise_sums(dense_NS, emb_NE, "cosine")
    _close(state.den_S, den, 1e-12)
    return _close(state.num_S / den, num / den, 1e-10)


def _pairwise_sums(device: torch.device) -> str:
    from saevlm_fast.kernels.pairwise_similarity import pairwise_sums

    _, _, _, dense_NS, emb_NE = _grouped(device)
    text = ""
    for similarity in ("cosine", "rbf"):
        num, den = pairwise_sums(dense_NS.to(device), emb_NE.to(device), similarity)
        expected, expected_den = reference.pairwise_sums(dense_NS, emb_NE, similarity)
        text = _close(num / den, expected / expected_den, 1e-9)
    return text


def _scaled_rows(device: torch.device) -> str:
    from saevlm_fast.kernels.scaled_rows import scaled_sum, squared_norms

    emb_NE, scale_N = _weights().x_BD, torch.rand(_ROWS, dtype=torch.float64)
    _close(squared_norms(emb_NE.to(device)), emb_NE.double().square().sum(1), 1e-12)
    return _close(scaled_sum(emb_NE.to(device), scale_N.to(device)), scale_N @ emb_NE.double(), 1e-10)


def _quick_gelu(device: torch.device) -> str:
    if device.type != "cuda":
        return "on a CPU there is no kernel for it"
    from saevlm_fast.kernels.quick_gelu_triton import launch_quick_gelu

    x = torch.linspace(-6, 6, 4096, device=device, dtype=torch.bfloat16)
    return _close(launch_quick_gelu(x), x.double() * torch.sigmoid(1.702 * x.double()), 1e-2)


def _latent_update(device: torch.device) -> str:
    """One step of Adam on the rows of a decoder by the gradients of entries; against the step written out."""
    from saevlm_fast.kernels.latent_gradient import clip_coefficient, entry_gradient
    from saevlm_fast.kernels.latent_update import AdamSettings, latent_update_

    generator = torch.Generator().manual_seed(4)
    W_SD = torch.randn(6, _D, generator=generator)
    offsets = torch.tensor([0, 5, 5, 9, 40, 41, 60])
    weights, ids = torch.randn(60, generator=generator), torch.randint(0, _ROWS, (60,), generator=generator)
    gradient = entry_gradient(weights, ids, offsets, _weights().x_BD)  # on the host; a GPU's steps are of "training"
    clip = clip_coefficient([gradient], [], 1.0)
    found, first, second = W_SD.clone(), *torch.zeros(2, 6, _D).unbind(0)
    latent_update_(found, first, second, gradient, [], clip, AdamSettings(1e-2, (0.9, 0.999), 1e-8, 1), False)
    g_SD = reference.segment_sum(weights.double(), ids, offsets, _weights().x_BD.double())
    g_SD *= min(1.0, 1.0 / (float(g_SD.norm()) + 1e-6))
    return _close(found, W_SD.double() - 1e-2 * g_SD / (g_SD.abs() + 1e-8))


def _rows() -> Tensor:
    """Activations of images with a few directions each, which an SAE can learn."""
    generator = torch.Generator().manual_seed(3)
    directions = torch.nn.functional.normalize(torch.randn(16, _D, generator=generator), dim=1)
    codes = torch.rand(1024, 16, generator=generator) * (torch.rand(1024, 16, generator=generator) < 0.15)
    return codes @ directions


def _train(device: torch.device) -> str:
    """The loss falls; on a GPU to what it falls to on the CPU."""
    first, last = _losses(device)
    require(last < 0.9 * first, f"loss {first:.4g} at first, {last:.4g} after {_STEPS} steps")
    if device.type == "cuda":
        on_cpu = _losses(torch.device("cpu"))[1]
        require(abs(last - on_cpu) < 0.02 * on_cpu, f"loss {last:.4g} after {_STEPS} steps, {on_cpu:.4g} on the CPU")
    return f"loss {first:.3g} to {last:.3g} in {_STEPS} steps"


def _losses(device: torch.device) -> tuple[float, float]:
    """Of the first and the last step."""
    from saevlm_fast.config import SAEConfig
    from saevlm_fast.training.run import train

    losses: list[float] = []
    settings: dict[str, Any] = {"steps": _STEPS, "batch_size": 256, "lr": 3e-3, "log_every": 1, "device": str(device)}
    on_log = lambda step, metrics: losses.append(float(metrics["losses/overall_loss"]))  # noqa: E731
    sae, _ = train(_rows(), SAEConfig(_D, 64, _K, "batch_topk"), on_log=on_log, **settings)
    require(all(bool(parameter.isfinite().all()) for parameter in sae.parameters()), "weights are not finite")
    return losses[0], losses[-1]


def _score(device: torch.device) -> str:
    """Of two latents, one that fires on images of one kind and one that fires on all; against the definition."""
    from saevlm_fast.config import SAEConfig
    from saevlm_fast.sae import SparseAutoencoder
    from saevlm_fast.scoring.monosemanticity import score

    sae = SparseAutoencoder(SAEConfig(2, 2, 2, "topk")).eval()
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(2))
        sae.W_dec.copy_(torch.eye(2))
    kinds = torch.tensor([1.0, -1.0]).repeat_interleave(8)
    activations = torch.stack([(kinds > 0).float(), torch.ones(16)], 1) * torch.linspace(1, 2, 16)[:, None]
    embeddings = torch.stack([kinds, torch.zeros(16)], 1)
    dense = activations.double()
    expected = reference.monosemanticity(dense, embeddings.double())
    found = score(activations, embeddings, sae.to(device), device=device)
    return _close(found.ms, expected, 1e-6)


def _harvest(device: torch.device) -> str:
    """Scenes through the CLIP in the box, twice: other batches, the same rows."""
    from saevlm_fast.harvesting.api import harvest

    with tempfile.TemporaryDirectory() as folder:
        settings: dict[str, Any] = {"layer": 1, "tokens": "patches", "workers": 0, "device": str(device)}
        rows = [
            harvest("hf:tiny-clip", "scenes:test:5", batch_size=size, output=Path(folder) / str(size), **settings)
            for size in (5, 2)
        ]
        first, second = (each.rows(torch.arange(each.n_rows)) for each in rows)
        require(bool(first.isfinite().all()), "rows are not finite")
        return f"{len(first)} rows, {_close(second, first, 1e-3)}"


CHECKS: dict[str, Callable[[torch.device], str]] = {
    "topk encode": _topk_encode,
    "screened encode": _screened_encode,
    "batch topk encode": _batch_topk_encode,
    "threshold encode": _threshold_encode,
    "sparse decode": _sparse_decode,
    "gather dot": _gather_dot,
    "segment sum": _segment_sum,
    "latent range": _latent_range,
    "streamed cosine": _streamed_cosine,
    "pairwise sums": _pairwise_sums,
    "scaled rows": _scaled_rows,
    "quick gelu": _quick_gelu,
    "latent update": _latent_update,
    "training": _train,
    "score": _score,
    "harvest": _harvest,
}
