"""Training steps in CUDA graphs: one launch where there were a hundred, the same bits.

    steps = CapturedSteps(stepper)
    for x_BD in batches:
        output = steps.step(x_BD)                           # or written into steps.input(len(x_BD)) before

A graph is of fixed shapes: so many rows, so long a list of dead latents, and of a relu or jumprelu SAE so many places
for entries, which the host asks between two graphs. The first steps of such shapes are taken
eagerly, which compiles kernels and lets libraries allocate; then one is captured and from there on replayed. Anything
that a replay would not see (weights replaced or written to from outside) makes a step eager again. On a CPU, where a
step asks the host on its way (Stepper.can_be_captured), and where a capture fails, every step is.

Shape suffixes: B rows of a batch, D d_in.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import is_dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from saevlm_fast.errors import doubt, first_line, require
from saevlm_fast.kernels.cpu_loops import when_compiling
from saevlm_fast.runtime import exactly
from saevlm_fast.training.step import StepOutput, Stepper

_EAGER_FIRST = 2  # steps of the same shapes before one is captured
_KEPT = 8  # graphs: their number of dead latents may go up and down
Shapes = tuple[int, int, int]  # rows, length of the list of dead latents, places for entries; -1: what asks for them
_ASKS = -1
R = TypeVar("R")


class _Captured(NamedTuple):
    """A graph, what it writes, and where the state was when it was captured."""

    graph: torch.cuda.CUDAGraph
    output: Any
    addresses: list[int]


class CapturedSteps:
    """Takes a Stepper's steps, by CUDA graphs where that can be.

    Args:
        stepper: whose steps. It may be asked anything between steps, and take steps of its own.
        capture: False takes every step eagerly.

    Attributes:
        n_eager, n_replayed: steps taken here so far, by kind; n_captured: graphs made.
    """

    def __init__(self, stepper: Stepper, capture: bool = True):
        self.stepper = stepper
        self.capture = capture and stepper.idle_S.is_cuda
        self.n_eager = self.n_replayed = self.n_captured = 0
        self._inputs: dict[int, Tensor] = {}
        self._embeddings: dict[int, Tensor] = {}
        self._seen: dict[Shapes, int] = {}
        self._graphs: OrderedDict[Shapes, _Captured] = OrderedDict()
        if self.capture:  # graphs take turns, and so share their memory
            self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(stepper.idle_S.device)

    def input(self, n_rows: int) -> Tensor | None:
        """Memory [n_rows, d_in] from which `step` takes a batch without copying it; None where it copies none."""
        if not self.capture:
            return None
        if n_rows not in self._inputs:
            weights = self.stepper.sae.W_dec
            self._inputs[n_rows] = weights.new_empty(n_rows, weights.shape[1], requires_grad=False)
        return self._inputs[n_rows]

    def metrics(self) -> dict[str, float]:
        """For the log, of a GPU: the share of the steps so far that were eager."""
        if not self.stepper.idle_S.is_cuda:
            return {}
        return {"details/eager_share": self.n_eager / max(self.n_eager + self.n_replayed, 1)}

    @torch.no_grad()
    @exactly
    def step(self, x_BD: Tensor, e_BE: Tensor | None = None) -> StepOutput:
        """One training step on a batch [B, d_in] in normalised units, as Stepper.step; all have embeddings, or none.

        Where steps are captured, the next one overwrites what is returned, and x_BD is left alone unless it is the
        memory of `input`, which stays as it is too.

        Raises:
            ValueError: a batch without rows, or of another width.
        """
        with torch.cuda.device_of(self.stepper.idle_S):
            return self._step(self._in_place(x_BD), self._held(e_BE))

    def _step(self, x_BD: Tensor, e_BE: Tensor | None) -> StepOutput:
        stepper, n_places = self.stepper, 0
        stepper.announce(len(x_BD))
        if not stepper.can_be_captured(x_BD):
            self.n_eager += 1
            return stepper.device_step(x_BD, e_BE)
        if stepper.penalised:
            stepper.asked, _ = self._run((len(x_BD), 0, _ASKS), lambda: stepper.asked_first(x_BD))
            n_places = stepper.answer()
        shapes = len(x_BD), stepper.n_listed, n_places
        output, replayed = self._run(shapes, lambda: stepper.device_step(x_BD, e_BE))
        if replayed:
            stepper.was_replayed()
        stepper.asked = None
        self.n_replayed += replayed
        self.n_eager += not replayed
        return output

    def _run(self, shapes: Shapes, call: Callable[[], R]) -> tuple[R, bool]:
        """What a call returns, eagerly or by a graph of such shapes, and whether it was replayed."""
        captured = self._captured(shapes, call)
        if captured is None:
            self._seen[shapes] = self._seen.get(shapes, 0) + 1
            return call(), False
        captured.graph.replay()
        return captured.output, True

    def _in_place(self, x_BD: Tensor) -> Tensor:
        """The batch where graphs read it."""
        static_BD = self.input(len(x_BD)) if len(x_BD) else None  # announce refuses no rows
        if static_BD is None or static_BD is x_BD:
            return x_BD
        fits = x_BD.shape == static_BD.shape
        require(fits, f"x_BD: shape is {list(x_BD.shape)}; {list(static_BD.shape)} is needed")
        return static_BD.copy_(x_BD)

    def _held(self, e_BE: Tensor | None) -> Tensor | None:
        """Embeddings where graphs read them, in the dtype of the weights."""
        if e_BE is None or not self.capture:
            return e_BE
        if len(e_BE) not in self._embeddings:
            self._embeddings[len(e_BE)] = e_BE.to(self.stepper.sae.W_dec.dtype, copy=True)
        return self._embeddings[len(e_BE)].copy_(e_BE)

    def _captured(self, shapes: Shapes, call: Callable[[], R]) -> _Captured | None:
        """The graph of a call of these shapes; None if it is to be eager."""
        if not self.capture or self._seen.get(shapes, 0) < _EAGER_FIRST or not self.stepper.low.is_current():
            return None
        captured = self._graphs.get(shapes)
        if captured is None or captured.addresses != self._addresses():
            captured = self._capture(call)
            if captured is None:
                return None
            self._graphs[shapes] = captured
        self._graphs.move_to_end(shapes)
        while len(self._graphs) > _KEPT:
            self._graphs.popitem(last=False)
        return captured

    def _addresses(self) -> list[int]:
        """Of all that a graph holds on to and somebody may replace."""
        stepper = self.stepper
        state = [*stepper.parameters().values(), *(t for pair in stepper.moments.values() for t in pair)]
        counters = stepper.idle_S, stepper.sae.threshold, stepper.bad_step, stepper.step_index, stepper.adam_schedule
        given = stepper.sparsity, stepper.group_ends_G, *(() if stepper.cone is None else stepper.cone[:1])
        return [
            t.data_ptr() for t in (*state, *counters, *given, *(stepper.low.weights or ()), *_tensors_in(stepper.asked))
        ]

    def _capture(self, call: Callable[[], R]) -> _Captured | None:
        """A call, recorded and not made. None, and no further attempt: it cannot be.

        Only what this thread does is recorded: others read and copy the next batches meanwhile.
        """
        graph, addresses = torch.cuda.CUDAGraph(), self._addresses()
        try:
            with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                output = call()
        except RuntimeError as error:
            self.capture = False
            self._graphs.clear()
            doubt(f"steps are not captured in a CUDA graph: {first_line(error)}", UserWarning)
            return None
        self.n_captured += 1
        return _Captured(graph, output, addresses)


def _tensors_in(of: object) -> Iterator[Tensor]:
    """All of a tuple or a dataclass, and of those inside it."""
    if isinstance(of, Tensor):
        yield of
    elif isinstance(of, tuple) or is_dataclass(of):
        for each in of if isinstance(of, tuple) else vars(of).values():
            yield from _tensors_in(each)


@contextmanager
def told_of_compiling(on_note: Callable[[str], None]) -> Iterator[None]:
    """While open: on_note is told, once, when a kernel, or a loop of a CPU, is compiled instead of found in a cache.

    More will follow then, and the step at hand takes seconds.
    """
    told = False

    def tell() -> None:
        nonlocal told
        if not told:
            told = True
            on_note("compiling kernels; where possible they are kept for the next run")

    with when_compiling(tell), _when_triton_compiles(tell):
        yield


@contextmanager
def _when_triton_compiles(tell: Callable[[], None]) -> Iterator[None]:
    try:
        from triton import knobs
    except ImportError:  # no Triton: it compiles nothing
        yield
        return
    before = knobs.compilation.listener

    def listen(*, cache_hit: bool, **compiled: Any) -> None:
        if not cache_hit:
            tell()
        if before is not None:
            before(cache_hit=cache_hit, **compiled)

    knobs.compilation.listener = listen
    try:
        yield
    finally:
        knobs.compilation.listener = before
