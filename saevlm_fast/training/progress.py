"""How far a run is, in one line that is written anew: it works in a terminal and in a notebook alike."""

import sys
from time import monotonic

from saevlm_fast.training.evaluate import Metrics


class ProgressLine:
    """On stderr: step, rate, time left, loss, explained variance, at every logged step."""

    def __init__(self, n_steps: int):
        self.n_steps, self.width = n_steps, 0
        self.first: tuple[int, float] | None = None  # step and time: the rate leaves out what came before

    def log(self, step: int, metrics: Metrics) -> None:
        """Called at every logged step."""
        self.first = self.first or (step, monotonic())
        seconds, done = monotonic() - self.first[1], step - self.first[0]
        pace = f"{done / seconds:.1f} it/s  {(self.n_steps - step) * seconds / done:.0f} s left  " if done else ""
        loss, variance = metrics["losses/overall_loss"], metrics["metrics/explained_variance"]
        line = f"step {step:,}/{self.n_steps:,}  {pace}loss {loss:.4f}  explained variance {variance:.3f}"
        print(f"\r{line:<{self.width}}", end="", file=sys.stderr, flush=True)
        self.width = len(line)

    def note(self, text: str) -> None:
        """A line of its own."""
        print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Called when the run has ended, however it did."""
        if self.first is not None:
            print(file=sys.stderr, flush=True)
