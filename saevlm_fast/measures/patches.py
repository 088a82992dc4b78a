"""Latents against labels of patches (masks.py): purity, AUROC, average precision, F1 over the rows of a store.

The measures are those of labels.py, with patches for images. Patches of an image are not independent, so chance is
another: whole masks are given to other images, which leaves every mask's shapes and places as they are. Halves for
choosing and reporting are of whole images too, and only latents that fire on 10 images count in means.
Shape suffixes: R rows (patches), N images, S latents, T times.
"""

from collections.abc import Iterator

import numpy as np
import torch

from saevlm_fast.data.label_sets import LabelSet
from saevlm_fast.data.passes import Pass
from saevlm_fast.data.rows import Activations
from saevlm_fast.measures.codes import CodesGathering, KeptCodes
from saevlm_fast.measures.labels import Chance, beside_null, counted_purity, purity, purity_figures, selection
from saevlm_fast.measures.results import Measured
from saevlm_fast.measures.subjects import Model, codes_of, most_entries
from saevlm_fast.peers import Peers, rows_of_share, shared_chunks


def codes_of_rows(
    model: Model, activations: Activations, batch_rows: int = 4096, peers: Peers | None = None
) -> KeptCodes:
    """Of every row by itself. peers: the ranks that share them. ValueError: they do not fit into memory."""
    n, first = activations.n_rows, rows_of_share(peers, activations.n_rows, batch_rows).start
    gathering = CodesGathering(None, n, len(model.W_dec), "max", most_entries(), first)
    with torch.no_grad():
        for _, x_BD in shared_chunks(peers, activations.chunks, n, batch_rows):
            gathering.add(codes_of(model, x_BD))
    if peers is not None:
        gathering.merge_ranks(peers)
    return gathering.result()


def labels_of_patches(
    codes: KeptCodes,
    labels: LabelSet,
    image_of_row: np.ndarray,
    half_N: np.ndarray,
    n_exchanges: int = 20,
    n_shuffles: int = 3,
) -> Measured:
    """As labels_of_latents, of patches.

    Args:
        codes: of R rows. labels: of the same rows; those of which nothing is known are left out.
        image_of_row: int64 [R], each image's rows together, all images of as many. half_N: bool, of the images.
        n_exchanges: of masks, for chance. n_shuffles: of masks, the whole selection repeated.
    """
    half_R, known_R = half_N[image_of_row], labels.known_N
    mine, theirs = codes.part(known_R), labels.part(known_R)
    exchanged = _exchanges(codes, labels, len(half_N), max(n_exchanges, n_shuffles), half_R)
    reading = Pass(f"labels of patches {labels.name}", (1 + n_shuffles) * len(mine.acts_M), "entries")
    draws, nulls = [], []
    for time, (of_known, of_others, half) in enumerate(exchanged):
        if time < n_exchanges:
            draws.append(counted_purity(of_known, of_others))
        if time < n_shuffles:
            nulls.append(selection(_halves(of_known, half), of_others, half, reading)[0])
    # A latent on few patches may meet unknown ones alone: then it is worth what the most frequent label is.
    base = float(theirs.counts_L.max()) / max(theirs.n_images, 1)
    chance = Chance(np.nan_to_num(np.array(draws), nan=base), np.arange(codes.n_latents))
    images_S = images_of_latents(mine, image_of_row[known_R])
    figures, columns = purity_figures(purity(mine, theirs, chance), mine, theirs, images_S)
    half = half_R[known_R]
    chosen, best = selection(_halves(mine, half), theirs, half, reading)
    figures["selection"] = chosen | beside_null(nulls, "masks exchanged between images")
    figures |= {"labels": len(labels.names), "patches": int(known_R.sum()), "left_out": int((~known_R).sum())}
    figures |= {"images": len(np.unique(image_of_row[known_R])), "chance_is": "masks exchanged between images"}
    named = columns | best | {"images": images_S}
    return Measured(figures, {f"{name}:{labels.name}": column for name, column in named.items()})


def _halves(codes: KeptCodes, half_R: np.ndarray) -> tuple[KeptCodes, KeptCodes]:
    return codes.part(half_R), codes.part(~half_R)


def _exchanges(
    codes: KeptCodes, labels: LabelSet, n_images: int, times: int, half_R: np.ndarray
) -> Iterator[tuple[KeptCodes, LabelSet, np.ndarray]]:
    """(codes, labels, half) of the rows that are known once whole masks have gone to other images."""
    generator = np.random.default_rng(0)
    rows_NP = np.arange(labels.n_images).reshape(n_images, -1)
    for _ in range(times):
        given = labels.taken(rows_NP[generator.permutation(n_images)].reshape(-1))
        known_R = given.known_N
        yield codes.part(known_R), given.part(known_R), half_R[known_R]


def images_of_latents(codes: KeptCodes, image_of_row: np.ndarray) -> np.ndarray:
    """int64 [S]: on how many images each latent fires, of its rows."""
    images_M, latents_M = image_of_row[codes.images_M], codes.latents_M
    new_M = np.append(True, (images_M[1:] != images_M[:-1]) | (latents_M[1:] != latents_M[:-1]))
    return np.bincount(latents_M[new_M[: len(latents_M)]], minlength=codes.n_latents)
