"""Scores compared with the truth, status by status."""

import torch

from saevlm_fast.scoring.monosemanticity import MonosemanticityScores
from saevlm_fast.scoring.sums import STATUSES


def assert_scores(scores: MonosemanticityScores, truth_S, tolerance: float) -> None:
    assert torch.equal(scores.ms.isnan(), truth_S.isnan())
    assert torch.equal(scores.ms.isnan(), scores.status != STATUSES.index("defined"))
    torch.testing.assert_close(scores.ms, truth_S, rtol=tolerance, atol=tolerance, equal_nan=True)


def close(found, expected, tolerance=1e-10):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance, equal_nan=True)
