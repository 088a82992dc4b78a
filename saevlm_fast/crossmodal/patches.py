"""Scores of the tokens of an image, and which of them are kept (2502.17514 algorithms 4 to 7).

A latent is active in a token if it is above the threshold there.

    count           how many latents are active in the token (algorithm 4)
    activation      the sum of what they have there (algorithm 5)
    co_occurrence   how many of them are active in the pair's text too (algorithm 6)
    cosine          the sum of omega over these (algorithm 7)
    random          the control: as many tokens, whichever

Many tokens of an image have equal scores. The random column decides between them, for by their places the top of the
image would be kept.
"""

from dataclasses import dataclass

import numpy as np

PATCH_SCORES = ("cosine", "co_occurrence", "count", "activation", "random")


@dataclass(frozen=True, eq=False)
class Patches:
    """Image tokens of whole pairs, [tokens] each, pair by pair in the store's order.

    sample: number of the pair. row: of the store. patch: place among the pair's image tokens. The others: PATCH_SCORES.
    """

    sample: np.ndarray
    row: np.ndarray
    patch: np.ndarray
    cosine: np.ndarray
    co_occurrence: np.ndarray
    count: np.ndarray
    activation: np.ndarray
    random: np.ndarray

    @property
    def columns(self) -> dict[str, np.ndarray]:
        """By their names, in this order."""
        return dict(vars(self))

    @property
    def sizes(self) -> np.ndarray:
        """Image tokens of every pair that has any."""
        return np.unique(self.sample, return_counts=True)[1]

    def rank(self, by: str, least: bool = False) -> np.ndarray:
        """int64 [tokens]: 0 for the token of its pair that is kept first. least: of the smallest score."""
        score = getattr(self, by) if least else -getattr(self, by)
        order = np.lexsort((-self.random, score, self.sample))
        rank = np.empty(len(order), np.int64)
        rank[order] = places_of(self.sizes)
        return rank


def kept_patches(patches: Patches, share: float, by: str = "cosine", least: bool = False) -> np.ndarray:
    """bool: of every pair the best `share` of its image tokens, rounded; of equal ones those that `random` keeps."""
    return patches.rank(by, least) < np.round(share * np.repeat(patches.sizes, patches.sizes))


def places_of(sizes: np.ndarray) -> np.ndarray:
    """0 .. size - 1 of every size, one after the other."""
    return np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
