"""Streamed scores against the float64 double loop over pairs, in any chunks; statuses, errors, tables, files."""

import csv
import json
import math
from itertools import pairwise

import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from true_scores import assert_scores

from saevlm_fast.kernels import reference
from saevlm_fast.kernels.common import SIMILARITIES
from saevlm_fast.scoring.monosemanticity import MonosemanticityScores, StreamedScore
from saevlm_fast.scoring.monosemanticity import score as score_stores
from saevlm_fast.scoring.sums import STATUSES
from saevlm_fast.scoring.tables import check_scores_path, write_scores
from saevlm_fast.sparse_codes import SparseCodes

N_IMAGES, N_LATENTS, D_EMB = 90, 24, 11


def make_data(seed: int = 0):
    """Non-negative activations [N, S]: the first latents are hard cases, the others fire on a fifth of the images."""
    generator = torch.Generator().manual_seed(seed)
    acts_NS = torch.rand(N_IMAGES, N_LATENTS, generator=generator, dtype=torch.float64)
    acts_NS *= torch.rand(N_IMAGES, N_LATENTS, generator=generator) < 0.2
    spread_N = torch.rand(N_IMAGES, generator=generator, dtype=torch.float64)
    acts_NS[:, :12] = 0.0
    acts_NS[3, 1] = 2.0  # single
    acts_NS[1, 2], acts_NS[N_IMAGES - 2, 2] = 1e6, 1.0  # two images
    acts_NS[5, 3], acts_NS[6, 3] = 1e-6, 1.0
    acts_NS[:, 4] = 5.0  # constant
    acts_NS[:, 5] = 1000 + spread_N  # fires on every image
    acts_NS[:, 6] = spread_N + 0.1  # on every image but one, in the middle
    acts_NS[N_IMAGES // 2, 6] = 0.0
    acts_NS[:, 7] = 0.3  # one image above a positive minimum
    acts_NS[7, 7] = 0.4
    acts_NS[:, 8] = torch.linspace(9.0, 1.0, N_IMAGES)  # the minimum falls with every image
    acts_NS[:, 9] = 1e-9  # two images above a small minimum
    acts_NS[:2, 9] = 1e6
    acts_NS[0, 10] = 1e6  # a large first image, then many small ones
    acts_NS[1:, 10] = spread_N[1:]
    acts_NS[:40, 11] = 7.0 + spread_N[:40]  # on every image of the first chunks, then never
    return acts_NS, torch.randn(N_IMAGES, D_EMB, generator=generator, dtype=torch.float64)


def to_csr(acts_NS):
    rows_M, latents_M = torch.nonzero(acts_NS).unbind(1)
    row_offsets = torch.nn.functional.pad((acts_NS != 0).sum(1).cumsum(0), (1, 0))
    return SparseCodes(acts_NS[rows_M, latents_M], latents_M, row_offsets, acts_NS.shape)


def score(acts_NS, emb_NE, similarity="cosine", sizes=(), dense=False, **options) -> MonosemanticityScores:
    """Scores in chunks of the given sizes (the last takes what is left)."""
    streamed = StreamedScore(acts_NS.shape[1], similarity, **options)
    bounds = [0, *torch.tensor(sizes, dtype=torch.int64).cumsum(0).tolist(), len(acts_NS)]
    for first, last in pairwise(bounds):
        chunk_nS = acts_NS[first:last]
        streamed.update(chunk_nS if dense else to_csr(chunk_nS), emb_NE[first:last])
    return streamed.result()


@pytest.mark.parametrize("dense", [False, True], ids=["sparse", "dense"])
@pytest.mark.parametrize("sizes", [(), (1,), (20, 20, 20), (1,) * 89])
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_against_double_loop(similarity, sizes, dense):
    acts_NS, emb_NE = make_data()
    truth_S = reference.monosemanticity(acts_NS, emb_NE, similarity)
    scores = score(acts_NS, emb_NE, similarity, sizes, dense, block_rows=1)
    assert_scores(scores, truth_S, 1e-12)
    names = [STATUSES[code] for code in scores.status[:8]]
    assert names == ["dead", "single", "defined", "defined", "constant", "defined", "defined", "single"]
    assert torch.equal(scores.n_active, (acts_NS > 0).sum(0))
    assert torch.equal(scores.max_activation, acts_NS.amax(0))
    assert (scores.n_images, scores.similarity) == (N_IMAGES, similarity)


@settings(max_examples=40)
@given(
    st.lists(st.integers(0, 25), max_size=6).filter(lambda sizes: sum(sizes) <= N_IMAGES),
    st.integers(1, 100),
    st.integers(0, 3),
)
def test_chunking_does_not_matter(sizes, block_rows, seed):
    acts_NS, emb_NE = make_data(seed)
    acts_NS = acts_NS[torch.randperm(N_IMAGES, generator=torch.Generator().manual_seed(seed))]
    truth_S = score(acts_NS, emb_NE).ms
    assert_scores(score(acts_NS, emb_NE, sizes=sizes, block_rows=block_rows), truth_S, 1e-12)
    assert_scores(score(acts_NS, emb_NE, sizes=sizes, dense=True), truth_S, 1e-12)


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_negative_raw_neurons_float32(similarity):
    generator = torch.Generator().manual_seed(1)
    acts_NK = torch.randn(600, 7, generator=generator)
    acts_NK[:, 1] = -2.0
    acts_NK[:, 2] -= 1000.0
    acts_NK[:, 3] = 0.0
    acts_NK[:, 4] = -1.0
    acts_NK[4, 4] = -0.5
    emb_NE = torch.randn(600, 9, generator=generator)
    scores = score(acts_NK, emb_NE, similarity, sizes=(300, 299), dense=True)
    assert_scores(scores, reference.monosemanticity(acts_NK.double(), emb_NE.double(), similarity), 1e-11)
    assert [STATUSES[code] for code in scores.status[1:5]] == ["constant", "defined", "dead", "single"]
    assert scores.max_activation[1] == -2.0


def test_fixed_k_codes_and_padding():
    """Zero activations in [B, K] codes, and entries after the last row, do not fire."""
    acts_NK = torch.tensor([[2.0, 0.0], [1.0, 3.0], [0.0, 0.0]])
    latents_NK = torch.tensor([[1, 2], [1, 2], [0, 1]])
    emb_NE = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    fixed, ragged = StreamedScore(4), StreamedScore(4)
    fixed.update(SparseCodes(acts_NK, latents_NK, None, (3, 4)), emb_NE)
    padded = torch.tensor([2.0, 1.0, 3.0, 0.0, 0.0]), torch.tensor([1, 1, 2, 0, 0])
    ragged.update(SparseCodes(*padded, torch.tensor([0, 1, 3, 3]), (3, 4)), emb_NE)
    for scores in (fixed.result(), ragged.result()):
        assert [STATUSES[code] for code in scores.status] == ["dead", "defined", "single", "dead"]
        torch.testing.assert_close(scores.ms[1], torch.cosine_similarity(*emb_NE[:2].double(), dim=0))


@pytest.mark.parametrize("dense", [False, True], ids=["sparse", "dense"])
@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("n_images", [0, 1, 2])
def test_few_images(n_images, similarity, dense):
    acts_NS = torch.tensor([[1.0, 0.0, 2.0], [1.0, 0.0, 3.0]])[:n_images]
    emb_NE = torch.randn(2, 4)[:n_images]
    scores = score(acts_NS, emb_NE, similarity, dense=dense)
    assert scores.ms.isnan().all()
    expected = {0: ["dead"] * 3, 1: ["constant", "dead", "constant"], 2: ["constant", "dead", "single"]}
    assert [STATUSES[code] for code in scores.status] == expected[n_images]
    assert scores.summary().counts["defined"] == 0
    assert math.isnan(scores.summary().mean)
    assert StreamedScore(3).result().ms.isnan().all()


def test_result_may_be_asked_twice_and_added_to():
    acts_NS, emb_NE = make_data()
    for similarity in ("cosine", "rbf"):
        streamed = StreamedScore(N_LATENTS, similarity)
        for rows in (slice(0, 50), slice(50, None)):
            streamed.update(to_csr(acts_NS[rows]), emb_NE[rows])
            first = streamed.result()
            assert torch.equal(first.status, streamed.result().status)
        assert_scores(first, reference.monosemanticity(acts_NS, emb_NE, similarity), 1e-12)


def test_rbf_takes_gamma():
    acts_NS, emb_NE = make_data()
    truth_S = reference.monosemanticity(acts_NS, emb_NE, "rbf", 0.01)
    assert_scores(score(acts_NS, emb_NE, "rbf", gamma=0.01), truth_S, 1e-12)


def change(tensor, row, value):
    changed = tensor.clone()
    changed[row] = value
    return changed


def test_bad_rows_are_named_and_leave_the_sums():
    acts_NS, emb_NE = make_data()
    streamed = StreamedScore(N_LATENTS)
    streamed.update(to_csr(acts_NS[:50]), emb_NE[:50])
    codes, emb_nE = to_csr(acts_NS[50:]), emb_NE[50:]
    at = int(codes.row_offsets[4])  # the first entry of image 54
    latent = int(codes.top_indices[at])

    def with_act(value):
        return codes._replace(top_acts=change(codes.top_acts, at, value))

    def with_latent(value):
        return codes._replace(top_indices=change(codes.top_indices, at, value))

    bad = [
        (codes, change(emb_nE, 4, 0.0), "embeddings: image 54: embedding is zero"),
        (codes, change(emb_nE, 4, float("nan")), "embeddings: image 54: embedding is NaN"),
        (codes, change(emb_nE, 4, float("inf")), "embeddings: image 54: embedding is NaN, infinite"),
        (with_act(float("nan")), emb_nE, f"codes: row 54, latent {latent}: nan is not a finite activation of at least"),
        (with_act(-1.0), emb_nE, f"codes: row 54, latent {latent}: -1 is not a finite activation of at least 0"),
        (with_latent(N_LATENTS), emb_nE, f"codes: row 54, .* {N_LATENTS} is not a latent within 0 to {N_LATENTS - 1}"),
        (with_latent(-1), emb_nE, "codes: row 54, latent -1: -1 is not a latent"),
        (codes, emb_nE[:-1], r"emb_nE: shape \(39, 11\) is not \[40, E\]"),
        (codes, emb_nE[:, :-1], "emb_nE: width 10 differs from the 11"),
        (codes._replace(top_acts=codes.top_acts[:-1]), emb_nE, r"codes: top_acts .* are not codes \[40, 24\] in CSR"),
        (codes._replace(shape=(40, 25)), emb_nE, "codes: of 25 latents, not 24"),
        (acts_NS[50:], emb_nE, "not both"),
    ]
    for codes_or_acts, embeddings, message in bad:
        with pytest.raises(ValueError, match=message):
            streamed.update(codes_or_acts, embeddings)
    streamed.update(codes, emb_nE)
    assert_scores(streamed.result(), reference.monosemanticity(acts_NS, emb_NE), 1e-12)


def test_codes_are_refused_after_dense_activations():
    acts_NS, emb_NE = make_data()
    streamed = StreamedScore(N_LATENTS)
    streamed.update(acts_NS, emb_NE)
    with pytest.raises(ValueError, match="not both"):
        streamed.update(to_csr(acts_NS), emb_NE)
    assert_scores(streamed.result(), reference.monosemanticity(acts_NS, emb_NE), 1e-12)


@pytest.mark.parametrize("dense", [False, True])
def test_what_asks_for_gradients_is_summed_without(dense):
    acts_NS, emb_NE = make_data()
    expected = reference.monosemanticity(acts_NS, emb_NE)
    streamed = StreamedScore(N_LATENTS)
    for rows in (slice(0, 50), slice(50, None)):
        acts_nS = acts_NS[rows].clone().requires_grad_()
        streamed.update(acts_nS if dense else to_csr(acts_nS), emb_NE[rows].clone().requires_grad_())
    assert not streamed.result().ms.requires_grad
    assert_scores(streamed.result(), expected, 1e-12)


def test_bad_dense_rows_and_options():
    acts_NS, emb_NE = make_data()
    streamed = StreamedScore(N_LATENTS)
    with pytest.raises(ValueError, match=r"^activations: image 3: acts_nK holds NaN"):
        streamed.update(change(acts_NS, 3, float("nan")), emb_NE)
    with pytest.raises(ValueError, match=r"acts_nK: shape \(90, 23\)"):
        streamed.update(acts_NS[:, 1:], emb_NE)
    with pytest.raises(ValueError, match="'l2' is not one of cosine, dot, rbf"):
        StreamedScore(3, "l2")
    with pytest.raises(ValueError, match="gamma: 0"):
        StreamedScore(3, "rbf", gamma=0.0)


def test_zero_embedding_is_no_error_for_dot_and_rbf():
    acts_NS, emb_NE = make_data()
    emb_NE[2] = 0.0
    for similarity in ("dot", "rbf"):
        truth_S = reference.monosemanticity(acts_NS, emb_NE, similarity)
        assert_scores(score(acts_NS, emb_NE, similarity), truth_S, 1e-12)


def test_summary():
    scores = MonosemanticityScores(
        ms=torch.tensor([0.5, float("nan"), 0.1, 0.5, 0.3], dtype=torch.float64),
        status=torch.tensor([0, 1, 0, 0, 0], dtype=torch.int8),
        n_active=torch.tensor([2, 0, 3, 4, 5]),
        max_activation=torch.ones(5, dtype=torch.float64),
        n_images=9,
        similarity="cosine",
    )
    summary = scores.summary(n_extreme=3)
    assert summary.counts == {"defined": 4, "dead": 1, "constant": 0, "single": 0}
    assert summary.mean == pytest.approx(0.35)
    assert summary.std == pytest.approx(torch.tensor([0.5, 0.1, 0.5, 0.3]).std(correction=0).item())
    assert summary.best == 0.5
    assert summary.quantiles[0.5] == pytest.approx(0.4)
    assert summary.best_latents == [(0, 0.5), (3, 0.5), (4, 0.3)]
    assert summary.worst_latents == [(2, 0.1), (4, 0.3), (0, 0.5)]


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".json"])
def test_written_files(tmp_path, suffix):
    acts_NS, emb_NE = make_data()
    scores, path = score(acts_NS, emb_NE), tmp_path / f"scores{suffix}"
    path.write_text("what was there before")
    write_scores(scores, path, {"sae": "here"})
    metadata = {"similarity": "cosine", "n_images": "90", "sae": "here"}
    if suffix == ".parquet":
        table = pq.read_table(path)
        assert {k.decode(): v.decode() for k, v in table.schema.metadata.items()} == metadata
        rows = table.to_pylist()
    elif suffix == ".csv":
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
    else:
        contents = json.loads(path.read_text())
        assert contents["metadata"] == metadata
        rows = contents["latents"]
    assert list(rows[0]) == ["latent", "ms", "status", "n_active", "max_activation"]
    assert [row["status"] for row in rows] == [STATUSES[code] for code in scores.status]
    ms_S = torch.tensor([float("nan") if row["ms"] is None else float(row["ms"]) for row in rows], dtype=torch.float64)
    assert torch.equal(ms_S.nan_to_num(9.0), scores.ms.nan_to_num(9.0))
    assert list(tmp_path.iterdir()) == [path]


def test_failed_write_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "scores.csv"
    path.write_text("before")
    monkeypatch.setattr("saevlm_fast.files.os.fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_scores(score(*make_data()), path)
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_output_path_is_checked(tmp_path):
    for name in ("scores.txt", "scores", "none/scores.csv"):
        with pytest.raises(ValueError, match="output: "):
            check_scores_path(tmp_path / name)
    assert check_scores_path(tmp_path / "scores.csv") == tmp_path / "scores.csv"


@pytest.mark.gpu
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_gpu_equals_cpu(similarity):
    acts_NS, emb_NE = make_data()
    for dense in (False, True):
        tolerance = 1e-5 if similarity == "rbf" and not dense else 1e-12
        truth_S = score(acts_NS, emb_NE, similarity).ms
        scores = score(acts_NS, emb_NE, similarity, sizes=(1, 20, 30), dense=dense, device="cuda", block_rows=30)
        assert_scores(scores, truth_S, tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_gpu_neurons_of_several_blocks(similarity):
    """20,000 images are two blocks of a GPU, read from the host; dominated neurons among them, and constant ones."""
    generator = torch.Generator().manual_seed(0)
    acts_NK = torch.randn(20_000, 40, generator=generator)
    acts_NK[:, 0], acts_NK[:, 1], acts_NK[7, 1], acts_NK[17_000, 2] = 0.5, 0.0, 3.0, 1e6
    emb_NE = torch.randn(20_000, 33, generator=generator) + 0.3
    truth, scores = (score_stores(acts_NK, emb_NE, similarity=similarity, device=d) for d in ("cpu", "cuda"))
    assert torch.equal(scores.status, truth.status)
    assert torch.equal(scores.n_active, truth.n_active)
    torch.testing.assert_close(scores.ms, truth.ms, rtol=0, atol=1e-11, equal_nan=True)
