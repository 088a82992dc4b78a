"""SAEs that the real sparsify makes and saves against its own encode and decode, and ours in its hands.

On a GPU it runs under bfloat16 autocast; compared on a CPU, where its own fallback of the Triton decoder is used.
"""

import os
from dataclasses import replace

import pytest
import torch

os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")  # read when it is imported
sparsify = pytest.importorskip("sparsify", reason="install the extra [interop]")

from foreign_files import D, S, assert_same, rows  # noqa: E402
from foreign_trainers import K, Made  # noqa: E402
from saevlm_fast.formats import export  # noqa: E402
from saevlm_fast.formats.registry import read  # noqa: E402

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("ignore")]
CONFIGS = {
    "num_latents": {"num_latents": S, "k": K},
    "expansion_factor": {"expansion_factor": 4, "k": 3},
    "multi_topk": {"num_latents": S, "k": K, "multi_topk": True},
    "free decoder": {"num_latents": S, "k": K, "normalize_decoder": False},
}


def made_by(name, dtype=torch.float32):
    sae = sparsify.SparseCoder(D, sparsify.SparseCoderConfig(**CONFIGS[name]), dtype=dtype)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    return sae


def forward_of(sae):
    def forward(x_BD):
        with torch.no_grad():
            acts_BK, latents_BK, _ = sae.encode(x_BD.float())
            z_BS = torch.zeros(len(x_BD), sae.num_latents).scatter(1, latents_BK, acts_BK)
            return z_BS.double(), sae.decode(acts_BK, latents_BK).double()

    return forward


@pytest.mark.parametrize("name", CONFIGS)
def test_what_it_saves(tmp_path, name):
    sae = made_by(name)
    sae.save_to_disk(tmp_path / "layers.7")
    plain = read(tmp_path / "layers.7")
    assert_same(plain, Made("sparsify", {}, forward_of(sae)), torch.float32)
    assert plain.metadata["layer"] == 7


@pytest.mark.parametrize("name", CONFIGS)
def test_ours_in_its_hands(tmp_path, name):
    sae = made_by(name)
    sae.save_to_disk(tmp_path / "theirs")
    (tmp_path / "ours").mkdir()
    assert export.write(read(tmp_path / "theirs"), tmp_path / "ours", "sparsify") == []
    again = sparsify.SparseCoder.load_from_disk(tmp_path / "ours")
    torch.testing.assert_close(forward_of(again)(rows()), forward_of(sae)(rows()), atol=0, rtol=0)


def test_a_threshold_becomes_a_top_k(tmp_path):
    sae = made_by("num_latents")
    sae.save_to_disk(tmp_path / "theirs")
    plain = replace(read(tmp_path / "theirs"), activation="batch_topk", threshold=torch.tensor(0.1))
    (tmp_path / "ours").mkdir()
    with pytest.raises(ValueError, match="to: sparsify loses the threshold"):
        export.write(plain, tmp_path / "ours", "sparsify")
    export.write(plain, tmp_path / "ours", "sparsify", lossy=True)
    again = sparsify.SparseCoder.load_from_disk(tmp_path / "ours")
    torch.testing.assert_close(forward_of(again)(rows()), forward_of(sae)(rows()), atol=0, rtol=0)
