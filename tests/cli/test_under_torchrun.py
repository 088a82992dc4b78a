"""What a command does that torchrun started several times, as far as one process shows it."""

import pytest

from command import run
from saevlm_fast.cli import ranks
from saevlm_fast.training.process_group import own_device

SHARING = {"train", "harvest", "ms-score", "evaluate"}


def test_a_command_of_one_process_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    text = run("synthetic", tmp_path / "out", code=2)
    assert text.startswith("error: synthetic: runs in one process, and torchrun started 2 (WORLD_SIZE)")
    named = text.rstrip().rpartition("; ")[2].removesuffix(" share their work")
    assert set(named.replace(" and ", ", ").split(", ")) == SHARING
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", ["0", "-1", "two"])
def test_a_world_of_no_size(monkeypatch, value):
    monkeypatch.setenv("WORLD_SIZE", value)
    with pytest.raises(ValueError, match="WORLD_SIZE"):
        ranks.n_processes()


def test_one_process_shares_with_nobody(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    ranks.check_shares("ms-score", shared=False)
    with ranks.joined_ranks("cpu", 1) as peers:
        assert ranks.leads(peers)
    assert ranks.speaks()


def test_a_named_gpu_is_no_device_of_many_ranks():
    assert own_device("cpu") == "cpu"
    with pytest.raises(ValueError, match="device: 'cuda:0' is one GPU; under torchrun say cuda"):
        own_device("cuda:0")
