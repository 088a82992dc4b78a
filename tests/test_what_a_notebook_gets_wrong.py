"""Loose arguments from a notebook: tensors are taken as they are, what is wrong is named in one line."""

import json

import numpy as np
import pytest
import torch

import saevlm_fast as sf

X, E = np.random.default_rng(0).normal(size=(300, 16)).astype(np.float32), torch.randn(300, 8)
CONFIG = sf.SAEConfig.sized(16, k=3, expansion=4)


@pytest.fixture(scope="module")
def sae():
    return sf.train(X, CONFIG, steps=np.int64(20), batch_size=64, lr="auto")[0]


def test_tensors_and_arrays_are_activations(sae):
    wrapped = sf.Activations.from_tensor(X)
    assert sf.evaluate(sae, X) == sf.evaluate(sae, wrapped)
    assert sf.score(X, E, sae, device="auto").table().equals(sf.score(wrapped, E.numpy(), sae).table())
    assert sf.top_images(X, [1], 3, sae)[0].images.tolist() == sf.top_images(wrapped, [1], 3, sae)[0].images.tolist()
    assert repr(wrapped) == "Activations(300 x 16, float32, tensor [300, 16])"
    assert repr(sae) == "SparseAutoencoder(batch_topk, 16 -> 64, k = 3)"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda sae: sf.train(3, CONFIG), "activations: int"),
        (lambda sae: sf.train(X, 64), "sae_config: 64|sae_config: int"),
        (lambda sae: sf.train(X, CONFIG, {"steps": 3}), "config: {'steps': 3} is not a TrainConfig"),
        (lambda sae: sf.train(X, CONFIG, steps=2.5), "steps: 2.5 is not a whole number"),
        (lambda sae: sf.train(X, CONFIG, steps=True), "steps: True is not a whole number"),
        (lambda sae: sf.train(X, CONFIG, steps="many"), "steps: 'many' is not a whole number"),
        (lambda sae: sf.train(X, CONFIG, steps=None), "steps: is None"),
        (lambda sae: sf.train(X, CONFIG, betas=0.9), "betas: 0.9 is not several values"),
        (lambda sae: sf.train(X, CONFIG, betas=(2.0, 0.9)), r"betas: \(2.0, 0.9\) must be two numbers in \[0, 1\)"),
        (lambda sae: sf.train(X, CONFIG, eps=-1.0), "eps: -1.0 must be positive"),
        (lambda sae: sf.train(X, CONFIG, output=""), "output: is empty"),
        (lambda sae: sf.train(X, CONFIG, steps=1, batch_size=32, lr=1e38, warmup_steps=0), "NaN or inf after step 1"),
        (lambda sae: sf.SAEConfig.sized("64"), "d_in: '64' must be a whole number"),
        (lambda sae: sf.SAEConfig.sized(64, k=2.5), "k: 2.5 is not a whole number"),
        (lambda sae: sf.SAEConfig.sized(64, architecture=None), "architecture: is None"),
        (lambda sae: sf.SAEConfig.sized(64, groups=0.5), "groups: 0.5 is not several values"),
        (lambda sae: sf.score(X, E, "sae"), "sae: str is not a SparseAutoencoder"),
        (lambda sae: sf.score(X, E, sae, device="gpu"), "device: 'gpu'"),
        (lambda sae: sf.top_images(X, [(1, 0.5)], 3, sae), "latents: torch.float32"),
        (lambda sae: sae.encode(X), "x: ndarray is not a tensor"),
        (
            lambda sae: sae.encode(torch.from_numpy(X).half()),
            r"x: float16, the SAE is float32; encode\(x.to",
        ),
        *(
            (lambda sae, n=n: sf.top_images(X, [1], n, sae), "n: .* is not a whole number")
            for n in ("2", 2.5, True, None)
        ),
        (lambda sae: sf.top_images(X, [1], 0, sae), "n: 0 must be at least 1"),
        (lambda sae: sf.top_images(X, [1], 10**30, sae), "n: 10+ must be at least 1 and below"),
        (lambda sae: sf.top_images(X, [1], 2, sae, batch_rows="8"), "batch_rows: '8' is not a whole number"),
        (lambda sae: sf.top_images(X, [1], 2, "sae"), "sae: str is not a SparseAutoencoder"),
        (lambda sae: sf.top_images(X, [1], 2, []), "sae: list is not a SparseAutoencoder"),
        (lambda sae: sf.score(X, E, sae, batch_rows=2.5), "batch_rows: 2.5 is not a whole number"),
        (lambda sae: sf.score(X, E, sae, device=0), "device: 0 is not a device"),
        (lambda sae: sf.evaluate("sae", X), "sae: str is not a SparseAutoencoder"),
        (lambda sae: sf.evaluate(sae, X, batch_rows=0), "batch_rows: 0 must be at least 1"),
    ],
)
def test_what_is_wrong_is_named(sae, call, message):
    with pytest.raises(ValueError, match=message):
        call(sae)


def test_several_values_may_come_in_any_form():
    config = sf.TrainConfig(betas=np.array([0.5, 0.9], dtype=np.float64))
    assert config.betas == (0.5, 0.9)
    assert json.loads(json.dumps(config.to_dict()))["betas"] == [0.5, 0.9]
    with pytest.raises(ValueError, match="betas: 'a' is not a number"):
        sf.TrainConfig(betas=("a", "b"))
    assert sf.top_images(X, [], 3) == []
