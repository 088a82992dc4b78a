"""Passes over data that are not seen: they are spoken of when they take long, and only then."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from codes_and_labels import latents_of_classes

from command import run
from saevlm_fast.config import SAEConfig
from saevlm_fast.data import passes
from saevlm_fast.data.digests import CheckedFiles
from saevlm_fast.data.label_sets import halves
from saevlm_fast.data.passes import Pass, told_of_passes
from saevlm_fast.files import sha256_file
from saevlm_fast.measures.labels import labels_of_latents
from saevlm_fast.training.run import train


@pytest.fixture
def at_once(monkeypatch):
    """Everything takes long."""
    monkeypatch.setattr(passes, "FIRST_SECONDS", 0.0)
    monkeypatch.setattr(passes, "SECONDS", 0.0)


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("saevlm_fast.data.passes.time.monotonic", lambda: now[0])
    return now


def test_only_what_takes_long_is_spoken_of(clock):
    said = []
    with told_of_passes(said.append):
        reading = Pass("reading x", 1000, "rows")
        for _ in range(10):
            clock[0] += 1
            reading.add(100)
    assert said == [
        "reading x: 200 of 1,000 rows, 8 s left at 100.0 rows/s",
        "reading x: 700 of 1,000 rows, 3 s left at 100.0 rows/s",
    ]
    clock[0] += 10
    Pass("nothing yet", 2, "rows").add(0)
    Pass("reading y", 2, "rows").add(1)
    assert len(said) == 2


def test_a_secret_of_a_url_is_not_said(at_once):
    said = []
    with told_of_passes(said.append):
        Pass("mean of https://me:secret@host/x.npy", 2, "rows").add(1)
    assert len(said) == 1
    assert "secret" not in said[0]


def test_threads_count_together(at_once):
    reading = Pass("x", 4000, "rows")
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(reading.add, [1] * 4000))
    assert reading.done == 4000


def test_a_store_that_is_compared(tmp_path, at_once):
    files = [tmp_path / f"{i}" for i in range(6)]
    for file in files:
        file.write_bytes(b"x")
    digests = [sha256_file(file) for file in files]
    said = []
    with told_of_passes(said.append):
        CheckedFiles(files, digests).check_all()
        CheckedFiles(files, digests).check_shared(0, lambda value: [value])
    each = [f"comparing {tmp_path} with its digests: {n} of 6 files" for n in range(1, 6)]
    assert [text.rpartition(",")[0] for text in said] == each * 2


def test_the_latents_of_labels_are_such_a_pass(at_once):
    """Of the labels and of those that are shuffled, all of them counted."""
    codes, labels = latents_of_classes()
    said = []
    with told_of_passes(said.append):
        labels_of_latents(codes, labels, halves([str(i) for i in range(labels.n_images)]), n_shuffles=3)
    n = len(codes.acts_M)
    counted = [int(text.removeprefix("labels labels: ").partition(" of ")[0].replace(",", "")) for text in said]
    assert all(f" of {4 * n:,} entries, " in text and text.endswith(" entries/s") for text in said)
    assert counted == sorted(counted)
    assert len(counted) == 7, "two halves of four selections; of the last one nothing is left"


def test_commands_and_notebooks_say_it(tmp_path, at_once, capsys):
    x = np.random.default_rng(0).standard_normal((9000, 16)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    given = ("--steps", 2, "--batch-size", 64, "--center", "--output", tmp_path / "out")
    text = run("train", "--activations", tmp_path / "x.npy", *given)
    assert f"mean of {tmp_path / 'x.npy'}: " in text.replace("\n", "")
    train(torch.from_numpy(x), SAEConfig(16, 32, 4), steps=2, batch_size=64, center=True)
    assert capsys.readouterr().err == ""
    train(torch.from_numpy(x), SAEConfig(16, 32, 4), steps=2, batch_size=64, center=True, progress=True)
    assert "mean of tensor [9000, 16]: " in capsys.readouterr().err
