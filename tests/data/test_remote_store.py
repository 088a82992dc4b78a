"""Stores and matrices by URL: the same rows as here, fetched as they are needed, refused in one line."""

import copy
import pickle
import time

import numpy as np
import pytest
import torch

import saevlm_fast as sf
from file_server import FileServer
from saevlm_fast.config import RunOptions, SAEConfig, TrainConfig
from saevlm_fast.data.order import ShuffledRows, batches
from saevlm_fast.errors import ActivationError
from saevlm_fast.remote import cache, reading
from saevlm_fast.remote.answers import RemoteError
from saevlm_fast.sparse_codes import SparseCodes
from saevlm_fast.training.run import train

N, D, SHARD = 1000, 16, 50
X = torch.randn(N, D, generator=torch.Generator().manual_seed(0)).half()


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("SAEVLM_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(reading, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(reading, "TRIES", 3)
    cache._users.forget()
    files = tmp_path / "files"
    files.mkdir()
    labels = ["even" if i % 2 == 0 else None for i in range(N)]
    with sf.ActivationWriter(files / "store", D, torch.float16, {"model": "m"}, rows_per_shard=SHARD) as writer:
        writer.append(X, {"image": [f"image {i}" for i in range(N)], "token": [0] * N, "label": labels})
    with FileServer(files) as made:
        yield made


def test_rows_and_items_are_those_of_the_store(server):
    rows = sf.open_activations(f"{server.url}/store")
    here = sf.open_activations(server.folder / "store")
    assert server.asked.total() == 2, "its index alone"
    assert (rows.n_rows, rows.d, rows.dtype, rows.source) == (N, D, torch.float16, {"model": "m"})
    indices = torch.tensor([999, 3, 51, 3])
    assert torch.equal(rows.rows(indices), here.rows(indices))
    assert {path for path in server.asked if "shard" in path} == {
        "store/shard-00000.safetensors",
        "store/shard-00001.safetensors",
        "store/shard-00019.safetensors",
    }
    assert rows.items(indices).equals(here.items(indices))
    assert torch.equal(torch.cat([x_BD for _, x_BD in rows.chunks(130)]), X.float())
    assert rows.digest() == here.digest()
    assert str(rows.path) == f"{server.url}/store"
    again = pickle.loads(pickle.dumps(rows))
    assert torch.equal(again.rows(indices), X[indices].float())
    assert torch.equal(copy.copy(rows).rows(indices), X[indices].float())


def test_codes(server):
    acts = torch.rand(40, 3) + 0.1
    latents = torch.tensor([1, 5, 7]).repeat(10, 1)
    with sf.CodesWriter(server.folder / "codes", 9, torch.float16, {}) as writer:
        for number in range(4):
            part = SparseCodes.from_flat(acts[number * 10 :][:10], latents, None, 9)
            writer.write_shard(number, part, {"image": [f"{number}-{i}" for i in range(10)], "token": [0] * 10})
    here, there = sf.open_codes(server.folder / "codes"), sf.open_codes(f"{server.url}/codes")
    assert server.asked.total() == 2
    for (first, mine), (other_first, others) in zip(here.chunks(7), there.chunks(7), strict=True):
        assert first == other_first
        assert torch.equal(mine.dense(), others.dense())
    assert there.n_entries == here.n_entries == 120
    with pytest.raises(ActivationError, match="a store of codes; needed is one of activations"):
        sf.open_activations(f"{server.url}/codes")


@pytest.mark.parametrize("suffix", ["npy", "safetensors", "pt"])
def test_a_matrix(server, suffix):
    from safetensors.torch import save_file

    file = server.folder / f"x.{suffix}"
    if suffix == "npy":
        np.save(file, X.numpy())
    elif suffix == "pt":
        torch.save({"a": X, "b": X[:3]}, file)
    else:
        save_file({"a": X, "b": X[:3].clone()}, file)
    key = "" if suffix == "npy" else "::a"
    rows = sf.open_activations(f"{server.url}/x.{suffix}{key}")
    assert torch.equal(rows.rows(torch.tensor([5, 2])), X[[5, 2]].float())
    assert rows.digest() == sf.open_activations(f"{file}{key}").digest()


def damaged(server, what):
    shard = server.folder / "store" / "shard-00003.safetensors"
    if what == "altered":
        data = bytearray(shard.read_bytes())
        data[-1] ^= 1
        shard.write_bytes(data)
    elif what == "missing":
        shard.unlink()
    elif what == "dead":
        server.stop()
    elif what == "index":
        (server.folder / "store" / "index.json").write_text("{")


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("altered", r"shard-00003.safetensors: altered, its SHA-256 is not the one"),
        ("missing", r"shard-00003.safetensors: nothing is there \(status 404\)"),
        ("dead", r"safetensors: no answer \(.*\), 3 times"),
    ],
)
def test_what_is_damaged_or_gone_is_one_line(server, what, message):
    rows = sf.open_activations(f"{server.url}/store")
    damaged(server, what)
    with pytest.raises(RemoteError, match=message) as error:
        rows.rows(torch.arange(160, 170))
    assert "\n" not in str(error.value)


def test_what_is_no_store(server):
    with pytest.raises(ActivationError, match=r"nowhere/index.json: nothing is there \(status 404\); a store of"):
        sf.open_activations(f"{server.url}/nowhere")
    damaged(server, "index")
    with pytest.raises(ActivationError, match=r"index\.json: not valid JSON"):
        sf.open_activations(f"{server.url}/store")
    with pytest.raises(ValueError, match=r"http://.*/store is elsewhere; a path on this machine is needed"):
        sf.verify(f"{server.url}/store")


class Elsewhere:
    """What an order knows of a store that is elsewhere."""

    def __init__(self, n_rows, block_rows, row_bytes=512):
        self.n_rows, self.block_rows, self.row_bytes = n_rows, block_rows, row_bytes


@pytest.mark.parametrize(("n_rows", "block", "batch"), [(1000, 50, 64), (1003, 50, 64), (40, 50, 7)])
def test_an_order_of_blocks_takes_every_row_once_and_few_blocks_at_a_time(n_rows, block, batch):
    order = ShuffledRows(Elsewhere(n_rows, block), batch, window_bytes=1)
    n_steps = order.batches_per_epoch
    rows = torch.cat([order.batch(step) for step in range(n_steps)])
    assert len(rows.unique()) == len(rows) == n_steps * batch
    touched = [set((order.batch(step) // block).tolist()) for step in range(n_steps)]
    assert max(map(len, touched)) <= 16, "a batch lies in two windows of eight blocks at most"
    begun = [first // block for step in range(n_steps) for first, _ in order.blocks_begun(step)]
    assert sorted(begun) == list(range(-(-n_rows // block)))
    for step in range(n_steps):
        after = {first // block for first, _ in order.blocks_after(step)}
        later = [set(b // block for b, _ in order.blocks_begun(s)) for s in range(step + 1, n_steps)]
        assert after in [each for each in later if each][:1] or not any(later)


def run(rows, output, **options):
    config = TrainConfig(steps=30, batch_size=64, lr=1e-3, norm_batches=2)
    options = RunOptions(output, "cpu", log_every=10, checkpoint_every=10, **options)
    return train(rows, SAEConfig(D, 32, 3), config, options, validation=X[:100].float())[0]


def test_a_run_begins_before_the_store_is_here_and_resumes_to_the_same_bits(server, tmp_path, monkeypatch):
    rows = sf.open_activations(f"{server.url}/store")
    order = ShuffledRows(rows, 64, window_bytes=1)
    first, x_BD = next(batches(rows, order, 0, 1))
    assert torch.equal(x_BD, X[first].float())
    assert len([path for path in server.asked if "shard" in path]) <= 16
    whole = run(rows, tmp_path / "whole")

    def stop(step):
        if step == 17:
            raise sf.Interrupted("enough")

    config = TrainConfig(steps=30, batch_size=64, lr=1e-3, norm_batches=2)
    options = {"device": "cpu", "log_every": 10, "checkpoint_every": 10}
    with pytest.raises(sf.Interrupted):
        train(rows, SAEConfig(D, 32, 3), config, RunOptions(tmp_path / "cut", **options), on_step=stop)
    resumed = run(sf.open_activations(f"{server.url}/store"), tmp_path / "cut", resume=True)
    assert torch.equal(resumed.W_enc, whole.W_enc)
    with pytest.raises(ValueError, match="order"):
        run(sf.open_activations(server.folder / "store"), tmp_path / "cut", resume=True)


def test_a_store_larger_than_the_cache(server, monkeypatch):
    """20 shards of 1.7 kB, and their items, in 24 kB."""
    monkeypatch.setenv("SAEVLM_FAST_CACHE_GIB", str(24_000 / (1 << 30)))
    rows = sf.open_activations(f"{server.url}/store")
    for _ in range(2):
        assert torch.equal(torch.cat([x_BD for _, x_BD in rows.chunks(130)]), X.float())
        kept = [path.stat().st_size for path in cache.remote_cache().rglob("shard*")]
        assert sum(kept) <= 24_000
    assert max(server.asked.values()) > 2, "what was let go is fetched again"


def test_shards_come_while_a_reader_is_busy(server):
    rows = sf.open_activations(f"{server.url}/store")
    rows.will_need(0, 200)
    deadline = time.monotonic() + 30
    while len([path for path in server.asked if "shard" in path]) < 4 or rows._remote.shards._coming:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    before = server.asked.total()
    rows.rows(torch.arange(200))
    assert server.asked.total() == before
