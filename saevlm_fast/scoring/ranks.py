"""Orders of scores: rank correlation, and which of many p values count as found."""

import torch
from torch import Tensor

from saevlm_fast.errors import require


def spearman(a: Tensor, b: Tensor) -> float:
    """Spearman's rank correlation, ties with their average rank; NaN if a or b is constant.

    Raises:
        ValueError: not two equally long vectors of at least two numbers, or NaN in one.
    """
    require(a.ndim == 1 and a.shape == b.shape and len(a) >= 2, f"a, b: shapes {list(a.shape)} and {list(b.shape)}")
    require(not bool((a.isnan() | b.isnan()).any()), "a, b: NaN has no rank")
    x, y = _ranks(a), _ranks(b)
    x, y = x - x.mean(), y - y.mean()
    return float((x @ y) / (x @ x * (y @ y)).sqrt())


def _ranks(a: Tensor) -> Tensor:
    _, inverse, counts = a.unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts - 1) / 2)[inverse].double()


def found_at(p_N: Tensor, false_share: float = 0.05) -> Tensor:
    """bool [N]: which hypotheses are rejected so that at most false_share of these are so wrongly, in expectation.

    Benjamini and Hochberg's step-up rule. NaN is not rejected and no hypothesis.
    """
    found_N = torch.zeros_like(p_N, dtype=torch.bool)
    (known,) = (~p_N.isnan()).nonzero(as_tuple=True)
    ascending, order = p_N[known].sort()
    ranks = torch.arange(1, len(known) + 1, dtype=torch.float64, device=p_N.device)
    limits = false_share * ranks / max(len(known), 1)
    below = (ascending <= limits).nonzero()
    if len(below):
        found_N[known[order[: int(below[-1]) + 1]]] = True
    return found_N
