"""One place of a tower whose rows come from a shuffle buffer instead of a store: its state, its SAEs, where it stands.

What TrainingState knows of rows at random places it knows here of the first ones: norm_factor, the mean (--center) and
where b_dec begins are of the buffer's first window, at most norm_batches of it in the order of the steps, so that a
run's first step has waited for them anyway; a threshold that has not moved yet is found on the first steps' rows, which
checkpoints hold. A checkpoint also says at which forward and row its window begins: the buffer itself is not saved, its
rows go through the tower again.

Shape suffixes: N rows, B rows of a batch, D d_in.
"""

import hashlib
import json
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saevlm_fast.config import CALIBRATED, RunOptions, SAEConfig, TrainConfig
from saevlm_fast.data.mixing import MixingBuffer
from saevlm_fast.training.evaluate import Metrics
from saevlm_fast.training.many import Member, take_all
from saevlm_fast.training.scale import Scale, mean_of
from saevlm_fast.training.state import TrainingState

_CALIBRATION_ROWS = 4096
POSITION, FIRST_ROWS = "position of the window", "first rows"  # in a checkpoint


class Position(NamedTuple):
    """Where a window of the buffer begins: the forward, and the row among those that it gives."""

    forward: int = 0
    row: int = 0


class StreamedRows(NamedTuple):
    """What a TrainingState asks of its data, of rows that come from a tower.

    n_rows: of an epoch, at most. row_bytes, d, kept_dtype: of a row. path: of the images. source: for the SAE's record.
    known_by: what decides the rows and their order, by name; for JSON. block_rows: None, they are in no blocks.
    """

    n_rows: int
    row_bytes: int
    d: int
    kept_dtype: torch.dtype
    path: Path
    source: dict[str, Any]
    known_by: dict[str, Any]
    block_rows: int | None = None

    def digest(self) -> str:
        """SHA-256 of what decides the rows and their order."""
        return hashlib.sha256(json.dumps(self.known_by, sort_keys=True).encode()).hexdigest()


class StreamedState(TrainingState):
    """The state of an SAE that is trained on the rows of a place."""

    def __init__(self, place: "Place", sae_config: SAEConfig, config: TrainConfig, device: torch.device):
        self.place, self.position = place, Position()
        rows: Any = place.rows  # all of Activations that is asked for here
        super().__init__(rows, sae_config, config, device, "host")

    def beginning(self) -> tuple[Scale, Tensor]:
        """Of the buffer's first window; found once for all SAEs of the place."""
        if self.place.begun is None:
            self.place.begun = super().beginning()
        return self.place.begun

    def mean(self) -> Tensor:
        """Of the rows that norm_factor is of."""
        return mean_of(self.batches(0, self.config.norm_batches))

    def batches(self, start_step: int, n_steps: int, announce: bool = True) -> Generator[Tensor, None, None]:
        """The first steps' batches in raw units on the device; of later ones those that are kept."""
        yield from self.place.first_batches(n_steps)

    def settings(self, sampled: bool = False) -> dict[str, dict[str, Any]]:
        """TrainingState's, and what decides the rows."""
        settings = super().settings(sampled=False)
        settings["data"] = self.place.rows.known_by | settings["data"]  # what differs is named before the digest of it
        return settings

    def tensors(self) -> dict[str, Tensor]:
        """TrainingState's, where the window begins, and the rows of a threshold that may have to be found."""
        position = self.place.position_of(self.stepper.n_steps)
        tensors = super().tensors() | {POSITION: torch.tensor(position)}
        if self.stepper.sae.config.architecture in CALIBRATED:
            tensors[FIRST_ROWS] = self.place.first_rows()
        return tensors

    def load(self, tensors: dict[str, Tensor], n_steps: int, n_rows_seen: int) -> None:
        """TrainingState's. ValueError: as there."""
        super().load(tensors, n_steps, n_rows_seen)
        self.position = Position(*tensors[POSITION].tolist())
        if FIRST_ROWS in tensors:
            self.place.first_BD = tensors[FIRST_ROWS]


class Place:
    """One hook point with one choice of tokens: its buffer, and the SAEs that are trained on what comes out of it.

    Args:
        name: residual-11-cls. rows: what they are. config: the recipe, of whose shared part all SAEs are.
        capacity: rows of the buffer. buffer_device: where it is. device: where steps are taken.

    Attributes:
        members: the SAEs. begun: scale and first b_dec, once they are known.
    """

    def __init__(
        self,
        name: str,
        rows: StreamedRows,
        config: TrainConfig,
        capacity: int,
        buffer_device: torch.device,
        device: torch.device,
    ):
        self.name, self.rows, self.config, self.capacity = name, rows, config, capacity
        self.buffer_device, self.device = buffer_device, device
        self.batch_size = min(config.batch_size, rows.n_rows)
        self.members: list[Member] = []
        self.begun: tuple[Scale, Tensor] | None = None
        self.first_BD: Tensor | None = None
        self.start = self._next = Position()
        self._base = 0  # rows before the buffer's first one
        self._positions: dict[int, Position] = {}
        self._running = False
        self.buffer = self._buffer(0)

    def _buffer(self, first_window: int) -> MixingBuffer:
        config, rows = self.config, self.rows
        return self._mixing(
            config.steps,
            self.batch_size,
            self.capacity,
            rows.d,
            config.seed,
            dtype=rows.kept_dtype,
            device=self.buffer_device,
            first_window=first_window,
        )

    def _mixing(self, *given: Any, **more: Any) -> MixingBuffer:
        return MixingBuffer(*given, **more)

    def add(
        self,
        name: str,
        sae: SAEConfig,
        config: TrainConfig,
        options: RunOptions,
        on_log: Callable[[str, int, Metrics], None],
        group: str | None = None,
    ) -> None:
        """One more SAE; the rest as of Member."""
        self.members.append(self._member(name, sae, config, options, on_log, group))

    def _member(self, name: str, sae: SAEConfig, config: TrainConfig, *rest: Any) -> Member:
        return Member(name, StreamedState(self, sae, config, self.device), *rest)

    def resume(self) -> None:
        """SAEs that have a checkpoint go on from it, and the rows from the earliest of these on."""
        for member in self.members:
            if member.has_checkpoint:
                member.begin()
        slowest = min(self.members, key=lambda member: member.n_steps).state
        if slowest.stepper.n_steps > 0 and isinstance(slowest, StreamedState):
            window = self.buffer.window_of(slowest.stepper.n_steps)
            self.start, self.buffer = slowest.position, self._buffer(window)
            self._base = self.buffer.first_step(window) * self.batch_size
        self._next = self.start

    @property
    def is_done(self) -> bool:
        """Whether all steps have been taken."""
        return self.buffer.step == self.config.steps and self.buffer.n_in == self.buffer.n_wanted

    def feed(self, forward: int, rows_MD: Tensor) -> Iterator[int]:
        """The rows of one forward: every step that can be taken is, and its number told."""
        if forward < self.start.forward or self.is_done:
            return
        row = self.start.row if forward == self.start.forward else 0
        while row < len(rows_MD) and self.buffer.n_in < self.buffer.n_wanted:
            self._mark(Position(forward, row), len(rows_MD) - row)
            n = self.buffer.put(rows_MD[row:])
            row += n
            self._next = Position(forward, row)
            if self.buffer.is_full:
                self.begin()
            if n == 0:
                yield self._take()
        while self.buffer.n_in == self.buffer.n_wanted and not self.is_done:
            yield self._take()

    def _mark(self, position: Position, n: int) -> None:
        """Windows whose first row is among n rows from this one on, which are fed next."""
        buffer, row = self.buffer, self._base + self.buffer.n_in
        for window in range(
            buffer.window_of(row // self.batch_size), buffer.window_of((row + n) // self.batch_size) + 1
        ):
            first = buffer.first_step(window) * self.batch_size
            if row <= first < row + n:
                self._positions[window] = Position(position.forward, position.row + first - row)

    def _take(self) -> int:
        """A step of every SAE that has not taken it."""
        step, raw_BD = self.buffer.step, self.buffer.take()
        if any(member.n_steps == step for member in self.members):
            take_all(self.members, step, self.members[0].state.normalised(raw_BD.to(self.device)))
        return step

    def begin(self) -> None:
        """The SAEs that have not begun do, from what is in the buffer, which is full."""
        if self._running:
            return
        self._running = True
        for member in self.members:
            if not member.has_begun:
                member.begin()
        if self.buffer.step == 0:
            n = len(self.first_rows()) // self.batch_size
            self.first_BD = torch.cat([x_BD.clone() for x_BD in self.first_batches(n)])

    def position_of(self, step: int) -> Position:
        """Where the window of a step begins; if nothing of it has come yet, with the next row."""
        return self._positions.get(self.buffer.window_of(step), self._next)

    def first_batches(self, n_steps: int) -> Generator[Tensor, None, None]:
        """Of the first steps: before the first, as many as are in the buffer; later, those that were kept."""
        if self.buffer.step == 0:
            for step in range(min(n_steps, self.buffer.first_step(1))):
                yield self.buffer.peek(step).to(self.device)
        elif self.first_BD is not None:
            yield from self.first_BD.to(self.device).split(self.batch_size)[:n_steps]

    def first_rows(self) -> Tensor:
        """[n, D] in raw units, by which a threshold is found."""
        n = min(-(-_CALIBRATION_ROWS // self.batch_size), self.buffer.first_step(1))
        if self.first_BD is None:
            return torch.zeros(n * self.batch_size, self.rows.d, dtype=self.rows.kept_dtype, device=self.device)
        return self.first_BD
