"""What is measured: SAEs, and controls that are asked in the same way; and the one pass in which their codes are made.

Shape suffixes: B rows of a chunk, D d_in, S latents, N images.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from saevlm_fast.data.rows import Activations
from saevlm_fast.errors import require
from saevlm_fast.measures.codes import CodesGathering, KeptCodes
from saevlm_fast.measures.reconstruction import ReconstructionSums
from saevlm_fast.peers import Peers, rows_of_share, shared_chunks
from saevlm_fast.sae import SparseAutoencoder, inferred
from saevlm_fast.scoring.source import Pool
from saevlm_fast.sparse_codes import SparseCodes
from saevlm_fast.training.memory import free_memory

_ENTRY_BYTES = 24  # while entries are sorted


class Centroids:
    """Clusters as a code: the nearest one fires, by exp(-distance^2 / spread), and reconstructs as itself.

    centers_SD: float32. spread: the mean squared distance of a row to its center. mean_D: of the rows.
    """

    W_enc: Tensor | None = None

    def __init__(self, centers_SD: Tensor, spread: float, mean_D: Tensor) -> None:
        self.centers_SD, self.spread, self.b_dec = centers_SD, max(spread, 1e-30), mean_D
        self.W_dec = centers_SD - mean_D

    def encode(self, x_BD: Tensor) -> SparseCodes:
        """One latent a row."""
        shifted_BD, shifted_SD = x_BD - self.b_dec, self.W_dec
        closeness_BS = shifted_BD @ shifted_SD.T - 0.5 * (shifted_SD**2).sum(1)
        which_B = closeness_BS.argmax(1)
        distance_B = ((shifted_BD - shifted_SD[which_B]) ** 2).sum(1)
        acts_B = torch.exp(-distance_B / self.spread).clamp_min(1e-30)
        return SparseCodes(acts_B[:, None], which_B[:, None], None, (len(x_BD), len(self.centers_SD)))

    def to(self, device: torch.device) -> "Centroids":
        """The same on that device."""
        return Centroids(self.centers_SD.to(device), self.spread, self.b_dec.to(device))

    def decode(self, codes: SparseCodes) -> Tensor:
        """The centers of codes that `encode` made."""
        return self.centers_SD[codes.top_indices[:, 0]]


Model = SparseAutoencoder | Centroids


def codes_of(model: Model, x_BD: Tensor) -> SparseCodes:
    """Of inference, in the model's dtype and on its device."""
    return model.encode(x_BD.to(model.b_dec)) if isinstance(model, Centroids) else inferred(model, x_BD)


def reconstruct(model: Model, x_BD: Tensor) -> tuple[SparseCodes, Tensor]:
    """Codes of inference and what they decode to, in the model's dtype and on its device."""
    held_BD = x_BD.to(model.b_dec)
    codes = codes_of(model, held_BD)
    if isinstance(model, Centroids):
        return codes, model.decode(codes)
    return codes, model.decode(codes, model.input_statistics(held_BD))


@dataclass(frozen=True)
class Subject:
    """An SAE, or a control of one.

    Attributes:
        name: short, of its own among all. kind: sae or control. control: which kind of control.
        group: SAEs that differ by their seeds alone, and their controls, have one.
        seed: of training or of the control; None where it is not known or there is none.
        digest: of what it is, by which finished parts are known again. record: what else is known, as JSON has it.
    """

    name: str
    kind: str
    model: Model
    group: str
    digest: str
    control: str | None = None
    seed: int | None = None
    record: dict[str, Any] | None = None

    @property
    def n_latents(self) -> int:
        return len(self.model.W_dec)

    @property
    def group_sizes(self) -> tuple[int, ...]:
        """Of Matryoshka levels; one of everything else."""
        if isinstance(self.model, Centroids):
            return (self.n_latents,)
        return tuple(self.model.config.group_sizes)

    @property
    def k(self) -> int | None:
        """That it was trained for."""
        return None if isinstance(self.model, Centroids) else getattr(self.model.config, "k", None)


class ImageRows(NamedTuple):
    """The images of the rows.

    Attributes:
        image_of_row: int64, images numbered as they come; None where each row is an image.
        ids: of the N images; the numbers of rows where there are none. labels: of the store, None without one.
    """

    image_of_row: np.ndarray | None
    ids: list[str]
    labels: list[str | None]

    @classmethod
    def of(cls, activations: Activations) -> "ImageRows":
        """Reads the items of a store. ActivationError: they are damaged."""
        if not activations.has_items:
            return cls(None, [str(row) for row in range(activations.n_rows)], [None] * activations.n_rows)
        number: dict[str, int] = {}
        labels: list[str | None] = []
        found = np.empty(activations.n_rows, np.int64)
        row = 0
        for table in activations.iter_items():
            for image, label in zip(table["image"].to_pylist(), table["label"].to_pylist()):
                if image not in number:
                    number[image] = len(number)
                    labels.append(label)
                found[row] = number[image]
                row += 1
        every = len(number) == activations.n_rows
        return cls(None if every else found, [str(image) for image in number], labels)


def encode_all(
    subject: Subject,
    activations: Activations,
    rows: ImageRows,
    pool: Pool = "max",
    batch_rows: int = 4096,
    on_rows: Callable[[int], None] = lambda done: None,
    peers: Peers | None = None,
) -> tuple[ReconstructionSums, KeptCodes]:
    """One pass over the rows: the sums of reconstruction, and the codes, pooled to images and kept.

    peers: the ranks that share the rows, all of which call this; each is given all sums and codes.

    Raises:
        ValueError: another width, a threshold that was never calibrated, codes that do not fit into memory. Of codes of
            at most 24 bytes an entry at a time half the free memory is taken.
    """
    model = subject.model
    device, dtype, d_in = model.b_dec.device, model.b_dec.dtype, len(model.b_dec)
    require(d_in == activations.d, f"sae: d_in of {subject.name} is {d_in}; the activations have width {activations.d}")
    ends = tuple(int(end) for end in np.cumsum(subject.group_sizes))
    sums = ReconstructionSums(subject.n_latents, ends, model.b_dec)
    own = rows_of_share(peers, activations.n_rows, batch_rows)
    gathering = CodesGathering(rows.image_of_row, len(rows.ids), subject.n_latents, pool, most_entries(), own.start)
    with torch.no_grad():
        for start, x_BD in shared_chunks(peers, activations.chunks, activations.n_rows, batch_rows):
            x_BD = x_BD.to(device, dtype)
            codes = codes_of(model, x_BD)
            sums.add(x_BD, codes, _prefixes(model, x_BD, codes, len(ends)))
            gathering.add(codes)
            on_rows(activations.n_rows * (start + len(x_BD) - own.start) // len(own))
    if peers is not None:
        sums.merge_ranks(peers)
        gathering.merge_ranks(peers)
    return sums, gathering.result()


def most_entries() -> int:
    """Of codes that are kept: at 24 bytes each while they are sorted, half the free memory."""
    free = free_memory(torch.device("cpu"))
    return 1 << 40 if free is None else free // (2 * _ENTRY_BYTES)


def _prefixes(model: Model, x_BD: Tensor, codes: SparseCodes, n_groups: int) -> Tensor:
    if isinstance(model, Centroids):
        return model.decode(codes)[None]
    statistics = model.input_statistics(x_BD)
    return model.decode_prefixes(codes, statistics) if n_groups > 1 else model.decode(codes, statistics)[None]
