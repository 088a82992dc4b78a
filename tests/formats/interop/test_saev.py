"""SAEs that the real saev 0.1.0 makes and saves against its own forward.

PyPI has no later one: files of later schemas are written from its repository's code
(tests/helpers/foreign_trainers.py).
"""

import pytest
import torch

from foreign_files import D, assert_same, rows
from foreign_trainers import Made
from saevlm_fast.formats.registry import read

nn = pytest.importorskip("saev.nn", reason="install saev 0.1.0, which is in no extra: it wants marimo and submitit")
pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize("factor", [1, 4])
def test_what_it_saves(tmp_path, factor):
    from saev.config import SparseAutoencoder

    sae = nn.SparseAutoencoder(SparseAutoencoder(d_vit=D, exp_factor=factor))
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.4)
    nn.dump(str(tmp_path / "sae.pt"), sae)

    def forward(x_BD):
        with torch.no_grad():
            x_hat_BD, z_BS, _ = sae(x_BD.float())
            return z_BS.double(), x_hat_BD.double()

    plain = read(tmp_path, assume={"input_mean": 0, "input_std": 1})
    assert not plain.doubts
    assert_same(plain, Made("saev", {}, forward), torch.float32, rows(d=D))
