"""What a command does that torchrun started several times, as far as one process shows it."""

from dataclasses import replace
from pathlib import Path

import pytest

from command import run
from saevlm_fast.cli import ranks
from saevlm_fast.cli.evaluate import EvaluateArguments
from saevlm_fast.cli.ms_score import ScoreArguments
from saevlm_fast.cli.same_call import check_same_call
from saevlm_fast.cli.train_options import TrainArguments
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


TRAIN = TrainArguments(activations=Path("x.npy"), output=Path("run"), device="cpu", sweep=({"k": 4}, {"k": 5}))
SCORE = ScoreArguments(raw=True, activations=Path("x"), embeddings=(Path("a"), Path("b")), output=Path("s.csv"))


def of_two_ranks(first, second):
    """What rank 0 sees: of what each rank tells."""
    told = []

    class Rank:
        def __init__(self, others):
            self.others = others

        def collect(self, value):
            told.append(value)
            return [value, *self.others]

    check_same_call(Rank([]), second)
    check_same_call(Rank([told[0]]), first)


@pytest.mark.parametrize(
    ("options", "changes"),
    [
        (TRAIN, {"activations": Path("/elsewhere/x.npy"), "output": Path("other"), "device": "cuda"}),
        (TRAIN, {"collective_timeout": 5.0, "json": True, "cache_gib": 2.0, "config": Path("run.toml")}),
        (SCORE, {"embeddings": (Path("c"), Path("d"))}),
    ],
)
def test_machines_have_their_own_paths_and_devices(options, changes):
    of_two_ranks(options, replace(options, **changes))


@pytest.mark.parametrize(
    ("options", "changes", "message"),
    [
        (TRAIN, {"k": 5}, "k: 5 for rank 1, but .* for rank 0; every rank needs the same command"),
        (TRAIN, {"lr": 1e-2}, "lr: 0.01 for rank 1, but None for rank 0"),
        (TRAIN, {"sweep": ({"k": 4}, {"k": 6})}, "sweep: "),
        (TRAIN, {"validation": Path("held.npy")}, "validation: 'given' for rank 1, but 'not given' for rank 0"),
        (SCORE, {"embeddings": (Path("a"),)}, "embeddings: '1 given' for rank 1, but '2 given' for rank 0"),
    ],
)
def test_ranks_with_other_options_are_refused(options, changes, message):
    with pytest.raises(ValueError, match=message):
        of_two_ranks(options, replace(options, **changes))


def test_ranks_of_another_command_or_code_are_refused(monkeypatch):
    evaluate = EvaluateArguments(sae=("sae",), activations=Path("x"), output=Path("out"))
    with pytest.raises(ValueError, match="command: 'EvaluateArguments' for rank 1, but 'TrainArguments' for rank 0"):
        of_two_ranks(TRAIN, evaluate)
    codes = iter(["0.1.0 (aaaa)", "0.1.0 (bbbb)"])
    monkeypatch.setattr("saevlm_fast.cli.same_call._code", lambda: next(codes))
    with pytest.raises(ValueError, match=r"code: '0.1.0 \(aaaa\)' for rank 1, but '0.1.0 \(bbbb\)' for rank 0"):
        of_two_ranks(TRAIN, TRAIN)
