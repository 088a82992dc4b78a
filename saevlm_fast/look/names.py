"""A name for every latent: the nearest words of a vocabulary by a CLIP's own text tower, held against chance.

The direction of a latent and the score of a word are those of scoring/naming.py. Any direction has a nearest word, so a
best score means little by itself. The control: the same activations, each on another image (one random order of the
images), give directions of no latent, and theirs have nearest words too. A latent has a name of its own where its best
word scores above all but one in twenty of the control's.

Shape suffixes: S latents, L chosen ones, C of the control, E embedding, M words.
"""

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from saevlm_fast.data.codes import StoredCodes
from saevlm_fast.data.rows import Activations
from saevlm_fast.errors import require
from saevlm_fast.sae import SparseAutoencoder
from saevlm_fast.scoring.encoding import n_latents
from saevlm_fast.scoring.image_rows import ImageTable, image_chunks, image_table
from saevlm_fast.scoring.monosemanticity import StreamedScore
from saevlm_fast.scoring.naming import Name, Words, latent_directions, nearest_words, read_words
from saevlm_fast.scoring.source import Pool
from saevlm_fast.sparse_codes import SparseCodes
from saevlm_fast.towers.text import TextEncoder

BUILT_IN = Path(__file__).parent / "assets" / "words.txt"
N_CONTROL = 1024
CHANCE = 0.05


@dataclass(frozen=True)
class Pointed:
    """Directions [S, E] of latents and [C, E] of the control; scores of the latents; n_active_S: images of each."""

    directions_SE: Tensor
    control_CE: Tensor
    sums: StreamedScore
    n_active_S: Tensor


@dataclass(frozen=True)
class Named:
    """Names of all S latents.

    Attributes:
        names: of each, the nearest first; none for a latent without a direction.
        chance_S: share of the control's directions whose best word scores as high; NaN without a direction.
        floor: the control's best score that one in twenty exceeds. control: best words of its directions.
        n_active_S: images on which each latent fires.
    """

    names: list[list[Name]]
    chance_S: np.ndarray
    floor: float
    control: list[Name]
    n_active_S: Tensor

    def own(self, latent: int) -> str | None:
        """The latent's name, if it has one of its own."""
        return self.names[latent][0].word if self.chance_S[latent] <= CHANCE else None

    def table(self, n: int) -> pa.Table:
        """Columns latent, name (null without one of its own), score, margin, chance, n_active, word_1, score_1 ..."""
        none = Name("", float("nan"))
        columns = [[each[i] if i < len(each) else none for each in self.names] for i in range(max(n, 2))]
        first, second = (np.array([name.score for name in column]) for column in columns[:2])
        table = {
            "latent": pa.array(range(len(self.names)), pa.int64()),
            "name": pa.array([self.own(latent) for latent in range(len(self.names))], pa.string()),
            "score": pa.array(first),
            "margin": pa.array(first - second),
            "chance": pa.array(self.chance_S),
            "n_active": pa.array(self.n_active_S.numpy()),
        }
        for i, column in enumerate(columns[:n], 1):
            table[f"word_{i}"] = pa.array([name.word or None for name in column], pa.string())
            table[f"score_{i}"] = pa.array([name.score for name in column])
        return pa.table(table)


def point(
    rows: Activations | StoredCodes,
    sae: SparseAutoencoder | None,
    embeddings: Activations,
    pool: Pool = "max",
    *,
    batch_rows: int = 4096,
    seed: int = 0,
    on_images: Callable[[int], None] = lambda done: None,
) -> Pointed:
    """Directions of all latents in the space of the embeddings, and of the control, in one pass.

    Args:
        rows: activations with their SAE, or codes; several rows of an image are one image (`pool`).
        embeddings: one row an image, the same images in the same order.
        seed: of the control's order of images, and of the latents that it takes: at most N_CONTROL.

    Raises:
        ValueError: other images than the rows', and what image_rows and StreamedScore refuse.
    """
    size, table = n_latents(rows, sae), image_table(rows)
    check_same_images(table, embeddings, str(rows.path))
    random = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(table.n_images, generator=random)
    control = torch.randperm(size, generator=random)[:N_CONTROL].sort().values
    sums, by_chance = StreamedScore(size), StreamedScore(len(control))
    n_active_S = torch.zeros(size, dtype=torch.int64)
    with closing(image_chunks(rows, sae, table, pool, batch_rows)) as chunks:
        for chunk in chunks:
            end = chunk.first + chunk.codes.n_rows
            sums.update(chunk.codes, embeddings.rows(torch.arange(chunk.first, end)))
            by_chance.update(_only(chunk.codes, control), embeddings.rows(shuffled[chunk.first : end]))
            n_active_S += torch.bincount(chunk.codes.csr()[1], minlength=size)
            on_images(end)
    return Pointed(latent_directions(sums), latent_directions(by_chance), sums, n_active_S)


def check_same_images(table: ImageTable, embeddings: Activations, where: str) -> None:
    """ValueError: another number of images, or other images, naming the first."""
    n = table.n_images
    require(embeddings.n_rows == n, f"embeddings: {embeddings.n_rows} rows ({embeddings.path}), {n} images in {where}")
    if table.ids is None or not embeddings.has_items:
        return
    theirs = pa.chunked_array([part for each in embeddings.iter_items() for part in each["image"].chunks])
    same = pa.chunked_array([table.ids]).equals(theirs)
    if not same:
        i = next(i for i in range(n) if table.ids[i] != theirs[i])
        message = f"row {i} is image {theirs[i].as_py()!r} ({embeddings.path}), but {table.name(i)!r} in {where}"
        raise ValueError(f"embeddings: {message}; row i must be the i-th image")


def _only(codes: SparseCodes, latents_C: Tensor) -> SparseCodes:
    """The codes of some latents, renumbered."""
    acts_M, latents_M, _ = codes.csr()
    slots_S = torch.full((codes.d_sae,), -1)
    slots_S[latents_C] = torch.arange(len(latents_C))
    kept_M = slots_S[latents_M] >= 0
    per_row = torch.bincount(codes.entry_rows()[kept_M], minlength=codes.n_rows)
    offsets = torch.nn.functional.pad(per_row.cumsum(0), (1, 0))
    return SparseCodes.from_flat(acts_M[kept_M], slots_S[latents_M[kept_M]], offsets, len(latents_C))


def vocabulary(path: Path | None, template: str) -> Words:
    """The words of a file, one a line, or the built-in ones. ValueError: as read_words."""
    return read_words(BUILT_IN if path is None else path, template)


def known_words(words: Words, encoder: TextEncoder) -> tuple[Words, int]:
    """The words that the model can read, and how many it cannot.

    Raises:
        ValueError: fewer than 2 are left.
    """
    kept = [i for i, text in enumerate(words.texts) if readable(encoder, text)]
    require(len(kept) >= 2, f"words: {encoder.spec} knows {len(kept)} of {len(words.words)}; at least 2 are needed")
    chosen = Words([words.words[i] for i in kept], [words.texts[i] for i in kept])
    return chosen, len(words.words) - len(kept)


def readable(encoder: TextEncoder, text: str) -> bool:
    """Whether a text is neither too long nor has a word that the tokenizer does not know."""
    ids = encoder.token_ids(text)
    return len(ids) <= encoder.max_tokens and encoder.unknown not in ids


def name_latents(pointed: Pointed, encoder: TextEncoder, words: Words, n: int) -> Named:
    """The n nearest words of every latent, and how they stand against the control's.

    Raises:
        ValueError: embeddings and texts of different widths; as nearest_words.
    """
    texts_ME = encoder.embed(words.texts)
    ours, theirs = pointed.directions_SE.shape[1], texts_ME.shape[1]
    require(
        ours == theirs,
        f"embeddings: {ours} wide, but texts of {encoder.spec} are {theirs} wide; "
        "needed are the images' embeddings by the same model (harvest --point projection)",
    )
    names = nearest_words(pointed.directions_SE, texts_ME, words.words, max(n, 2))
    control = [each[0] for each in nearest_words(pointed.control_CE, texts_ME, words.words, 1) if each]
    best_C = np.sort([name.score for name in control])
    best_S = np.array([each[0].score if each else np.nan for each in names])
    above_S = len(best_C) - np.searchsorted(best_C, best_S, side="left")
    # One is added to both, so that no chance is 0: of C directions at most 1 in C + 1 can be told.
    chance_S = np.where(np.isnan(best_S), np.nan, (above_S + 1) / (len(best_C) + 1))
    floor = float(np.quantile(best_C, 1 - CHANCE)) if len(best_C) else float("nan")
    return Named(names, chance_S, floor, control, pointed.n_active_S)
