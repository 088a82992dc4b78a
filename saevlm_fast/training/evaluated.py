"""The rows that the evaluation at the end of a run reads: all that are held out, or some of what was trained on.

A run of few steps on a large store would otherwise take minutes to train and hours to be measured.
"""

from collections.abc import Generator
from contextlib import closing

import torch
from torch import Tensor

from saevlm_fast.config import TrainConfig
from saevlm_fast.data.prefetch import prefetch
from saevlm_fast.data.rows import Activations

LEAST = 1 << 16  # training rows that are evaluated at least, if there are so many
_LOOKED_AT = 4096
_LONGEST = LEAST // 8  # rows of a stretch: so many in a row would be of one shard, whose images may be of one class


class EvaluatedRows:
    """Some rows of activations, evenly spread, numbered from 0.

    Of activations that are elsewhere they are stretches, as rows are fetched together; here each stands alone.

    Attributes:
        activations: what they are of. n_rows: how many they are. d: their width.
    """

    def __init__(self, activations: Activations, most: int | None = None):
        """most: of its rows; all if None. A last stretch that is cut is left out where not all are taken."""
        n_rows, self.activations, self.d = activations.n_rows, activations, activations.d
        self._stretch = min(activations.block_rows or 1, _LONGEST)
        n_stretches = n_rows // self._stretch
        taken = n_stretches if most is None else min(n_stretches, -(-most // self._stretch))
        self.is_all = taken == n_stretches
        self.n_rows = n_rows if self.is_all else taken * self._stretch
        self._last = n_stretches - 1

    @classmethod
    def of_run(cls, trained_on: Activations, held_out: Activations | None, config: TrainConfig) -> "EvaluatedRows":
        """All rows held out; else as many of the others as the steps take, counting those that come again."""
        if held_out is not None:
            return cls(held_out)
        return cls(trained_on, max(LEAST, config.steps * config.batch_size))

    def rows(self, numbers: Tensor) -> Tensor:
        """float32 [B, d]. ActivationError: NaN or infinity, naming the row."""
        if self.is_all:
            return self.activations.rows(numbers)
        taken = self.n_rows // self._stretch
        stretches = (numbers // self._stretch) * self._last // max(taken - 1, 1)
        return self.activations.rows(stretches * self._stretch + numbers % self._stretch)

    def chunks(self, n: int) -> Generator[tuple[int, Tensor], None, None]:
        """Each row once, n at a time, as Activations.chunks gives them."""
        if self.is_all:
            return self.activations.chunks(n)
        return prefetch(
            lambda start: (start, self.rows(torch.arange(start, min(start + n, self.n_rows)))),
            range(0, self.n_rows, n),
        )


def look_at(evaluated: EvaluatedRows, config: TrainConfig, whole: bool, rank: int = 0, world: int = 1) -> None:
    """Rows of what the evaluation at the end reads, the first and the last among them, evenly spread: a hundredth of
    those that are trained on, and at least 4096. All of them if `whole`: where nothing is kept, an evaluation that
    fails loses the SAE. Of several ranks each looks at its part of these.

    Raises:
        ActivationError: NaN or infinity, naming the row.
    """
    n_rows, block_rows = evaluated.n_rows, evaluated.activations.block_rows
    if block_rows is not None:  # elsewhere: its first and its last shard are fetched, not all of it
        n = min(_LOOKED_AT, block_rows, n_rows)
        evaluated.rows(torch.arange(n))
        evaluated.rows(torch.arange(n_rows - n, n_rows))
        return
    n = n_rows if whole else min(n_rows, max(_LOOKED_AT, config.steps * config.batch_size // 100))
    if n == n_rows:
        with closing(evaluated.chunks(_LOOKED_AT)) as chunks:
            for _ in chunks:
                pass
        return
    for start in range(rank * _LOOKED_AT, n, world * _LOOKED_AT):
        places = torch.arange(start, min(start + _LOOKED_AT, n))
        evaluated.rows(places * (n_rows - 1) // max(n - 1, 1))
