"""Exact float32 encoders on a GPU: a float16 tensor-core product screens with a bound, float32 dots decide.

    product      v = fp16(x~ w~ + b) in the row's units, and its maximum over every group of latents
    candidates   latents whose upper bound reaches L, the k-th largest lower bound of a group (or 0): a pool of entries
    dots         float32 dot products of the candidates: the values that decide and that are returned
    choice       the top k of every row, the B k largest of the batch, or all above a threshold
    redo         float32 FMA product for rows (TopK) or a batch without a usable bound; nothing to do as a rule

The bound, the rule for the size of groups and why the codes are exact: docs/kernels.md, section 1. Nothing asks the
host (threshold: the size of its result, once a chunk), so all of it can be captured in a CUDA graph.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .low_weights import LowWeights


class Centred(NamedTuple):
    """What the encoder makes of x beside the codes, for callers who need it too: memory to be written.

    x_BD: float32 [B, D] contiguous, x - b_dec. norm_B: float32 [B], |x - b_dec| + 2^-40.
    """

    x_BD: Tensor
    norm_B: Tensor

    @staticmethod
    def empty(n_rows: int, d_in: int, device: torch.device | str) -> "Centred":
        return Centred(*(torch.empty(size, dtype=torch.float32, device=device) for size in ((n_rows, d_in), (n_rows,))))


def group_size(d_sae: int, k: int) -> int | None:
    """Latents a group: 64 where there are at least 2 k such groups, else 16 likewise, else None: the plain path.

    With fewer the k-th best group maximum says little of the k-th best value, and candidates are many. Also None for
    k above MAX_K.
    """
    raise NotImplementedError


def screens_cuda(x_BD: Tensor, W_enc_DS: Tensor, k: int) -> bool:
    """Whether the encoders below take these: float32 on a GPU, with a group_size. Otherwise topk_encode's ops do."""
    raise NotImplementedError


def topk_encode_screened_cuda(
    x_BD: Tensor,
    W_enc_DS: Tensor,
    b_enc_S: Tensor,
    b_dec_D: Tensor,
    k: int,
    buffer_bytes: int | None = None,
    low: LowWeights | None = None,
    centred: Centred | None = None,
) -> tuple[Tensor, Tensor]:
    """topk_encode: (acts [B, K], latents [B, K] int64). low: those of W_enc, if at hand; centred is written if given."""
    raise NotImplementedError


def batch_topk_encode_screened_cuda(
    x_BD: Tensor,
    W_enc_DS: Tensor,
    b_enc_S: Tensor,
    b_dec_D: Tensor,
    k: int,
    buffer_bytes: int | None = None,
    low: LowWeights | None = None,
    centred: Centred | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """batch_topk_encode: (acts [M], latents [M] int64, row_offsets [B + 1] int64), M = B k; else as above."""
    raise NotImplementedError


def threshold_encode_screened_cuda(
    x_BD: Tensor,
    W_enc_DS: Tensor,
    b_enc_S: Tensor,
    b_dec_D: Tensor,
    threshold: float,
    buffer_bytes: int | None = None,
    low: LowWeights | None = None,
    centred: Centred | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """threshold_encode; else as above."""
    raise NotImplementedError
