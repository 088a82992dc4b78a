"""What several ops share: typed custom ops, checks of arguments, the layout of sparse codes, sizes, scratch memory.

Imports nothing of kernels/ and registers no op.
"""

import threading
from collections.abc import Callable
from typing import Any, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor

GROUP = 64  # contiguous latents with one maximum: the encoders look only into groups that can hold a winner
MAX_K = 1024  # of TopK on a GPU
TINY = 2.0**-40  # added to norms on a GPU: more than underflow and flushing to zero take from them
SIMILARITIES = ("cosine", "dot", "rbf")

P = ParamSpec("P")
R_co = TypeVar("R_co", covariant=True)
R = TypeVar("R")

# --- custom ops ------------------------------------------------------------------------------------------------------


class Op(Protocol[P, R_co]):
    """A torch.library.CustomOpDef with the types of its function; its CPU path and its fake must have the same."""

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R_co: ...

    def register_kernel(self, device: str, /) -> Callable[[Callable[P, R]], Callable[P, R]]: ...

    def register_fake(self, fake: Callable[P, R], /) -> Callable[P, R]: ...

    def register_autograd(self, backward: Callable[..., Any], /, *, setup_context: Callable[..., None]) -> None: ...


def custom_op(name: str, mutates_args: tuple[str, ...] = ()) -> Callable[[Callable[P, R]], Op[P, R]]:
    """torch.library.custom_op("saevlm_fast::name") of a function for CUDA tensors, typed: torch's own returns `Any`."""
    decorator: Any = torch.library.custom_op(f"saevlm_fast::{name}", mutates_args=mutates_args, device_types="cuda")
    return decorator


# --- checks ----------------------------------------------------------------------------------------------------------


def check(condition: bool, message: str) -> None:
    """ValueError with this message unless the condition holds."""
    if not condition:
        raise ValueError(message)


def check_same_kind(**tensors: Tensor) -> None:
    """ValueError unless all are on one device and share one floating dtype; names the first that differs."""
    first_name, first = next(iter(tensors.items()))
    for name, tensor in tensors.items():
        check(tensor.is_floating_point(), f"{name}: dtype {tensor.dtype} is not a floating type")
        check(tensor.dtype == first.dtype, f"{name}: dtype {tensor.dtype} differs from {first_name}'s {first.dtype}")
        check(tensor.device == first.device, f"{name}: on {tensor.device}, {first_name} on {first.device}")


def check_indices(**tensors: Tensor) -> None:
    """ValueError unless all are int64."""
    for name, tensor in tensors.items():
        check(tensor.dtype == torch.int64, f"{name}: dtype {tensor.dtype}, must be torch.int64")


def check_codes(latents: Tensor, row_offsets: Tensor | None) -> None:
    """ValueError unless laid out as sparse codes are (kernels/reference.py): [B, K] alone, or [M] with [B + 1]."""
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
    known = isinstance(similarity, str) and similarity in SIMILARITIES
    check(known, f"similarity: {' '.join(repr(similarity).split()):.60} is not one of {', '.join(SIMILARITIES)}")


# --- sparse codes ----------------------------------------------------------------------------------------------------


def n_code_rows(latents: Tensor, row_offsets: Tensor | None) -> int:
    """B of sparse codes in either layout."""
    return latents.shape[0] if row_offsets is None else row_offsets.shape[0] - 1


def fixed_row_offsets(latents_BK: Tensor) -> Tensor:
    """[B + 1] row offsets of fixed-k codes."""
    n_rows, k = latents_BK.shape
    return torch.arange(n_rows + 1, device=latents_BK.device) * k


# --- scratch memory --------------------------------------------------------------------------------------------------


class Workspace(threading.local):
    """One grow-only buffer a thread, on the CPU: a first touch of fresh memory costs ten times the write."""

    def __init__(self) -> None:
        self.bytes = torch.empty(0, dtype=torch.uint8)

    def get(self, numel: int, dtype: torch.dtype) -> Tensor:
        """[numel] of this dtype, uninitialised; the next call of this thread hands out the same memory."""
        n_bytes = numel * dtype.itemsize
        if self.bytes.numel() < n_bytes:
            with torch.inference_mode(False):  # an inference tensor could not be written outside inference mode later
                self.bytes = torch.empty(n_bytes, dtype=torch.uint8)
        return self.bytes[:n_bytes].view(dtype)
