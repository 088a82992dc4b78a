"""What is scored and shown: the latents of an SAE, those of stored codes, or raw neurons, chunk by chunk."""

from collections.abc import Generator
from contextlib import closing

from torch import Tensor

from saevlm_fast.data.codes import StoredCodes
from saevlm_fast.data.rows import Activations
from saevlm_fast.errors import require
from saevlm_fast.sae import SparseAutoencoder, check_sae, inferred
from saevlm_fast.sparse_codes import SparseCodes


def n_latents(activations: Activations | StoredCodes, sae: SparseAutoencoder | None) -> int:
    """How many latents, or neurons without an SAE, there are.

    Raises:
        ValueError: an SAE of another width, or for codes, which are encoded already.
    """
    if sae is not None:
        check_sae(sae)
    if isinstance(activations, StoredCodes):
        require(sae is None, "sae: codes are encoded already; give activations or no SAE")
        return activations.d_sae
    d_in = sae.config.d_in if sae else activations.d
    require(d_in == activations.d, f"sae: d_in is {d_in}, but the activations have width {activations.d}")
    return sae.config.d_sae if sae else activations.d


def encoded_chunks(
    activations: Activations | StoredCodes, sae: SparseAutoencoder | None, batch_rows: int
) -> Generator[tuple[int, SparseCodes | Tensor], None, None]:
    """(first row, codes [<= batch_rows, d_sae] or raw neurons [<= batch_rows, d_in]) of every chunk, in order.

    Codes of an SAE are those of inference, on its device and in its dtype; what is read is float32 on the host.
    """
    with closing(activations.chunks(batch_rows)) as chunks:
        for start, values in chunks:
            yield start, values if sae is None or isinstance(values, SparseCodes) else inferred(sae, values)
