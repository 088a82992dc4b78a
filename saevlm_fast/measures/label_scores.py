"""AUROC, average precision and best F1 of every latent for every label, exactly, touching only pairs that meet.

A latent's activations on N images are sparse: the Z = N - n_k silent ones tie at 0. With P images of a label, p of them
among the n_k active ones, r_i the mid-rank among the active (1 the smallest):

    R = sum over active positives of (Z + r_i) + (P - p) (Z + 1) / 2      AUROC = (R - P (P + 1) / 2) / (P (N - P))

Average precision and F1 go down the tied groups of activations; the silent images are the last group, where precision
is P / N. All is O(nnz x labels of an image), block of latents by block. Pairs that do not meet have p = 0 in the same
formula.
Shape suffixes: S latents, N images, L labels, M entries, E (entry, label) pairs, Q (latent, label) pairs.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from saevlm_fast.data.label_sets import LabelSet
from saevlm_fast.data.passes import Pass
from saevlm_fast.measures.codes import KeptCodes
from saevlm_fast.measures.uniqueness import blocks

_BLOCK_ENTRIES = 4_000_000


class LabelScores(NamedTuple):
    """Of Q pairs that meet on an image, latents ascending, labels ascending within each: arrays [Q].

    latent, label, positives (p); auroc (NaN if all or no images have the label), ap, f1.
    """

    latent: np.ndarray
    label: np.ndarray
    positives: np.ndarray
    auroc: np.ndarray
    ap: np.ndarray
    f1: np.ndarray

    def at(self, latents: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Where pairs stand, -1 where they do not meet."""
        n_labels = int(max(self.label.max(initial=0), labels.max(initial=0))) + 1
        keys, wanted = (
            self.latent.astype(np.int64) * n_labels + self.label,
            latents.astype(np.int64) * n_labels + labels,
        )
        places = np.searchsorted(keys, wanted)
        there = (places < len(keys)) & (np.append(keys, -1)[places] == wanted)
        return np.where(there, places, -1)


def label_scores(codes: KeptCodes, labels: LabelSet, reading: Pass | None = None) -> LabelScores:
    """Every latent and label of the same N images, of which all are taken to be known.

    reading: counts the entries of codes.
    """
    parts = []
    for first, last in _blocks(codes, labels):
        part = _block(codes, labels, first, last)
        parts += [] if part is None else [part]
        if reading is not None:
            reading.add(int(codes.offsets_S1[last] - codes.offsets_S1[first]))
    if not parts:
        return LabelScores(*(np.zeros(0, kind) for kind in (np.int32, np.int32, np.int64, float, float, float)))
    return LabelScores(*(np.concatenate(columns) for columns in zip(*parts)))


def without_meeting(
    codes: KeptCodes, labels: LabelSet, latents: np.ndarray, which: np.ndarray
) -> tuple[np.ndarray, ...]:
    """(auroc, ap, f1) of pairs that meet on no image."""
    n, P = codes.n_images, labels.counts_L[which].astype(np.float64)
    Z = n - codes.counts_S[latents]
    both = (n > P) & (P > 0)
    auroc = np.divide(Z - P, 2 * (n - P), out=np.full(len(P), np.nan), where=both)
    return auroc, P / n if n else P, 2 * P / np.maximum(n + P, 1)


def _blocks(codes: KeptCodes, labels: LabelSet) -> Iterator[tuple[int, int]]:
    lengths_N = np.diff(labels.offsets_N1)
    ends_M = np.concatenate([[0], lengths_N[codes.images_M].cumsum()])
    work_S = np.diff(ends_M[codes.offsets_S1])
    return iter(blocks(work_S, _BLOCK_ENTRIES)) if work_S.sum() else iter(())


def _block(codes: KeptCodes, labels: LabelSet, first: int, last: int) -> LabelScores | None:
    """The latents first .. last - 1; None if they meet no label."""
    begin, end = int(codes.offsets_S1[first]), int(codes.offsets_S1[last])
    latent_M, order_M = codes.latents_M[begin:end].astype(np.int64), codes.order_M[begin:end]
    acts_M, images_M = codes.acts_M[order_M], codes.images_M[order_M]  # each latent's largest first
    above_M, through_M = _tied(latent_M, acts_M)
    # Of every positive: its pair, and where its tied group begins and ends.
    lengths_M = np.diff(labels.offsets_N1)[images_M]
    entry_E = np.repeat(np.arange(len(acts_M)), lengths_M)
    within_E = np.arange(len(entry_E)) - np.repeat(lengths_M.cumsum() - lengths_M, lengths_M)
    label_E = labels.labels_M[labels.offsets_N1[images_M[entry_E]] + within_E]
    if not len(entry_E):
        return None
    order = np.argsort(latent_M[entry_E] * len(labels.names) + label_E, kind="stable")  # entries ascend already
    entry_E, label_E = entry_E[order], label_E[order]
    return _reduced(codes, labels, latent_M[entry_E], label_E, above_M[entry_E], through_M[entry_E])


def _tied(latent_M: np.ndarray, acts_M: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of every entry, how many of its latent are above its tied group, and how many through its end."""
    n = len(acts_M)
    new_latent = np.append(True, latent_M[1:] != latent_M[:-1])
    new_group = new_latent | np.append(True, acts_M[1:] != acts_M[:-1])
    starts, groups = np.flatnonzero(new_group), np.cumsum(new_group) - 1
    ends = np.append(starts[1:], n)
    first_M = np.flatnonzero(new_latent)[np.cumsum(new_latent) - 1]
    return starts[groups] - first_M, ends[groups] - first_M


def _reduced(
    codes: KeptCodes,
    labels: LabelSet,
    latent_E: np.ndarray,
    label_E: np.ndarray,
    above_E: np.ndarray,
    through_E: np.ndarray,
) -> LabelScores:
    new_pair = np.append(True, (latent_E[1:] != latent_E[:-1]) | (label_E[1:] != label_E[:-1]))
    new_group = new_pair | np.append(True, above_E[1:] != above_E[:-1])
    starts_Q = np.flatnonzero(new_pair)
    p_Q = np.diff(np.append(starts_Q, len(latent_E)))
    first_E = np.repeat(starts_Q, p_Q)
    group_ends = np.append(np.flatnonzero(new_group)[1:], len(latent_E))
    hits_E = group_ends[np.cumsum(new_group) - 1] - first_E  # positives through the end of the tied group
    latent_Q, label_Q = latent_E[starts_Q], label_E[starts_Q]
    n, n_Q = codes.n_images, codes.counts_S[latent_Q].astype(np.float64)
    P = labels.counts_L[label_Q].astype(np.float64)
    rank_E = np.repeat(n_Q, p_Q) - (above_E + through_E + 1) / 2 + 1  # mid-rank among the active, 1 the smallest
    Z = n - n_Q
    ranks = np.add.reduceat(rank_E, starts_Q) + p_Q * Z + (P - p_Q) * (Z + 1) / 2
    auroc = np.divide(ranks - P * (P + 1) / 2, P * (n - P), out=np.full(len(P), np.nan), where=n > P)
    ap = (np.add.reduceat(hits_E / through_E, starts_Q) + (P - p_Q) * P / n) / P
    f1 = np.maximum.reduceat(2 * hits_E / (through_E + np.repeat(P, p_Q)), starts_Q)
    return LabelScores(latent_Q.astype(np.int32), label_Q, p_Q, auroc, ap, np.maximum(f1, 2 * P / (n + P)))
