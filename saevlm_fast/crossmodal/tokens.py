"""The rows of a store of language tokens, chunk by chunk: what fires in them, and which are text and which image.

Shape suffixes: N rows of a chunk, M entries of its codes.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from saevlm_fast.data.rows import Activations
from saevlm_fast.data.store import TOKEN_SCHEMA
from saevlm_fast.errors import require
from saevlm_fast.sae import SparseAutoencoder
from saevlm_fast.scoring.encoding import encoded_chunks
from saevlm_fast.sparse_codes import SparseCodes

MODALITIES = ("text", "image")


class Chunk(NamedTuple):
    """Rows first .. first + N - 1 of the store.

    text_N, image_N: bool, which rows count as such. sample_N: int64, numbers of the pairs, from 0. ids: of the pairs
    that begin here. act_M (float64), latent_M, row_M: what fires above 0, row_M counted within the chunk.
    """

    first: int
    text_N: np.ndarray
    image_N: np.ndarray
    sample_N: np.ndarray
    ids: list[str]
    act_M: np.ndarray
    latent_M: np.ndarray
    row_M: np.ndarray


def check_language_store(activations: Activations) -> None:
    """ValueError: rows that are not those of --point language with all tokens."""
    needed = "cross-modal reads a store of harvest --point language --tokens all"
    require(activations.has_items, f"activations: {activations.path}: a matrix has no modality of its rows; {needed}")
    source = activations.source or {}
    modality = next(iter(activations.iter_items(TOKEN_SCHEMA)))["modality"]
    told = len(modality) == 0 or modality.null_count == 0
    require(told, f"activations: {activations.path}: its rows have no modality (point {source.get('point')}); {needed}")
    tokens = source.get("tokens", "all")
    require(tokens == "all", f"activations: {activations.path}: holds tokens {tokens}, one modality alone; {needed}")


def token_chunks(activations: Activations, sae: SparseAutoencoder, batch_rows: int, template: bool) -> Iterator[Chunk]:
    """The store in order; what an SAE of inference makes of it."""
    n_samples, last = 0, None
    items = activations.item_chunks(batch_rows, TOKEN_SCHEMA)
    for (first, codes), table in zip(encoded_chunks(activations, sae, batch_rows), items):
        assert isinstance(codes, SparseCodes)
        names = table["image"].combine_chunks().dictionary_encode()
        modality = table["modality"]
        text = pc.is_in(modality, pa.array(["text", "template"] if template else ["text"]))
        places = np.asarray(names.indices)
        begins = np.flatnonzero(np.diff(places, prepend=-1))
        ids = [names.dictionary[int(places[i])].as_py() for i in begins]
        goes_on = bool(ids) and ids[0] == last
        starts = np.zeros(len(places), np.int64)
        starts[begins] = 1
        sample_N = n_samples - 1 + np.cumsum(starts) - goes_on
        new = ids[1:] if goes_on else ids
        n_samples, last = n_samples + len(new), ids[-1] if ids else last
        acts_M, latents_M, _ = codes.csr()
        row_M = codes.entry_rows().cpu().numpy()
        act_M, latent_M = acts_M.double().cpu().numpy(), latents_M.cpu().numpy()
        fires = (act_M > 0) & (row_M < len(places))
        yield Chunk(
            first,
            np.asarray(text.combine_chunks()),
            np.asarray(pc.equal(modality, "image").combine_chunks()),
            sample_N,
            new,
            act_M[fires],
            latent_M[fires],
            row_M[fires],
        )
