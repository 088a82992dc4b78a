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
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saevlm_fast.activations import Activations
from saevlm_fast.codes import CodeRows, Codes, codes_of_rows
from saevlm_fast.config import require
from saevlm_fast.kernels.grouping import entry_rows
from saevlm_fast.monosemanticity import StreamedScore, checked_ids
from saevlm_fast.sae import SparseAutoencoder, evaluating

_SAME = 1e-12  # shorter differences of unit vectors are rounding
_SIMILARITIES_AT_ONCE = 1 << 24

# --- the images on which a latent is most active ---


class TopImages(NamedTuple):
    """Of one latent, the most active first: images int64 [<= n], the numbers of their rows; acts float32 [<= n]."""

    images: Tensor
    acts: Tensor


def top_images(
    activations: Activations | Codes,
    latents: Sequence[int] | Tensor,
    n: int,
    sae: SparseAutoencoder | None = None,
    *,
    batch_rows: int = 4096,
    on_rows: Callable[[int], None] = lambda done: None,
) -> list[TopImages]:
    """The n images on which each of `latents` is most active, in one pass; of equally active ones the earlier first.

    Memory: len(latents) * n, and one chunk of rows.

    Args:
        activations, sae: as for monosemanticity.score: row i is image i; codes, activations with an SAE, or
            activations alone, whose neurons are then meant.
        latents: L different numbers. Only images on which a latent fires count, so it may have fewer than n; a raw
            neuron has the n largest activations, whatever their sign.
        on_rows: called with the number of images done.

    Raises:
        ValueError: latents that are not there or listed twice, n below 1, an SAE of another width, several rows of one
            image.
    """
    require(n >= 1, f"n: {n} must be at least 1")
    latents_L = torch.as_tensor(latents, dtype=torch.int64)
    slot_of_latent_S = _slots(latents_L, _n_latents(activations, sae))
    best = _Best(len(latents_L), n)
    for (start, rows), _ in zip(_encoded(activations, sae, batch_rows), checked_ids(batch_rows, activations)):
        if isinstance(rows, CodeRows):
            acts_M, slots_M, images_M = _chosen_entries(rows, slot_of_latent_S)
            n_rows = rows.n_rows
        else:
            acts_M, slots_M, images_M = _top_of_columns(rows[:, latents_L], n)
            n_rows = len(rows)
        best.add(acts_M, slots_M, images_M + start)
        on_rows(start + n_rows)
    return best.result()


def _n_latents(activations: Activations | Codes, sae: SparseAutoencoder | None) -> int:
    if isinstance(activations, Codes):
        require(sae is None, "sae: codes are encoded already; give activations or no SAE")
        return activations.d_sae
    d_in = sae.config.d_in if sae else activations.d
    require(d_in == activations.d, f"sae: d_in is {d_in}, but the activations have width {activations.d}")
    return sae.config.d_sae if sae else activations.d


def _slots(latents_L: Tensor, n_latents: int) -> Tensor:
    """Where each of the S latents stands in latents_L; -1 for those that are not chosen."""
    outside_L = (latents_L < 0) | (latents_L >= n_latents)
    bad = int(latents_L[outside_L][0]) if bool(outside_L.any()) else 0
    require(not bool(outside_L.any()), f"latents: {bad} is not within 0 to {n_latents - 1}")
    slots_S = torch.full((n_latents,), -1)
    slots_S[latents_L] = torch.arange(len(latents_L))
    n_different = int((slots_S >= 0).sum())
    require(n_different == len(latents_L), f"latents: {len(latents_L)} are listed, but only {n_different} differ")
    return slots_S


def _encoded(
    activations: Activations | Codes, sae: SparseAutoencoder | None, batch_rows: int
) -> Iterator[tuple[int, CodeRows | Tensor]]:
    """(first row, codes or dense activations [B, S]) of every chunk, on the host."""
    chunks: Generator[tuple[Any, ...], None, None] = activations.chunks(batch_rows)
    with closing(chunks):
        for start, *rows in chunks:
            if len(rows) == 3:
                yield start, CodeRows(*rows)
            elif sae is None:
                yield start, rows[0]
            else:
                with evaluating(sae), torch.inference_mode():
                    codes = codes_of_rows(sae.encode(rows[0].to(sae.b_dec)))
                yield start, CodeRows(codes.acts.cpu().float(), codes.latents.cpu(), codes.row_offsets.cpu())


def _chosen_entries(codes: CodeRows, slot_of_latent_S: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(acts, slots, rows) of the chosen latents where they fire, rows ascending."""
    rows_M, slots_M = entry_rows(codes.latents, codes.row_offsets), slot_of_latent_S[codes.latents]
    kept_M = (rows_M < codes.n_rows) & (slots_M >= 0) & (codes.acts > 0)
    return codes.acts[kept_M], slots_M[kept_M], rows_M[kept_M]


def _top_of_columns(acts_BL: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """(acts, slots, rows) of the n largest of every column; a stable sort, so of equal ones the first rows."""
    acts_BL, rows_BL = acts_BL.sort(dim=0, descending=True, stable=True)
    acts_BL, rows_BL = acts_BL[:n], rows_BL[:n]
    slots_BL = torch.arange(acts_BL.shape[1]).expand_as(rows_BL)
    return acts_BL.flatten(), slots_BL.flatten(), rows_BL.flatten()


class _Best:
    """The n largest activations of each of L slots so far, sorted by slot, activation descending, image ascending."""

    def __init__(self, n_slots: int, n: int):
        self.n_slots, self.n = n_slots, n
        self.acts_M, self.slots_M = torch.empty(0), torch.empty(0, dtype=torch.int64)
        self.images_M = torch.empty(0, dtype=torch.int64)

    def add(self, acts_M: Tensor, slots_M: Tensor, images_M: Tensor) -> None:
        """Later images than any before; in one slot, equal activations in the order of their images."""
        acts_M, slots_M = torch.cat([self.acts_M, acts_M]), torch.cat([self.slots_M, slots_M])
        images_M = torch.cat([self.images_M, images_M])
        # Two stable sorts: what is equal in slot and activation stays in the order of images.
        order_M = acts_M.argsort(descending=True, stable=True)
        order_M = order_M[slots_M[order_M].argsort(stable=True)]
        slots_M = slots_M[order_M]
        ends_L = torch.bincount(slots_M, minlength=self.n_slots).cumsum(0)
        starts_L = torch.nn.functional.pad(ends_L[:-1], (1, 0))
        kept_M = torch.arange(len(slots_M)) - starts_L[slots_M] < self.n
        self.slots_M, order_M = slots_M[kept_M], order_M[kept_M]
        self.acts_M, self.images_M = acts_M[order_M], images_M[order_M]

    def result(self) -> list[TopImages]:
        counts = torch.bincount(self.slots_M, minlength=self.n_slots).tolist()
        return [TopImages(*pair) for pair in zip(self.images_M.split(counts), self.acts_M.split(counts))]


# --- where a latent points ---


def latent_directions(scores: StreamedScore) -> Tensor:
    """Unit directions of every latent in the space of the embeddings, [S, E] float64 on the CPU (see the module).

    Args:
        scores: cosine sums of all images: `monosemanticity.accumulate`, so one pass gives scores and names. The
            embeddings must be the projections of the CLIP whose text tower is asked for words.

    Rows are zero where there is no direction: latents whose score is undefined, embeddings that are all the same.
    ValueError: sums of another similarity.
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


def scene_words() -> Words:
    """Every value of every factor of the box's scenes: "red" as "a red thing", "teal" as "a scene on teal"."""
    from saevlm_fast.box_evaluation import value_prompts
    from saevlm_fast.scenes import VALUES

    words = [word for values in VALUES.values() for word in values]
    return Words(words, [text for factor in VALUES for text in value_prompts(factor)])


def read_words(path: str | os.PathLike[str], template: str = "a photo of {}") -> Words:
    """A list of words from a UTF-8 file, one a line; empty lines and repeated words are left out.

    ValueError: a file that cannot be read, has no words, or a template without {}.
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
        directions_LE: rows of latent_directions; one that is zero gets no words.
        texts_ME: text_models.TextEncoder.embed of all candidates, in the order of `words`.
        words: M names.

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
        [Name(words[m], score) for m, score in zip(*pair)] if has_direction else []
        for has_direction, *pair in zip(pointing, order, scores)
    ]
