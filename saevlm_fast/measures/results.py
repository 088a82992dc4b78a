"""What a measure gives: figures of the set, columns with one row a latent, and pairs of latents."""

import math
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

Figures = dict[str, Any]
MEASURES = (
    "reconstruction",
    "monosemanticity",
    "uniqueness",
    "hierarchy",
    "labels",
    "patches",
    "probing",
    "geometry",
    "kept",
    "behaviour",
    "visaebench",
)
VERSION = 2  # of evaluation.json
PARTS_VERSION = 6  # of the parts, of every command that has some: one more makes all of them anew


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
        mean, std, median, n (defined), n_undefined, mean_with_null. NaN where there are none.
    """
    defined = values_S[defined_S]
    n, n_all = len(defined), len(values_S)
    mean = float(defined.mean()) if n else math.nan
    whole = (float(defined.sum()) + (n_all - n) * null) / n_all if n_all else math.nan
    return {
        "mean": mean,
        "std": float(defined.std()) if n else math.nan,
        "median": float(np.median(defined)) if n else math.nan,
        "n": n,
        "n_undefined": n_all - n,
        "mean_with_null": whole,
    }


def bootstrap_mean(values: np.ndarray) -> list[float]:
    """The 95 % percentile interval of a mean, latents drawn with replacement; [nan, nan] of fewer than 2."""
    if len(values) < 2:
        return [math.nan, math.nan]
    generator = np.random.default_rng(0)
    if len(values) > 2000:  # the normal interval is the same there, without 1000 x len(values) draws
        half = 1.959964 * float(values.std(ddof=1)) / math.sqrt(len(values))
        return [float(values.mean()) - half, float(values.mean()) + half]
    means = values[generator.integers(0, len(values), (1000, len(values)))].mean(1)
    return [float(each) for each in np.quantile(means, [0.025, 0.975])]


def share(true_N: np.ndarray) -> Figures:
    """A share with Wilson's 95 % interval: value, n, status, interval."""
    n = len(true_N)
    if not n:
        return {"value": math.nan, "n": 0, "status": "too few", "interval": [math.nan, math.nan]}
    value = float(true_N.mean())
    return {"value": value, "n": n, "status": "defined", "interval": wilson(value, n)}


def wilson(value: float, n: int) -> list[float]:
    """The 95 % interval of a share of n."""
    z = 1.959964
    middle, width = value + z * z / (2 * n), z * math.sqrt(value * (1 - value) / n + z * z / (4 * n * n))
    return [max(0.0, (middle - width) / (1 + z * z / n)), min(1.0, (middle + width) / (1 + z * z / n))]


def mean_figure(values_N: np.ndarray) -> Figures:
    """A mean over images with its normal 95 % interval: value, n, status, interval."""
    n = len(values_N)
    if n < 2:
        value = float(values_N[0]) if n else math.nan
        return {"value": value, "n": n, "status": "too few", "interval": [math.nan, math.nan]}
    value, half = float(values_N.mean()), 1.959964 * float(values_N.std(ddof=1)) / math.sqrt(n)
    return {"value": value, "n": n, "status": "defined", "interval": [value - half, value + half]}


def ratio(above_N: np.ndarray, below_N: np.ndarray, least: float) -> Figures:
    """A ratio of two means over the same images; images drawn anew for the 95 % interval.

    Returns:
        value, n, status, interval, denominator. Where the denominator is below `least` the value is NaN and the status
        `withheld`: such a ratio says nothing.
    """
    n, nothing = len(above_N), [math.nan, math.nan]
    below = float(below_N.mean()) if n else math.nan
    given: Figures = {"n": n, "denominator": below, "least_denominator": least}
    if not n or not below >= least:
        return {"value": math.nan, "status": "withheld" if n else "too few", "interval": nothing} | given
    drawn_RN = _drawn(n)
    above_R, below_R = drawn_RN @ above_N, drawn_RN @ below_N
    ratios = np.divide(above_R, below_R, out=np.full(len(below_R), np.nan), where=below_R > 0)
    interval = [float(each) for each in np.nanquantile(ratios, [0.025, 0.975])]
    return {"value": float(above_N.mean()) / below, "status": "defined", "interval": interval} | given


@lru_cache(maxsize=4)
def _drawn(n: int, times: int = 500) -> np.ndarray:
    """float64 [times, n]: how often each of n is drawn in n draws with replacement."""
    return np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), times).astype(np.float64)
