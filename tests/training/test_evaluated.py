"""The rows that the evaluation at the end of a run reads, and how far it is."""

import os
import shlex
import signal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from command import run, run_json
from saevlm_fast.config import SAEConfig, TrainConfig
from saevlm_fast.data.rows import Activations
from saevlm_fast.errors import Interrupted
from saevlm_fast.training import evaluated
from saevlm_fast.training.evaluate import RowSums
from saevlm_fast.training.evaluated import EvaluatedRows
from saevlm_fast.training.progress import ProgressLine
from saevlm_fast.training.run import train


class Elsewhere(Activations):
    """Rows that are fetched 7 at a time."""

    block_rows = 7


def numbered(n, kind=Activations):
    return kind.from_tensor(torch.arange(n, dtype=torch.float32)[:, None].expand(n, 2).contiguous())


@given(n=st.integers(7, 300), most=st.integers(1, 400), kind=st.sampled_from([Activations, Elsewhere]))
def test_each_row_once_evenly_spread_and_in_order(n, most, kind):
    found = EvaluatedRows(numbered(n, kind), most)
    rows = torch.cat([x_BD[:, 0] for _, x_BD in found.chunks(16)]).long()
    assert len(rows) == found.n_rows
    assert torch.equal(rows, found.rows(torch.arange(found.n_rows))[:, 0].long())
    assert (rows.diff() > 0).all()
    stretch = min(found.activations.block_rows or 1, evaluated._LONGEST)
    if found.is_all:
        assert torch.equal(rows, torch.arange(n))
    else:
        assert most <= found.n_rows < most + stretch
        starts = rows[::stretch]
        assert torch.equal(rows, (starts[:, None] + torch.arange(stretch)).flatten()), "stretches are whole"
        assert len(starts) == 1 or starts[-1] == (n // stretch - 1) * stretch, "the last one is among them"
        steps = starts.diff() // stretch
        assert len(steps) == 0 or steps.max() - steps.min() <= 1
    assert (len(rows) < n) <= (most < n)


def test_of_a_store_elsewhere_several_shards_are_seen(monkeypatch):
    """Images of one shard may be of one class."""
    monkeypatch.setattr(evaluated, "_LONGEST", 4)
    found = EvaluatedRows(numbered(700, Elsewhere), 28)
    rows = torch.cat([x_BD[:, 0] for _, x_BD in found.chunks(16)]).long()
    assert len(rows) == 28
    assert len(set((rows // 7).tolist())) >= 7


def test_as_many_as_were_trained_on(monkeypatch):
    monkeypatch.setattr(evaluated, "LEAST", 50)
    config = TrainConfig(steps=10, batch_size=8)
    assert EvaluatedRows.of_run(numbered(1000), None, config).n_rows == 80
    assert EvaluatedRows.of_run(numbered(70), None, config).n_rows == 70
    assert EvaluatedRows.of_run(numbered(1000), None, TrainConfig(steps=1, batch_size=8)).n_rows == 50
    assert EvaluatedRows.of_run(numbered(10), numbered(1000), config).n_rows == 1000
    untrained = TrainConfig(steps=10, batch_size=8, control="untrained")
    assert EvaluatedRows.of_run(numbered(1000), None, untrained).n_rows == 80, "as many as its trained twin's"


def test_a_run_tells_how_far_its_evaluation_is(monkeypatch):
    monkeypatch.setattr(evaluated, "LEAST", 5000)
    x_ND = torch.randn(20_000, 8, generator=torch.Generator().manual_seed(0))
    told = []
    _, metrics = train(
        x_ND,
        SAEConfig(8, 16, 4),
        steps=2,
        batch_size=64,
        on_evaluated=lambda done, total: told.append((done, total)),
    )
    assert told == [(4096, 5000), (5000, 5000)]
    assert metrics["rows"] == 5000


@pytest.mark.parametrize("many", [False, True])
def test_the_command_says_on_what_it_evaluated(tmp_path, monkeypatch, many):
    monkeypatch.setattr(evaluated, "LEAST", 500)
    np.save(tmp_path / "x.npy", np.random.default_rng(0).standard_normal((2000, 8)).astype(np.float32))
    given = ("--activations", tmp_path / "x.npy", "--steps", 2, "--batch-size", 64, "--expansion", 2)
    ks = "2,3" if many else 2
    text = run("train", *given, "--k", ks, "--output", tmp_path / "out")
    assert "evaluation 500/500 rows" in text
    assert "evaluation on 500 training rows, evenly spread over 2,000" in text
    whole = run("train", *given, "--k", ks, "--steps", 40, "--output", tmp_path / "whole")
    assert "evaluation on all 2,000 training rows" in whole
    if not many:
        found = run_json("train", *given, "--k", 2, "--steps", 40, "--output", tmp_path / "more")
        assert found["evaluation"]["rows"] == 2000


def test_a_long_evaluation_has_a_line_of_its_own(monkeypatch, capsys):
    now = iter(range(0, 100, 10))
    monkeypatch.setattr("saevlm_fast.training.progress.monotonic", lambda: next(now))
    line = ProgressLine(10)
    for done in (10, 20, 40):
        line.evaluated(done, 40)
    line.close()
    written = capsys.readouterr().err
    assert written.count("\n") == 1
    assert [each.strip() for each in written.split("\r")[1:]] == [
        "evaluation 20/40 rows  20 s left",
        "evaluation 40/40 rows  0 s left",
    ]


@pytest.mark.parametrize("kind", [KeyboardInterrupt, Interrupted("interrupted")])  # the second by a command's handler
@pytest.mark.parametrize("ks", ["2", "2,3"])
def test_an_interrupted_evaluation_goes_on(tmp_path, monkeypatch, ks, kind):
    def stop(*_):
        raise kind

    np.save(tmp_path / "x.npy", np.random.default_rng(0).standard_normal((2000, 8)).astype(np.float32))
    given = ("--activations", tmp_path / "x.npy", "--steps", 2, "--batch-size", 64, "--expansion", 2, "--k", ks)
    with monkeypatch.context() as patched:
        patched.setattr(RowSums, "add", stop)
        text = run("train", *given, "--output", tmp_path / "out", code=130)
    assert "interrupted in the evaluation: the SAE is finished and saved in" in text
    (again,) = (line.partition("saevlm-fast ")[2] for line in text.splitlines() if "continue with: " in line)
    done = run(*shlex.split(again))
    assert "all steps are done" in done or "," in ks
    assert run("train", *given, "--output", tmp_path / "alone").splitlines()[-8:-2] == done.splitlines()[-8:-2]


def test_an_evaluation_that_is_interrupted_in_memory():
    def stop(*_):
        raise KeyboardInterrupt

    x_ND = torch.randn(500, 8, generator=torch.Generator().manual_seed(0))
    with pytest.raises(Interrupted, match=r"^interrupted in the evaluation: nothing was saved$"):
        train(x_ND, SAEConfig(8, 16, 4), steps=2, batch_size=64, on_evaluated=stop)


def test_no_image_of_the_first_batch_can_be_used(monkeypatch, capsys):
    now = iter(range(0, 100, 10))
    monkeypatch.setattr("saevlm_fast.training.progress.monotonic", lambda: next(now))
    line = ProgressLine(10)
    for done in (0, 0, 20):
        line.evaluated(done, 40)
    assert capsys.readouterr().err.strip() == "evaluation 20/40 rows  20 s left"


def test_ctrl_c_after_the_last_step_is_not_lost(tmp_path):
    def last(step):
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    x_ND = torch.randn(500, 8, generator=torch.Generator().manual_seed(0))
    with pytest.raises(Interrupted, match=r"^interrupted"):
        train(x_ND, SAEConfig(8, 16, 4), steps=2, batch_size=64, on_step=last, output=tmp_path / "out")
