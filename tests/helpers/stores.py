"""Small stores and matrix files to read."""

import numpy as np
import torch
from safetensors.torch import save_file

from saevlm_fast.data.writing import ActivationWriter

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
SOURCE = {"model": "hf:openai/clip", "layer": 11, "point": "residual", "tokens": "cls"}


def rows_of(n, d=5, dtype=torch.float32, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)).to(dtype)


def items_of(start, stop):
    return {
        "image": [f"cat/{i}.jpg" for i in range(start, stop)],
        "token": list(range(start, stop)),
        "label": [None if i % 3 == 0 else f"class {i % 3}" for i in range(start, stop)],
    }


def write_store(path, x, rows_per_shard=10, batch=7, **options):
    with ActivationWriter(path, x.shape[1], x.dtype, SOURCE, rows_per_shard, **options) as writer:
        for start in range(0, len(x), batch):
            writer.append(x[start : start + batch], items_of(start, min(start + batch, len(x))))
    return path


def gathered(activations):
    return torch.cat([x for _, x in activations.chunks(4)])


def save_matrix(path, x):
    if path.suffix == ".npy":
        np.save(path, x.numpy())
    elif path.suffix == ".pt":
        torch.save(x, path)
    else:
        save_file({"x": x, "bias": torch.zeros(3)}, path)
    return path
