"""Formulas of labels against brute force: hierarchy, purity, AUROC, probes; and every status in every measure."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from codes_and_labels import N, latents_of_classes, random_codes, random_labels
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

from saevlm_fast.config import SAEConfig
from saevlm_fast.data.label_sets import LabelSet, halves
from saevlm_fast.data.rows import activations_of
from saevlm_fast.measures import label_scores as label_scores_module
from saevlm_fast.measures.codes import KeptCodes
from saevlm_fast.measures.geometry import Side, compare, geometry
from saevlm_fast.measures.hierarchy import hierarchy, mean_depths, null_depth
from saevlm_fast.measures.label_scores import label_scores, without_meeting
from saevlm_fast.measures.labels import chance_purity, labels_of_latents, purity
from saevlm_fast.measures.measure import measure
from saevlm_fast.measures.monosemanticity import monosemanticity
from saevlm_fast.measures.patches import labels_of_patches
from saevlm_fast.measures.probing import sparse_probing
from saevlm_fast.measures.results import MEASURES
from saevlm_fast.measures.taxonomy import Taxonomy
from saevlm_fast.measures.uniqueness import uniqueness
from saevlm_fast.sae import SparseAutoencoder
from saevlm_fast.scoring.sums import STATUSES

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
        counted = each.figures["counts"]
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
    assert set(first.figures) == {*MEASURES} - {"patches", "behaviour", "visaebench"}
    with torch.no_grad():
        status = np.bincount(KeptCodes.of(sae.encode(x_ND, use_threshold=True)).status_S, minlength=4)
    assert (first.latents["status"] == "dead").sum() == status[STATUSES.index("dead")]
    assert first.figures["reconstruction"]["dead_fraction"] == (1.0 if kind == "all dead" else 0.0)
    assert json.dumps(found.as_json(), allow_nan=False)
