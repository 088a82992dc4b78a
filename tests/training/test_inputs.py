"""A run's batches in the units that are trained in: one pass over memory or several, the same bits."""

import pytest
import torch

from saevlm_fast.config import SAEConfig, TrainConfig
from saevlm_fast.data.rows import Activations
from saevlm_fast.training.state import TrainingState

CUDA = pytest.param("cuda", marks=pytest.mark.gpu)


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("settings", [{}, {"center": True}, {"control": "shuffled"}], ids=str)
def test_they_are_the_normalised_batches_in_the_memory_that_was_named(device, dtype, settings):
    x_ND = torch.randn(500, 24, generator=torch.Generator().manual_seed(0)).to(dtype)
    config = TrainConfig(steps=9, batch_size=128, norm_batches=2, **settings)
    sae = SAEConfig.sized(24, d_sae=64, k=4, architecture="topk")
    state = TrainingState(Activations.from_tensor(x_ND), sae, config, torch.device(device), "device")
    state.initialise()
    memory_BD = torch.empty(128, 24, device=device)
    expected = [state.normalised(raw_BD).clone() for raw_BD in state.batches(1, 7)]
    found = []
    for x_BD in state.inputs(1, 7, lambda n_rows: memory_BD[:n_rows]):
        assert x_BD.data_ptr() == memory_BD.data_ptr()
        found.append(x_BD.clone())
    anywhere = [x_BD.clone() for x_BD in state.inputs(1, 7)]
    torch.testing.assert_close(torch.stack(found), torch.stack(expected), rtol=0, atol=0)
    torch.testing.assert_close(torch.stack(anywhere), torch.stack(expected), rtol=0, atol=0)
