"""What a latent is about: the images on which it is most active, and the nearest words in the shared space of a CLIP.

The direction of latent k in that space is sum_i r_ik e_i / sum_i r_ik - mean_i e_i with unit image embeddings e_i and
the score's weights r_ik: where the images it stands for lie, as seen from the average image. (This is, up to length,
the covariance of activation and embedding, so raw neurons with activations of any sign have one, too.) A word's score
is the cosine of the direction and its text embedding, less the mean of that over all candidate words.

Both means must go: in a CLIP all images lie in one narrow cone and all texts in another (the modality gap, arXiv
2203.02053), and what all pairs share would hide what sets this latent apart from other images, and this word from the
other candidates (arXiv 2402.10376 centres for this reason). Names are relative to the list. Centred texts are not
scaled to length 1 again: that magnifies texts near the mean, which say little (measured on scenes: fewer right names).

Shape suffixes: N images, S latents or neurons, L chosen ones, E embedding, M entries, in nearest_words words.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from saevlm_fast.errors import require
from saevlm_fast.scoring.monosemanticity import StreamedScore

_SAME = 1e-12  # shorter differences of unit vectors are rounding
_SIMILARITIES_AT_ONCE = 1 << 24

# --- where a latent points ---


def latent_directions(scores: StreamedScore) -> Tensor:
    """Unit directions of every latent in the space of the embeddings, [S, E] float64 on the CPU (see the module).

    Args:
        scores: cosine sums of all images: `monosemanticity.streamed_score`, so one pass gives scores and names. The
            embeddings must be the projections of the CLIP whose text tower is asked for words.

    Rows are zero where there is no direction: latents whose score is undefined, embeddings that are all the same.

    Raises:
        ValueError: sums of another similarity, or of no images.
    """
    require(scores.similarity == "cosine", f"similarity: names need cosine sums, not {scores.similarity}")
    offsets_SE = (scores.mean_embedding() - scores.mean_of_images()).nan_to_num(0.0)
    return _unit(offsets_SE.cpu())


def _unit(vectors_SE: Tensor) -> Tensor:
    lengths_S1 = vectors_SE.norm(dim=1, keepdim=True)
    return torch.where(lengths_S1 > _SAME, vectors_SE / lengths_S1, 0.0)


# --- candidate words ---


class Words(NamedTuple):
    """M candidate names, and the text by which the text tower is told of each."""

    words: list[str]
    texts: list[str]


def read_words(path: str | os.PathLike[str], template: str = "a photo of {}") -> Words:
    """A list of words from a UTF-8 file, one a line; empty lines and repeated words are left out.

    Args:
        path: the file. template: what the text tower is told of a word, at {}.

    Raises:
        ValueError: a file that cannot be read or has no words, a template without {}.
    """
    require("{}" in template, f"template: {template!r} has no {{}}")
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"words: {path} cannot be read: {error}") from error
    words = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    require(len(words) > 0, f"words: {path} has no words, one a line")
    return Words(words, [template.replace("{}", word) for word in words])


# --- the nearest words ---


class Name(NamedTuple):
    """A word, and by how much its cosine with the latent's direction exceeds the average candidate's."""

    word: str
    score: float


def nearest_words(directions_LE: Tensor, texts_ME: Tensor, words: Sequence[str], n: int) -> list[list[Name]]:
    """The n words nearest to each direction, the nearest first; of equally near ones the earlier in the list.

    Args:
        directions_LE: rows of latent_directions [L, E]; one that is zero gets no words.
        texts_ME: embeddings [M, E] of all candidates' texts by towers.text.TextEncoder.embed, in the order of `words`.
        words: M names. n: how many of them each direction gets at most.

    Raises:
        ValueError: shapes that do not fit, fewer than 2 words (names are relative to the other candidates), n below 1,
            a text embedding that is zero or not finite.
    """
    require(n >= 1, f"n: {n} must be at least 1")
    require(len(words) >= 2, f"words: {len(words)} given; at least 2 are needed to compare")
    expected = (len(words), directions_LE.shape[1])
    require(
        tuple(texts_ME.shape) == expected,
        f"texts: shape {list(texts_ME.shape)} is not {list(expected)}, one row a word, as wide as the images' space",
    )
    texts_ME = texts_ME.double()
    lengths_M1 = texts_ME.norm(dim=1, keepdim=True)
    bad_M = ~(lengths_M1[:, 0].isfinite() & (lengths_M1[:, 0] > 0))
    require(
        not bool(bad_M.any()), f"texts: the embedding of {words[int(bad_M.int().argmax())]!r} is zero, NaN or infinite"
    )
    texts_ME = texts_ME / lengths_M1
    texts_ME -= texts_ME.mean(dim=0)
    blocks = directions_LE.double().split(max(1, _SIMILARITIES_AT_ONCE // len(words)))
    return [names for block in blocks for names in _names(block, texts_ME, words, n)]


def _names(directions_LE: Tensor, texts_ME: Tensor, words: Sequence[str], n: int) -> list[list[Name]]:
    scores_LM, order_LM = (directions_LE @ texts_ME.T).sort(dim=1, descending=True, stable=True)
    pointing = directions_LE.any(dim=1).tolist()
    scores, order = scores_LM[:, :n].tolist(), order_LM[:, :n].tolist()
    return [
        [Name(words[int(m)], score) for m, score in zip(order_n, scores_n)] if has_direction else []
        for has_direction, order_n, scores_n in zip(pointing, order, scores)
    ]
