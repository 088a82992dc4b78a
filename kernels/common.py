"""What several ops share: typed custom ops, checks of arguments, the layout of sparse codes, sizes, scratch memory.

Imports nothing of kernels/ and registers no op.
"""

import functools
import math
import sys
import threading
from collections.abc import Callable
from typing import Any, Generic, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch._library.autograd import make_autograd_impl
from torch.autograd import forward_ad

from saevlm_fast.runtime import exactly, without_autocast

GROUP = 64  # contiguous latents with one maximum: the encoders look only into groups that can hold a winner
MAX_K = 1024  # of TopK on a GPU
TINY = 2.0**-40  # added to norms on a GPU: more than underflow and flushing to zero take from them
SIMILARITIES = ("cosine", "dot", "rbf")

P = ParamSpec("P")
R = TypeVar("R")

# --- custom ops ------------------------------------------------------------------------------------------------------


class Op(Generic[P, R]):
    """A torch.library.custom_op "saevlm_fast::name", with the types of its function.

    torch's own wraps every kernel so that Dynamo is imported at its first call, which takes a process a second.
    Kernels are therefore registered here, and shielded from Dynamo once somebody else has imported it.
    torch.autocast, which people set for a language model, changes neither the values of an op nor its gradients; nor
    does torch.set_float32_matmul_precision on a CPU.
    """

    def __init__(self, name: str, cuda_kernel: Callable[P, R], mutates_args: tuple[str, ...]) -> None:
        self._name = f"saevlm_fast::{name}"
        self._op: Any = torch.library.custom_op(self._name, cuda_kernel, mutates_args=mutates_args, device_types=())
        self.overload: Any = getattr(torch.ops.saevlm_fast, name).default
        self.register_kernel("cuda")(cuda_kernel)
        self._op._lib.impl(name, without_autocast()(self.overload), "AutocastCUDA")
        differentiated = _unseen_by_dynamo(self._with_no_tangents(make_autograd_impl(self.overload, self._op)))
        for device in ("CPU", "CUDA", "Meta"):  # each before "Autograd", which torch has registered
            self._op._lib.impl(name, differentiated, f"Autograd{device}", with_keyset=True)
        if not mutates_args:
            self.register_vmap(self._part_by_part)

    def __repr__(self) -> str:
        return f"<Op {self._name}>"

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """NotImplementedError: a derivative by torch.func, whose own refusal names nothing that a user could do."""
        transformed = not torch.compiler.is_compiling() and _in_torch_func()
        if transformed and torch._C._any_requires_grad(*args, *kwargs.values()):
            raise NotImplementedError(f"{self._name} has no derivative by torch.func (grad, vjp, jacrev); {_INSTEAD}")
        return self.overload(*args, **kwargs)

    def _with_no_tangents(self, differentiated: Callable[..., R]) -> Callable[..., R]:
        """NotImplementedError: a derivative forwards, which torch would lose below autograd, and call 0.

        Asked by the dispatcher, so that of graphs and of transforms within transforms too.
        """

        def call(keyset: Any, *args: Any, **kwargs: Any) -> R:
            if forward_ad._current_level >= 0 and any(map(_has_tangent, (*args, *kwargs.values()))):
                kind = "forward-mode derivative (jvp, jacfwd, dual tensors)"
                raise NotImplementedError(f"{self._name} has no {kind}; {_INSTEAD}")
            return differentiated(keyset, *args, **kwargs)

        return call

    def register_kernel(self, device: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
        """Decorates what runs for tensors of this kind of device."""

        def register(kernel: Callable[P, R]) -> Callable[P, R]:
            # In the library of the definition: defined anew, as by a reload, the op loses its old kernels with it.
            run = exactly(kernel) if device == "cpu" else kernel  # those of a GPU multiply in Triton or float64
            torch.library.impl(self._name, device, _unseen_by_dynamo(run), lib=self._op._lib)
            return kernel

        return register

    def register_fake(self, fake: Callable[P, R]) -> Callable[P, R]:
        """Decorates what says the shapes of the results."""
        self._op.register_fake(fake)
        return fake

    def register_autograd(self, backward: Callable[..., Any], *, setup_context: Callable[..., None]) -> None:
        """As torch.library.register_autograd."""
        self._op.register_autograd(exactly(backward), setup_context=setup_context)

    def register_vmap(self, rule: Callable[..., Any]) -> None:
        """As torch.library.register_vmap, in place of `_part_by_part`."""
        self._op.register_vmap(rule)

    def _part_by_part(self, info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        """torch.vmap, as torch's own does it, whose warning of that hides an error that is raised within."""
        parts = [
            self.overload(*(arg if dim is None else arg.select(dim, i) for arg, dim in zip(args, in_dims)))
            for i in range(info.batch_size)
        ]
        if isinstance(parts[0], Tensor):
            return torch.stack(parts), 0
        return tuple(torch.stack(each) for each in zip(*parts)), (0,) * len(parts[0])


def custom_op(name: str, mutates_args: tuple[str, ...] = ()) -> Callable[[Callable[P, R]], Op[P, R]]:
    """Decorates the function of an op for CUDA tensors."""
    return lambda cuda_kernel: Op(name, cuda_kernel, mutates_args)


def _unseen_by_dynamo(kernel: Callable[P, R]) -> Callable[P, R]:
    """The kernel, which Dynamo does not trace when an op is called between the graphs of a compiled function."""
    disabled: Any = functools.cache(torch.compiler.disable)

    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        run = disabled(kernel) if "torch._dynamo" in sys.modules else kernel
        return run(*args, **kwargs)

    return call


_INSTEAD = "torch.autograd.grad and torch.autograd.functional.jacobian go through it"


def _in_torch_func() -> bool:
    """Whether the innermost transform is one of derivatives, with gradients on."""
    functorch: Any = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]
    innermost = functorch.peek_interpreter_stack()
    return innermost is not None and innermost.key() == functorch.TransformType.Grad and torch.is_grad_enabled()


def _has_tangent(argument: object) -> bool:
    return isinstance(argument, Tensor) and forward_ad.unpack_dual(argument).tangent is not None


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


def sums_at(places_M: Tensor, values_M: Tensor, n: int) -> Tensor:
    """[n]: at each of n places the sum of the values_M (float32 or float64) that places_M (int64) puts there.

    torch.bincount with weights waits for a GPU, and is refused there by torch.use_deterministic_algorithms.
    """
    check(len(places_M) == len(values_M), f"places: {len(places_M)} of them, {len(values_M)} values")
    return values_M.new_zeros(n).scatter_add_(0, places_M, values_M)


# --- sizes of launches -----------------------------------------------------------------------------------------------


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up, for the host: triton.cdiv looks for constexprs at every call, which takes microseconds."""
    return -(-a // b)


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


def zeros_of(device: torch.device | str, *shapes: tuple[int, ...]) -> list[Tensor]:
    """Float64 zeros of these shapes by one fill; each begins at a multiple of 64 bytes."""
    sizes = [math.prod(shape) for shape in shapes]
    padded = [size + -size % 8 for size in sizes]
    parts = torch.zeros(sum(padded), dtype=torch.float64, device=device).split(padded)
    return [part[:size].view(shape) for part, size, shape in zip(parts, sizes, shapes)]


def on_gpu(t: Tensor) -> bool:
    """Whether Triton's kernels take it; a test without a GPU says yes, and they run in the interpreter."""
    return t.is_cuda


# --- a decoder that stays near its beginning ------------------------------------------------------------------------


class Cone(NamedTuple):
    """Where a soft-frozen decoder's unit rows may be: at a cosine of at least `cosine` with the unit rows_SD."""

    rows_SD: Tensor
    cosine: float

    @property
    def rounding(self) -> float:
        """Up to which w_perp may be as much along w0 as across it: the edge made of it would be no unit row."""
        return torch.finfo(self.rows_SD.dtype).eps ** 0.5

    def hold_(self, W_SD: Tensor, start: int = 0) -> None:
        """Moves rows start .. of unit rows, in place, to the nearest that are inside; the others keep their bits.

        w -> tau w0 + sqrt(1 - tau^2) w_perp / |w_perp| with w_perp = w - (w . w0) w0. A row opposite to its first one
        (|w_perp| at most `rounding`), which has no nearest, becomes that. A GPU is asked nothing.
        """
        w0_SD = self.rows_SD[start : start + len(W_SD)]
        cosine_S1 = (W_SD * w0_SD).sum(1, keepdim=True)
        if W_SD.is_cuda:
            W_SD.copy_(torch.where(cosine_S1 < self.cosine, self._edge(W_SD, w0_SD, cosine_S1), W_SD))
            return
        outside = (cosine_S1 < self.cosine).squeeze(1).nonzero().squeeze(1)
        if len(outside):
            W_SD.index_copy_(0, outside, self._edge(W_SD[outside], w0_SD[outside], cosine_S1[outside]))

    def _edge(self, W_SD: Tensor, w0_SD: Tensor, cosine_S1: Tensor) -> Tensor:
        across_SD = W_SD - cosine_S1 * w0_SD
        length_S1 = torch.linalg.vector_norm(across_SD, dim=1, keepdim=True)
        edge_SD = self.cosine * w0_SD + math.sqrt(1 - self.cosine**2) * across_SD / length_S1
        return torch.where(length_S1 <= self.rounding, w0_SD, edge_SD)
