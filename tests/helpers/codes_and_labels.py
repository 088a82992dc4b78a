"""Codes with latents of every status, and labels of their images."""

import numpy as np

from saevlm_fast.data.label_sets import LabelSet
from saevlm_fast.measures.codes import KeptCodes

N = 60


def random_codes(n=N, n_latents=12, share=0.4, levels=None, seed=0):
    """Dense codes: latent 0 is dead, 1 constant, 2 fires once, 3 on two images; with few levels there are ties."""
    generator = np.random.default_rng(seed)
    acts = generator.random((n, n_latents)) if levels is None else generator.integers(1, levels + 1, (n, n_latents))
    acts = (acts * (generator.random((n, n_latents)) < share)).astype(np.float32)
    for latent, images in ((0, []), (2, [5]), (3, [5, 9])):
        if latent < n_latents:
            acts[:, latent] = 0
            acts[images, latent] = 1.5
    if n_latents > 1:
        acts[:, 1] = 2.0
    return acts


def random_labels(n=N, n_labels=4, seed=0, several=False):
    generator = np.random.default_rng(seed + 1)
    if not several:
        return LabelSet.of([f"class {each}" for each in generator.integers(0, n_labels, n)])
    return LabelSet.of([{f"class {c}" for c in np.flatnonzero(generator.random(n_labels) < 0.4)} for _ in range(n)])


def latents_of_classes(n=400, n_labels=5):
    """Latent c fires on class c alone, and 20 others anywhere."""
    labels = [f"class {i % n_labels}" for i in range(n)]
    acts = random_codes(n, 30, share=0.1)
    for label in range(n_labels):
        acts[:, 10 + label] = 3 * (np.arange(n) % n_labels == label)
    return KeptCodes.of_dense(acts), LabelSet.of(labels)
