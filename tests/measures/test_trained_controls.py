"""SAEs that were trained as controls, beside the others: recognised by their records, each kind a column."""

import torch
from test_controls import rows

from saevlm_fast.config import SAEConfig
from saevlm_fast.measures.measure import measure
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
