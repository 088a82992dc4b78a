"""cross_modal: the omegas of an SAE's latents and the scores of a store's image-text pairs, in two passes.

    first pass     of every latent the K tokens of each modality where it fires most
    omegas         from the residual streams of these tokens alone (crossmodal/omega.py)
    second pass    pairs, as soon as they are whole (crossmodal/samples.py)

Memory: 32 K bytes a latent, some numbers a pair, and a chunk of rows, however large the store is.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from saevlm_fast.config import keyword_settings
from saevlm_fast.config.crossmodal import CrossModalSettings
from saevlm_fast.crossmodal.controls import random_scores, shuffled_omegas
from saevlm_fast.crossmodal.omega import TopTokens, omegas
from saevlm_fast.crossmodal.patches import Patches
from saevlm_fast.crossmodal.samples import PairScores, auroc, auroc_interval, kept_pairs
from saevlm_fast.crossmodal.tokens import check_language_store, token_chunks
from saevlm_fast.data.rows import Activations
from saevlm_fast.data.store import TOKEN_SCHEMA
from saevlm_fast.errors import check_kind, require, whole_number
from saevlm_fast.images.pairs import is_wrong
from saevlm_fast.runtime import exact_defaults
from saevlm_fast.sae import SparseAutoencoder
from saevlm_fast.scoring.encoding import n_latents

SCORES = ("cosine", "co_occurrence", "count")
CONTROLS = ("random", "shuffled", "n_text", "clip")


@dataclass(frozen=True, eq=False)
class CrossModal:
    """What SAE-V says of S latents and P pairs.

    Attributes:
        omega_S: float64, NaN for unimodal latents. text, image: their top tokens. ids: of the pairs.
        columns: name -> [P]: SCORES, n_text, n_image, random, shuffled; kept (bool); clip, if it was asked for.
        wrong_P: bool, which captions are wrong, if the store says that some are; else None.
    """

    omega_S: np.ndarray
    text: TopTokens
    image: TopTokens
    ids: list[str]
    columns: dict[str, np.ndarray]
    wrong_P: np.ndarray | None

    def with_clip(self, clip_P: np.ndarray) -> "CrossModal":
        """With a CLIP's image-text cosines as a further control."""
        columns = self.columns | {"clip": clip_P}
        return CrossModal(self.omega_S, self.text, self.image, self.ids, columns, self.wrong_P)

    def detection(self, seed: int = 0) -> dict[str, dict[str, Any]]:
        """How well each score tells right pairs from wrong ones: name -> auroc, interval (bootstrap over pairs).

        Empty without wrong captions, or right ones. Pairs that a CLIP could not read are left out of its number.
        """
        if self.wrong_P is None or self.wrong_P.all() or not self.wrong_P.any():
            return {}
        found = {}
        for name in (*SCORES, *CONTROLS):
            if name in self.columns:
                there = ~np.isnan(self.columns[name].astype(float))
                scores, wrong = self.columns[name][there].astype(float), self.wrong_P[there]
                if wrong.all() or not wrong.any():
                    continue
                interval = auroc_interval(scores, wrong, seed)
                found[name] = {"auroc": auroc(scores, wrong), "interval": list(interval)}
        return found

    def samples_table(self) -> pa.Table:
        """A row a pair."""
        wrong = {} if self.wrong_P is None else {"wrong": pa.array(self.wrong_P)}
        return pa.table({"image": self.ids, **{name: pa.array(x) for name, x in self.columns.items()}, **wrong})

    def latents_table(self, activations: Activations) -> pa.Table:
        """A row a latent: omega (null for unimodal ones), rows on which it fires, and its top tokens."""
        return pa.table(
            {
                "latent": pa.array(np.arange(len(self.omega_S))),
                "omega": pa.array(self.omega_S, from_pandas=True),
                "n_text": pa.array(self.text.n_S),
                "n_image": pa.array(self.image.n_S),
                "text": _told(activations, self.text, "text"),
                "text_images": _told(activations, self.text, "image"),
                "image_images": _told(activations, self.image, "image"),
                "image_tokens": _told(activations, self.image, "token"),
            }
        )


def _told(activations: Activations, tops: TopTokens, column: str) -> pa.Array:
    """Of every latent what the items say of its top rows, the strongest first."""
    there = tops.row_SK >= 0
    rows = tops.row_SK[there]
    known, places = np.unique(rows, return_inverse=True)
    values = activations.items(torch.from_numpy(known), TOKEN_SCHEMA)[column].combine_chunks()
    offsets = np.concatenate([[0], np.cumsum(there.sum(1))]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), values.take(pa.array(places.reshape(-1))))


@exact_defaults()
def cross_modal(
    activations: Activations,
    sae: SparseAutoencoder,
    *,
    batch_rows: int = 4096,
    on_rows: Callable[[int], None] = lambda done: None,
    on_patches: Callable[[Patches], None] = lambda patches: None,
    **settings: Any,
) -> CrossModal:
    """SAE-V's measures of an SAE on a store of language tokens (arXiv 2502.17514; docs/how-to/cross-modal.md).

        found = cross_modal(open_activations("pairs"), sae, top=5, keep=0.5)
        found.omega_S, found.columns["cosine"], found.columns["kept"]

    Args:
        activations: a store of `harvest --point language --tokens all`.
        on_rows: called after every chunk with the rows done, of twice as many as there are.
        on_patches: given the image tokens of whole pairs, and their scores.
        settings: fields of CrossModalSettings by name, as top=5, threshold=1.0, template=True, by="count".

    Raises:
        ValueError: rows without modalities or with one alone, an SAE of another width, a setting that does not exist.
    """
    check_kind("activations", activations, Activations, "Activations, as open_activations gives them")
    (given,) = keyword_settings("cross_modal", settings, CrossModalSettings)
    config = CrossModalSettings(**given)
    batch_rows = whole_number("batch_rows", batch_rows)
    check_kind("sae", sae, SparseAutoencoder, "a SparseAutoencoder")
    check_language_store(activations)
    d_sae = n_latents(activations, sae)
    text, image = TopTokens(d_sae, config.top), TopTokens(d_sae, config.top)
    for done, chunk in _counted(activations, sae, batch_rows, config.template):
        for tops, rows_N in ((text, chunk.text_N), (image, chunk.image_N)):
            of_it = rows_N[chunk.row_M]
            tops.add(chunk.act_M[of_it], chunk.latent_M[of_it], chunk.row_M[of_it] + chunk.first)
        on_rows(done)
    for name, tops in (("text", text), ("image", image)):
        require(bool(tops.n_S.any()), f"activations: {activations.path}: no latent fires on a token of its {name}s")
    most = max(float(tops.act_SK.max()) for tops in (text, image))
    below = f"threshold: {config.threshold:g} is above every activation in {activations.path}, of which the largest is"
    require(most > config.threshold, f"{below} {most:.4g}")
    omega_S = omegas(activations, text, image)
    if config.by == "cosine":
        _check_scored(omega_S, text, image)
    scores = PairScores(omega_S, shuffled_omegas(omega_S, config.seed), config.threshold, on_patches, config.seed)
    for done, chunk in _counted(activations, sae, batch_rows, config.template):
        scores.add(chunk)
        on_rows(activations.n_rows + done)
    columns = scores.finish()
    columns["random"] = random_scores(len(scores.ids), config.seed)
    columns["kept"] = kept_pairs(columns[config.by], config.keep, columns["random"])
    return CrossModal(omega_S, text, image, scores.ids, columns, _wrong(activations, scores.ids))


def _check_scored(omega_S: np.ndarray, text: TopTokens, image: TopTokens) -> None:
    """ValueError: no latent has an omega, so that all cosines would be 0, and what is kept left to chance."""
    most = int(np.minimum(text.n_S, image.n_S).max())
    k = text.row_SK.shape[1]
    none = f"top: {k}: no latent fires on {k} text and {k} image tokens, {most} is the most, so that there is no omega"
    require(not np.isnan(omega_S).all(), f"{none} to rank pairs by; take fewer, or --by count")


def _counted(activations: Activations, sae: SparseAutoencoder, batch_rows: int, template: bool) -> Any:
    """Every chunk with the rows that are done with it."""
    for chunk in token_chunks(activations, sae, batch_rows, template):
        yield chunk.first + len(chunk.text_N), chunk


def _wrong(activations: Activations, ids: list[str]) -> np.ndarray | None:
    """Which captions are wrong, by what the harvest recorded."""
    source = activations.source or {}
    images = source.get("images")
    share = images.get("wrong_captions", 0) if isinstance(images, dict) else 0
    seed = source.get("seed", 0)
    if not isinstance(share, int | float) or not share or not isinstance(seed, int):
        return None
    return np.array([is_wrong(name, float(share), seed) for name in ids], bool)
