"""What was opened goes to another process as its place: nothing that is mapped is copied."""

import copy
import multiprocessing
import pickle

import numpy as np
import pytest
import torch

from saevlm_fast.data.codes import CodesWriter, open_codes
from saevlm_fast.data.rows import Activations, open_activations
from saevlm_fast.data.writing import ActivationWriter
from saevlm_fast.sparse_codes import SparseCodes

N, D = 300, 64
X_ND = torch.randn(N, D, generator=torch.Generator().manual_seed(0))


def placed(kind, tmp_path):
    items = {"image": [str(i) for i in range(N)], "token": [0] * N}
    if kind == "store":
        with ActivationWriter(tmp_path / "store", D, torch.float32, {"model": "x"}, rows_per_shard=100) as writer:
            writer.append(X_ND, items)
        return open_activations(tmp_path / "store")
    if kind == "codes":
        acts, latents = X_ND.abs().topk(3)
        latents, order = latents.sort()
        codes = SparseCodes.from_flat(acts.gather(1, order), latents, None, D)
        with CodesWriter(tmp_path / "codes", D, torch.float32, {"model": "x"}) as writer:
            writer.write_shard(0, codes, items)
        return open_codes(tmp_path / "codes")
    if kind == "npy":
        np.save(tmp_path / "x.npy", X_ND.numpy())
        return open_activations(tmp_path / "x.npy")
    if kind == "pt":
        torch.save({"a": X_ND[:3], "b": X_ND}, tmp_path / "x.pt")
        return open_activations(f"{tmp_path / 'x.pt'}::b")
    return Activations.from_tensor(X_ND)


def read(stored):
    found = next(iter(stored.chunks(N)))[1]
    return found if isinstance(found, torch.Tensor) else found.dense()


def sent(stored, results):
    results.put((stored.n_rows, float(read(stored).double().sum())))


@pytest.mark.parametrize("kind", ["store", "codes", "npy", "pt", "memory"])
def test_pickled_and_copied(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stored = placed(kind, tmp_path)
    packed = pickle.dumps(stored)
    assert (len(packed) < 2000) == (kind != "memory")
    monkeypatch.chdir("/")
    for other in (pickle.loads(packed), copy.copy(stored), copy.deepcopy(stored)):
        assert torch.equal(read(other), read(stored))
        assert (other.path, other.n_rows) == (stored.path, N)


@pytest.mark.parametrize("kind", ["store", "npy"])
def test_a_spawned_process_reads_it(kind, tmp_path):
    stored, context = placed(kind, tmp_path), multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=sent, args=(stored, results))
    process.start()
    n_rows, total = results.get(timeout=60)
    process.join(60)
    assert n_rows == N
    assert total == pytest.approx(float(X_ND.double().sum()))


def test_what_was_opened_by_a_relative_path(tmp_path, monkeypatch):
    np.save(tmp_path / "x.npy", X_ND.numpy())
    monkeypatch.chdir(tmp_path)
    packed = pickle.dumps(open_activations("x.npy"))
    monkeypatch.chdir("/")
    assert torch.equal(read(pickle.loads(packed)), X_ND)
