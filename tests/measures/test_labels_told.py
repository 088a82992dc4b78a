"""Mutual information and one-latent probes against scikit-learn."""

import math

import numpy as np
import pytest
from codes_and_labels import N, latents_of_classes, random_codes, random_labels
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss, mutual_info_score

from saevlm_fast.data.label_sets import LabelSet, halves
from saevlm_fast.measures import one_latent
from saevlm_fast.measures.codes import KeptCodes
from saevlm_fast.measures.information import mutual_information
from saevlm_fast.measures.labels import labels_of_latents


def miller_madow(fires, label):
    """From the definition: each entropy with its own correction."""

    def entropy(values):
        counts = np.unique(values, return_counts=True)[1]
        share = counts / counts.sum()
        return -(share * np.log(share)).sum() + (len(counts) - 1) / (2 * counts.sum())

    return entropy(fires) + entropy(label) - entropy([f"{a} {b}" for a, b in zip(fires, label)])


def test_mutual_information_with_its_correction():
    acts, labels = random_codes(), random_labels()
    label = labels.single()
    found = mutual_information(KeptCodes.of_dense(acts), labels)
    for latent, column in enumerate(acts.T):
        fires = column > 0
        expected = 0.0 if fires.all() or not fires.any() else miller_madow(fires, label)
        assert found[latent] == pytest.approx(expected, abs=1e-10)
    fires = acts[:, 5] > 0
    cells = len(set(zip(fires, label)))
    assert found[5] == pytest.approx(mutual_info_score(fires, label) + (2 + 4 - cells - 1) / (2 * N), abs=1e-10)


def test_images_without_a_label_are_a_label_and_several_count_each():
    acts = random_codes()
    labels = LabelSet.of([() if i % 5 == 0 else (["a"] if i % 2 else ["a", "b"]) for i in range(N)])
    images = np.repeat(np.arange(N), [1 if i % 5 == 0 or i % 2 else 2 for i in range(N)])
    names = [name for i in range(N) for name in ([""] if i % 5 == 0 else ["a"] if i % 2 else ["a", "b"])]
    found = mutual_information(KeptCodes.of_dense(acts), labels)
    for latent in range(4, 12):
        assert found[latent] == pytest.approx(miller_madow(acts[images, latent] > 0, names), abs=1e-10)


def test_shuffled_labels_tell_nothing_on_average():
    """Without the correction the mean over 300 latents would be (5 - 1) / (2 n) above 0."""
    n, generator = 400, np.random.default_rng(0)
    labels = LabelSet.of([f"class {each}" for each in generator.integers(0, 5, n)])
    found = mutual_information(KeptCodes.of_dense(random_codes(n, 304, share=0.2)), labels)[4:]
    bias = 4 / (2 * n)
    assert abs(found.mean()) < 5 * found.std() / 300**0.5 < bias


@pytest.mark.parametrize("most", [1, 1 << 30])
def test_fits_are_scikit_learns(most, monkeypatch):
    monkeypatch.setattr(one_latent, "_BLOCK_ENTRIES", most)
    acts, labels = random_codes(), random_labels(several=True)
    acts[:, 6] = labels.matrix().toarray()[:, 1] * 2.0  # tells its label altogether
    codes, has = KeptCodes.of_dense(acts), labels.matrix().toarray() > 0
    pairs = np.array([[latent, label] for latent in range(1, 12) for label in range(4)])
    found = one_latent.fit(codes, labels, *pairs.T)
    for q, (latent, label) in enumerate(pairs):
        column = acts[:, latent].astype(np.float64)
        scale = np.sqrt((column[column > 0] ** 2).mean())
        assert found.scale_Q[q] == pytest.approx(scale, rel=1e-10)
        x = column[:, None] / scale
        probe = LogisticRegression(C=1.0, tol=1e-10, max_iter=10_000).fit(x, has[:, label])
        assert found.weight_Q[q] == pytest.approx(probe.coef_[0, 0], abs=1e-4)
        loss = log_loss(has[:, label], probe.predict_proba(x), normalize=False)
        assert found.loss_Q[q] + found.weight_Q[q] ** 2 / 2 <= loss + probe.coef_[0, 0] ** 2 / 2 + 1e-9
        assert found.loss_Q[q] == pytest.approx(loss, abs=1e-4)


def test_purity_of_top_images_is_not_told_of_a_few_labels():
    """Latents on fewer than 16 images are left out: a mean over one that is left said nothing of 50 labels."""
    acts = np.zeros((400, 12), np.float32)
    for latent in range(12):
        acts[latent::12, latent] = np.linspace(1, 2, len(acts[latent::12])) if latent < 7 else 0
        acts[latent, latent] = 1
    labels = LabelSet.of([f"{i % 12:02d}" for i in range(400)])
    able = lambda most: one_latent._top_purity(KeptCodes.of_dense(acts), labels, np.arange(most), np.arange(most))  # noqa: E731
    assert able(12) == (1.0, 7)
    assert able(7) == (1.0, 7)
    acts[:, 4:] *= np.arange(400)[:, None] < 40
    value, n = able(12)
    assert (math.isnan(value), n) == (True, 4)
    assert able(4) == (1.0, 4), "four labels, all told"


def test_r_is_reported_held_out():
    codes, labels = latents_of_classes()
    half = halves([f"image {i}" for i in range(400)])
    selection = labels_of_latents(codes, labels, half).figures["selection"]
    told = selection["one_latent"]
    assert told["R"] == selection["R"] > 0.8
    assert told["interval_R"][0] <= told["R"] <= told["interval_R"][1]
    assert told["top16_purity"] == told["map"] == told["coverage"] == 1
    assert abs(selection["null"]["R"]) < 0.15
    # By hand, of one label.
    has, column = labels.single() == 2, codes.matrix().toarray()[12]
    scale = np.sqrt((column[half][column[half] > 0] ** 2).mean())
    x = column[:, None] / scale
    probe = LogisticRegression(C=1.0, tol=1e-10).fit(x[half], has[half])
    loss = log_loss(has[~half], probe.predict_proba(x[~half]), normalize=False)
    share = has[half].mean()
    bias = log_loss(has[~half], np.full((~half).sum(), share), normalize=False)
    pair = np.array([12]), np.array([2])
    alone = one_latent.told_by_one_latent(
        (codes.part(half), labels.part(half)), (codes.part(~half), labels.part(~half)), *pair
    )[2]
    assert alone["R"] == pytest.approx(1 - loss / bias, abs=1e-5)
