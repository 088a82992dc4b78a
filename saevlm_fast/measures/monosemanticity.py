"""The Monosemanticity Score of kept codes, beside what the encoder gives any pair of images.

The level of the score is set by the embeddings: two images have the cosine s on average, and MS' = (MS - s) / (1 - s)
is what compares across encoders. Means are over latents with a floor on their images: below it a score is noise.
"""

import math

import numpy as np
import torch
from torch.nn.functional import normalize

from saevlm_fast.data.rows import Activations
from saevlm_fast.measures.codes import KeptCodes
from saevlm_fast.measures.results import Figures, Measured, bootstrap_mean, mean_both_ways
from saevlm_fast.scoring.monosemanticity import StreamedScore
from saevlm_fast.scoring.sums import STATUSES
from saevlm_fast.sparse_codes import SparseCodes

LEAST_IMAGES = 10


def monosemanticity(codes: KeptCodes, embeddings: Activations, name: str, batch_rows: int = 4096) -> Measured:
    """The score of every latent, and its means.

    Args:
        codes: of N images. embeddings: N rows, row i of image i. name: of the embeddings.

    Returns:
        figures: ms, ms_10 (over latents with at least 10 images), corrected, mean_cosine, deciles, status. latents: ms.
            Names of columns end in the name of the embeddings.
    """
    by_image = codes.by_image()
    scores = StreamedScore(codes.n_latents)
    total_E = torch.zeros(embeddings.d, dtype=torch.float64)
    for start, emb_BE in embeddings.chunks(batch_rows):
        scores.update(rows_of(by_image, start, start + len(emb_BE)), emb_BE)
        total_E += normalize(emb_BE.double(), dim=1).sum(0)
    found = scores.result()
    n = codes.n_images
    cosine = (float(total_E @ total_E) - n) / (n * (n - 1)) if n > 1 else math.nan
    ms_S = found.ms.numpy()
    defined_S = found.status.numpy() == STATUSES.index("defined")
    enough_S = defined_S & (codes.counts_S >= LEAST_IMAGES)
    figures: Figures = {
        "ms": mean_both_ways(ms_S, defined_S, cosine),
        "ms_10": mean_both_ways(ms_S, enough_S, cosine) | {"interval": bootstrap_mean(ms_S[enough_S])},
        "mean_cosine": cosine,
        "corrected": (float(ms_S[enough_S].mean()) - cosine) / (1 - cosine) if enough_S.any() else math.nan,
        "deciles": np.quantile(ms_S[enough_S], np.arange(11) / 10).tolist() if enough_S.any() else [],
        "status": {status: int((found.status.numpy() == i).sum()) for i, status in enumerate(STATUSES)},
        "similarity": "cosine",
    }
    return Measured(figures, {f"ms:{name}": ms_S})


def rows_of(codes: SparseCodes, first: int, last: int) -> SparseCodes:
    """Some neighbouring rows of codes in CSR form."""
    acts_M, latents_M, offsets = codes.csr()
    begin, end = int(offsets[first]), int(offsets[last])
    return SparseCodes.from_flat(
        acts_M[begin:end], latents_M[begin:end], offsets[first : last + 1] - begin, codes.d_sae
    )
