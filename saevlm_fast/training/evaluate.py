"""What is measured of an SAE: of one training batch, and of all rows of a set.

Shape suffixes: B rows of a batch, D d_in, S d_sae, M entries.
"""

from collections.abc import Callable, Sequence
from contextlib import closing

import torch
from torch import Tensor

from saevlm_fast.data.rows import Activations, Matrix, activations_of
from saevlm_fast.errors import whole_number
from saevlm_fast.runtime import exact_defaults
from saevlm_fast.sae import SparseAutoencoder, check_sae, inferred
from saevlm_fast.training.evaluated import EvaluatedRows
from saevlm_fast.training.step import StepOutput, Stepper

Metrics = dict[str, float]
_PENALTIES = {"relu": "losses/l1_loss", "jumprelu": "losses/l0_loss"}


@torch.no_grad()
def batch_metrics(stepper: Stepper, x_BD: Tensor, output: StepOutput) -> Metrics:
    """What is logged of one batch, under SAELens' names. Explained variance is 1 - Var(x - x_hat) / Var(x).

    A GPU is waited for once, when all of it has been asked for.
    """
    losses = output.losses
    error, total = stepper.variance(x_BD - output.x_hat_BD), stepper.variance(x_BD)
    n_fired, n_dead = stepper.counted(output)
    config = stepper.sae.config
    penalty = {} if losses.penalty is None else {_PENALTIES[config.architecture]: losses.penalty}
    mono = {} if losses.mono is None else {"losses/mono_loss": losses.mono}
    metrics = _on_host(
        {
            "losses/overall_loss": losses.overall,
            "losses/mse_loss": losses.mse,
            "losses/auxiliary_reconstruction_loss": losses.aux,
            **penalty,
            **mono,
            "metrics/explained_variance": 1 - error / total,
            "metrics/l0": n_fired,
            "sparsity/dead_features": n_dead,
            "details/current_learning_rate": stepper.learning_rate(),
            "details/n_training_samples": stepper.n_rows_seen,
            "details/threshold": stepper.mean_threshold(),
        }
    )
    metrics["metrics/l0"] /= stepper.batch_rows(x_BD)
    metrics["sparsity/dead_features"] = int(metrics["sparsity/dead_features"])
    weight = stepper.config.mono_weight
    if weight is not None and metrics.get("losses/mono_loss"):  # 0 where no latent of the batch has a score (mono.py)
        metrics["metrics/batch_ms"] = 1 - metrics["losses/mono_loss"] / weight
    return metrics


def _on_host(numbers: dict[str, Tensor | float]) -> Metrics:
    """0-d tensors of any dtype as Python's numbers, which lose nothing of float32 or of a count."""
    there = {name: number.double() for name, number in numbers.items() if isinstance(number, Tensor)}
    values = dict(zip(there, torch.stack(list(there.values())).tolist()))
    return {name: values[name] if isinstance(number, Tensor) else number for name, number in numbers.items()}


@exact_defaults()
def evaluate(sae: SparseAutoencoder, activations: Matrix, batch_rows: int = 4096) -> Metrics:
    """Explained variance, L0, L2 and dead fraction over all rows, at inference (threshold, not batch selection).

    Args:
        sae: in raw activation units, as `train` returns it. Its device does the work; its mode is left as it was.
        activations: N rows [N, d_in], read batch_rows at a time.

    Returns:
        explained_variance: 1 - sum_d Var(x - x_hat) / sum_d Var(x) over the whole set: the paper's code averages it
            over batches, which is wrong for small ones (docs/recipe.md section 4).
        l0: latents that fire, mean over rows. l2: mean over rows of |x - x_hat|^2, in squared activation units.
        dead_fraction: share of the latents that fire on none of the rows. rows: N.
        Sums are float64, around b_dec.

    Raises:
        ValueError: another width than the SAE's, rows that are not finite, a threshold that was never calibrated.
    """
    activations = activations_of(activations, "activations")
    check_sae(sae)
    whole_number("batch_rows", batch_rows)
    (metrics,) = evaluate_rows([sae], activations, batch_rows=batch_rows)
    return metrics


@torch.no_grad()
def evaluate_rows(
    saes: Sequence[SparseAutoencoder],
    rows: Activations | EvaluatedRows,
    on_rows: Callable[[int, int], None] = lambda done, total: None,
    batch_rows: int = 4096,
) -> list[Metrics]:
    """The same of several SAEs, for which the rows are read once. on_rows: called with those so far, and with all."""
    sums, done = [RowSums(sae) for sae in saes], 0
    with closing(rows.chunks(batch_rows)) as chunks:
        for _, x_BD in chunks:
            for each in sums:
                each.add(x_BD)
            done += len(x_BD)
            on_rows(done, rows.n_rows)
    return [each.metrics() for each in sums]


class RowSums:
    """What is summed of one SAE, in float64 and around b_dec."""

    def __init__(self, sae: SparseAutoencoder):
        device, config = sae.b_dec.device, sae.config
        self.sae = sae
        self.sums_4D = torch.zeros(4, config.d_in, dtype=torch.float64, device=device)
        self.fired_S = torch.zeros(config.d_sae, dtype=torch.int64, device=device)
        self.n_fired = self.n_rows = 0

    @torch.no_grad()
    def add(self, x_BD: Tensor) -> None:
        """Some rows."""
        sae = self.sae
        x_BD = x_BD.to(sae.b_dec.device, sae.b_dec.dtype)
        codes = inferred(sae, x_BD)
        x_hat_BD = sae.decode(codes, sae.input_statistics(x_BD))
        self.sums_4D += row_sums(x_BD, x_hat_BD, sae.b_dec.detach())
        fires_M = (codes.top_acts > 0).flatten().long()
        self.fired_S.index_add_(0, codes.top_indices.flatten(), fires_M)
        self.n_fired += int(fires_M.sum())
        self.n_rows += len(x_BD)

    def metrics(self) -> Metrics:
        """Of all rows so far."""
        dead_fraction = float((self.fired_S == 0).double().mean())
        return metrics_of_sums(self.sums_4D, self.n_fired, dead_fraction, self.n_rows)


def row_sums(x_BD: Tensor, x_hat_BD: Tensor, b_dec_D: Tensor) -> Tensor:
    """Of rows and their reconstructions: sums over rows of the error, x - b_dec, and their squares, float64 [4, D]."""
    error_BD, centred_BD = (x_BD - x_hat_BD).double(), (x_BD - b_dec_D).double()
    return torch.stack([error_BD, error_BD**2, centred_BD, centred_BD**2]).sum(1)


def metrics_of_sums(sums_4D: Tensor, n_fired: int, dead_fraction: float, n_rows: int) -> Metrics:
    """What `evaluate` returns, of `row_sums` over all rows."""
    means_4D = sums_4D / n_rows
    error_var, total_var = means_4D[1] - means_4D[0] ** 2, means_4D[3] - means_4D[2] ** 2
    return {
        "explained_variance": float(1 - error_var.sum() / total_var.sum()),
        "l0": n_fired / n_rows,
        "l2": float(means_4D[1].sum()),
        "dead_fraction": dead_fraction,
        "rows": n_rows,
    }
