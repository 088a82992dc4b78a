"""Top images against brute force."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planted_codes import SOURCE, in_memory, write_codes
from torch import Tensor

from saevlm_fast.config import SAEConfig
from saevlm_fast.data.rows import open_activations
from saevlm_fast.data.writing import ActivationWriter
from saevlm_fast.sae import SparseAutoencoder
from saevlm_fast.scoring.top_images import top_images


def brute_force(column: Tensor, n: int, fires: bool) -> list[tuple[int, float]]:
    pairs = [(i, float(a)) for i, a in enumerate(column) if a > 0 or not fires]
    return sorted(pairs, key=lambda pair: (-pair[1], pair[0]))[:n]


def as_pairs(top) -> list[tuple[int, float]]:
    return list(zip(top.images.tolist(), top.acts.tolist()))


@settings(max_examples=60)
@given(
    st.integers(1, 40), st.integers(1, 6), st.integers(1, 9), st.integers(1, 45), st.booleans(), st.integers(0, 2**20)
)
def test_top_images_of_neurons_equal_brute_force_with_ties_and_any_chunks(n_rows, width, n, chunk, shuffle, seed):
    generator = torch.Generator().manual_seed(seed)
    acts_NS = torch.randint(-3, 4, (n_rows, width), generator=generator).float()  # few values: ties everywhere
    latents = torch.randperm(width, generator=generator)[: max(1, width - 1)] if shuffle else torch.arange(width)
    found = top_images(in_memory(acts_NS), latents, n, batch_rows=chunk)
    assert [as_pairs(top) for top in found] == [brute_force(acts_NS[:, k], n, fires=False) for k in latents]


@pytest.mark.parametrize("seed", range(6))
def test_top_images_of_stored_codes_equal_brute_force(tmp_path, seed):
    generator = torch.Generator().manual_seed(seed)
    acts_NS = torch.randint(-4, 3, (50, 11), generator=generator).clamp(min=0).float()
    acts_NS[:, 3] = 0.0  # dead
    acts_NS[:, 4] = 1.0  # all equal: the first images
    codes, latents = write_codes(tmp_path / "codes", acts_NS), [4, 10, 3, 0]
    done: list[int] = []
    found = top_images(codes, latents, 5, batch_rows=8, on_rows=done.append)
    assert [as_pairs(top) for top in found] == [brute_force(acts_NS[:, k], 5, fires=True) for k in latents]
    assert found[0].images.tolist() == [0, 1, 2, 3, 4]
    assert len(found[2].images) == 0
    assert done == [8, 16, 24, 32, 40, 48, 50]


@pytest.mark.parametrize("architecture", ["topk", "batch_topk"])
def test_top_images_of_an_sae_are_those_of_its_codes(architecture):
    generator = torch.Generator().manual_seed(0)
    x_ND = torch.randn(60, 8, generator=generator)
    sae = SparseAutoencoder(SAEConfig(8, 24, 3, architecture)).train()
    sae.threshold.fill_(0.5)
    sae.b_enc.data.fill_(-1.2)  # topk rows are filled up with zeros, which are no activations
    dense_NS = sae.eval().encode(x_ND).dense().detach()
    sae.train()
    found = top_images(in_memory(x_ND), torch.arange(24), 4, sae, batch_rows=60)
    assert sae.training
    assert [as_pairs(top) for top in found] == [brute_force(dense_NS[:, k], 4, fires=True) for k in range(24)]


def test_top_images_refuses_in_one_line(tmp_path):
    acts, sae = in_memory(torch.ones(3, 4)), SparseAutoencoder(SAEConfig(5, 8, 2))
    for arguments, message in (
        ((acts, [0], 0), "n: 0 must be at least 1"),
        ((acts, [1, 4], 2), "latents: 4 is not within 0 to 3"),
        ((acts, [-1], 2), "latents: -1 is not within 0 to 3"),
        ((acts, torch.tensor(3), 2), "latents: torch.int64 [], must be a list of whole numbers"),
        ((acts, 3, 2), "latents: torch.int64 [], must be a list of whole numbers"),
        ((acts, [True, False], 2), "latents: torch.bool [2], must be a list of whole numbers"),
        ((acts, "3", 2), "latents: '3' must be a list of whole numbers"),
        ((acts, None, 2), "latents: None must be a list of whole numbers"),
        ((acts, [2**70], 2), "latents: [1180591620717411303424] must be a list of whole numbers"),
        ((acts, [1, 2, 1], 2), "latents: 3 are listed, but only 2 differ"),
        ((acts, [0], 2, sae), "sae: d_in is 5, but the activations have width 4"),
        ((write_codes(tmp_path / "codes", torch.ones(2, 3)), [0], 2, sae), "sae: codes are encoded already"),
    ):
        with pytest.raises(ValueError, match="^" + re.escape(message)):
            top_images(*arguments)


def test_top_images_refuses_several_rows_of_an_image(tmp_path):
    with ActivationWriter(tmp_path / "store", 4, torch.float32, SOURCE) as writer:
        writer.write_shard(0, torch.ones(3, 4), {"image": ["a", "a", "b"], "token": [0, 1, 0], "label": [None] * 3})
    with pytest.raises(ValueError, match="2 rows of image 'a'"):
        top_images(open_activations(tmp_path / "store"), [0], 2)


@pytest.mark.parametrize("pool", ["max", "mean"])
def test_top_images_of_several_rows_an_image_are_pooled(tmp_path, pool):
    rows_BD = torch.rand(9, 4, generator=torch.Generator().manual_seed(0))
    images = ["a"] * 2 + ["b"] * 4 + ["c"] * 3
    with ActivationWriter(tmp_path / "store", 4, torch.float32, SOURCE) as writer:
        writer.append(rows_BD.numpy(), {"image": images, "token": [0, 1, 0, 1, 2, 3, 0, 1, 2]})
    sae = SparseAutoencoder(SAEConfig(4, 6, 2, "topk"))
    parts = sae.encode(rows_BD).dense().detach().split((2, 4, 3))
    pooled_NS = torch.stack([part.amax(0) if pool == "max" else part.mean(0) for part in parts])
    for batch_rows in (1, 4, 100):
        found = top_images(tmp_path / "store", [3, 0], 2, sae, pool=pool, batch_rows=batch_rows)
        for top, latent in zip(found, [3, 0]):
            wanted = brute_force(pooled_NS[:, latent], 2, fires=True)
            assert top.images.tolist() == [image for image, _ in wanted]
            torch.testing.assert_close(top.acts, torch.tensor([act for _, act in wanted]))
    with pytest.raises(ValueError, match="pool: 'min' is not one of max, mean"):
        top_images(tmp_path / "store", [0], 2, sae, pool="min")
