"""What a command does that torchrun started several times, as far as one process shows it."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from command import run
from saevlm_fast.cli import ranks, same_call
from saevlm_fast.cli.evaluate_options import EvaluateArguments
from saevlm_fast.cli.ms_score import ScoreArguments
from saevlm_fast.cli.same_call import check_same_call, check_same_data, digest_of
from saevlm_fast.cli.terminal import tell
from saevlm_fast.cli.train_options import TrainArguments
from saevlm_fast.data.rows import open_activations
from saevlm_fast.training.process_group import own_device
from stores import write_store

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


@pytest.mark.parametrize("rank", [0, 1])
def test_a_dry_run_of_many_ranks_says_it_once(rank, tmp_path, monkeypatch):
    """Its plan, and what it tells of."""
    x_ND = np.random.default_rng(0).normal(size=(64, 4)).astype(np.float32)
    np.save(tmp_path / "x.npy", x_ND)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", str(rank))

    def opened(options):
        tell("a note")
        return open_activations(options.activations), None

    monkeypatch.setattr("saevlm_fast.cli.train.open_data", opened)
    words = ("train", "--activations", tmp_path / "x.npy", "--output", tmp_path / "out", "--dry-run")
    said = run(*words, "--d-sae", 8, "--k", 2, "--device", "cpu", "--batch-size", 16)
    assert ("a note" in said, "dry run" in said) == (rank == 0, rank == 0)
    bad = run(*words, "--device", "tpu", code=2)
    assert bad.startswith("error: device")  # of which rank, `speaks` decides


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


def test_machines_may_have_torch_for_other_gpus_but_not_another_one(monkeypatch):
    told = []
    for version in ("2.11.0+cu128", "2.11.0+cpu", "2.11.0", "2.11.1"):
        monkeypatch.setattr("torch.__version__", version)
        told.append(same_call._code())
    assert [each == told[0] for each in told] == [True, True, True, False]


@pytest.mark.parametrize("name", sorted(SHARING))
def test_every_command_that_shares_its_work_compares_the_ranks(name, tmp_path, monkeypatch):
    def refused(ranks, options):
        raise ValueError(f"compared: {type(options).__name__}")

    monkeypatch.setattr(f"saevlm_fast.cli.{name.replace('-', '_')}.check_same_call", refused)
    words = {
        "train": ("--activations", tmp_path / "x.npy"),
        "harvest": ("--model", "hf:tiny-clip", "--images", tmp_path),
        "ms-score": ("--raw", "--activations", tmp_path / "x.npy", "--embeddings", tmp_path / "e.npy"),
        "evaluate": ("--sae", tmp_path / "sae", "--activations", tmp_path / "x.npy"),
    }
    output = tmp_path / ("out.csv" if name == "ms-score" else "out")
    assert run(name, *words[name], "--output", output, code=2).startswith("error: compared: ")
    assert not output.exists()


def test_ranks_that_read_other_rows_are_refused(tmp_path):
    x_ND = torch.randn(200, 4)
    write_store(tmp_path / "a", x_ND)
    write_store(tmp_path / "b", x_ND + 1)
    shutil.copytree(tmp_path / "a", tmp_path / "copy")
    for name, rows in (("x", x_ND), ("y", x_ND[:100]), ("z", -x_ND)):
        np.save(tmp_path / f"{name}.npy", rows.numpy())
    digests = {
        each: digest_of(open_activations(tmp_path / each)) for each in ("a", "b", "copy", "x.npy", "y.npy", "z.npy")
    }
    assert digests["a"] == digests["copy"]
    assert len(set(digests.values())) == 5

    class Rank:
        def collect(self, value):
            return [value, {"activations": digests["b"]}]

    check_same_data(None, {"activations": digests["a"]})
    check_same_data(Rank(), {"activations": digests["b"]})
    with pytest.raises(
        ValueError, match=r"activations: .* for rank 1, but .* for rank 0; every rank needs the same data"
    ):
        check_same_data(Rank(), {"activations": digests["a"]})
