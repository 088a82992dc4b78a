"""Several SAEs that differ by their seeds alone: how many latents are steerable in each, and whether by the same words.

A word is covered by an SAE where it is the most changed word of a steerable latent. That latents of several SAEs change
the same words says something only beside chance: which of the latents that were asked about are the steerable ones is
drawn anew in every SAE, as many as there are.

Shape suffixes: R SAEs, C words.
"""

import math
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from saevlm_fast.clip_steering.run import MEANS, Steerable
from saevlm_fast.clip_steering.steerability import CHANCE
from saevlm_fast.errors import require
from saevlm_fast.measures.results import Figures

_DRAWS = 1000


def over_seeds(found: Sequence[Steerable], n_words: int, seed: int = 0) -> Figures:
    """Figures over SAEs, named as of one; `steerable` is the mean of their shares, `shared` says of the words.

    Args:
        found: of the latents of each SAE. n_words: of the vocabulary. seed: of the draws behind chance.

    Raises:
        ValueError: fewer than 2 SAEs.
    """
    require(len(found) >= 2, f"sae: {len(found)} SAE has no spread over seeds; 2 are needed")
    figures: Figures = {
        name: sum(each.summary[name] for each in found) for name in ("units", "asked", "dead", "random_directions")
    }
    figures["steerable"] = mean_of_seeds([each.summary["steerable"]["value"] for each in found])
    for name in MEANS:
        values = np.array([each.summary[name] for each in found])
        figures[name] = float(np.nanmean(values)) if np.isfinite(values).any() else math.nan
    return figures | {"shared": shared_words([each.table for each in found], n_words, seed)}


def mean_of_seeds(values: Sequence[float]) -> Figures:
    """A mean over seeds with Student's 95 % interval: value, n, status, interval; what is not finite is left out."""
    from scipy.stats import t

    finite_R = np.array([value for value in values if math.isfinite(value)])
    n = len(finite_R)
    if n < 2:
        value = float(finite_R[0]) if n else math.nan
        return {"value": value, "n": n, "status": "too few", "interval": [math.nan, math.nan]}
    value, half = float(finite_R.mean()), float(t.ppf(0.975, n - 1) * finite_R.std(ddof=1) / math.sqrt(n))
    return {"value": value, "n": n, "status": "defined", "interval": [value - half, value + half]}


def shared_words(tables: Sequence[pa.Table], n_words: int, seed: int = 0) -> Figures:
    """Of R SAEs: words that each covers, any, every; and how many every one would by chance.

    Returns:
        words: of the vocabulary. covered: by each SAE. by_any, by_every: covered by one of them at least, by all.
        by_every_chance: the mean of by_every over draws; p: (1 + draws with as many) / (1 + draws).
        in_every: those words.
    """
    asked = [[row for row in table.to_pylist() if row["status"] == "defined"] for table in tables]
    concepts = [np.array([row["concept"] for row in rows], object) for rows in asked]
    steerable = [np.array([row["chance"] <= CHANCE for row in rows], bool) for rows in asked]
    covered = [set(words[chosen]) for words, chosen in zip(concepts, steerable)]
    every = set.intersection(*covered)
    random = np.random.default_rng(seed)
    drawn = np.array([len(set.intersection(*_drawn(concepts, steerable, random))) for _ in range(_DRAWS)])
    return {
        "words": n_words,
        "covered": [len(each) for each in covered],
        "by_any": len(set.union(*covered)),
        "by_every": len(every),
        "by_every_chance": float(drawn.mean()),
        "p": (1 + int((drawn >= len(every)).sum())) / (1 + _DRAWS),
        "in_every": sorted(every),
    }


def _drawn(
    concepts: Sequence[np.ndarray], steerable: Sequence[np.ndarray], random: np.random.Generator
) -> list[set[str]]:
    """What each SAE would cover with as many steerable latents, whichever they are."""
    return [set(words[random.permutation(chosen)]) for words, chosen in zip(concepts, steerable)]
