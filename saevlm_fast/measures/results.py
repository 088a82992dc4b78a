"""What a measure gives: figures of the set, columns with one row a latent, and pairs of latents."""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Figures = dict[str, Any]
MEASURES = (
    "reconstruction",
    "monosemanticity",
    "uniqueness",
    "hierarchy",
    "labels",
    "probing",
    "geometry",
)
VERSION = 1  # of evaluation.json
PARTS_VERSION = 2  # of the parts: one more makes all of them anew


@dataclass(frozen=True)
class Measured:
    """One measure of one SAE or control.

    Attributes:
        figures: by name, nested; numbers, texts and lists that JSON has. NaN is what is not defined.
        latents: columns of the table with one row a latent, each [S].
        pairs: columns kind, latent, rank, other, value, support of related latents; none if empty.
    """

    figures: Figures
    latents: dict[str, np.ndarray] = field(default_factory=dict)
    pairs: dict[str, np.ndarray] = field(default_factory=dict)


def plain(value: Any) -> Any:
    """As strict JSON has it: Python's own numbers, null for what is not finite."""
    if isinstance(value, dict):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def mean_both_ways(values_S: np.ndarray, defined_S: np.ndarray, null: float) -> Figures:
    """The mean over the latents where a value is defined, and with the others counted as the null; and the shares.

    Returns:
        mean, sd, median, n (defined), n_undefined, mean_with_undefined_as_null. NaN where there are none.
    """
    defined = values_S[defined_S]
    n, n_all = len(defined), len(values_S)
    mean = float(defined.mean()) if n else math.nan
    whole = (float(defined.sum()) + (n_all - n) * null) / n_all if n_all else math.nan
    return {
        "mean": mean,
        "sd": float(defined.std()) if n else math.nan,
        "median": float(np.median(defined)) if n else math.nan,
        "n": n,
        "n_undefined": n_all - n,
        "mean_with_undefined_as_null": whole,
    }


def bootstrap_mean(values: np.ndarray, n: int = 1000, seed: int = 0) -> list[float]:
    """The 95 % percentile interval of a mean, latents drawn with replacement; [nan, nan] of fewer than 2."""
    if len(values) < 2:
        return [math.nan, math.nan]
    generator = np.random.default_rng(seed)
    if len(values) > 2000:  # the normal interval is the same there, without n x len(values) draws
        half = 1.959964 * float(values.std(ddof=1)) / math.sqrt(len(values))
        return [float(values.mean()) - half, float(values.mean()) + half]
    means = values[generator.integers(0, len(values), (n, len(values)))].mean(1)
    return [float(each) for each in np.quantile(means, [0.025, 0.975])]
