"""Every formula against brute force, on codes with ties, dead, constant and single latents."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from codes_and_labels import N, latents_of_classes, random_codes, random_labels
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import pearsonr
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

from saevlm_fast.config import SAEConfig
from saevlm_fast.data.label_sets import LabelSet, halves
from saevlm_fast.data.rows import activations_of
from saevlm_fast.kernels import reference
from saevlm_fast.measures import geometry as geometry_module
from saevlm_fast.measures import label_scores as label_scores_module
from saevlm_fast.measures import uniqueness as uniqueness_module
from saevlm_fast.measures.codes import KeptCodes
from saevlm_fast.measures.geometry import Side, cofiring, compare, geometry, nearest, phi_of
from saevlm_fast.measures.hierarchy import hierarchy, mean_depths, null_depth
from saevlm_fast.measures.label_scores import label_scores, without_meeting
from saevlm_fast.measures.labels import chance_purity, labels_of_latents, purity
from saevlm_fast.measures.matching import sparse_assignment
from saevlm_fast.measures.measure import measure
from saevlm_fast.measures.monosemanticity import monosemanticity
from saevlm_fast.measures.patches import labels_of_patches
from saevlm_fast.measures.probing import sparse_probing
from saevlm_fast.measures.separation import matched_mean, separation
from saevlm_fast.measures.taxonomy import Taxonomy
from saevlm_fast.measures.uniqueness import uniqueness
from saevlm_fast.sae import SparseAutoencoder
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


# Uniqueness -----------------------------------------------------------------------------------------------------------


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


# Hierarchy ------------------------------------------------------------------------------------------------------------

PATHS = {"cat": "animal mammal cat", "dog": "animal mammal dog", "carp": "animal fish carp", "oak": "plant oak"}
TREE = Taxonomy.of({label: path.split() for label, path in PATHS.items()})


def brute_depth(first, second, taxonomy):
    def shared(a, b):
        return len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a, b))))

    return max(shared(a, b) for a in taxonomy.paths[first] for b in taxonomy.paths[second])


def several_paths():
    paths = {label: (tuple(path.split()),) for label, path in PATHS.items()}
    return Taxonomy(
        paths | {"carp": (("animal", "fish", "carp"), ("food", "sushi", "carp")), "oak": (("food", "oak"),)}
    )


@pytest.mark.parametrize("taxonomy", [TREE, several_paths()], ids=["tree", "several paths"])
def test_depths(taxonomy):
    names = sorted(PATHS)
    generator = np.random.default_rng(0)
    label_TP = generator.integers(-1, 4, (20, 6))
    label_TP[0] = -1
    label_TP[1] = [0, -1, -1, -1, -1, -1]
    found = mean_depths(label_TP, names, taxonomy)
    for row, depth in zip(label_TP, found):
        pairs = list(itertools.combinations([names[label] for label in row if label >= 0], 2))
        expected = np.mean([brute_depth(*pair, taxonomy) for pair in pairs]) if pairs else math.nan
        assert depth == pytest.approx(expected, abs=1e-10, nan_ok=True)
    label_N = generator.integers(-1, 4, 30)
    pairs = itertools.combinations([names[label] for label in label_N if label >= 0], 2)
    expected = np.mean([brute_depth(*pair, taxonomy) for pair in pairs])
    assert null_depth(label_N, names, taxonomy) == pytest.approx(expected, abs=1e-10)


def test_levels_and_their_controls():
    """Latents of the second level see one label each, those of the first any: the trend beats shuffled levels."""
    generator = np.random.default_rng(0)
    labels = LabelSet.of([sorted(PATHS)[i % 4] for i in range(400)])
    acts = np.zeros((400, 40), np.float32)
    for latent in range(40):
        images = np.flatnonzero(np.arange(400) % 4 == latent % 4) if latent >= 16 else np.arange(400)
        acts[generator.choice(images, 30, replace=False), latent] = generator.random(30) + 0.1
    found = hierarchy(KeptCodes.of_dense(acts), labels, TREE, (16, 24))
    first, second = found.figures["levels"]
    assert (first["latents"], second["latents"]) == (16, 24)
    assert second["depth"] == pytest.approx(np.mean([2, 3, 3, 3]), abs=1e-9)
    assert first["interval"][0] < first["depth"] < first["interval"][1] < second["depth"]
    assert first["depth"] < first["shuffled_interval"][0]
    assert found.figures["trend"] > 0.6
    assert found.figures["trend_p"] < 0.01
    assert abs(found.figures["trend_by_rate"]) < 0.5, "all fire on 30 images"
    assert found.figures["null"] < first["depth"] + 0.3


# Labels ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("levels", [None, 2], ids=["few ties", "ties"])
@pytest.mark.parametrize("most", [1, 1 << 30])
def test_auroc_ap_and_f1_of_every_pair(several, levels, most, monkeypatch):
    """scikit-learn's are the reference."""
    monkeypatch.setattr(label_scores_module, "_BLOCK_ENTRIES", most)
    acts, labels = random_codes(levels=levels), random_labels(several=several)
    codes = KeptCodes.of_dense(acts)
    scores = label_scores(codes, labels)
    has = labels.matrix().toarray() > 0
    met = 0
    for latent, label in itertools.product(range(12), range(4)):
        place = int(scores.at(np.array([latent]), np.array([label]))[0])
        y, a = has[:, label], acts[:, latent].astype(np.float64)
        auroc, ap = roc_auc_score(y, a), average_precision_score(y, a)
        precision, recall, _ = precision_recall_curve(y, a)
        f1 = (2 * precision * recall / np.maximum(precision + recall, 1e-300)).max()
        if place >= 0:
            met += 1
            found = scores.auroc[place], scores.ap[place], scores.f1[place]
            assert scores.positives[place] == (y & (a > 0)).sum() > 0
        else:
            assert not (y & (a > 0)).any()
            found = tuple(float(each[0]) for each in without_meeting(codes, labels, *np.array([[latent], [label]])))
            f1 = 2 * y.sum() / (N + y.sum())
        assert found == pytest.approx((auroc, ap, f1), abs=1e-10)
    assert 20 < met < 48


@settings(max_examples=25)
@given(st.integers(0, 10_000), st.integers(2, 25), st.integers(1, 3), st.sampled_from([1, 3, None]))
def test_auroc_of_any_codes(seed, n, n_labels, levels):
    acts = random_codes(max(n, 10), 5, levels=levels, seed=seed)
    labels = (
        random_labels(len(acts), n_labels, seed, several=True) if n_labels > 1 else random_labels(len(acts), 2, seed)
    )
    scores = label_scores(KeptCodes.of_dense(acts), labels)
    has = labels.matrix().toarray() > 0
    for latent, label, auroc, ap in zip(scores.latent, scores.label, scores.auroc, scores.ap):
        if has[:, label].all():
            assert np.isnan(auroc)
            continue
        assert auroc == pytest.approx(roc_auc_score(has[:, label], acts[:, latent]), abs=1e-10)
        assert ap == pytest.approx(average_precision_score(has[:, label], acts[:, latent]), abs=1e-10)


@pytest.mark.parametrize("several", [False, True])
def test_purity_and_entropy(several):
    acts, labels = random_codes(), random_labels(several=several)
    codes = KeptCodes.of_dense(acts)
    found = purity(codes, labels, chance_purity(labels, codes.counts_S, 5))
    has = labels.matrix().toarray()
    for latent, column in enumerate(acts.T.astype(np.float64)):
        fires = column > 0
        if not fires.any():
            assert np.isnan(found.purity_S[latent])
            assert found.label_S[latent] == -1
            continue
        counts = has[fires].sum(0)
        assert found.purity_S[latent] == pytest.approx(counts.max() / fires.sum(), abs=1e-10)
        assert found.label_S[latent] == counts.argmax() or counts.max() == 0
        weighted = (column[:, None] * has).sum(0).max() / column.sum()
        assert found.weighted_S[latent] == pytest.approx(weighted, abs=1e-10)
        share = counts[counts > 0] / counts.sum() if counts.any() else np.array([])
        expected = -(share * np.log(share)).sum() / np.log(4) if len(share) else np.nan
        assert found.entropy_S[latent] == pytest.approx(expected, abs=1e-10, nan_ok=True)
        if fires.sum() >= 16:
            tops = sorted(range(N), key=lambda i: (-column[i], i))[:16]
            assert found.top_S[latent] == pytest.approx(has[tops].sum(0).max() / 16, abs=1e-10)


@pytest.mark.parametrize("several", [False, True])
def test_chance_of_purity(several):
    """The mean over random sets of n images, drawn here one by one."""
    labels = random_labels(several=several)
    chance = chance_purity(labels, np.array([0, 1, 7, 7, N]), 2000)
    mean, sd = chance.mean(), chance.sd()
    assert chance.error_of_mean(np.array([False, False, True, True, False])) == pytest.approx(
        sd[2] / 2000**0.5, rel=1e-3
    )
    has = labels.matrix().toarray()
    generator = np.random.default_rng(5)
    drawn = [has[generator.choice(N, 7, replace=False)].sum(0).max() / 7 for _ in range(4000)]
    assert np.isnan(mean[0])
    assert mean[1] == pytest.approx((has.sum(1) > 0).mean(), abs=0.03)
    assert mean[2] == mean[3]
    assert mean[2] == pytest.approx(np.mean(drawn), abs=4 * np.std(drawn) / 4000**0.5 * 2**0.5)
    assert sd[2] == pytest.approx(np.std(drawn), rel=0.1)
    assert mean[4] == pytest.approx(has.sum(0).max() / N, abs=1e-10)


def test_shuffled_labels_have_no_excess():
    labels = random_labels(400, 5)
    codes = KeptCodes.of_dense(random_codes(400, 150, share=0.2))
    shuffled = labels.shuffled(np.random.default_rng(3))
    assert sorted(shuffled.labels_M) == sorted(labels.labels_M)
    figures = labels_of_latents(codes, shuffled, halves([str(i) for i in range(400)])).figures
    low, high = figures["excess"]["interval"]
    assert low - 0.002 < 0 < high + 0.002
    assert figures["selection"]["ap"] == pytest.approx(figures["selection"]["null"]["ap"], abs=0.05)
    assert figures["share_above_chance"] < 0.05


def test_the_interval_of_the_excess_has_the_error_of_chance_in_it():
    """Thousands of latents share the draws of chance: without their error the interval is narrow about a wrong 0."""
    generator, n = np.random.default_rng(0), 1000
    labels = LabelSet.of([f"class {each}" for each in generator.integers(0, 100, n)])
    acts = (generator.random((n, 2000)).argsort(0) < 15).astype(np.float32)
    excess = labels_of_latents(KeptCodes.of_dense(acts), labels, halves([str(i) for i in range(n)]), 25, 0).figures[
        "excess"
    ]
    low, high = excess["interval"]
    assert low < 0 < high
    assert high - low > 2 * 1.96 * 0.03 / 25**0.5, "of the draws alone"


def test_the_latents_of_labels_are_found_and_reported_held_out():
    codes, labels = latents_of_classes()
    ids = [f"image {i}" for i in range(400)]
    found = labels_of_latents(codes, labels, halves(ids))
    selection = found.figures["selection"]
    assert selection["auroc"] == selection["ap"] == selection["coverage"] == selection["purity"] == 1
    assert selection["one_to_one"]["ap"] == 1
    assert selection["null"]["ap"] < 0.35
    assert selection["null"]["coverage"] < 0.5
    assert found.latents["best_label:labels"][10:15].tolist() == [f"class {i}" for i in range(5)]
    assert found.latents["best_ap:labels"][10:15].tolist() == [1] * 5
    assert found.latents["purity_excess:labels"][10:15] == pytest.approx([0.72] * 5, abs=0.05)
    assert found.latents["best_label:labels"][0] == "", "a dead latent has none"
    probes = sparse_probing(codes, labels, halves(ids), ids).figures
    assert probes["accuracy"]["1"]["mean"] == 1
    assert probes["labels"] == 5


def test_probes_of_nothing_are_at_chance():
    labels = random_labels(600, 4)
    ids = [str(i) for i in range(600)]
    codes = KeptCodes.of_dense(random_codes(600, 20, share=0.3)[:, 4:])
    figures = sparse_probing(codes, labels, halves(ids), ids).figures
    assert figures["accuracy"]["1"]["mean"] == pytest.approx(0.5, abs=0.08)


def test_the_order_of_images_does_not_matter():
    codes, labels = latents_of_classes()
    ids = [f"image {i}" for i in range(400)]
    order = np.random.default_rng(0).permutation(400)
    turned = KeptCodes.of_dense(codes.matrix().toarray().T[order])
    names = [labels.names[labels.labels_M[i]] for i in order]
    ids_turned = [ids[i] for i in order]
    first = labels_of_latents(codes, labels, halves(ids)).figures["selection"]
    second = labels_of_latents(turned, LabelSet.of(names), halves(ids_turned)).figures["selection"]
    for name in ("auroc", "ap", "f1", "coverage", "purity"):
        assert first[name] == pytest.approx(second[name], abs=1e-12)
    probes = [
        sparse_probing(c, each, halves(i), i).figures["accuracy"]["2"]["mean"]
        for c, each, i in ((codes, labels, ids), (turned, LabelSet.of(names), ids_turned))
    ]
    assert probes[0] == pytest.approx(probes[1], abs=1e-9)


# Monosemanticity ------------------------------------------------------------------------------------------------------


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


# Geometry -------------------------------------------------------------------------------------------------------------


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


# Separation -----------------------------------------------------------------------------------------------------------


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
    assert matched_mean(np.zeros(3), np.full(3, 20), np.zeros(50), np.full(50, 20))[2] == 0


# Every status in every measure ----------------------------------------------------------------------------------------

SHAPES = {
    "one latent": random_codes(20, 4)[:, 3:],
    "one dead latent": np.zeros((20, 1), np.float32),
    "one constant latent": np.full((20, 1), 2, np.float32),
    "all dead": np.zeros((20, 5), np.float32),
    "every status": random_codes(20, 6),
    "two images": random_codes(10, 6)[:2],
    "one image": np.ones((1, 3), np.float32),
}


@pytest.mark.parametrize("name", SHAPES)
def test_no_measure_fails_on_any_status(name):
    acts = SHAPES[name]
    codes, n = KeptCodes.of_dense(acts), len(acts)
    labels = LabelSet.of([sorted(PATHS)[i % 4] for i in range(n)])
    ids = [str(i) for i in range(n)]
    decoder = torch.randn(acts.shape[1], 3)
    emb = np.random.default_rng(0).normal(size=(n, 3)).astype(np.float32)
    half, image_of_row = halves(ids), np.arange(n)
    measured = [
        uniqueness(codes),
        monosemanticity(codes, activations_of(emb, "embeddings"), "e"),
        hierarchy(codes, labels, TREE, (acts.shape[1],)),
        labels_of_latents(codes, labels, half, 5, 1),
        labels_of_patches(codes, labels, image_of_row, half, 3, 1),
        sparse_probing(codes, labels, half, ids),
        geometry(codes, decoder, decoder.T),
    ]
    for each in measured:
        assert all(len(column) == acts.shape[1] for column in each.latents.values())
    compare(Side(decoder, None, codes), Side(decoder, None, codes))
    assert measured[0].figures["status"] == "too few" or acts.shape[1] > 1
    _, scored, _, labelled, patched, _, _ = measured
    defined = codes.status_S == STATUSES.index("defined")
    fires = codes.counts_S > 0
    assert (np.isfinite(scored.latents["ms:e"]) == defined).all()
    assert not np.isfinite(scored.latents["ms_p:e"][~defined]).any()
    for each, name in ((labelled, "labels"), (patched, "labels")):
        assert (np.isfinite(each.latents[f"purity:{name}"]) == fires).all(), "of those that fire at all"
        assert (each.latents[f"mutual_information:{name}"][~fires] == 0).all(), "silence tells nothing"
        always = codes.counts_S == n
        assert (each.latents[f"mutual_information:{name}"][always] == 0).all()
        counted = each.figures["status"]
        assert sum(counted[status] for status in ("dead", "constant", "single", "too few")) <= acts.shape[1]
        assert counted["dead"] == (~fires).sum()


@pytest.mark.parametrize("kind", ["of one latent", "all dead", "constant"])
def test_every_measure_of_an_sae_of_any_status(kind):
    """The pass over the rows, what is kept of them, and controls beside: nothing fails, nothing is made up."""
    generator, n, d_sae = torch.Generator().manual_seed(0), 60, 1 if kind == "of one latent" else 4
    x_ND = torch.randn(n, 3, generator=generator)
    sae = SparseAutoencoder(SAEConfig(3, d_sae, 1, "batch_topk"))
    sae.reset_parameters(0)
    with torch.no_grad():
        sae.threshold.fill_(1e9 if kind == "all dead" else 0.0)
        if kind == "constant":
            sae.W_enc.zero_()
            sae.b_enc.fill_(1.0)
    labels = [sorted(PATHS)[i % 4] for i in range(n)]
    embeddings = torch.randn(n, 5, generator=generator)
    found = measure(sae, x_ND, embeddings=embeddings, labels=labels, taxonomy=TREE, controls=("untrained", "pca"))
    first, *_ = found.results
    assert set(first.figures) == {
        *("reconstruction", "monosemanticity", "uniqueness", "hierarchy", "labels", "probing", "geometry", "kept")
    }
    with torch.no_grad():
        status = np.bincount(KeptCodes.of(sae.encode(x_ND)).status_S, minlength=4)
    assert (first.latents["status"] == "dead").sum() == status[STATUSES.index("dead")]
    assert first.figures["reconstruction"]["dead_share"] == (1.0 if kind == "all dead" else 0.0)
    assert json.dumps(found.as_json(), allow_nan=False)
