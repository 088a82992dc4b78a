"""The directory of a run: when a checkpoint is written, and which there are."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic

STATE_FILE, METRICS_FILE, RUN_FILE, CHECKPOINTS = "train_state.safetensors", "metrics.jsonl", "run.json", "checkpoints"
_CHECKPOINTS_A_RUN = 20
_CHECKPOINT_PAUSE = 30.0  # seconds of work that may be lost rather than saved
_CHECKPOINT_COSTS = 20  # work between two checkpoints, in units of what writing one takes: a twentieth of the time


class Cadence:
    """After which steps a checkpoint is written (that of the last step, or of an interrupt, is written anyway).

    At every `every` steps, exactly; or, if that is None, once a twentieth of the run's n_steps, 30 s, and 20 times what
    the last one took have all passed since the last one (or the start, after step `last`). What it costs is thus in
    proportion to what it saves: with the default a kill loses the longest of these three.
    """

    def __init__(self, every: int | None, n_steps: int, last: int):
        self.exact = every is not None
        self.every = every or max(1, n_steps // _CHECKPOINTS_A_RUN)
        self.last, self.took, self.ended = last, 0.0, monotonic()

    def due(self, step: int) -> bool:
        """Whether one is to be written after that step."""
        if self.exact:
            return step % self.every == 0
        pause = max(_CHECKPOINT_PAUSE, _CHECKPOINT_COSTS * self.took)
        return step - self.last >= self.every and monotonic() - self.ended >= pause

    @contextmanager
    def writing(self, step: int) -> Iterator[None]:
        """Around the writing of that step's."""
        start = monotonic()
        yield
        self.last, self.ended = step, monotonic()
        self.took = self.ended - start


def checkpoints(output: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    return sorted((Path(output) / CHECKPOINTS).glob("step_" + "[0-9]" * 8))


def latest_checkpoint(output: Path) -> Path | None:
    """The newest complete checkpoint of a run, if any."""
    found = checkpoints(output)
    return found[-1] if found else None
