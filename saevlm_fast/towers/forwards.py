"""Forwards of single modules replaced for a while, and QuickGELU's by one that gives the same bits in a third.

OpenAI's CLIPs have x * sigmoid(1.702 x) in every block, which transformers and open_clip write as three operations on
the widest tensor of the model: a seventh of a half-precision forward on a GPU. A half-precision number has 65,536
values; the kernel is used where it gives the module's own result on every one of them, and nowhere else.
"""

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

_QUICK_GELUS = ("QuickGELUActivation", "QuickGELU")  # of transformers, of open_clip


def replace_forward(stack: ExitStack, module: nn.Module, forward: Callable[..., Any]) -> None:
    """Sets the instance's forward until the stack is left: hooks on the module stay, and the module itself."""
    stack.callback(_restore, module, vars(module).get("forward"))
    module.forward = forward


def _restore(module: nn.Module, forward: Any) -> None:
    """The forward that was set on the instance, if one was, else that of its class."""
    del module.forward
    if forward is not None:
        module.forward = forward


def fuse_quick_gelus(
    stack: ExitStack, model: nn.Module, device: torch.device, dtype: torch.dtype, kernel: Callable[[Tensor], Tensor]
) -> int:
    """The kernel in place of every QuickGELU that it equals in this half-precision dtype. Returns how many."""
    modules = [module for module in model.modules() if type(module).__name__ in _QUICK_GELUS]
    equal = {kind: _equal_everywhere(kind, device, dtype, kernel) for kind in {type(module) for module in modules}}
    fused = [module for module in modules if equal[type(module)]]
    for module in fused:
        replace_forward(stack, module, partial(_fused, module.forward, dtype, kernel))
    return len(fused)


def quick_gelu_kernel() -> Callable[[Tensor], Tensor] | None:
    """None where there is no Triton."""
    try:
        from saevlm_fast.kernels.quick_gelu_triton import launch_quick_gelu
    except ImportError:
        return None
    return launch_quick_gelu


def _equal_everywhere(
    kind: type[nn.Module], device: torch.device, dtype: torch.dtype, kernel: Callable[[Tensor], Tensor]
) -> bool:
    """Bit by bit, NaN for NaN, on all numbers of the dtype."""
    every = torch.arange(-(1 << 15), 1 << 15, device=device).to(torch.int16).view(dtype)
    with torch.inference_mode(), torch.autocast(device.type, enabled=False):
        expected, found = kind()(every), kernel(every)
    same = (found.view(torch.int16) == expected.view(torch.int16)) | (found.isnan() & expected.isnan())
    return bool(same.all())


def _fused(
    own: Callable[[Tensor], Tensor], dtype: torch.dtype, kernel: Callable[[Tensor], Tensor], x: Tensor
) -> Tensor:
    plain = x.dtype == dtype and x.is_contiguous() and not (x.requires_grad and torch.is_grad_enabled())
    return kernel(x) if plain else own(x)
