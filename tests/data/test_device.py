"""Batches on the device: the rows of the host's batches in their order, checked, whatever dtype they are kept in."""

import numpy as np
import pytest
import torch

from saevlm_fast.data import device as device_module
from saevlm_fast.data.device import ResidentRows, uploaded_batches
from saevlm_fast.data.order import ShuffledRows, batches
from saevlm_fast.data.rows import Activations, open_activations
from saevlm_fast.errors import ActivationError
from stores import write_store

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def rows_of(n, d, dtype):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(n)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("windowed", [False, True])
def test_resident_batches_are_the_hosts(dtype, windowed, device, monkeypatch):
    monkeypatch.setattr(device_module, "_LOADED_BYTES", 1000)
    monkeypatch.setattr(device_module, "_STEPS_A_PIECE", 3)
    data = Activations.from_tensor(rows_of(203, 6, dtype))
    small = {"exact_bytes": 0, "window_bytes": 8192, "block_bytes": 2048} if windowed else {}
    order = ShuffledRows(data, 16, seed=4, **small)
    resident = ResidentRows(data, device)
    assert resident.rows_ND.dtype == (torch.float32 if dtype == torch.float64 else dtype)
    for start, n_steps in ((0, 30), (7, 4), (5, 0)):
        expected = [x for _, x in batches(data, order, start, n_steps)]
        found = list(resident.batches(order, start, n_steps))
        assert len(found) == n_steps
        assert all(torch.equal(a, b.float().cpu()) for a, b in zip(expected, found))


def test_resident_rows_of_a_store_are_read_across_its_shards(tmp_path, device, monkeypatch):
    monkeypatch.setattr(device_module, "_LOADED_BYTES", 7 * 8)
    x = rows_of(50, 4, torch.float16)
    resident = ResidentRows(open_activations(write_store(tmp_path / "s", x)), device)
    assert torch.equal(resident.rows_ND.cpu(), x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_rows_that_are_not_finite_are_named(dtype, value, device, monkeypatch):
    monkeypatch.setattr(device_module, "_LOADED_BYTES", 100)
    x = rows_of(40, 3, dtype)
    x[27, 1] = value
    x[33, 0] = value
    with pytest.raises(
        ActivationError,
        match=r"tensor \[40, 3\]: row 27, column 1 is (nan|-?inf in (bfloat16|float16|float32)); it must be finite",
    ):
        ResidentRows(Activations.from_tensor(x), device)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_as_they_are_kept(dtype):
    x = rows_of(20, 3, dtype)
    data, rows = Activations.from_tensor(x), torch.tensor([3, 17, 4])
    out = torch.empty(3, 3, dtype=data.kept_dtype)
    assert data.rows(rows, out=out) is out
    assert torch.equal(out.float(), data.rows(rows))
    x[17, 2] = torch.nan
    with pytest.raises(ActivationError, match="row 17, column 2 is nan"):
        Activations.from_tensor(x).rows(rows, out=out)
    if dtype != torch.float32:
        with pytest.raises(ValueError, match="out is"):
            data.rows(rows, out=torch.empty(3, 3, dtype=torch.int16))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_uploaded_batches_are_the_hosts(dtype, device, tmp_path):
    data = Activations.from_tensor(rows_of(1003, 64, dtype))
    order = ShuffledRows(data, 100, seed=4)
    for start, n_steps in ((0, 60), (7, 1), (5, 0)):
        expected = [x for _, x in batches(data, order, start, n_steps)]
        found = [x.float().clone() for x in uploaded_batches(data, order, start, n_steps, device)]
        assert len(found) == n_steps
        assert all(torch.equal(a, b.cpu()) for a, b in zip(expected, found))


@pytest.mark.gpu
def test_pinned_memory_that_is_used_again_holds_what_was_read_last(device, monkeypatch):
    monkeypatch.setattr("saevlm_fast.data.device._PINNED_BYTES", 0)  # few slots
    data = Activations.from_tensor(rows_of(1003, 64, torch.float32))
    order = ShuffledRows(data, 100, seed=4)
    expected = [x for _, x in batches(data, order, 0, 60)]
    found = [x.clone() for x in uploaded_batches(data, order, 0, 60, device)]
    assert all(torch.equal(a, b.cpu()) for a, b in zip(expected, found))


@pytest.mark.gpu
def test_uploaded_rows_that_are_not_finite_are_named_and_threads_end(device):
    x = rows_of(1000, 8, torch.float16)
    x[700, 5] = torch.nan
    data = Activations.from_tensor(x)
    with pytest.raises(ActivationError, match="row 700, column 5 is nan"):
        list(uploaded_batches(data, ShuffledRows(data, 50), 0, 20, device))
    stream = uploaded_batches(data, ShuffledRows(data, 50), 0, 1, device)
    next(stream)
    stream.close()
