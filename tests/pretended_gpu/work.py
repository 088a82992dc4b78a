"""The pretended devices: what launches read and write, what is in order with what, captured graphs, pinned memory.

A launch is done at once. What a GPU would have been free to do otherwise is found by clocks (Lamport, 1978): every
stream knows up to which launch of every other one it has waited, and so does the host. Of two launches that touch the
same bytes, and one writes, the later must have waited for the earlier, or a RaceError names them.
"""

import ctypes
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

POISON = 0xAB  # in memory that holds nothing yet
Clock = dict[int, int]  # of a stream: launches that are known to be over


class RaceError(AssertionError):
    """Nothing says which of two launches comes first, or the host does not wait for a copy."""


class Access(NamedTuple):
    """What a launch touches, from its first byte to behind its last: a column reaches over its neighbours."""

    begin: int
    end: int
    writes: bool

    def __str__(self) -> str:
        return f"{'writes' if self.writes else 'reads'} {self.begin:#x} to {self.end:#x}"

    def conflicts(self, other: "Access") -> bool:
        return (self.writes or other.writes) and self.begin < other.end and other.begin < self.end


class Copy(NamedTuple):
    """Between the device and pinned memory, on its way: until the stream's launch of this number is over.

    It holds the pinned tensor: torch's allocator gives that memory to nobody meanwhile, either.
    """

    stream: int
    number: int
    pinned: Tensor
    value: Tensor  # what comes to the pinned memory, or what must stay there meanwhile


@dataclass
class Graph:
    """What a torch.cuda.CUDAGraph has captured."""

    stream: int
    runs: list[Callable[[], Any]] = field(default_factory=list)
    accesses: dict[Access, None] = field(default_factory=dict)
    before: list[tuple[int, Tensor]] = field(default_factory=list)  # bytes that capturing has changed, by address
    made: list[tuple[int, int]] = field(default_factory=list)
    last: Clock = field(default_factory=dict)  # of the streams that have joined, their last launch


class Device:
    """faults: what was found, for those who would take an error of it for something else."""

    def __init__(self) -> None:
        self.faults: list[RaceError] = []
        self._lock = threading.RLock()
        self._streams: dict[int, Clock] = {}
        self._host: Clock = {}  # one for all threads: what hands work between them is taken to wait
        self._events: dict[int, Clock] = {}
        self._queries: dict[int, int] = {}
        self._asked: dict[int, int] = {}  # of a stream, its last launch when Stream.query was asked
        self._open: dict[int, dict[Access, tuple[int, str]]] = {}  # of a stream, unknown to the host
        self._coming: list[Copy] = []
        self._lent: list[Copy] = []
        self._device_of: dict[int, int] = {}  # of a stream
        self._graphs: dict[int, Graph] = {}  # by the number of a capture, while it goes on
        self._capture_of = ctypes.CDLL(None).pretended_capture
        self._capture_of.argtypes, self._capture_of.restype = [ctypes.c_void_p], ctypes.c_ulonglong

    # --- launches ----------------------------------------------------------------------------------------------------

    def launch(self, name: str, accesses: list[Access], run: Callable[[], Any], made: list[Tensor]) -> Any:
        """Does it in its stream's order, and keeps it if that captures. made: where `run` puts the tensors it makes."""
        with self._lock:
            self._next(name, accesses)
            graph = self._capturing()
            if graph is not None:
                graph.before += [(a.begin, bytes_at(a.begin, a.end).clone()) for a in accesses if a.writes]
            result = run()
            results = [Access(*extent(t), True) for t in made if t.numel()]
            self._touch(name, results)
            if graph is not None:
                graph.made += [(access.begin, access.end) for access in results]
                self._capture(graph, run, [*accesses, *results])
            return result

    def launch_kernel(self, name: str, arguments: list[Tensor], run: Callable[[], list[Access]]) -> None:
        """As launch; `run` tells what it has touched of its arguments."""
        with self._lock:
            graph = self._capturing()
            spans = {extent(t) for t in arguments if t.numel()} if graph else set()
            before = [(begin, bytes_at(begin, end).clone()) for begin, end in spans]
            accesses = run()
            self._next(name, accesses)
            if graph is not None:
                graph.before += before
                self._capture(graph, run, accesses)

    def _capture(self, graph: Graph, run: Callable[[], Any], accesses: list[Access]) -> None:
        stream = current_stream()
        graph.runs.append(run)
        graph.accesses |= dict.fromkeys(accesses)
        graph.last[stream] = self._streams[stream][stream]

    def _next(self, name: str, accesses: Iterable[Access]) -> None:
        """The next launch of the current stream."""
        stream = current_stream()
        clock = self._clock(stream)
        clock[stream] = clock.get(stream, 0) + 1
        self._device_of[stream] = torch.cuda.current_device()
        self._touch(name, accesses)

    def _touch(self, name: str, accesses: Iterable[Access]) -> None:
        """By the last launch. RaceError: one of another stream that this one has not waited for touches the same."""
        stream = current_stream()
        clock = self._streams[stream]
        for other in self._open.keys() - {stream}:
            known = clock.get(other, 0)
            for earlier, (number, other_name) in self._open[other].items():
                for access in accesses if number > known else ():
                    if access.conflicts(earlier):
                        self._fail(
                            f"{name} on stream {stream:#x} {access}, and nothing says whether before or after"
                            f" {other_name} on stream {other:#x}, which {earlier}"
                        )
        self._open.setdefault(stream, {}).update(dict.fromkeys(accesses, (clock[stream], name)))

    def _fail(self, message: str) -> None:
        self.faults.append(RaceError(message))
        raise self.faults[-1]

    def _clock(self, stream: int) -> Clock:
        """What the host knows comes first for all that it launches."""
        clock = self._streams.setdefault(stream, {})
        merge(clock, self._host)
        return clock

    # --- waiting -----------------------------------------------------------------------------------------------------

    def record(self, event: int, stream: int) -> None:
        with self._lock:
            self._events[event] = dict(self._clock(stream))
            self._queries[event] = 0

    def stream_waits(self, event: int, stream: int) -> None:
        with self._lock:
            merge(self._clock(stream), self._events.get(event, {}))

    def host_waits(self, event: int) -> None:
        with self._lock:
            self._host_knows(self._events.get(event, {}))

    def host_waits_for_stream(self, stream: int | None = None) -> None:
        """The current one, if none is named."""
        with self._lock:
            self._host_knows(self._clock(current_stream() if stream is None else stream))

    def host_waits_for_all(self, number: int | None = None) -> None:
        """All streams of a device, if one is named."""
        self.must_not_capture("a wait for the device")
        with self._lock:
            for stream, clock in list(self._streams.items()):
                if number in (None, self._device_of.get(stream)):
                    self._host_knows(clock)

    def is_over(self, event: int) -> bool:
        """Not yet, when it is asked for the first time."""
        with self._lock:
            clock = self._events.get(event, {})
            self._queries[event] = self._queries.get(event, 0) + 1
            if self._queries[event] > 1:
                self._host_knows(clock)
            return all(number <= self._host.get(stream, 0) for stream, number in clock.items())

    def stream_is_over(self, stream: int) -> bool:
        """Not yet, when it is asked for the first time since its last launch."""
        with self._lock:
            clock = self._clock(stream)
            last = clock.get(stream, 0)
            if self._asked.get(stream) == last:
                self._host_knows(clock)
            self._asked[stream] = last
            return last <= self._host.get(stream, 0)

    def _host_knows(self, clock: Clock) -> None:
        merge(self._host, clock)
        for stream, launches in self._open.items():
            over = self._host.get(stream, 0)
            self._open[stream] = {access: launch for access, launch in launches.items() if launch[0] > over}
        coming, self._coming = self._split(self._coming)
        lent, self._lent = self._split(self._lent)
        for copy in coming:
            copy.pinned.copy_(copy.value)
        for copy in lent:
            if not torch.equal(raw(copy.pinned), copy.value):
                self._fail(f"pinned memory [{len(copy.value)} bytes] was written before its copy was over")

    def _split(self, copies: list[Copy]) -> tuple[list[Copy], list[Copy]]:
        """Those that are over, and the others."""
        over = [copy for copy in copies if copy.number <= self._host.get(copy.stream, 0)]
        return over, [copy for copy in copies if copy.number > self._host.get(copy.stream, 0)]

    # --- pinned memory -----------------------------------------------------------------------------------------------

    def comes_to(self, pinned: Tensor, value: Tensor) -> None:
        """The host reads poison there until it has waited for the launch before this call."""
        stream = current_stream()
        pinned.detach().copy_(torch.full((pinned.element_size(),), POISON, dtype=torch.uint8).view(pinned.dtype))
        self._coming.append(Copy(stream, self._streams[stream][stream], pinned.detach(), value))

    def is_lent(self, pinned: Tensor) -> None:
        """The host writes nothing there until it has waited for the launch before this call."""
        stream = current_stream()
        self._lent.append(Copy(stream, self._streams[stream][stream], pinned.detach(), raw(pinned)))

    # --- graphs ------------------------------------------------------------------------------------------------------

    def _capturing(self) -> Graph | None:
        return self._graphs.get(self._number_of_capture(current_stream()))

    def _number_of_capture(self, stream: int) -> int:
        return int(self._capture_of(stream)) if stream > 0 else 0  # a default stream captures nothing

    def must_not_capture(self, what: str) -> None:
        """RuntimeError while the current stream captures, as CUDA raises."""
        if self._capturing() is not None:
            raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing: {what}")

    def begin_capture(self) -> Graph:
        stream = current_stream()
        graph = self._graphs[self._number_of_capture(stream)] = Graph(stream)
        return graph

    def end_capture(self, graph: Graph) -> None:
        """RaceError: a stream that has joined is not waited for. Capturing computes nothing: what it did is undone."""
        with self._lock:
            self._graphs = {number: each for number, each in self._graphs.items() if each is not graph}
            for begin, value in reversed(graph.before):
                bytes_at(begin, begin + len(value)).copy_(value)
            for begin, end in graph.made:
                if begin < end:
                    bytes_at(begin, end).fill_(POISON)
            graph.before = []
            waited = dict(self._clock(graph.stream))
            self._host_knows(graph.last)  # that were no launches
            for stream, number in graph.last.items():
                if number > waited.get(stream, 0):
                    self._fail(f"a graph is captured, and does not wait for what stream {stream:#x} launches in it")

    def replay(self, graph: Graph) -> None:
        with self._lock:
            self._next("a graph", graph.accesses)
            for run in graph.runs:
                touched = run()
                if isinstance(touched, list) and touched and isinstance(touched[0], Access):
                    self._touch("a graph", touched)  # masks may let more through than in the capture


def current_stream() -> int:
    return key_of(torch.cuda.current_stream())


def key_of(stream: torch.cuda.Stream) -> int:
    """Its address; of a device's default stream, which has none, the device's number below 0."""
    return int(stream.cuda_stream or -stream.device.index)


def merge(clock: Clock, other: Clock) -> None:
    for stream, number in other.items():
        clock[stream] = max(number, clock.get(stream, 0))


def extent(t: Tensor) -> tuple[int, int]:
    """The addresses of a tensor's first byte and behind its last; 0, 0 of an empty one."""
    if t.numel() == 0:
        return 0, 0
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride()))
    return t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()


def raw(t: Tensor) -> Tensor:
    """A copy of its elements' bytes [n], those between them left out."""
    return t.detach().clone(memory_format=torch.contiguous_format).flatten().view(torch.uint8)


def bytes_at(begin: int, end: int) -> Tensor:
    return torch.frombuffer((ctypes.c_char * (end - begin)).from_address(begin), dtype=torch.uint8)


def as_host(t: Tensor) -> Tensor:
    """A tensor of the device as one of the CPU, in the same memory."""
    if not t.is_cuda:
        return t
    if t.numel() == 0:
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype)
    return bytes_at(*extent(t)).view(t.dtype).as_strided(t.shape, t.stride())
