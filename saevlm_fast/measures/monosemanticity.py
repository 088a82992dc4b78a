"""The Monosemanticity Score of kept codes, beside what the encoder gives any pair of images.

The level of the score is set by the embeddings: two images have the cosine s on average, and MS' = (MS - s) / (1 - s)
is what compares across encoders. Means are over latents with a floor on their images: below it a score is noise.
Intervals are by image (scoring/second_pass.py), chance is codes shuffled over images (scoring/null.py).
Memory beside the codes: two sums of S x E float64, and what SecondPass says.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from saevlm_fast.data.rows import Activations
from saevlm_fast.measures.codes import KeptCodes
from saevlm_fast.measures.results import Figures, Measured, mean_both_ways
from saevlm_fast.peers import Peers, rows_of_share, shared_chunks
from saevlm_fast.scoring.monosemanticity import StreamedScore
from saevlm_fast.scoring.second_pass import SecondPass, change_error
from saevlm_fast.scoring.source import rows_between
from saevlm_fast.scoring.sums import STATUSES
from saevlm_fast.scoring.trust import FEWEST_IMAGES, TrustedScores, interval
from saevlm_fast.sparse_codes import SparseCodes


def monosemanticity(
    codes: KeptCodes, embeddings: Activations, name: str, batch_rows: int = 4096, peers: Peers | None = None
) -> Measured:
    """The score of every latent, and its means, in two passes over the embeddings.

    Args:
        codes: of N images. embeddings: N rows, row i of image i. name: of the embeddings.
        peers: the ranks that share the images, all of which call this with all codes.

    Returns:
        figures: ms, ms_10 (over latents with at least 10 images; its interval covers the images, not the seed),
            corrected, mean_cosine, above_null, above_99, guarded_best, split_half, deciles, status. latents: ms, ms_se,
            ms_p, ms_above_null. Names of columns end in the name of the embeddings.
    """
    own = rows_of_share(peers, codes.n_images, batch_rows)
    by_image, first = codes.by_image(), StreamedScore(codes.n_latents, halves=True, first_image=own.start)
    _feed(first.update, by_image, embeddings, batch_rows, peers)
    if peers is not None:
        first.merge_ranks(peers, True, embeddings.d)
    status_S = first.result().status.numpy()
    defined_S = status_S == STATUSES.index("defined")
    enough_S = defined_S & (codes.counts_S >= FEWEST_IMAGES)
    weights_SW = torch.from_numpy(enough_S / max(int(enough_S.sum()), 1))[:, None]
    second = SecondPass(first, weights_SW)
    _feed(second.update, by_image, embeddings, batch_rows, peers)
    found = TrustedScores.of(second.result(peers))
    summary, ms_S = found.summary(), found.ms.numpy()
    mean = float(ms_S[enough_S].mean()) if enough_S.any() else math.nan
    sure = interval(mean, change_error(found.weighted_NW[:, 0]))
    figures: Figures = {
        "ms": mean_both_ways(ms_S, defined_S, found.mean_cosine) | {"interval": list(summary.mean_interval)},
        "ms_10": mean_both_ways(ms_S, enough_S, found.mean_cosine) | {"interval": list(sure)},
        "mean_cosine": found.mean_cosine,
        "corrected_mean": float(found.corrected.numpy()[enough_S].mean()) if enough_S.any() else math.nan,
        "above_null": summary.above_null,
        "above_99": summary.above_99,
        "guarded_best": summary.guarded_best._asdict(),
        "split_half": summary.split_half,
        "deciles": np.quantile(ms_S[enough_S], np.arange(11) / 10).tolist() if enough_S.any() else [],
        "counts": {status: int((status_S == i).sum()) for i, status in enumerate(STATUSES)},
        "similarity": "cosine",
    }
    assert found.se is not None
    assert found.p is not None
    assert found.above_null is not None
    columns = {"ms": found.ms, "ms_se": found.se, "ms_p": found.p, "ms_above_null": found.above_null}
    return Measured(figures, {f"{column}:{name}": values_S.numpy() for column, values_S in columns.items()})


def _feed(
    update: Callable[..., Any], codes: SparseCodes, embeddings: Activations, batch_rows: int, peers: Peers | None
) -> None:
    for start, emb_BE in shared_chunks(peers, embeddings.chunks, embeddings.n_rows, batch_rows):
        update(rows_between(codes, start, start + len(emb_BE)), emb_BE)
