"""A kernel takes an activation's place only where it gives the same bits, and is gone afterwards."""

from contextlib import ExitStack

import pytest
import torch
from torch import nn

from saevlm_fast.towers.forwards import fuse_quick_gelus
from saevlm_fast.towers.load import load_tower
from saevlm_fast.towers.tower import HookPoint
from tiny_tower import N_BLOCKS, save_clip

CPU, HALF = torch.device("cpu"), torch.bfloat16


def same_formula(x):
    return x * torch.sigmoid(1.702 * x)


class QuickGELU(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.7 * x)  # the name alone says nothing


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return save_clip(tmp_path_factory.mktemp("clip"))


def test_the_kernel_takes_the_place_of_modules_that_it_equals_and_leaves_it(directory):
    model = load_tower(f"hf:{directory}").model
    model.other = QuickGELU()
    calls = []

    def kernel(x):
        calls.append(x.dtype)
        return same_formula(x)

    activation = next(module for module in model.modules() if type(module).__name__ == "QuickGELUActivation")
    with ExitStack() as stack:
        assert fuse_quick_gelus(stack, model, CPU, HALF, kernel) == N_BLOCKS
        calls.clear()
        for x in (torch.randn(3, dtype=HALF), torch.randn(3), torch.randn(4, 4, dtype=HALF).T):
            assert torch.equal(activation(x), same_formula(x))
        assert calls == [HALF]  # another dtype and a transposed tensor are the module's own business
        x = torch.randn(3, dtype=HALF, requires_grad=True)
        activation(x).sum().backward()
        assert x.grad is not None
    assert not any("forward" in vars(module) for module in model.modules())


def test_one_number_that_differs_is_enough(directory):
    model = load_tower(f"hf:{directory}").model

    def nearly(x):
        return torch.where(x == 1.5, 1.5, same_formula(x))

    with ExitStack() as stack:
        assert fuse_quick_gelus(stack, model, CPU, HALF, nearly) == 0
        assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.gpu
def test_a_gpu_tower_in_bfloat16_gives_the_same_bits_with_the_kernel(directory, monkeypatch):
    tower = load_tower(f"hf:{directory}", "cuda")
    noise = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8, device="cuda")
    points = [HookPoint("residual", layer) for layer in range(N_BLOCKS)]
    found = []
    for kernel in (True, False):
        if not kernel:
            monkeypatch.setattr("saevlm_fast.towers.tower.quick_gelu_kernel", lambda: None)
        with tower.hooked(points, autocast=HALF) as run:
            assert any("forward" in vars(module) for module in tower.model.modules()) == kernel
            found.append(run({"pixel_values": noise}))
    assert all(torch.equal(found[0][point], found[1][point]) for point in points)
