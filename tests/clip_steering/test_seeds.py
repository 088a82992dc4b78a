"""Shares over seeds, and words that every SAE has a steerable latent for, against counting by hand."""

import numpy as np
import pyarrow as pa
import pytest
from scipy import stats

from saevlm_fast.clip_steering.run import MEANS, Steerable
from saevlm_fast.clip_steering.seeds import mean_of_seeds, over_seeds, shared_words


def table(concepts, steerable):
    """One unit a concept; steerable: places of those that are."""
    n = len(concepts)
    chance = np.where(np.isin(np.arange(n), steerable), 0.005, 0.5)
    status = ["defined"] * n
    return pa.table({"status": [*status, "dead"], "concept": [*concepts, None], "chance": [*chance, float("nan")]})


def test_the_interval_is_students():
    values = [0.03, 0.05, 0.1]
    found = mean_of_seeds(values)
    low, high = stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))
    assert found["value"] == pytest.approx(0.06)
    assert found["interval"] == pytest.approx([low, high])
    assert mean_of_seeds([0.5, float("nan")])["status"] == "too few"


def test_words_of_every_seed():
    first = table(["a", "b", "c", "d"], [0, 1])
    second = table(["b", "a", "d", "d"], [0, 1, 2])
    found = shared_words([first, second], 9)
    assert found["covered"] == [2, 3]
    assert (found["by_any"], found["by_every"], found["in_every"]) == (3, 2, ["a", "b"])
    # By chance: 2 of abcd, and 3 of badd, which are {b, d}, {a, d} or {b, a, d}.
    pairs = [{x, y} for x in "abcd" for y in "abcd" if x < y]
    triples = [{"a", "d"}, {"b", "d"}, {"a", "b", "d"}, {"a", "b", "d"}]
    expected = np.mean([len(x & y) for x in pairs for y in triples])
    assert found["by_every_chance"] == pytest.approx(expected, abs=0.1)
    assert found["p"] == pytest.approx(np.mean([len(x & y) >= 2 for x in pairs for y in triples]), abs=0.06)


def test_figures_over_seeds():
    means = dict.fromkeys(MEANS, 0.25)
    counts = {"units": 4, "asked": 4, "dead": 0, "random_directions": 4}
    found = [
        Steerable("latent", table(["a", "b", "c", "d"], places), {"steerable": {"value": share}, **counts, **means})
        for places, share in (([0, 1], 0.5), ([0], 0.25))
    ]
    figures = over_seeds(found, 9)
    assert figures["asked"] == 8
    assert figures["steerable"]["value"] == pytest.approx(0.375)
    assert figures["specificity"] == 0.25
    assert figures["shared"]["in_every"] == ["a"]
    with pytest.raises(ValueError, match="sae: 1 SAE has no spread over seeds"):
        over_seeds(found[:1], 9)
