"""A disk that is full in the middle of the work: what each writer says, and that what it keeps is there."""

import errno
import os
import re
from concurrent.futures import Future

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors import SafetensorError

from command import run
from saevlm_fast import files
from saevlm_fast.config import SAEConfig
from saevlm_fast.data.store import read_index
from saevlm_fast.data.writing import ActivationWriter
from saevlm_fast.errors import DiskFull
from saevlm_fast.look.spill import Spill
from saevlm_fast.measures.parts import Parts
from saevlm_fast.measures.results import Measured
from saevlm_fast.scoring.tables import write_table
from saevlm_fast.sparse_codes import SparseCodes
from saevlm_fast.steering.table import write_block
from saevlm_fast.training.checkpoints import RunDirectory, checkpoints
from saevlm_fast.training.run import train

X = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def no_room(monkeypatch):
    """No room for files of some names, from a call on."""

    def begin(pattern):
        flush = files._fsync_file

        def full(path):
            if re.search(pattern, str(path)):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            flush(path)

        monkeypatch.setattr(files, "_fsync_file", full)

    return begin


def told(what, kept):
    return rf"^[^:]+: No space left on device, while {what} was written; .*B are free on its disk; {kept}"


def trained(output, **more):
    return train(X, SAEConfig(8, 16, 2), steps=20, batch_size=32, output=output, checkpoint_every=5, **more)


def test_a_checkpoint(tmp_path, no_room):
    no_room(r"step_00000015")
    with pytest.raises(
        DiskFull, match=told("the checkpoint step_00000015", ".*step_00000010 is whole, from which")
    ) as e:
        trained(tmp_path / "run")
    assert "/checkpoints/step_00000015/" in str(e.value), "not the folder's name while it is written"
    assert checkpoints(tmp_path / "run")[-1].name == "step_00000010"


def test_the_first_checkpoint_and_the_log(tmp_path, no_room, monkeypatch):
    no_room(r"step_0")
    with pytest.raises(DiskFull, match=told("the checkpoint step_00000005", "no checkpoint had been written")):
        trained(tmp_path / "run")
    monkeypatch.setattr("saevlm_fast.training.checkpoints.open", no_open("a"), raising=False)
    with pytest.raises(DiskFull, match=told("the log", "no checkpoint had been written")):
        trained(tmp_path / "other")


@pytest.mark.parametrize("full_after", [0, 3])
def test_a_run_that_diverges_says_so(tmp_path, no_room, monkeypatch, full_after):
    """Whether its weights or its loss are no numbers, and whatever becomes of the line of the log that says it."""

    def no_room_from_then_on(step):
        if step > full_after:
            no_room(r"metrics\.jsonl")
            monkeypatch.setattr("saevlm_fast.training.checkpoints.open", no_open("a"), raising=False)

    more = {"log_every": 100, "lr": 1e39, "warmup_steps": 5, "on_step": no_room_from_then_on}
    with pytest.raises(
        ValueError, match=r"NaN or inf (at|after) step \d+; .*metrics\.jsonl does not say so \(.*No space"
    ):
        train(X, SAEConfig(8, 16, 2), steps=20, batch_size=32, output=tmp_path / "run", checkpoint_every=5, **more)


def test_a_checkpoint_that_could_not_be_written_does_not_hide_a_divergence(tmp_path):
    """As of a GPU, where it is written beside the steps."""
    trained(tmp_path / "run")
    kept, failed = RunDirectory(tmp_path / "run", None, False, False), Future()
    failed.set_exception(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    kept._written = failed
    assert "the last good checkpoint is" in kept.diverged(21)


def no_open(mode):
    def opened(path, how="r", *more, **others):
        if how == mode:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return open(path, how, *more, **others)

    return opened


def test_a_shard_of_a_store(tmp_path, no_room):
    writer = ActivationWriter(tmp_path / "store", 8, torch.float32, {}, rows_per_shard=50)
    no_room(r"shard-00002")
    items = {"image": [str(i) for i in range(200)], "token": [0] * 200}
    with pytest.raises(DiskFull, match=told("shard 2 of a store", "the 100 rows of shards before it are whole")):
        writer.append(X, items)
    assert read_index(tmp_path / "store").n_rows == 100


def test_measures_tables_blocks_and_codes(tmp_path, no_room):
    no_room(r"-labels\.json|-t\.parquet|-block")
    parts = Parts(tmp_path)
    parts.write("sae", "geometry", "key", Measured({"x": 1}))
    with pytest.raises(DiskFull, match=told("labels of sae", "measures that were finished before it are kept")):
        parts.write("sae", "labels", "key", Measured({}))
    assert parts.read("sae", "geometry", "key") is not None
    with pytest.raises(DiskFull, match=told("the table", "what was there before is as it was")):
        write_table(pa.table({"a": [1]}), tmp_path / "t.parquet")
    with pytest.raises(DiskFull, match=told("a block of latents", "blocks before it are whole")):
        write_block(tmp_path / "block-00000.json", [])
    spill = Spill(tmp_path / "spill", 4)
    codes = SparseCodes.from_flat(torch.ones(1), torch.zeros(1, dtype=torch.int64), torch.tensor([0, 1]), 4)
    spill.append(codes)
    spill._files["acts"] = FullFile()
    with pytest.raises(DiskFull, match=told("codes", ".*")):
        spill.append(codes)
    with pytest.raises(DiskFull, match=told("codes", ".*")):
        spill.finish()


class FullFile:
    def write(self, data=b""):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    close = write  # what is left in the buffer


def test_what_a_command_says(tmp_path, no_room):
    """One line and exit code 2, as of any refusal."""
    np.save(tmp_path / "x.npy", X.numpy())
    no_room(r"weights|sae\.safetensors")
    given = ("--steps", 2, "--batch-size", 32, "--output", tmp_path / "out")
    text = run("train", "--activations", tmp_path / "x.npy", *given, code=2)
    assert "No space left on device, while the checkpoint step_00000002 was written" in " ".join(text.split())


def test_what_safetensors_says_of_it(tmp_path, monkeypatch):
    """It has no errno, and raises an error of its own kind."""

    def full(tensors, path, metadata):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(files, "save_file", full)
    with pytest.raises(DiskFull, match=told("shard 0 of a store", "the 0 rows of shards before it are whole")):
        ActivationWriter(tmp_path / "store", 8, torch.float32, {}).write_shard(0, X[:2], two_items())
    with pytest.raises(DiskFull, match="No space left on device") as caught:
        files.save_safetensors_atomic(tmp_path / "x.safetensors", {"x": X})
    assert caught.value.free is not None
    assert isinstance(caught.value.__cause__.__cause__, SafetensorError)


def two_items():
    return {"image": ["a", "b"], "token": [0, 0]}
