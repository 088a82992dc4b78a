"""Codes that are known beforehand, in memory and in stores."""

from pathlib import Path

import torch
from torch import Tensor

from saevlm_fast.data.codes import CodesWriter, open_codes
from saevlm_fast.data.rows import Activations
from saevlm_fast.sparse_codes import SparseCodes

SOURCE = {"model": "planted", "sae": "planted"}


def in_memory(rows_ND: Tensor) -> Activations:
    return Activations.from_tensor(rows_ND)


def write_codes(path: Path, dense_NS: Tensor, shard_rows: int = 7):
    with CodesWriter(path, dense_NS.shape[1], torch.float32, SOURCE) as writer:
        for shard, start in enumerate(range(0, len(dense_NS), shard_rows)):
            part = dense_NS[start : start + shard_rows]
            latents = torch.arange(part.shape[1]).expand(part.shape)
            names = [f"image {start + i}" for i in range(len(part))]
            items = {"image": names, "token": [0] * len(part), "label": [None] * len(part)}
            codes = SparseCodes.from_flat(part, latents.contiguous(), None, part.shape[1])
            writer.write_shard(shard, codes, items)
    return open_codes(path)
