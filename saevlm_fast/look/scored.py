"""The Monosemanticity Score of the latents of a report, with what makes it worth something, from spilled codes."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa

from saevlm_fast.data.rows import Activations
from saevlm_fast.look.spill import Spill
from saevlm_fast.look.tables import numeric_columns
from saevlm_fast.records import object_of
from saevlm_fast.scoring.monosemanticity import StreamedScore
from saevlm_fast.scoring.second_pass import SecondPass
from saevlm_fast.scoring.trust import TrustedScores

_MOST_SUMS = 1 << 26  # of latents x embedding: above, the score alone, in one pass and half the memory
_CHUNK = 4096
_TAKEN = ("ms", "ms_low", "ms_high", "corrected", "n_eff", "z", "p")


def image_scores(codes: Spill, embeddings: Activations, tell: Callable[[int], None]) -> dict[str, np.ndarray]:
    """Columns [S] of scoring/trust.py's table: ms, ms_low, ms_high, corrected, n_eff, z, p; ms alone of very many.

    tell: called with images done, of two passes.
    """
    sure = codes.d_sae * embeddings.d <= _MOST_SUMS
    first = StreamedScore(codes.d_sae, halves=sure)
    _feed(first.update, codes, embeddings, tell, 0)
    if not sure:
        return {"ms": first.result().ms.numpy()}
    second = SecondPass(first)
    _feed(second.update, codes, embeddings, tell, codes.n_rows)
    table = TrustedScores.of(second.result()).table()
    there = numeric_columns(table)
    return {name: table[name].cast(pa.float64()).to_numpy() for name in _TAKEN if name in there}


def _feed(
    update: Callable[..., Any], codes: Spill, embeddings: Activations, tell: Callable[[int], None], done: int
) -> None:
    for (start, chunk), (_, emb_nE) in zip(codes.chunks(_CHUNK), embeddings.chunks(_CHUNK)):
        update(chunk, emb_nE)
        tell(done + start + chunk.n_rows)


def encoder_of(embeddings: Activations) -> str:
    """Whose embeddings they are, in words: the model and the point, as far as they are recorded."""
    source = embeddings.source or {}
    spec = object_of(source.get("model")).get("spec")
    known = [str(each) for each in (spec, source.get("point")) if each]
    return ", ".join(known) or embeddings.path.name
