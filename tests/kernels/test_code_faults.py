"""What is wrong with a chunk of codes, by the kernel: against counts in plain torch; and how the score takes it."""

import pytest
import torch
from launches import counted_launches

from saevlm_fast.kernels.code_faults_triton import code_faults
from saevlm_fast.scoring import intake, sums
from saevlm_fast.scoring.monosemanticity import StreamedScore
from saevlm_fast.sparse_codes import SparseCodes
from static_compile import TARGETS, Case, assert_no_spills

GPU = torch.cuda.is_available()
N, K, S, E = 30, 3, 11, 5


def make_codes() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """acts [N, K], latents [N, K] that ascend, embeddings [N, E]."""
    generator = torch.Generator().manual_seed(0)
    acts_NK = torch.rand(N, K, generator=generator) + 0.1
    latents_NK = torch.stack([torch.randperm(S, generator=generator)[:K].sort().values for _ in range(N)])
    return acts_NK, latents_NK, torch.randn(N, E, generator=generator)


@pytest.mark.parametrize("n_images", [0, 1, N])
@pytest.mark.parametrize("csr", [False, True])
def test_counts(csr, n_images, device, monkeypatch):
    from saevlm_fast.kernels import code_faults_triton

    monkeypatch.setattr(code_faults_triton, "BLOCK", 16)
    monkeypatch.setattr(code_faults_triton, "MOST_PROGRAMS", 3)
    acts_NK, latents_NK, emb_NE = (t[:n_images].to(device) for t in make_codes())
    offsets = torch.arange(n_images + 1, device=device) * K if csr else None
    if csr:  # padding, of which nothing is asked
        acts_NK = torch.cat([acts_NK.flatten(), acts_NK.new_full((40,), torch.nan)])
        latents_NK = torch.cat([latents_NK.flatten(), latents_NK.new_full((40,), -1)])
    sqnorm_N = emb_NE.double().square().sum(1)
    assert code_faults(acts_NK, latents_NK, offsets, sqnorm_N, S) == (0, 0, 0, 0, n_images * K)
    if n_images < N:
        return
    sqnorm_N[[3, 29]], sqnorm_N[[0, 7, 20]] = (
        0.0,
        torch.tensor([torch.nan, torch.inf, torch.inf], device=device).double(),
    )
    acts, latents = acts_NK.flatten(), latents_NK.flatten()
    acts[[5, 50]], acts[[8, 81, 82]] = 0.0, torch.tensor([torch.nan, torch.inf, -1e-30], device=device)
    latents[[13, 14]] = torch.tensor([-1, S], device=device)
    assert code_faults(acts_NK, latents_NK, offsets, sqnorm_N, S) == (2, 3, 5, 2, N * K)
    if csr:
        offsets[[4, 5]] = offsets[[5, 4]]
        assert code_faults(acts, latents, offsets, sqnorm_N, S).wrong == 6
        offsets[0], offsets[-1] = 1, len(acts) + 1
        assert code_faults(acts, latents, offsets, sqnorm_N, S).n_entries == len(acts)


@pytest.fixture
def kernels(monkeypatch):
    """Where there is no GPU, chunks are checked by the kernel all the same."""
    if not GPU:
        monkeypatch.setattr(intake, "on_gpu", lambda _: True)


@pytest.mark.parametrize("csr", [False, True])
def test_the_score_refuses_by_name_and_goes_on(csr, device, kernels):
    acts_NK, latents_NK, emb_NE = (t.to(device) for t in make_codes())

    def chunk(acts_NK, latents_NK, rows):
        codes = SparseCodes.from_flat(acts_NK[rows], latents_NK[rows], None, S)
        return codes.rows() if csr else codes

    scores = StreamedScore(S, device=device, block_rows=25)
    scores.update(chunk(acts_NK, latents_NK, slice(0, 20)), emb_NE[:20])
    rows = slice(20, N)
    for part, value, message in (
        (0, float("nan"), "row 24, latent"),
        (0, -1.0, "row 24, latent"),
        (1, S, f"row 24, latent {S}"),
        (2, 0.0, "image 24: embedding is zero"),
        (2, float("inf"), "image 24: embedding is NaN"),
    ):
        bad = [t.clone() for t in (acts_NK, latents_NK, emb_NE)]
        bad[part][24, 1 if part < 2 else slice(None)] = value
        with pytest.raises(ValueError, match=message):
            scores.update(chunk(*bad[:2], rows), bad[2][rows])
    silent_NK = acts_NK.clone()
    silent_NK[24, 1] = 0.0  # allowed; no image fires with it
    scores.update(chunk(silent_NK, latents_NK, rows), emb_NE[rows])
    expected = StreamedScore(S)
    expected.update(SparseCodes.from_flat(silent_NK.cpu(), latents_NK.cpu(), None, S), emb_NE.cpu())
    torch.testing.assert_close(scores.result().ms, expected.result().ms, rtol=1e-12, atol=1e-12, equal_nan=True)
    assert torch.equal(scores.result().n_active, expected.result().n_active)


@pytest.mark.skipif(GPU, reason="launches are counted in the interpreter")
def test_a_chunk_that_waits_is_two_launches(kernels):
    """Of docs/gpu.md: the embeddings' norms, and what is wrong; one copy to the host."""
    acts_NK, latents_NK, emb_NE = make_codes()
    scores = StreamedScore(S)
    scores.update(SparseCodes.from_flat(acts_NK, latents_NK, None, S), emb_NE)
    with counted_launches() as counts:
        scores.update(SparseCodes.from_flat(acts_NK, latents_NK, None, S), emb_NE)
    counts = {name: n for name, n in counts.items() if name not in ("_to_copy", "mul", "pow", "sum", "square", "cat")}
    assert counts == {"code_faults_kernel": 1}


@pytest.mark.skipif(GPU, reason="launches are counted in the interpreter")
@pytest.mark.parametrize("halves", [False, True])
@pytest.mark.parametrize("always", [0, 9, N])
def test_minima_that_are_zero_are_not_asked_for_again(always, halves, kernels, monkeypatch):
    """always: images on all of which some latents fire, so that the minimum of these may still fall."""
    monkeypatch.setattr(sums, "on_gpu", lambda _: True)
    acts_NK, latents_NK, emb_NE = make_codes()
    latents_NK[:always] = torch.arange(K)
    scores, lowered, asked = StreamedScore(S, block_rows=1, halves=halves), [], []
    for rows in (slice(0, 9), slice(9, 20), slice(20, N)):
        with counted_launches() as counts:
            scores.update(SparseCodes.from_flat(acts_NK[rows], latents_NK[rows], None, S), emb_NE[rows])
        lowered.append(counts["lower_kernel"])
        asked.append(counts["nonzero"] + counts["gt"] > 0)
    assert lowered == [0, *((1 + halves) * (always > before) for before in (0, 9))]
    assert asked == [True, always > 0, always > 9]
    cpu = StreamedScore(S)
    cpu.update(SparseCodes.from_flat(acts_NK, latents_NK, None, S), emb_NE)
    torch.testing.assert_close(scores.result().ms, cpu.result().ms, rtol=1e-12, atol=1e-12, equal_nan=True)


def test_static_compile_without_spills():
    from saevlm_fast.kernels import code_faults_triton as kernels

    assert (kernels.BLOCK, kernels.NUM_WARPS) == (1024, 4)
    signature = {"acts_ptr": "*fp32", "latents_ptr": "*i64", "offsets_ptr": "*i64", "sqnorm_ptr": "*fp64"}
    signature |= {"counts_ptr": "*i64"} | dict.fromkeys(("n_entries", "n_images", "n_latents"), "i32")
    module, more = "saevlm_fast.kernels.code_faults_triton", {"BLOCK": 1024, "CSR": True}
    assert_no_spills([Case(module, "code_faults_kernel", target, signature, more) for target in TARGETS])
