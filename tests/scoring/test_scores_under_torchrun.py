"""`torchrun -m saevlm_fast.cli ms-score`: real processes over gloo give the table of one, and end together."""

import os
import signal
import time

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torchrun import Torchrun, messages

from command import run
from saevlm_fast.config import SAEConfig
from saevlm_fast.data.codes import CodesWriter
from saevlm_fast.data.rows import open_activations
from saevlm_fast.sae import SparseAutoencoder
from stores import write_store

pytestmark = pytest.mark.distributed
N = 700


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A float16 store, embeddings in a file, an SAE and its codes."""
    path, generator = tmp_path_factory.mktemp("world"), torch.Generator().manual_seed(0)
    x_ND = torch.randn(N, 16, generator=generator).half()
    write_store(path / "store", x_ND, rows_per_shard=90)
    np.save(path / "emb.npy", torch.randn(N, 12, generator=generator).numpy() + 0.3)
    sae = SparseAutoencoder(SAEConfig(16, 40, 4, "topk")).eval()
    sae.save_pretrained(path / "sae")
    with CodesWriter(path / "codes", 40, torch.float32, {}) as writer, torch.no_grad():
        items = open_activations(path / "store").items()
        columns = {name: items[name].to_pylist() for name in ("image", "token", "label")}
        writer.write_shard(0, sae.encode(x_ND.float()), columns)
    return path


WHAT = {
    "sae": ("--sae", "{}/sae", "--activations", "{}/store", "--controls", "1"),
    "codes": ("--codes", "{}/codes", "--variant", "visaebench"),
    "raw": ("--raw", "--activations", "{}/store", "--similarity", "rbf"),
}


def words(world, what, output):
    given = [word.format(world) for word in WHAT[what]]
    return [
        "ms-score",
        *given,
        "--embeddings",
        world / "emb.npy",
        "--output",
        output,
        "--batch-size",
        50,
        "--device",
        "cpu",
    ]


@pytest.mark.parametrize(("what", "n_ranks"), [("sae", 3), ("codes", 2), ("raw", 2)])
def test_the_table_of_one_process(world, tmp_path, what, n_ranks):
    alone, shared = tmp_path / "alone.parquet", tmp_path / "shared.parquet"
    run(*words(world, what, alone))
    with Torchrun(words(world, what, shared), n_ranks, tmp_path / "log") as ranks:
        code, said = ranks.end()
    assert code == 0, said
    assert said.count("wrote") == 1  # one rank speaks
    found, expected = pq.read_table(shared), pq.read_table(alone)
    assert found.column_names == expected.column_names
    assert found["status"].to_pylist() == expected["status"].to_pylist()
    for name in set(found.column_names) - {"status"}:
        tolerance = 1e-10 if name in ("ms", "n_active", "n_eff") else 1e-4
        mine, its = (table[name].to_numpy().astype(np.float64) for table in (found, expected))
        np.testing.assert_allclose(mine, its, rtol=tolerance, atol=tolerance)


def test_a_row_that_one_rank_meets_is_one_message(world, tmp_path):
    rows = np.random.default_rng(0).normal(size=(N, 16)).astype(np.float32)
    rows[650, 3] = np.nan
    np.save(tmp_path / "x.npy", rows)
    output = tmp_path / "scores.parquet"
    given = ["ms-score", "--raw", "--activations", tmp_path / "x.npy", "--embeddings", world / "emb.npy"]
    with Torchrun([*given, "--output", output, "--batch-size", 50], 2, tmp_path / "log") as ranks:
        _, said = ranks.end()
    (message,) = messages(said)
    assert "row 650" in message
    assert "exitcode  : 2" in said
    assert not output.exists()


def test_what_all_ranks_meet_is_one_message(world, tmp_path):
    (tmp_path / "scores.parquet").write_text("mine")
    with Torchrun(words(world, "sae", tmp_path / "scores.parquet"), 2, tmp_path / "log") as ranks:
        _, said = ranks.end()
    (message,) = messages(said)
    assert "scores.parquet" in message
    assert "--force" in message
    assert "exitcode  : 2" in said


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "hangs"])
def test_a_rank_that_is_gone_ends_all(tmp_path, number):
    generator = np.random.default_rng(0)
    for name, width in (("x", 16), ("emb", 8)):
        np.save(tmp_path / f"{name}.npy", generator.normal(size=(400_000, width)).astype(np.float32))
    given = ["ms-score", "--raw", "--activations", tmp_path / "x.npy", "--embeddings", tmp_path / "emb.npy"]
    more = ["--output", tmp_path / "s.parquet", "--batch-size", 32, "--collective-timeout", 20, "--device", "cpu"]
    with Torchrun([*given, *more], 3, tmp_path / "log") as ranks:
        end = time.monotonic() + 150
        while "score " not in ranks.said():  # a line of progress
            assert time.monotonic() < end, ranks.said()
            assert ranks.process.poll() is None, ranks.said()
            time.sleep(0.2)
        os.kill(ranks.ranks()[1], number)
        while not messages(ranks.said()):
            assert time.monotonic() < end, ranks.said()
            time.sleep(0.2)
        (message,) = messages(ranks.said())
    assert message.startswith("another of the 3 ranks has ended, or has not answered for 20 s (collective_timeout)")
    assert not (tmp_path / "s.parquet").exists()
