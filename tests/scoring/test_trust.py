"""Intervals, null, corrected scores and halves against brute force; invariance; every status; stores and pools."""

import math
from dataclasses import replace
from itertools import pairwise, permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import pearson3
from true_scores import close

from saevlm_fast.kernels import reference
from saevlm_fast.measures.codes import dense_codes
from saevlm_fast.scoring.monosemanticity import StreamedScore
from saevlm_fast.scoring.null import (
    FEW_IMAGES,
    SimilarityMoments,
    drawn_images,
    null_deviation,
    null_skewness,
    skewed_tail,
    third_order,
)
from saevlm_fast.scoring.ranks import found_at
from saevlm_fast.scoring.second_pass import Certainty, SecondPass, change_error
from saevlm_fast.scoring.sums import STATUSES
from saevlm_fast.scoring.trust import TrustedScores, rank_agreement, trusted_score, trusted_scores

N_IMAGES, D_EMB = 60, 12
NAMES = ("dead", "constant", "single", "two", "three", "many", "some", "few", "dominated", "always")
DEAD, CONSTANT, SINGLE, TWO, THREE = range(5)
ALWAYS = NAMES.index("always")


def make_data(seed=0):
    """Activations [N, S], a latent of every kind in NAMES, and embeddings [N, E] with a common part."""
    generator = torch.Generator().manual_seed(seed)
    acts_NS = torch.rand(N_IMAGES, len(NAMES), generator=generator, dtype=torch.float64) + 0.05
    shares = torch.tensor([1, 1, 1, 1, 1, 0.8, 0.4, 0.15, 0.3, 1])
    acts_NS *= torch.rand(N_IMAGES, len(NAMES), generator=generator) < shares
    acts_NS[:, DEAD] = 0.0
    acts_NS[:, CONSTANT] = 3.0
    for latent, images in ((SINGLE, [7]), (TWO, [3, 30]), (THREE, [2, 9, 41])):
        kept = acts_NS[images, latent].clone()
        acts_NS[:, latent] = 0.0
        acts_NS[images, latent] = kept
    acts_NS[11, NAMES.index("dominated")] = 1e3
    return acts_NS, torch.randn(N_IMAGES, D_EMB, generator=generator, dtype=torch.float64) + 0.4


def two_passes(acts_NS, emb_NE, weights_SW=None, sizes=(), dense=False, similarity="cosine", **options) -> Certainty:
    bounds = [0, *np.cumsum(sizes, dtype=int).tolist(), len(acts_NS)]
    pieces = [slice(*pair) for pair in pairwise(bounds)]
    first = StreamedScore(acts_NS.shape[1], similarity, halves=True, **options)
    for rows in pieces:
        first.update(acts_NS[rows] if dense else dense_codes(acts_NS[rows]), emb_NE[rows])
    second = SecondPass(first, weights_SW)
    for rows in pieces:
        second.update(acts_NS[rows] if dense else dense_codes(acts_NS[rows]), emb_NE[rows])
    return second.result()


def slow_scores(b_NS, emb_NE, similarity="cosine"):
    """[S] of weights b as they are: the minimum is held, and stays what it was when an image goes."""
    unit_NE = torch.nn.functional.normalize(emb_NE, dim=1) if similarity == "cosine" else emb_NE
    s_NN = (unit_NE @ unit_NE.T).fill_diagonal_(0.0)
    ones_NN = torch.ones_like(s_NN).fill_diagonal_(0.0)
    den_S = (b_NS * (ones_NN @ b_NS)).sum(0)
    return torch.where((b_NS > 0).sum(0) > 1, (b_NS * (s_NN @ b_NS)).sum(0) / den_S, math.nan)


def without(tensor, i):
    return torch.cat([tensor[:i], tensor[i + 1 :]])


def jackknifed(b_NS, emb_NE, statistic, similarity="cosine"):
    """The statistic of scores and embeddings without each image, less that with all; [N, ...]."""
    whole = statistic(slow_scores(b_NS, emb_NE, similarity), emb_NE)
    parts = [
        statistic(slow_scores(without(b_NS, i), without(emb_NE, i), similarity), without(emb_NE, i))
        for i in range(len(b_NS))
    ]
    return torch.stack(parts) - whole


def mean_similarity(emb_NE, similarity="cosine"):
    unit_NE = torch.nn.functional.normalize(emb_NE, dim=1) if similarity == "cosine" else emb_NE
    n = len(unit_NE)
    return float((unit_NE @ unit_NE.T).fill_diagonal_(0.0).sum()) / (n * (n - 1))


@pytest.mark.parametrize("dense", [False, True], ids=["sparse", "dense"])
@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_jackknife_against_leaving_each_image_out(similarity, dense):
    acts_NS, emb_NE = make_data()
    b_NS = acts_NS - acts_NS.amin(0)
    weights_SW = torch.randn(len(NAMES), 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    found = two_passes(acts_NS, emb_NE, weights_SW, sizes=(7, 20), dense=dense, similarity=similarity, block_rows=10)
    close(found.scores.ms, reference.monosemanticity(acts_NS, emb_NE, similarity))
    changes_NS = jackknifed(b_NS, emb_NE, lambda ms_S, _: ms_S, similarity)
    n = N_IMAGES
    expected_S = ((n - 1) / n * (changes_NS.square().sum(0) - changes_NS.sum(0).square() / n)).sqrt()
    close(found.se_S, expected_S.masked_fill((b_NS > 0).sum(0) < 3, math.nan))
    several_S = (b_NS > 0).sum(0) > 2
    close(found.weighted_NW, changes_NS[:, several_S] @ weights_SW[several_S])
    close(found.mean_changes_N, jackknifed(b_NS, emb_NE, lambda ms_S, _: ms_S.nanmean(), similarity))

    def with_null(ms_S, emb_nE):
        return ms_S.nan_to_num(mean_similarity(emb_nE, similarity)).mean()

    close(found.null_mean_changes_N, jackknifed(b_NS, emb_NE, with_null, similarity))
    assert found.mean_similarity == pytest.approx(mean_similarity(emb_NE, similarity), abs=1e-12)
    close(found.n_eff_S, b_NS.sum(0).square() / b_NS.square().sum(0))
    for half in (0, 1):
        close(found.half_ms_2S[half], slow_scores(b_NS[half::2], emb_NE[half::2], similarity))


def test_jackknife_beside_a_bootstrap():
    """An independent check of what the jackknife estimates: a Poisson bootstrap, pairs of copies left out."""
    acts_NS, emb_NE = make_data(5)
    found = two_passes(acts_NS, emb_NE)
    latent, generator = NAMES.index("some"), torch.Generator().manual_seed(0)
    unit_NE = torch.nn.functional.normalize(emb_NE, dim=1)
    b_N = acts_NS[:, latent]
    counts_BN = torch.poisson(torch.ones(2000, N_IMAGES, dtype=torch.float64), generator=generator)
    w_BN = counts_BN * b_N
    num_B = (w_BN @ unit_NE).square().sum(1) - w_BN.square().sum(1)
    den_B = w_BN.sum(1).square() - w_BN.square().sum(1)
    assert float(found.se_S[latent]) == pytest.approx(float((num_B / den_B).std()), rel=0.25)


def test_null_against_shuffles():
    """Mean and deviation of 20,000 shuffles. Errors of both are known: 5 of their standard errors are allowed."""
    acts_NS, emb_NE = make_data(1)
    found = two_passes(acts_NS, emb_NE)
    b_NS = acts_NS - acts_NS.amin(0)
    unit_NE = torch.nn.functional.normalize(emb_NE, dim=1)
    s_NN, n_shuffles = (unit_NE @ unit_NE.T).fill_diagonal_(0.0), 20_000
    generator = torch.Generator().manual_seed(0)
    shuffles_BN = torch.rand(n_shuffles, N_IMAGES, generator=generator).argsort(1)
    for latent in range(TWO, len(NAMES)):
        b_BN = b_NS[:, latent][shuffles_BN]
        drawn_B = ((b_BN @ s_NN) * b_BN).sum(1) / (b_BN[0].sum().square() - b_BN[0].square().sum())
        mean, sd = float(drawn_B.mean()), float(drawn_B.std())
        assert abs(mean - found.mean_similarity) < 5 * sd / math.sqrt(n_shuffles)
        fourth = float((drawn_B - mean).pow(4).mean())  # Var(s^2) = (m4 - s^4) / B, so that of s is it / (4 s^2)
        error = math.sqrt((fourth - sd**4) / n_shuffles) / (2 * sd)
        assert abs(sd - float(found.null_sd_S[latent])) < 5 * error
        # p: a binomial share of 2,000 draws (or the normal law's, from 30 images on) beside one of 20,000.
        share = float((drawn_B >= found.scores.ms[latent]).double().mean())
        error = math.sqrt(max(share * (1 - share), 0.001) * (1 / 2000 + 1 / n_shuffles))
        skew = 0.004 if int((b_NS[:, latent] > 0).sum()) >= FEW_IMAGES else 0.0
        assert abs(float(found.p_S[latent]) - share) < 5 * error + skew


@pytest.mark.parametrize("skewness", [-1.5, -0.2, 1e-5, 0.2, 1.0, 3.0])
def test_the_law_of_a_skewed_null(skewness):
    z = torch.linspace(-3, 6, 40, dtype=torch.float64)
    found = skewed_tail(z, torch.full_like(z, skewness))
    close(found, torch.from_numpy(pearson3.sf(z.numpy(), skewness)), 1e-5)


def clustered(n_images=400):
    """Unit vectors in ten clusters: a null that is skewed."""
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(10, D_EMB, generator=generator, dtype=torch.float64)
    emb_NE = centers[torch.arange(n_images) % 10] + 0.3 * torch.randn(n_images, D_EMB, generator=generator) + 0.2
    return torch.nn.functional.normalize(emb_NE.double(), dim=1)


def test_skewness_and_far_tail_against_shuffles():
    """Of 20,000 shuffles: the skewness, and how many have p below .01 and .001. The normal law has far more."""
    unit_NE, n_shuffles, generator = clustered(), 20_000, torch.Generator().manual_seed(1)
    n_images, ones_N = len(unit_NE), torch.ones(len(unit_NE), dtype=torch.float64)
    b_n = torch.rand(20, generator=generator, dtype=torch.float64) + 0.2
    moments = SimilarityMoments(unit_NE.sum(0), ones_N.sum(), n_images)
    v_NE, along_N = moments.centred_rows(unit_NE, ones_N)
    moments.add(v_NE, along_N, ones_N)
    powers_PS = torch.stack([b_n.pow(m).sum() for m in range(1, 7)])[:, None]
    deviation_S = null_deviation(powers_PS[:4], moments)
    skewness_S = null_skewness(powers_PS, third_order(v_NE.float(), along_N), deviation_S, n_images)
    images_Bn = torch.rand(n_shuffles, n_images, generator=generator).topk(20, dim=1).indices
    sums_BE = torch.einsum("bne,n->be", unit_NE[images_Bn], b_n)
    drawn_B = (sums_BE.square().sum(1) - b_n.square().sum()) / (b_n.sum().square() - b_n.square().sum())
    z_B = (drawn_B - moments.mean_similarity) / deviation_S
    assert float(skewness_S) == pytest.approx(float(z_B.pow(3).mean()), abs=0.1)
    assert float(skewness_S) > 0.4
    p_B = skewed_tail(z_B, skewness_S.expand_as(z_B))
    normal_B = torch.special.erfc(z_B / 2**0.5) / 2
    for limit, most in ((0.01, 1.25), (0.001, 2.0)):
        share, by_normal = (float((each < limit).double().mean()) / limit for each in (p_B, normal_B))
        assert 0.5 < share < most
        assert by_normal > 1.4 * share


def test_third_order_means_against_loops():
    v_NE, a_N = torch.randn(2, 9, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    a_N = a_N[:, 0]
    found = third_order(v_NE, a_N)
    h = v_NE @ v_NE.T
    pairs, triples = list(permutations(range(9), 2)), list(permutations(range(9), 3))
    assert found.aaa == pytest.approx(float(a_N.pow(3).mean()), rel=1e-6)
    assert found.aah == pytest.approx(np.mean([float(a_N[i] * a_N[j] * h[i, j]) for i, j in pairs]), rel=1e-6)
    assert found.ahh == pytest.approx(np.mean([float(a_N[i] * h[i, j] ** 2) for i, j in pairs]), rel=1e-6)
    assert found.cubes == pytest.approx(np.mean([float(h[i, j] ** 3) for i, j in pairs]), rel=1e-6)
    assert found.hhh == pytest.approx(np.mean([float(h[i, j] * h[j, k] * h[k, i]) for i, j, k in triples]), rel=1e-6)


def test_float32_embeddings_give_the_same():
    """Products of centred float32 vectors, also where a common part is a hundred times the rest."""
    acts_NS, emb_NE = make_data(2)
    for common in (0.0, 100.0):
        whole, half = (two_passes(acts_NS, (emb_NE + common).to(dtype)) for dtype in (torch.float64, torch.float32))
        for name, tolerance in (("se_S", 1e-3), ("null_sd_S", 1e-3), ("mean_changes_N", 1e-3)):
            found, expected = getattr(half, name), getattr(whole, name)
            scale = float(expected.abs().nan_to_num(0).max())
            torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * scale, equal_nan=True)


@settings(max_examples=25)
@given(st.integers(4, 6), st.integers(0, 5), st.lists(st.integers(0, 3), min_size=6, max_size=6))
def test_null_variance_over_all_placements(n, seed, levels):
    """Exact for every placement of few images, with ties and zeros."""
    b_n = torch.tensor(levels[:n], dtype=torch.float64)
    if int((b_n > 0).sum()) < 2:
        return
    unit_nE = torch.randn(n, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    unit_nE /= unit_nE.norm(dim=1, keepdim=True)
    s_nn = (unit_nE @ unit_nE.T).fill_diagonal_(0.0)
    placements = torch.tensor(list(permutations(range(n))))
    b_Bn = b_n[placements]
    drawn_B = ((b_Bn @ s_nn) * b_Bn).sum(1) / (b_n.sum().square() - b_n.square().sum())
    moments = SimilarityMoments(unit_nE.sum(0), torch.tensor(float(n), dtype=torch.float64), n)
    ones_n = torch.ones(n, dtype=torch.float64)
    moments.add(*moments.centred_rows(unit_nE, ones_n), ones_n)
    powers_4S = torch.stack([b_n.pow(m).sum() for m in (1, 2, 3, 4)])[:, None]
    assert float(drawn_B.mean()) == pytest.approx(moments.mean_similarity, abs=1e-12)
    # A difference of sums of order 1 in float64: what is left of a variance of 0 is its rounding.
    found = float(null_deviation(powers_4S, moments)) ** 2
    assert found == pytest.approx(float(drawn_B.var(correction=0)), abs=1e-12, rel=1e-9)


@settings(max_examples=12)
@given(
    st.lists(st.integers(0, 25), max_size=5).filter(lambda sizes: sum(sizes) <= N_IMAGES),
    st.integers(1, 80),
    st.booleans(),
    st.integers(0, 3),
)
def test_chunks_do_not_matter(sizes, block_rows, dense, seed):
    acts_NS, emb_NE = make_data(seed)
    whole = two_passes(acts_NS, emb_NE, torch.ones(len(NAMES), 1))
    parts = two_passes(acts_NS, emb_NE, torch.ones(len(NAMES), 1), sizes, dense, block_rows=block_rows)
    for name in ("n_eff_S", "half_ms_2S", "se_S", "mean_changes_N", "null_mean_changes_N", "weighted_NW", "null_sd_S"):
        close(getattr(parts, name), getattr(whole, name), 1e-9)
    close(parts.p_S, whole.p_S, 1e-6)  # its skewness is of float32 products


def test_order_and_threads_do_not_matter():
    acts_NS, emb_NE = make_data()
    whole = two_passes(acts_NS, emb_NE)
    order = torch.randperm(N_IMAGES, generator=torch.Generator().manual_seed(0))
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        moved = two_passes(acts_NS[order], emb_NE[order])
    finally:
        torch.set_num_threads(threads)
    for name in ("n_eff_S", "se_S", "null_sd_S"):
        close(getattr(moved, name), getattr(whole, name))
    close(moved.mean_changes_N, whole.mean_changes_N[order])
    few_S = whole.scores.n_active < FEW_IMAGES
    close(moved.p_S[~few_S], whole.p_S[~few_S], 1e-6)
    # The same 2,000 sets of positions are other images: two samples of one share.
    share_S = whole.p_S[few_S]
    allowed_S = 5 * (share_S * (1 - share_S) * 2 / 2000).sqrt() + 2e-3
    assert torch.equal(moved.p_S.isnan(), whole.p_S.isnan())
    known_S = ~share_S.isnan()
    assert int(known_S.sum()) >= 2
    assert ((moved.p_S[few_S] - share_S).abs() <= allowed_S)[known_S].all()


def test_images_that_are_all_alike_are_no_discovery():
    """What differs is the rounding of sums: a deviation of 1e-17 must not make p values of it."""
    acts_NS = make_data()[0].repeat(4, 1)
    emb_NE = torch.randn(1, D_EMB, generator=torch.Generator().manual_seed(4)).expand(len(acts_NS), -1).contiguous()
    trusted = TrustedScores.of(two_passes(acts_NS, emb_NE))
    defined_S = trusted.status == STATUSES.index("defined")
    assert (trusted.p[defined_S] == 1).all()
    assert (trusted.null_sd[defined_S] == 0).all()
    assert trusted.z.isnan().all()
    assert not trusted.above_null.any()


@settings(max_examples=30)
@given(st.lists(st.lists(st.integers(0, 2), min_size=3, max_size=3), min_size=0, max_size=9), st.integers(0, 3))
def test_small_codes_with_ties_and_zeros(levels, seed):
    acts_NS = torch.tensor(levels, dtype=torch.float64).reshape(-1, 3)
    emb_NE = torch.randn(len(acts_NS), 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if not len(acts_NS):
        with pytest.raises(ValueError, match="with halves=True and images"):
            SecondPass(StreamedScore(3, halves=True))
        return
    trusted = TrustedScores.of(two_passes(acts_NS, emb_NE))
    defined_S = trusted.status == STATUSES.index("defined")
    b_NS = acts_NS - acts_NS.amin(0)
    for values_S in (trusted.ms, trusted.n_eff, trusted.p):
        assert torch.equal(values_S.isnan(), ~defined_S)
    assert ((trusted.p > 0) & (trusted.p <= 1))[defined_S].all()
    assert torch.equal(trusted.se.isnan(), (b_NS > 0).sum(0) < 3)
    assert ((trusted.n_eff >= 1 - 1e-9) & (trusted.n_eff <= len(acts_NS) + 1e-9))[defined_S].all()
    trusted.summary()
    assert len(trusted.table()) == 3


@pytest.mark.parametrize("dense", [False, True], ids=["sparse", "dense"])
def test_every_status_in_every_column(dense):
    acts_NS, emb_NE = make_data()
    trusted = TrustedScores.of(two_passes(acts_NS, emb_NE, dense=dense))
    rows = trusted.table().to_pylist()
    assert [rows[i]["status"] for i in (DEAD, CONSTANT, SINGLE, TWO)] == ["dead", "constant", "single", "defined"]
    for row in (rows[DEAD], rows[CONSTANT], rows[SINGLE]):
        assert all(math.isnan(row[name]) for name in ("ms", "corrected", "n_eff", "se", "ms_low", "null_sd", "z", "p"))
        assert row["above_null"] is False
    two = rows[TWO]
    assert all(math.isfinite(two[name]) for name in ("ms", "corrected", "n_eff", "null_sd", "z", "p"))
    assert math.isnan(two["se"])
    assert rows[THREE]["ms_low"] < rows[THREE]["ms"] < rows[THREE]["ms_high"]
    summary = trusted.summary()
    assert summary.mean == pytest.approx(float(trusted.ms.nanmean()))
    assert summary.mean_with_null == pytest.approx(float(trusted.ms.nan_to_num(trusted.mean_cosine).mean()))
    low, high = summary.mean_interval
    assert high - summary.mean == pytest.approx(1.959964 * change_error(trusted.mean_changes_N), rel=1e-6)
    assert low < summary.mean < high


def test_one_latent_and_nothing_asked_for():
    acts_NS, emb_NE = make_data()
    column = acts_NS[:, [NAMES.index("some")]]
    trusted = TrustedScores.of(two_passes(column, emb_NE))
    assert trusted.summary().guarded_best.latent == 0
    assert trusted.summary().split_half != trusted.summary().split_half  # of one latent there is no rank
    plain = trusted_score(column, emb_NE, intervals=False, null=False)
    assert plain.table().column_names[-2:] == ["corrected", "n_eff"]
    assert plain.se is None
    assert plain.p is None
    assert math.isnan(plain.summary().mean_interval.low)
    assert math.isnan(plain.summary().above_null)
    close(plain.ms, trusted.ms, 1e-6)  # what is read is float32


def test_best_is_chosen_on_one_half_and_told_on_the_other():
    trusted = TrustedScores.of(two_passes(*make_data()))
    n_latents = len(NAMES)
    even_S, odd_S = torch.linspace(0, 0.9, n_latents), torch.linspace(0.5, 0.1, n_latents)
    n_active = torch.full((n_latents,), 10)
    n_active[-1] = 9  # on too few images
    n_eff = torch.full((n_latents,), 5.0)
    n_eff[-2] = 4.9  # one image weighs too much
    odd_S[-3] = math.nan
    guarded = replace(trusted, half_ms_2S=torch.stack([even_S, odd_S]), n_active=n_active, n_eff=n_eff).guarded_best()
    assert guarded == (n_latents - 4, float(even_S[-4]), float(odd_S[-4]))
    assert replace(trusted, n_active=torch.zeros(n_latents, dtype=torch.int64)).guarded_best().latent == -1


def test_false_discoveries():
    p = torch.tensor([0.001, 0.2, 0.012, math.nan, 0.026, 0.9], dtype=torch.float64)
    assert found_at(p).tolist() == [True, False, True, False, True, False]  # limits .01 .02 .03 .04 .05
    assert not found_at(torch.tensor([0.06, math.nan])).any()
    assert len(found_at(torch.zeros(0))) == 0


def test_draws_are_of_different_images():
    for n_images in (2, 5, 40, 300, 100_000):
        draws_RW = drawn_images(n_images, 0, 500)
        assert draws_RW.shape == (500, min(FEW_IMAGES - 1, n_images))
        assert (draws_RW.sort(1).values.diff(dim=1) > 0).all()
        assert 0 <= int(draws_RW.min()) <= int(draws_RW.max()) < n_images
    assert torch.equal(drawn_images(1000, 1), drawn_images(1000, 1))
    assert not torch.equal(drawn_images(1000, 1), drawn_images(1000, 2))


def test_several_encoders_in_one_pass():
    acts_NS, emb_NE = make_data()
    other_NE = torch.randn(N_IMAGES, 5, generator=torch.Generator().manual_seed(9))
    both = trusted_scores(acts_NS, {"one": emb_NE, "other": other_NE})
    for name, embeddings in (("one", emb_NE), ("other", other_NE)):
        alone = trusted_score(acts_NS, embeddings)
        for field in ("ms", "se", "p", "n_eff"):
            close(getattr(both[name], field), getattr(alone, field))
    agreement = rank_agreement(both)
    assert list(agreement) == [("one", "other")]
    assert rank_agreement({"a": both["one"], "b": both["one"]})["a", "b"] == pytest.approx(1.0)
    assert -1 <= agreement["one", "other"] <= 1


def test_a_second_pass_keeps_no_more_than_the_centred_sums():
    """The float64 sums of both halves go once they are centred: no vector lies in their memory."""
    acts_NS, emb_NE = make_data()
    first = StreamedScore(len(NAMES), halves=True)
    first.update(acts_NS, emb_NE.float())
    second = SecondPass(first)
    second.update(acts_NS, emb_NE.float())
    kept = vars(second._pairs).items()
    vectors = {name: each for name, each in kept if name.endswith("_S") and isinstance(each, torch.Tensor)}
    assert len(vectors) > 3
    for name, each in vectors.items():
        assert each.untyped_storage().nbytes() < 8 * len(NAMES) * D_EMB, name


def test_what_is_refused():
    acts_NS, emb_NE = make_data()
    with pytest.raises(ValueError, match="rbf has no intervals"):
        trusted_score(acts_NS, emb_NE, similarity="rbf")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least one encoder"):
        trusted_scores(acts_NS, {})
    with pytest.raises(ValueError, match="rbf keeps no sums"):
        StreamedScore(3, "rbf", halves=True)
    with pytest.raises(ValueError, match="no image ids"):
        trusted_score(acts_NS, emb_NE, pool="max")
    first = StreamedScore(len(NAMES), halves=True)
    first.update(acts_NS, emb_NE)
    second = SecondPass(first)
    second.update(acts_NS[:50], emb_NE[:50])
    with pytest.raises(ValueError, match="second pass: 50 images, but 60"):
        second.result()
    with pytest.raises(ValueError, match=r"weights_SW: shape \(3, 1\)"):
        two_passes(acts_NS, emb_NE, torch.ones(3, 1))
