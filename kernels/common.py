"""What several ops share: checks of their arguments, the layout of sparse codes, sizes, scratch memory.

Imports nothing of kernels/ and registers no op.
"""

import threading

import torch
from torch import Tensor

GROUP = 64  # contiguous latents with one maximum: the encoders look only into groups that can hold a winner
MAX_K = 128 if torch.version.hip is None else 64  # on a GPU: k * 64 candidates in one program, more would spill
SIMILARITIES = ("cosine", "dot", "rbf")

# --- checks ----------------------------------------------------------------------------------------------------------


def check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def check_same_kind(**tensors: Tensor) -> None:
    """Every named floating tensor shares one floating dtype, and all tensors one device."""
    first_name, first = next(iter(tensors.items()))
    for name, tensor in tensors.items():
        check(tensor.is_floating_point(), f"{name}: dtype {tensor.dtype} is not a floating type")
        check(tensor.dtype == first.dtype, f"{name}: dtype {tensor.dtype} differs from {first_name}'s {first.dtype}")
        check(tensor.device == first.device, f"{name}: on {tensor.device}, {first_name} on {first.device}")


def check_indices(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        check(tensor.dtype == torch.int64, f"{name}: dtype {tensor.dtype}, must be torch.int64")


def check_codes(latents: Tensor, row_offsets: Tensor | None) -> None:
    """Layout of sparse codes (kernels/reference.py): [B, K] alone, or [M] with row_offsets [B + 1]."""
    check_indices(latents=latents)
    shape = tuple(latents.shape)
    if row_offsets is None:
        check(latents.ndim == 2, f"latents: shape {shape}, must be [B, K] when row_offsets is None")
    else:
        check(latents.ndim == 1, f"latents: shape {shape}, must be [M] when row_offsets is given")
        check_indices(row_offsets=row_offsets)
        offsets_shape = tuple(row_offsets.shape)
        check(len(offsets_shape) == 1 and offsets_shape[0] > 0, f"row_offsets: shape {offsets_shape}, must be [B + 1]")


def check_similarity(similarity: str) -> None:
    """ValueError unless the similarity is one of SIMILARITIES."""
    if similarity not in SIMILARITIES:
        raise ValueError(f"similarity: {similarity!r} is not one of {', '.join(SIMILARITIES)}")


# --- sparse codes ----------------------------------------------------------------------------------------------------


def fixed_row_offsets(latents_BK: Tensor) -> Tensor:
    """[B + 1] row offsets of fixed-k codes."""
    n_rows, k = latents_BK.shape
    return torch.arange(n_rows + 1, device=latents_BK.device) * k


# --- scratch memory --------------------------------------------------------------------------------------------------


class Workspace(threading.local):
    """One grow-only buffer a thread."""

    def __init__(self) -> None:
        self.bytes = torch.empty(0, dtype=torch.uint8)

    def get(self, numel: int, dtype: torch.dtype) -> Tensor:
        n_bytes = numel * dtype.itemsize
        if self.bytes.numel() < n_bytes:
            with torch.inference_mode(False):  # an inference tensor could not be written outside inference mode later
                self.bytes = torch.empty(n_bytes, dtype=torch.uint8)
        return self.bytes[:n_bytes].view(dtype)
