"""SAEs that were trained as controls, beside the others: recognised by their records, each kind a column."""

import pytest
import torch
from test_controls import rows

from saevlm_fast.config import SAEConfig
from saevlm_fast.data.rows import open_activations
from saevlm_fast.data.writing import ActivationWriter
from saevlm_fast.measures.measure import Measuring, measure
from saevlm_fast.sae import SparseAutoencoder
from saevlm_fast.training.run import train


def test_a_trained_control_stands_among_the_controls():
    saes = {}
    for name, control in (("plain", None), ("first", "frozen-decoder"), ("second", "frozen-decoder")):
        seed = 1 if name == "second" else 0
        recipe = {"steps": 20, "batch_size": 64, "lr": 3e-3, "seed": seed}
        saes[name] = train(rows(), SAEConfig(12, 40, 4), **recipe, control=control)[0]
    found = measure(saes, torch.cat([rows(seed=4).rows(torch.arange(200)), torch.zeros(1, 12)]), controls=["raw"])
    kinds = {each.subject.name: (each.subject.kind, each.subject.control, each.subject.seed) for each in found.results}
    assert kinds["plain"] == ("sae", None, 0)
    assert kinds["first"] == ("control", "frozen-decoder", 0)
    assert kinds["second"] == ("control", "frozen-decoder", 1)
    row = next(row for row in found.table() if row["measure"] == "explained variance")
    assert [each["control"] for each in row["against"]] == ["frozen-decoder", "raw"]
    assert row["values"]["plain"] > max(row["values"]["first"], row["values"]["second"])
    assert row["against"][0]["verdict"] == "better, seeds missing"


def test_activations_of_random_weights_are_of_the_same_images_in_the_same_order(tmp_path):
    """Labels and embeddings are by place: another order would give every image another one's."""
    stores = []
    for name, order in (("trained", range(20)), ("random", reversed(range(20)))):
        with ActivationWriter(tmp_path / name, 6, torch.float32, {"layer": 1, "point": "residual"}, 100) as writer:
            items = {"image": [f"{i}.jpg" for i in order], "token": [0] * 20, "label": ["a", "b"] * 10}
            writer.append(torch.randn(20, 6), items)
        stores.append(open_activations(tmp_path / name))
    sae = SparseAutoencoder(SAEConfig(6, 12, 2, "topk"))
    with pytest.raises(ValueError, match=r"random_activations: .*random is of other images, or in another order"):
        measure(sae, stores[0], random_activations=stores[1])


def test_controls_that_groups_share_are_measured_once(monkeypatch):
    """Raw dimensions of one L0 are the same beside every architecture; untrained SAEs are not."""
    saes = {}
    for seed, architecture in enumerate(("topk", "batch_topk")):
        torch.manual_seed(seed)
        saes[architecture] = SparseAutoencoder(SAEConfig(12, 40, 4, architecture)).eval()
    saes["batch_topk"].threshold.data.fill_(1e-3)
    encoded, encode = [], Measuring.encode
    monkeypatch.setattr(Measuring, "encode", lambda self, each: encoded.append(each.name) or encode(self, each))
    found = measure(saes, rows(seed=4), controls=["kmeans", "untrained"])
    figures = {each.subject.name: each.figures for each in found.results}
    assert len(figures) == 6
    kmeans = [each for name, each in figures.items() if name.startswith("kmeans")]
    assert kmeans[0] == kmeans[1]
    assert sum(name.startswith("kmeans") for name in encoded) == 1
    assert sum(name.startswith("untrained") for name in encoded) == 2
