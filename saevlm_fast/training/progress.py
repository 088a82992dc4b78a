"""How far a run is, in one line that is written anew: it works in a terminal and in a notebook alike."""

import sys
from time import monotonic

from saevlm_fast.training.evaluate import Metrics

_SECONDS = 0.5  # between two lines of the evaluation


class ProgressLine:
    """On stderr: step, rate, time left, loss, explained variance, at every logged step; then rows of the evaluation."""

    def __init__(self, n_steps: int):
        self.n_steps, self.width = n_steps, 0
        self.began: tuple[int, float] | None = None  # the evaluation: rows and time when it was first told of
        self.spoken, self.open = 0.0, False
        self.first: tuple[int, float] | None = None  # step and time: the rate leaves out what came before

    def log(self, step: int, metrics: Metrics) -> None:
        """Called at every logged step."""
        self.first = self.first or (step, monotonic())
        seconds, done = monotonic() - self.first[1], step - self.first[0]
        pace = f"{done / seconds:.1f} it/s  {(self.n_steps - step) * seconds / done:.0f} s left  " if done else ""
        loss, variance = metrics["losses/overall_loss"], metrics["metrics/explained_variance"]
        line = f"step {step:,}/{self.n_steps:,}  {pace}loss {loss:.4f}  explained variance {variance:.3f}"
        self._write(line)

    def evaluated(self, done: int, total: int) -> None:
        """Called as the evaluation goes on; one that is over at once is not spoken of."""
        now = monotonic()
        if self.began is None:
            self.close()
            self.began, self.spoken = (done, now), now
        seconds, spoke = now - self.began[1], self.spoken > self.began[1]
        if done > self.began[0] and (now - self.spoken >= _SECONDS or (spoke and done == total)):
            left = (total - done) * seconds / (done - self.began[0])
            self._write(f"evaluation {done:,}/{total:,} rows  {left:.0f} s left")
            self.spoken = now

    def _write(self, line: str) -> None:
        print(f"\r{line:<{self.width}}", end="", file=sys.stderr, flush=True)
        self.open, self.width = True, len(line)

    def note(self, text: str) -> None:
        """A line of its own."""
        print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Called when the steps have ended, and when the run has, however it did."""
        if self.open:
            print(file=sys.stderr, flush=True)
        self.open, self.width = False, 0
