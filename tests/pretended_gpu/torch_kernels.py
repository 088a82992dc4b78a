"""torch's kernels for CUDA, done by those for the CPU in the same memory."""

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from pretended_gpu.work import Access, Device, as_host, extent
from torch import Tensor

# They make memory, or views of it, and launch nothing: torch's own.
NATIVE = frozenset(
    "empty.memory_format empty_strided as_strided view _reshape_alias unfold view_as_real view_as_complex resize_ set_"
    " set_.source_Storage set_.source_Storage_storage_offset set_.source_Tensor is_set_to record_stream".split()
)
# Their result's shape depends on numbers that the device holds, or is such a number: the host waits.
WAITING = frozenset(
    "equal nonzero masked_select bincount _unique2 unique_dim unique_consecutive repeat_interleave.Tensor".split()
)
# One function for all devices, which finds the device's loop itself: no kernel that could be replaced.
OF_ALL_DEVICES = frozenset("ldexp.Tensor".split())
INDEXING = frozenset("index.Tensor index.Tensor_out _index_put_impl_".split())  # by indices on either side, or masks


def replace_kernels(device: Device) -> torch.library.Library:
    """In effect while the result is kept."""
    library = torch.library.Library("aten", "IMPL")
    for name in torch._C._dispatch_get_all_op_names():
        namespace, _, own = name.partition("::")
        if namespace != "aten" or own in NATIVE:
            continue
        if own in OF_ALL_DEVICES or torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA"):
            packet, _, overload = own.partition(".")
            kernel = Kernel(device, own, getattr(getattr(torch.ops.aten, packet), overload or "default"))
            library.impl(own, kernel, "CUDA", allow_override=True)
    library.impl("_local_scalar_dense", partial(number, device), "CUDA", allow_override=True)
    library.impl("copy_", partial(copy, device), "CUDA")
    return library


class Kernel:
    """One overload."""

    def __init__(self, device: Device, name: str, overload: Any) -> None:
        self.device, self.name, self.overload = device, name, overload
        arguments = overload._schema.arguments
        self.arguments = [a.name for a in arguments]
        self.positional = [a.name for a in arguments if not a.kwarg_only]
        self.tensors = [a.name for a in arguments if a.type.kind() == "TensorType"]
        self.out = [a.name for a in arguments if a.is_out]
        self.written = [a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write]
        self.generators: dict[int, torch.Generator] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = dict(zip(self.arguments, args)) | kwargs
        with torch.cuda.device(self._device_of(given)):
            return self._launch(given)

    def _launch(self, given: dict[str, Any]) -> Any:
        waits = self._waits(given)
        if waits:
            self.device.must_not_capture(self.name)
        made: list[Tensor] = []
        accesses = [
            Access(*extent(t), name in self.written)
            for name, value in given.items()
            for t in tensors_of(value)
            if t.is_cuda and t.numel()
        ]
        result = self.device.launch(self.name, accesses, partial(self._run, given, made), made)
        if waits:
            self.device.host_waits_for_stream()
        return result

    @torch.no_grad()
    def _run(self, given: dict[str, Any], made: list[Tensor]) -> Any:
        """made: empty at first; in a replay the tensors that are computed anew."""
        host = {name: self._on_host(name, value) for name, value in given.items()}
        result = self._on_cpu(host)
        there = {id(h): g for name in self.written for h, g in pairs(host.get(name), given.get(name))}
        for h, g in [pair for name in self.out for pair in pairs(host.get(name), given.get(name))]:
            if g.shape != h.shape:
                g.resize_(h.shape)
            as_host(g).copy_(h)
        again = iter(made[:])
        return mapped(result, lambda t: there[id(t)] if id(t) in there else self._kept(t, made, next(again, None)))

    def _on_host(self, name: str, value: Any) -> Any:
        if name in self.out:  # the CPU's kernel gives it the shape
            return mapped(value, lambda t: torch.empty(0, dtype=t.dtype))
        if name == "generator":
            return self._generator(value)
        if name == "device":
            return torch.device("cpu")
        return mapped(value, as_host)

    def _on_cpu(self, host: dict[str, Any]) -> Any:
        """By the overload that torch finds where a number is in a tensor's place: its kind alone promotes types.

        Products that tensor cores add up in a wider type than their factors have are products of that type.
        """
        wider = host.pop("out_dtype", None)
        if wider is not None:
            host = {name: mapped(value, lambda t: t.to(wider)) for name, value in host.items()}
        ordered = [host[name] for name in self.positional if name in host]
        named = {name: value for name, value in host.items() if name not in self.positional}
        numbers = any(isinstance(host.get(name), (bool, int, float, complex)) for name in self.tensors)
        return (self.overload.overloadpacket if numbers or wider else self.overload)(*ordered, **named)

    def _kept(self, t: Tensor, made: list[Tensor], again: Tensor | None) -> Tensor:
        """On the device."""
        if again is None:
            again = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda")
            made.append(again)
        assert again.shape == t.shape, f"{self.name}: {tuple(t.shape)}, but {tuple(again.shape)} when it was captured"
        as_host(again).copy_(t)
        return again

    def _generator(self, of: torch.Generator | None) -> torch.Generator:
        """The CPU's, that stands for one of the device."""
        of = torch.cuda.default_generators[torch.cuda.current_device()] if of is None else of
        known = self.generators.get(id(of))
        if known is None or known.initial_seed() != of.initial_seed():
            known = self.generators[id(of)] = torch.Generator().manual_seed(of.initial_seed())
        return known

    def _waits(self, given: dict[str, Any]) -> bool:
        if self.name not in INDEXING:
            return self.name in WAITING and given.get("output_size") is None
        return any(t.dtype in (torch.bool, torch.uint8) or not t.is_cuda for t in tensors_of(given["indices"]))

    def _device_of(self, given: dict[str, Any]) -> torch.device | None:
        """The device that all are on, or that was named; None: the current one.

        RuntimeError: a tensor of another device or the host beside them, which is no single number of the host.
        """
        all_of = [(name, t) for name, value in given.items() for t in tensors_of(value)]
        on = next((t.device for _, t in all_of if t.is_cuda), None)
        for name, t in all_of:
            elsewhere = t.device != on if t.is_cuda else t.ndim and not (self.name in INDEXING and name == "indices")
            if elsewhere:
                raise RuntimeError(f"{self.name}: {name} {list(t.shape)} is on {t.device}, others on {on}")
        named = given.get("device")
        return on if on is not None or named is None or named.type != "cuda" else named


def number(device: Device, t: Tensor) -> Any:
    """t.item()"""
    with torch.cuda.device(t.device):
        device.must_not_capture("_local_scalar_dense")
        found = device.launch("_local_scalar_dense", [Access(*extent(t), False)], lambda: as_host(t).item(), [])
        device.host_waits_for_stream()
    return found


def copy(device: Device, to: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """to.copy_(source), of which one is on a device, or both. The host waits, unless that is pinned and need not.

    Between two devices the source's does it, as torch has it: after what the other one's stream has to do, and before
    what comes there.
    """
    on = source.device if source.is_cuda else to.device
    between = to.is_cuda and to.device != on
    streams = [torch.cuda.current_stream(each) for each in (to.device, on)] if between else []
    with torch.cuda.device(on):
        if between:
            streams[1].wait_stream(streams[0])
        copy_on_one(device, to, source, non_blocking)
        if between:
            streams[0].wait_stream(streams[1])
    return to


def copy_on_one(device: Device, to: Tensor, source: Tensor, non_blocking: bool) -> None:
    """By the current one."""

    @torch.no_grad()
    def run() -> None:
        as_host(to).copy_(as_host(source))
        if later and host is source:
            device.is_lent(source)

    def arrive() -> None:
        device.comes_to(to, as_host(source).to(to.dtype, copy=True).expand(to.shape))

    host = next((t for t in (to, source) if not t.is_cuda), None)
    later = host is not None and non_blocking and host.is_pinned()
    if host is not None and not later:
        device.must_not_capture("a copy that the host waits for")
    accesses = [Access(*extent(t), t is to) for t in (to, source) if t.is_cuda and t.numel()]
    device.launch("copy_", accesses, arrive if later and host is to else run, [])
    if host is not None and not later and not (host is source and non_blocking):
        device.host_waits_for_stream()


def tensors_of(value: Any) -> Iterator[Tensor]:
    """Those in an argument."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        yield from itertools.chain.from_iterable(map(tensors_of, value))


def pairs(host: Any, given: Any) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(tensors_of(host), tensors_of(given))


def mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """An argument or a result, of which every tensor is another."""
    if isinstance(value, Tensor):
        return change(value)
    return type(value)(mapped(each, change) for each in value) if isinstance(value, (list, tuple)) else value
