"""Formulas of codes alone against brute force: uniqueness, monosemanticity, geometry, separation."""

import itertools
import math

import numpy as np
import pytest
import torch
from codes_and_labels import N, random_codes
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import pearsonr

from saevlm_fast.data.rows import activations_of
from saevlm_fast.kernels import reference
from saevlm_fast.measures import geometry as geometry_module
from saevlm_fast.measures import uniqueness as uniqueness_module
from saevlm_fast.measures.codes import KeptCodes
from saevlm_fast.measures.geometry import Side, cofiring, compare, nearest, phi_of
from saevlm_fast.measures.matching import sparse_assignment, top_of_groups
from saevlm_fast.measures.monosemanticity import monosemanticity
from saevlm_fast.measures.separation import matched_mean, separation
from saevlm_fast.measures.uniqueness import uniqueness
from saevlm_fast.scoring.sums import STATUSES
from saevlm_fast.scoring.trust import trusted_score


def test_kept_codes_and_statuses():
    acts = random_codes()
    codes = KeptCodes.of_dense(acts)
    np.testing.assert_array_equal(codes.matrix().toarray(), acts.T)
    np.testing.assert_array_equal(codes.by_image().dense().numpy(), acts)
    assert [STATUSES[status] for status in codes.status_S[:4]] == ["dead", "constant", "single", "defined"]
    keep = np.arange(N) % 3 != 1
    np.testing.assert_array_equal(codes.part(keep).matrix().toarray(), acts[keep].T)


def brute_sets(acts, n_top):
    sets = {}
    for latent, column in enumerate(acts.T):
        if (column > 0).sum() >= n_top:
            sets[latent] = set(sorted(range(len(column)), key=lambda i: (-column[i], i))[:n_top])
    return sets


@pytest.mark.parametrize("levels", [None, 2])
@pytest.mark.parametrize("most", [1, 1 << 30])
def test_shared_images_of_all_pairs(levels, most, monkeypatch):
    monkeypatch.setattr(uniqueness_module, "_BLOCK_PAIRS", most)
    acts = random_codes(n_latents=15, levels=levels)
    sets = brute_sets(acts, 8)
    assert len(sets) > 8
    found = uniqueness(KeptCodes.of_dense(acts), n_top=8, n_closest=7)
    shared = {pair: len(sets[pair[0]] & sets[pair[1]]) for pair in itertools.combinations(sorted(sets), 2)}
    assert found.figures["histogram"] == np.bincount(list(shared.values()), minlength=9).tolist()
    ordered = sorted(shared, key=lambda pair: (-shared[pair], pair))[:7]
    assert list(zip(found.pairs["latent"].tolist(), found.pairs["other"].tolist())) == ordered
    for latent in range(15):
        others = {o: len(sets[latent] & sets[o]) for o in sets if o != latent} if latent in sets else {}
        best = max(others.values(), default=0)
        assert found.latents["top16_shared"][latent] == best
        nearest_one = min((o for o, c in others.items() if c == best), default=-1) if best else -1
        assert found.latents["top16_nearest"][latent] == nearest_one
    redundant = [any(c / (16 - c) > 0.5 for pair, c in shared.items() if latent in pair) for latent in sets]
    assert found.figures["redundant_share"] == pytest.approx(np.mean(redundant))
    assert found.figures["distinct_images_share"] == pytest.approx(len(set.union(*sets.values())) / (8 * len(sets)))


@given(seed=st.integers(0, 1000), n_keys=st.integers(1, 9), n=st.integers(1, 6), n_values=st.integers(1, 40))
def test_the_largest_of_groups(seed, n_keys, n, n_values):
    """As a sort of everything has them, whatever the order of keys, with ties and infinities."""
    generator = np.random.default_rng(seed)
    for keys in (generator.integers(0, n_keys, 60), np.arange(60) % n_keys, np.sort(generator.integers(0, n_keys, 60))):
        values = np.append(generator.integers(0, n_values, 58).astype(np.float64), [-np.inf, np.inf])
        ties = generator.permutation(60)
        order = np.lexsort((ties, -values, keys))
        wanted = np.concatenate([order[keys[order] == key][:n] for key in np.unique(keys)])
        assert top_of_groups(keys, values, n, ties).tolist() == wanted.tolist()
    assert not len(top_of_groups(keys[:0], values[:0], n, ties[:0]))


@given(st.integers(0, 1000), st.integers(1, 5))
def test_the_order_by_activation(seed, levels):
    codes = KeptCodes.of_dense(random_codes(30, 12, seed=seed, levels=levels))
    assert codes.order_M.tolist() == np.lexsort((codes.images_M, -codes.acts_M, codes.latents_M)).tolist()


@settings(max_examples=20)
@given(st.integers(0, 1000), st.integers(2, 30), st.integers(1, 6))
def test_the_identity_of_shared_images(seed, n_latents, n_top):
    """sum_c c hist(c) = sum_images C(L, 2)."""
    codes = KeptCodes.of_dense(random_codes(30, n_latents, seed=seed))
    figures = uniqueness(codes, n_top).figures
    _, images = codes.top_images(n_top)
    listed = np.bincount(images.reshape(-1), minlength=30)
    total = sum(c * count for c, count in enumerate(figures["histogram"]))
    assert total == figures["shared"] == (listed * (listed - 1) // 2).sum()
    assert sum(figures["histogram"]) == figures["pairs"]
    assert sum(c * count for c, count in enumerate(figures["popularity"])) == listed.sum()


def test_chance_of_shared_images():
    """Random sets of a uniform popularity: the observed histogram is about both kinds of chance."""
    generator = np.random.default_rng(0)
    codes = KeptCodes.of_dense((generator.random((200, 300)) * (generator.random((200, 300)) < 0.5)).astype(np.float32))
    figures = uniqueness(codes).figures
    assert figures["pairs"] == 300 * 299 // 2
    for c in range(4):
        assert figures["histogram"][c] == pytest.approx(figures["expected_uniform"][c], rel=0.05)
    assert figures["two_or_more_over_chance"] == pytest.approx(1, abs=0.05)
    assert figures["jaccard_above"]["0"] == figures["pairs"] - figures["histogram"][0]
    assert figures["jaccard_above"]["0.5"] == sum(figures["histogram"][11:])


def test_the_score_is_the_trusted_one_and_its_interval_is_by_image():
    """Columns against trusted_score; the interval of the mean over latents on 10 images by leaving each image out."""
    acts = random_codes()
    emb = np.random.default_rng(3).normal(0.4, 1, (N, 5)).astype(np.float32)
    codes = KeptCodes.of_dense(acts)
    found = monosemanticity(codes, activations_of(emb, "embeddings"), "e", batch_rows=17)
    expected = trusted_score(acts, emb)
    for column, values in (("ms", expected.ms), ("ms_se", expected.se), ("ms_p", expected.p)):
        np.testing.assert_allclose(found.latents[f"{column}:e"], values.numpy(), rtol=1e-6, atol=1e-9)
    assert found.latents["ms_above_null:e"].tolist() == expected.above_null.tolist()
    enough = (expected.status.numpy() == 0) & (codes.counts_S >= 10)
    assert 4 < enough.sum() < 12
    means = []
    for i in range(N):
        kept = [torch.tensor(np.delete(each, i, 0)).double() for each in (acts, emb)]
        means.append(float(reference.monosemanticity(*kept)[enough].mean()))
    error = math.sqrt((N - 1) * np.var(means))
    figures = found.figures["ms_10"]
    low, high = figures["interval"]
    assert high - figures["mean"] == pytest.approx(1.959964 * error, rel=1e-5)
    assert figures["mean"] - low == pytest.approx(1.959964 * error, rel=1e-5)
    assert found.figures["guarded_best"] == pytest.approx(expected.summary().guarded_best._asdict(), rel=1e-12)


@pytest.mark.parametrize("most", [1, 1 << 30])
def test_cofiring(most, monkeypatch):
    monkeypatch.setattr(geometry_module, "_BLOCK_PAIRS", most)
    acts = random_codes()
    found = cofiring(KeptCodes.of_dense(acts), 3, least_support=4)
    fires = acts > 0
    supported = {
        (i, j): pearsonr(fires[:, i], fires[:, j]).statistic if fires[:, [i, j]].any(0).all() else math.nan
        for i, j in itertools.permutations(range(4, 12), 2)
        if (fires[:, i] & fires[:, j]).sum() >= 4
    }
    for latent in range(4, 12):
        best = max((phi for (i, _), phi in supported.items() if i == latent), default=math.nan)
        assert found.latents["cofiring_phi"][latent] == pytest.approx(max(best, 0), abs=1e-10)
    assert found.latents["cofiring_nearest"][0] == -1
    assert max(np.bincount(found.pairs["latent"])) <= 3
    assert phi_of(np.array([60]), np.array([60]), np.array([60]), 60)[0] == 0, "what always fires tells nothing"


def test_nearest_rows(monkeypatch):
    monkeypatch.setattr(geometry_module, "_BLOCK", 3)
    rows = torch.nn.functional.normalize(torch.randn(10, 4, generator=torch.Generator().manual_seed(0)), dim=1)
    cosines, which = nearest(rows, rows, 2, same=True)
    product = rows @ rows.T - 3 * torch.eye(10)
    torch.testing.assert_close(torch.from_numpy(cosines), product.topk(2).values)
    assert which.tolist() == product.topk(2).indices.tolist()


def test_assignment_is_the_best_there_is():
    from scipy.optimize import linear_sum_assignment

    for seed, shape in enumerate([(5, 7), (7, 5), (1, 1), (6, 6)]):
        weights = np.random.default_rng(seed).normal(size=shape)
        rows, columns = (each.reshape(-1) for each in np.indices(shape))
        found = sparse_assignment(rows, columns, weights.reshape(-1), shape)
        clipped = np.maximum(weights, 0)
        assert weights[found].sum() == pytest.approx(clipped[linear_sum_assignment(-clipped)].sum(), abs=1e-10)
        assert len(set(found[0])) == len(found[0]) == len(set(found[1]))
    assert [len(each) for each in sparse_assignment(*np.zeros((3, 0), int), (3, 3))] == [0, 0]


def test_two_saes_matched():
    generator = torch.Generator().manual_seed(0)
    decoder = torch.randn(40, 16, generator=generator)
    acts = random_codes(n_latents=40)
    order = torch.randperm(40, generator=generator)
    first = Side(decoder, decoder.T, KeptCodes.of_dense(acts))
    same = compare(first, Side(3 * decoder[order], decoder[order].T, KeptCodes.of_dense(acts[:, order.numpy()])))
    assert same["shared_share"] == same["shared_share_both"] == same["mutual_nearest"] == 1
    assert same["mmcs"] == pytest.approx([1, 1], abs=1e-6)
    assert same["code_correlation"] == pytest.approx(1, abs=1e-9)
    assert same["frequency_weighted"] == 1
    random = torch.randn(40, 16, generator=generator)
    other = compare(first, Side(random, None, KeptCodes.of_dense(random_codes(n_latents=40, seed=1))))
    assert other["mmcs"][0] == pytest.approx(other["random"][0], abs=0.05)
    assert other["shared_share"] < 0.2
    assert abs(other["code_correlation"]) < 0.1
    with pytest.raises(ValueError, match="widths 16 and 8"):
        compare(first, Side(random[:, :8], None, first.codes))


def test_constant_latents_have_no_correlation():
    """Their variance is a difference of equal sums, which rounding leaves at 1e-13, of either sign."""
    acts = np.full((60, 4), 0.1, np.float32)
    acts[:, 1] = np.random.default_rng(0).random(60)
    acts[:, 2], acts[:, 3] = 0.3, 0.7
    side = Side(torch.eye(4), None, KeptCodes.of_dense(acts))
    assert compare(side, side)["code_correlation"] == pytest.approx(1, abs=1e-12)


def test_separation():
    trained, control = [0.9, 1.0, 1.1], [0.4, 0.5, 0.6]
    found = separation(trained, control, 1)
    assert found["d_prime"] == pytest.approx(0.5 / 0.1)
    assert found["verdict"] == "separates"
    assert separation(trained, control, -1)["verdict"] == "does not separate"
    assert separation(trained, [0.9], 1)["d_prime"] == pytest.approx(1.0)
    assert separation(trained, [0.9], 1)["verdict"] == "does not separate"
    assert separation([0.5], [0.4], 1)["verdict"] == "better, seeds missing"
    assert separation([0.5], [0.6], 1)["verdict"] == "does not separate: not better"
    assert separation([0.5], [math.nan], 1)["verdict"] == "not measured"
    assert separation(trained, control, 0)["verdict"] == "not judged"


def test_means_at_matched_firing_counts_overrule():
    """Of means that differ because latents fire at other rates, and of those that do not, the fair ones decide."""
    worse, better = ({"sae": mine, "control": 0.4, "covered": 0.9} for mine in (0.3, 0.6))
    none = {"sae": math.nan, "control": math.nan, "covered": 0.0}
    seeds, others = [0.9, 1.0, 1.1], [0.4, 0.5, 0.6]
    assert separation([0.5], [0.4], 1, worse)["verdict"] == "does not separate: not better at matched counts"
    assert separation([0.5], [0.4], -1, worse)["verdict"] == "better, seeds missing"
    assert separation([0.4], [0.5], 1, better)["verdict"] == "better, seeds missing"
    assert separation([0.5], [0.4], 1, worse | {"covered": 0.3})["verdict"] == "better, seeds missing"
    assert separation([0.5], [0.4], 1, none)["verdict"] == "better, seeds missing"
    assert separation(seeds, others, 1, better)["verdict"] == "separates"
    assert separation(others, seeds, 1, better)["verdict"] == "does not separate"
    found = separation(seeds, others, 1, worse)
    assert found["verdict"] == "does not separate: not better at matched counts"
    assert found["d_prime"] == pytest.approx(0.5 / 0.1)
    assert separation([0.5], [0.4], 0, worse)["verdict"] == "not judged"


def test_matched_firing_counts():
    """Values that follow counts alone are equal once counts are matched, however differently they are distributed."""
    counts = np.repeat([10, 30, 100, 300], [40, 30, 20, 10])
    like = counts[::-1].copy()
    others = np.repeat([10, 30, 100, 300], [10, 20, 30, 40])
    value = {10: 0.9, 30: 0.7, 100: 0.4, 300: 0.1}
    of = [np.array([value[n] for n in each]) for each in (counts, others)]
    matched, own, covered = matched_mean(of[1], others, of[0], counts)
    assert matched == pytest.approx(own, abs=1e-12)
    assert own == pytest.approx(of[0].mean(), abs=1e-12)
    assert covered == 1
    assert of[1].mean() < own
    assert matched_mean(of[1], others, of[0], like)[2] == 1
    rare = np.append(counts, np.full(400, 5))  # four fifths of the latents are on too few images to be matched
    assert matched_mean(of[1], others, np.append(of[0], np.ones(400)), rare)[2] == pytest.approx(0.2)
    assert matched_mean(np.zeros(3), np.full(3, 20), np.zeros(50), np.full(50, 20))[2] == 0
