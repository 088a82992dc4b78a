"""What `saevlm-fast evaluate` is tried on, and its calls."""

import csv
import json
from pathlib import Path

import numpy as np
import torch

from saevlm_fast.config import SAEConfig
from saevlm_fast.data.writing import ActivationWriter
from saevlm_fast.sae import SparseAutoencoder

N, D = 240, 8
PATHS = {"cat": ["animal", "mammal", "cat"], "dog": ["animal", "mammal", "dog"], "oak": ["plant", "oak"]}
CLASSES = sorted(PATHS)


def make_inputs(root: Path) -> Path:
    """A store of labelled images, embeddings, three SAEs of one shape, labels and a taxonomy in files."""
    generator = torch.Generator().manual_seed(0)
    kind_N = torch.arange(N) % 3
    centers = 3 * torch.randn(3, D, generator=generator)
    x_ND = centers[kind_N] + torch.randn(N, D, generator=generator)
    ids = [f"{CLASSES[kind]}/{i}.jpg" for i, kind in enumerate(kind_N)]
    items = {"image": ids, "token": [0] * N, "label": [CLASSES[kind] for kind in kind_N]}
    with ActivationWriter(root / "store", D, torch.float32, {"layer": 3, "point": "residual"}, 100) as writer:
        writer.append(x_ND, items)
    np.save(root / "emb.npy", (centers[kind_N] + 2 * torch.randn(N, D, generator=generator)).numpy())
    for seed in range(3):
        sae = SparseAutoencoder(SAEConfig(D, 16, 2, "matryoshka", (4, 12), {"seed": seed}))
        sae.reset_parameters(seed)
        with torch.no_grad():
            rows = centers / centers.norm(dim=1, keepdim=True)
            sae.W_dec[:3] = rows + 0.01 * seed
            sae.W_enc[:, :3] = rows.T
            sae.threshold.fill_(1.5)
        sae.save_pretrained(root / f"sae{seed}")
    with open(root / "labels.csv", "w", newline="") as file:
        lines = [[identity, identity.split("/")[0], i % 2] for i, identity in enumerate(ids)]
        csv.writer(file).writerows([["image", "kind", "parity"], *lines, [ids[0], "pet", ""], ["none.jpg", "x", "y"]])
    (root / "paths.json").write_text(json.dumps(PATHS))
    return root


def words(there, output, *more, saes=1):
    """A call of the command."""
    given = ("--sae", ",".join(str(there / f"sae{seed}") for seed in range(saes)))
    return ("evaluate", *given, "--activations", there / "store", "--output", output, "--device", "cpu", *more)
