"""The units in which an SAE is trained: activations less their mean, if that is wanted, over norm_factor.

    trained on    y = (x - mean) / f,        f = norm_factor = sqrt(mean |x - mean|^2), mean = 0 unless --center
    exported      b_enc' = f b_enc,   b_dec' = mean + f b_dec,   threshold' = f threshold,   W_enc and W_dec as they are

An exported SAE is a plain one in raw units, whatever reads it: with these,

    (x - b_dec') W_enc + b_enc' = f ((y - b_dec) W_enc + b_enc)      so every act is f times that of training, and
    f z W_dec + b_dec'          = f (z W_dec + b_dec) + mean         is the reconstruction in raw units.

Why a mean may have to go: docs/recipe.md section 2. Shape suffixes: N rows, B rows of a batch, D d_in.
"""

import math
from collections.abc import Iterable
from contextlib import closing
from typing import NamedTuple

import torch
from torch import Tensor

from saevlm_fast.data.passes import Pass
from saevlm_fast.data.rows import Activations
from saevlm_fast.errors import require
from saevlm_fast.sae import SparseAutoencoder

_ROWS_AT_A_TIME = 4096


class Scale(NamedTuple):
    """norm_factor, and the mean [D] that is subtracted first: float32 on the device, None where none is."""

    norm_factor: float = 1.0
    mean_D: Tensor | None = None

    def normalised(self, x_BD: Tensor, out: Tensor | None = None) -> Tensor:
        """float32 [B, D] of a batch in raw units; into `out` if given, whose dtype it then is.

        On a GPU without a mean, widened and divided in one pass: a divisor of one dimension makes torch compute in
        float32.
        """
        if self.mean_D is not None:  # float32, whatever the batch is
            return torch.sub(x_BD, self.mean_D, out=out).div_(self.norm_factor)
        if x_BD.is_cuda:
            divisor = torch.full((1,), self.norm_factor, device=x_BD.device)
            return torch.div(x_BD, divisor, out=out)
        return torch.div(x_BD.float(), self.norm_factor, out=out)

    def gathered(self, rows_ND: Tensor, rows_B: Tensor, out: Tensor) -> Tensor:
        """`normalised` of rows_ND[rows_B], on a GPU and without a mean: the same bits in one pass."""
        from saevlm_fast.kernels.gathered_rows_triton import launch_gathered_rows

        return launch_gathered_rows(rows_ND, rows_B, self.norm_factor, out)

    @torch.no_grad()
    def to_raw_units_(self, sae: SparseAutoencoder) -> None:
        """An SAE that was trained on normalised rows, in place."""
        sae.scale_biases_(self.norm_factor)
        if self.mean_D is not None:
            sae.b_dec.add_(self.mean_D.to(sae.b_dec.device))


def mean_of_rows(activations: Activations) -> Tensor:
    """The mean [D] of all rows, summed in float64, as float32: one pass over them, in their order.

    Raises:
        ActivationError: NaN or infinity, naming the row.
    """
    reading = Pass(f"mean of {activations.path}", activations.n_rows, "rows")
    with closing(activations.chunks(_ROWS_AT_A_TIME)) as chunks:
        return mean_of(reading.each(x_BD for _, x_BD in chunks))


def mean_of(batches: Iterable[Tensor]) -> Tensor:
    """The mean [D] of the rows of some batches, summed in float64, as float32."""
    total_D, n_rows = None, 0
    for x_BD in batches:
        sum_D = x_BD.double().sum(0)
        total_D, n_rows = sum_D if total_D is None else total_D + sum_D, n_rows + len(x_BD)
    assert total_D is not None
    return (total_D / n_rows).float()


def check_several_rows(activations: Activations) -> None:
    """ValueError: a single row."""
    require(activations.n_rows > 1, f"activations: {activations.path} has one row: there is nothing to learn")


def check_rows_differ(activations: Activations) -> None:
    """Reads as far as all rows are equal: a batch, of rows that are not.

    Raises:
        ValueError: a single row, or rows that are all equal.
        ActivationError: NaN or infinity, naming the row.
    """
    check_several_rows(activations)
    first_D = None
    with closing(activations.chunks(_ROWS_AT_A_TIME)) as chunks:
        for _, x_BD in chunks:
            first_D = x_BD[0].clone() if first_D is None else first_D
            if bool((x_BD != first_D).any()):
                return
    what = f"all {activations.n_rows:,} rows of {activations.path} are equal"
    raise ValueError(f"activations: {what}: there is nothing to learn")


def scale_of(batches: Iterable[Tensor], mean_D: Tensor | None, where: object) -> tuple[Scale, Tensor]:
    """The scale by some batches in raw units, and the first of them.

    where: that they are from, for messages.

    Raises:
        ValueError: nothing but zeros, or but the mean, or one row again and again.
    """
    squared, n_rows, first_BD, differ = 0.0, 0, None, False
    for x_BD in batches:
        first_BD = x_BD.clone() if first_BD is None else first_BD  # a GPU's is overwritten
        differ = differ or bool((x_BD != first_BD[:1]).any())
        y_BD = x_BD.double() if mean_D is None else x_BD.double() - mean_D.double()
        squared += float(y_BD.square().sum())
        n_rows += len(x_BD)
    assert first_BD is not None
    what = "zero" if mean_D is None else "their mean: there is nothing else to train on"
    require(squared > 0, f"activations: every row of {where} read so far is {what}")
    same = f"activations: all {n_rows:,} rows of {where} read so far are equal: there is nothing to learn"
    require(differ or n_rows == 1, same)
    return Scale(math.sqrt(squared / n_rows), mean_D), first_BD
