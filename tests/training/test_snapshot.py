"""What a checkpoint is made of: as it was, whatever comes later."""

import threading
from itertools import count

import pytest
import torch

from saevlm_fast.config import SAEConfig
from saevlm_fast.sae import SparseAutoencoder
from saevlm_fast.training.snapshot import Snapshot, copying_stream


def spoiled_snapshot(device):
    """A snapshot on its device, what it should hold, and the tensors after later steps on them."""
    sae = SparseAutoencoder(SAEConfig.sized(64, d_sae=4096, k=4), device=device)
    sae.reset_parameters(0)
    tensors = {"W": torch.randn(4096, 64, device=device), "idle": torch.arange(4096, device=device)}
    expected = {name: tensor.cpu().clone() for name, tensor in tensors.items()}
    snapshot = Snapshot(tensors, sae)
    for _ in range(50):
        for tensor in tensors.values():
            tensor.mul_(3)
    return snapshot, expected, sae.W_dec.detach().cpu().clone()


def check(snapshot, expected, W_dec):
    found = []
    thread = threading.Thread(target=lambda: found.append(snapshot.on_host()))
    thread.start()
    thread.join()
    ((tensors, sae),) = found
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        assert tensor.device.type == "cpu"
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0)
    torch.testing.assert_close(sae.W_dec.detach(), W_dec, rtol=0, atol=0)


@pytest.mark.parametrize("where", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_later_steps_change_nothing_of_it(where):
    check(*spoiled_snapshot(torch.device(where)))


def test_where_there_is_no_memory_for_a_copy_the_host_gets_it_at_once(monkeypatch):
    def full(tensors):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr("saevlm_fast.training.snapshot._copies", full)
        snapshot = spoiled_snapshot(torch.device("cpu"))
    check(*snapshot)


def test_no_step_is_beside_the_copies(monkeypatch):
    """Streams that torch hands out in turn, again and again."""
    pytest.importorskip("triton")
    from saevlm_fast.training.gpu_step import side_stream

    numbers, device = count(), torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device, priority: next(numbers) % 4)
    monkeypatch.setattr("saevlm_fast.training.snapshot._copying", {})
    first, copying = side_stream(device), copying_stream(device)
    sides = [first, *(side_stream(device) for _ in range(9))]
    assert set(sides) == {0, 1, 2, 3} - {copying}
    assert {copying_stream(device) for _ in range(9)} == {copying}
