"""Weights drawn anew: which ones, of which scale, and that the record says so."""

import pytest
import torch

from saevlm_fast.towers.load import load_tower
from saevlm_fast.towers.random_weights import randomise
from tests.helpers.tiny_tower import save_clip


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return save_clip(tmp_path_factory.mktemp("clip") / "model")


@pytest.mark.parametrize("what", ["blocks", "all"])
def test_which_weights_are_drawn_and_of_which_scale(directory, what):
    trained, drawn, again, other = (load_tower(f"hf:{directory}") for _ in range(4))
    randomise(drawn, what)
    randomise(again, what)
    randomise(other, what, seed=1)
    inside = {id(p) for block in drawn.anatomy.blocks for p in block.parameters()}
    changed = 0
    pairs = zip(trained.model.parameters(), drawn.model.parameters(), again.model.parameters())
    for old, new, same in pairs:
        assert torch.equal(new, same)
        if what == "blocks" and id(new) not in inside:
            assert torch.equal(old, new)
            continue
        changed += 1
        n = new.numel()
        if n > 1:
            assert not torch.equal(old, new)
            error = float(old.std()) / n**0.5
            assert abs(float(new.mean() - old.mean())) < 5 * error + 1e-7
            assert float(new.std()) == pytest.approx(float(old.std()), rel=5 / (2 * n) ** 0.5, abs=1e-7)
    assert changed > 10
    assert drawn.description()["random_weights"] == {"what": what, "seed": 0}
    digests = {tower.description()["weights_sha256"] for tower in (trained, drawn, again, other)}
    assert len(digests) == 3
    with pytest.raises(ValueError, match="drawn already"):
        randomise(drawn, what)


def test_anything_else_is_refused(directory):
    with pytest.raises(ValueError, match="random_weights: 'heads' is not one of blocks, all"):
        randomise(load_tower(f"hf:{directory}"), "heads")
