"""VISAEBench's numbers: against its own wheel where that is installed, and by hand."""

import numpy as np
import pytest
import torch

from saevlm_fast.config import SAEConfig
from saevlm_fast.data.label_sets import LabelSet
from saevlm_fast.data.rows import open_activations
from saevlm_fast.data.writing import ActivationWriter
from saevlm_fast.measures.subjects import ImageRows
from saevlm_fast.measures.taxonomy import Taxonomy
from saevlm_fast.measures.visaebench import Grid, _Moran, grid_of, sibling_groups, visaebench_numbers
from saevlm_fast.sae import SparseAutoencoder

N, SIDE, D, F = 150, 6, 8, 24
P = SIDE * SIDE
KINDS = ("ant", "bee", "cat", "dog", "elk", "fir")
PATHS = {kind: ["insect" if kind in "ant bee fly" else "mammal" if kind != "fir" else "tree", kind] for kind in KINDS}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Patches of images in which a few blobs of a kind's direction lie; an SAE; embeddings."""
    root = tmp_path_factory.mktemp("visaebench")
    generator = torch.Generator().manual_seed(0)
    kinds = torch.arange(N) % len(KINDS)
    directions = torch.randn(len(KINDS), D, generator=generator)
    x = 0.7 * torch.randn(N, SIDE, SIDE, D, generator=generator) + 0.3
    for i in range(N):
        top, left = torch.randint(0, SIDE - 3, (2,), generator=generator).tolist()
        x[i, top : top + 4, left : left + 4] += 1.5 * directions[kinds[i]]
    x = x.view(N, P, D)
    ids = [f"{KINDS[kind]}/{i}" for i, kind in enumerate(kinds)]
    source = {"layer": 11, "point": "residual", "tokens": "patches", "layout": {"grid": [SIDE, SIDE]}}
    with ActivationWriter(root / "store", D, torch.float32, source, 10_000) as writer:
        repeated = [each for each in ids for _ in range(P)]
        labels = [each.split("/")[0] for each in repeated]
        writer.append(x.flatten(0, 1), {"image": repeated, "token": [*range(P)] * N, "label": labels})
    sae = SparseAutoencoder(SAEConfig(D, F, 6, "topk"))
    sae.reset_parameters(0)
    emb = directions[kinds] + torch.randn(N, D, generator=generator)
    np.save(root / "emb.npy", emb.numpy())
    return root, x, kinds, sae.eval(), emb


@pytest.fixture(scope="module")
def numbers(made):
    root, _, kinds, sae, _ = made
    store = open_activations(root / "store")
    labels = LabelSet.of([KINDS[kind] for kind in kinds])
    embeddings = {"emb": open_activations(root / "emb.npy")}
    rows = ImageRows.of(store)
    return visaebench_numbers(sae, store, rows, [labels], embeddings, Taxonomy.of(PATHS)).figures


def test_every_number_but_the_sixth_is_there(numbers):
    assert numbers["status"] == "defined"
    for name in ("M1", "M2", "M3", "M4", "M5", "M7"):
        assert numbers[name]["status"] == "defined", name
        assert np.isfinite(numbers[name]["value"])
    assert np.isnan(numbers["M6"]["value"])


def test_moran_by_hand():
    grid, generator = Grid(3, 4), np.random.default_rng(0)
    codes = np.maximum(generator.normal(size=(60, 12, 2)), 0)
    sums = _Moran(grid, 2)
    sums.add(torch.from_numpy(codes))
    totals, counts = np.zeros(2), np.zeros(2)
    for image in codes:
        for latent in range(2):
            x = image[:, latent]
            c = x - x.mean()
            above, edges = 0.0, 0
            for p in range(12):
                for q in range(12):
                    if p != q and abs(p // 4 - q // 4) <= 1 and abs(p % 4 - q % 4) <= 1:
                        above, edges = above + c[p] * c[q], edges + 1
            if 5 <= (x > 0).sum() <= int(0.9 * 12):
                totals[latent] += 12 / edges * above / (c**2).sum()
                counts[latent] += 1
    np.testing.assert_allclose(sums.sum_F, totals, atol=1e-10)
    assert (sums.count_F == counts).all()


def test_siblings_have_one_parent():
    labels = LabelSet.of(KINDS)
    assert sibling_groups(labels, Taxonomy.of(PATHS)) == {"mammal": [2, 3, 4]}


def test_what_it_needs_is_said(made):
    root, _, _, sae, _ = made
    matrix = open_activations(root / "emb.npy")
    assert visaebench_numbers(sae, matrix, ImageRows.of(matrix)).figures["status"].startswith("it needs a store")
    store = open_activations(root / "store")
    alone = visaebench_numbers(sae, store, ImageRows.of(store)).figures
    rows = ImageRows.of(store)
    captions = LabelSet.of([f"a photo of {each}" for each in rows.ids])
    assert visaebench_numbers(sae, store, rows, [captions]).figures["M4"]["status"].endswith("a label on two images")
    assert alone["M1"]["status"] == alone["M2"]["status"] == "defined"
    assert {alone[each]["value"] != alone[each]["value"] for each in ("M3", "M4", "M5", "M6", "M7")} == {True}
    assert grid_of(store, ImageRows.of(store)) == Grid(SIDE, SIDE)


class Standardised:
    """The same SAE on rows as the wheel gives them, less their mean and over one standard deviation."""

    def __init__(self, sae, mean, std):
        self.sae, self.mean, self.std = sae, mean, std

    @torch.no_grad()
    def encode(self, x):
        return self.sae.encode(x * self.std + self.mean).dense()

    @torch.no_grad()
    def decode(self, z):
        return (z @ self.sae.W_dec + self.sae.b_dec - self.mean) / self.std


class Embedded:
    """A backbone whose patch tokens are an image's embedding."""

    def extract_activations(self, images, layer=-1):
        return torch.stack(images)[:, None]


@pytest.mark.interop
def test_the_numbers_are_those_of_its_wheel(made, numbers):
    pytest.importorskip("visaebench")
    from visaebench.metrics.concept_detection.monosemanticity import MonosemanticityScore
    from visaebench.metrics.concept_detection.sparse_probing import SparseProbing
    from visaebench.metrics.disentanglement.absorption import FeatureAbsorption
    from visaebench.metrics.reconstruction.downstream import DownstreamPreservation
    from visaebench.metrics.reconstruction.fvu import FVU
    from visaebench.metrics.spatial_coherence.localization import FeatureLocalization

    _, x, kinds, sae, emb = made
    flat = x.flatten(0, 1)
    mean = flat.mean(0)
    std = float(((flat * flat).mean(0) - mean * mean).clamp_min(0).mean().sqrt())
    given = {"device": "cpu", "mean": mean, "std": std, "labels": kinds.numpy(), "seed": 42}
    same = Standardised(sae, mean, std)
    groups = {"mammal": {"class_indices": [2, 3, 4], "hierarchy_depth": 1}}
    found = {
        "M1": FeatureLocalization((SIDE, SIDE)).compute(same, x, **given),
        "M2": FVU().compute(same, flat, **given, dict_size=F),
        "M3": DownstreamPreservation().compute(same, x, **given),
        "M4": SparseProbing().compute(same, x, **given),
        "M5": MonosemanticityScore().compute(same, x, **given, images=list(emb), evaluator_backbone=Embedded()),
        "M7": FeatureAbsorption().compute(same, x, **given, sibling_groups=groups),
    }
    for name, each in found.items():
        assert numbers[name]["value"] == pytest.approx(each.value, abs=1e-5), name
    assert numbers["M1"]["n"] == found["M1"].metadata["num_features_scored"]
    assert numbers["M1"]["non_localised"] == pytest.approx(found["M1"].metadata["frac_non_localized"])
    assert numbers["M2"]["l0"] == pytest.approx(found["M2"].metadata["l0"])
    assert numbers["M4"]["accuracy"] == {str(k): v for k, v in found["M4"].metadata["k_accuracies"].items()}
    assert numbers["M7"]["mean_overlap"] == pytest.approx(found["M7"].metadata["mean_overlap"])


def test_its_variance_is_ours_only_where_rows_are_centred(made):
    """The fault that is named: the square of the summed means, instead of the sum of their squares."""
    _, x, _, _, _ = made
    flat = x.flatten(0, 1).double()
    theirs = float(flat.pow(2).sum() / len(flat) - (flat.sum() / len(flat)) ** 2)
    ours = float(flat.var(0, correction=0).sum())
    assert abs(theirs - ours) > 0.1 * ours
    centred = flat - flat.mean(0)
    assert float(centred.pow(2).sum() / len(flat) - (centred.sum() / len(flat)) ** 2) == pytest.approx(ours)
