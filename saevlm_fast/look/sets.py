"""What the sets of top images say of a latent: whether another has the same, and how specific their classes are.

Section 4 of arXiv 2504.02821, computed by measures/uniqueness.py and measures/hierarchy.py: both need the 16 most
active images of a latent and nothing else, so codes of these alone are given to them. Shape suffixes: S latents.
"""

from typing import NamedTuple

import numpy as np

from saevlm_fast.errors import require
from saevlm_fast.look.shown import Lists
from saevlm_fast.measures.codes import TOP, KeptCodes
from saevlm_fast.measures.hierarchy import mean_depths
from saevlm_fast.measures.taxonomy import Taxonomy
from saevlm_fast.measures.uniqueness import uniqueness


class TopSets(NamedTuple):
    """Of S latents; NaN and -1 of those that fire on fewer than 16 images.

    Attributes:
        uniqueness_S: 1 less the Jaccard index with the set of the nearest latent: 1 where nothing is shared.
        nearest_S: int64, that latent; -1 where nothing is shared.
        depth_S: mean depth of the lowest common ancestor of the classes of two images; None without a taxonomy.
    """

    uniqueness_S: np.ndarray
    nearest_S: np.ndarray
    depth_S: np.ndarray | None


def top_sets(
    tops: Lists, n_images: int, class_N: np.ndarray | None, names: list[str], taxonomy: Taxonomy | None
) -> TopSets:
    """From the TOP (16) first of each latent's most active images.

    Args:
        class_N: the class of every image, -1 for none, and the classes' names: for the depth.

    Raises:
        ValueError: a taxonomy that has none of the classes.
    """
    kept = _kept(tops, n_images)
    columns = uniqueness(kept, n_closest=0).latents
    depth_S = None
    if taxonomy is not None and class_N is not None:
        known = np.array([name in taxonomy.paths for name in names])
        require(bool(known.any()), f"taxonomy: {taxonomy.origin} has none of the classes, as {names[0]!r}")
        renumbered = np.append(np.where(known, np.cumsum(known) - 1, -1), -1)
        latents_T, images_TP = kept.top_images()
        depth_S = np.full(len(tops), np.nan)
        there = [name for name, is_known in zip(names, known) if is_known]
        depth_S[latents_T] = mean_depths(renumbered[class_N[images_TP]], there, taxonomy)
    return TopSets(1 - columns["top16_jaccard"], columns["top16_nearest"], depth_S)


def _kept(tops: Lists, n_images: int) -> KeptCodes:
    """Codes of the top images alone, of latents that have TOP."""
    full_S = tops.counts_L >= TOP
    places_TP = tops.offsets_L1[:-1][full_S, None] + np.arange(TOP)
    images_TP, acts_TP = tops.images_M[places_TP].astype(np.int32), tops.acts_M[places_TP]
    order_TP = images_TP.argsort(axis=1)
    acts_TP, images_TP = np.take_along_axis(acts_TP, order_TP, axis=1), np.sort(images_TP, axis=1)
    offsets_S1 = np.concatenate([[0], (TOP * full_S).cumsum()]).astype(np.int64)
    return KeptCodes(acts_TP.reshape(-1), images_TP.reshape(-1), offsets_S1, n_images)
