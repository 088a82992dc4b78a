"""Scores of image-text pairs, and of the tokens of their images, pair by pair as the store is read.

A latent is active in a pair's text, or image, if it is above the threshold in one of its tokens there.

    cosine          sum of omega over the latents that are active in both (2502.17514 algorithm 1)
    co_occurrence   how many these are, with or without an omega (algorithm 3)
    count           how many latents are active in the pair at all (algorithm 2)
    shuffled        cosine with the omegas of the scored latents exchanged at random: a control

The scores of an image's tokens are those of crossmodal/patches.py.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from saevlm_fast.crossmodal.patches import Patches, places_of
from saevlm_fast.crossmodal.tokens import Chunk

_DRAWS = 1000  # of all pairs, for an interval
_DRAWN_AT_ONCE = 1 << 20  # pairs of the bootstrap
COUNTS = ("co_occurrence", "count", "n_text", "n_image")


class _Entries(NamedTuple):
    """What is above the threshold in one modality: numbers of pairs, latents and rows of the store, activations."""

    sample: np.ndarray
    latent: np.ndarray
    row: np.ndarray
    act: np.ndarray

    def where(self, chosen: np.ndarray) -> "_Entries":
        return _Entries(*(column[chosen] for column in self))

    def and_then(self, other: "_Entries") -> "_Entries":
        return _Entries(*(np.concatenate(pair) for pair in zip(self, other)))


class PairScores:
    """Scores of all pairs of a store. Memory: a few numbers a pair, and one pair more than a chunk.

    Attributes:
        ids: of the pairs. columns: after `finish`, name -> [pairs].
    """

    def __init__(
        self,
        omega_S: np.ndarray,
        shuffled_S: np.ndarray,
        threshold: float,
        on_patches: Callable[[Patches], None] = lambda patches: None,
        seed: int = 0,
    ):
        """seed: of the patches' random scores."""
        self._omega_S, self._shuffled_S = np.nan_to_num(omega_S), np.nan_to_num(shuffled_S)
        self._threshold, self._on_patches = threshold, on_patches
        nothing = np.empty(0, np.int64)
        self._text = self._image = _Entries(nothing, nothing, nothing, np.empty(0))
        self._rng = np.random.default_rng([seed, 2])
        self._tokens = nothing, nothing  # pair and row of image tokens that wait
        self._n_done = 0
        self.ids: list[str] = []
        self._parts: dict[str, list[np.ndarray]] = {
            name: [] for name in ("cosine", "shuffled", "co_occurrence", "count")
        }
        self._lengths: dict[str, np.ndarray] = {name: nothing for name in ("n_text", "n_image")}
        self.columns: dict[str, np.ndarray] = {}

    def add(self, chunk: Chunk) -> None:
        """The next rows of the store; pairs that are whole are scored."""
        self.ids += chunk.ids
        active = chunk.act_M > self._threshold
        latent, row = chunk.latent_M[active], chunk.row_M[active]
        entries = _Entries(chunk.sample_N[row], latent, row + chunk.first, chunk.act_M[active])
        self._text = self._text.and_then(entries.where(chunk.text_N[row]))
        self._image = self._image.and_then(entries.where(chunk.image_N[row]))
        image_rows = np.flatnonzero(chunk.image_N)
        found = chunk.sample_N[image_rows], image_rows + chunk.first
        self._tokens = tuple(np.concatenate(pair) for pair in zip(self._tokens, found))  # type: ignore[assignment]
        for name, rows_N in (("n_text", chunk.text_N), ("n_image", chunk.image_N)):
            grown = np.zeros(len(self.ids), np.int64)
            grown[: len(self._lengths[name])] = self._lengths[name]
            self._lengths[name] = grown + np.bincount(chunk.sample_N[rows_N], minlength=len(self.ids))
        self._score(len(self.ids) - 1)

    def finish(self) -> dict[str, np.ndarray]:
        """The last pair, and the columns of all."""
        self._score(len(self.ids))
        self.columns = {
            name: np.concatenate([np.empty(0), *parts]) for name, parts in self._parts.items()
        } | self._lengths
        for name in COUNTS:
            self.columns[name] = self.columns[name].astype(np.int64)
        return self.columns

    def _score(self, stop: int) -> None:
        """Pairs self._n_done .. stop - 1, of which nothing more comes."""
        if stop <= self._n_done:
            return
        start, self._n_done = self._n_done, stop
        text, image = (entries.where(entries.sample < stop) for entries in (self._text, self._image))
        self._text, self._image = (entries.where(entries.sample >= stop) for entries in (self._text, self._image))
        s = len(self._omega_S)
        text_keys, image_keys = (np.unique(entries.sample * s + entries.latent) for entries in (text, image))
        both = np.intersect1d(text_keys, image_keys, assume_unique=True)
        n, place, latent = stop - start, both // s - start, both % s
        self._parts["cosine"].append(np.bincount(place, self._omega_S[latent], n))
        self._parts["shuffled"].append(np.bincount(place, self._shuffled_S[latent], n))
        self._parts["co_occurrence"].append(np.bincount(place, minlength=n))
        self._parts["count"].append(np.bincount(np.union1d(text_keys, image_keys) // s - start, minlength=n))
        self._patches(stop, image, both)

    def _patches(self, stop: int, image: _Entries, both: np.ndarray) -> None:
        sample, row = self._tokens
        done = sample < stop
        self._tokens = sample[~done], row[~done]
        sample, row = sample[done], row[done]
        n, places = len(row), np.searchsorted(row, image.row)
        shared = np.isin(image.sample * len(self._omega_S) + image.latent, both)
        self._on_patches(
            Patches(
                sample,
                row,
                places_of(np.unique(sample, return_counts=True)[1]),
                cosine=np.bincount(places[shared], self._omega_S[image.latent[shared]], n),
                co_occurrence=np.bincount(places[shared], minlength=n),
                count=np.bincount(places, minlength=n),
                activation=np.bincount(places, image.act, n),
                random=self._rng.random(n),
            )
        )


def kept_pairs(scores: np.ndarray, share: float, random: np.ndarray) -> np.ndarray:
    """bool: the best `share` of the pairs, rounded, one at least; of equal ones those that `random` puts first.

    Counts of latents are equal for many pairs. By their places one part of a set would be kept, as its first shards.
    """
    kept = np.zeros(len(scores), bool)
    kept[np.lexsort((-random, -scores))[: max(1, round(share * len(scores)))]] = True
    return kept


def auroc(scores: np.ndarray, wrong: np.ndarray) -> float:
    """How often a right pair has a higher score than a wrong one, ties half. NaN without one of both."""
    level = np.unique(scores, return_inverse=True)[1].reshape(-1)
    return float(_aurocs(level[None], wrong[None])[0])


def auroc_interval(scores: np.ndarray, wrong: np.ndarray, seed: int) -> tuple[float, float]:
    """2.5 % and 97.5 % points over pairs that are drawn anew; the draws without one of both are left out."""
    rng, size = np.random.default_rng(seed), len(scores)
    level = np.unique(scores, return_inverse=True)[1].reshape(-1)
    values: list[np.ndarray] = []
    for start in range(0, _DRAWS, at_once := max(1, _DRAWN_AT_ONCE // max(1, size))):
        draws = rng.integers(0, size, (min(at_once, _DRAWS - start), size))
        values.append(_aurocs(level[draws], wrong[draws]))
    low, high = np.nanpercentile(np.concatenate(values), [2.5, 97.5])
    return float(low), float(high)


def _aurocs(level_RP: np.ndarray, wrong_RP: np.ndarray) -> np.ndarray:
    """[R]: AUROC of every row of P pairs, by the number of right and wrong pairs at each level of the score."""
    n_rows, n_levels = len(level_RP), int(level_RP.max(initial=0)) + 1
    keys = (np.arange(n_rows)[:, None] * 2 + wrong_RP) * n_levels + level_RP
    counts = np.bincount(keys.reshape(-1), minlength=2 * n_rows * n_levels).reshape(n_rows, 2, n_levels)
    right_RL, wrong_RL = counts[:, 0], counts[:, 1]
    above_R = (right_RL * (np.cumsum(wrong_RL, 1) - wrong_RL / 2)).sum(1)
    pairs_R = right_RL.sum(1) * wrong_RL.sum(1)
    return np.divide(above_R, pairs_R, out=np.full(n_rows, np.nan), where=pairs_R > 0)
