"""Rows of planted concepts, made where they are needed: a GPU makes a million in a second, numpy some thousand.

Fresh rows matter. An SAE that meets the same few batches again and again learns them by heart; its activations crowd
below the smallest one kept, and an encoder that screens has five times as many candidates as in a run.
"""

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from saevlm_fast.data.synthetic import PlantedConcepts

_BLOCK_ROWS = 1 << 15


def planted_rows(
    n_rows: int,
    d_in: int,
    device: str | torch.device,
    seed: int = 0,
    n_concepts: int | None = None,
    concepts_per_row: float = 8.0,
) -> Tensor:
    """[n_rows, d_in] float32 as PlantedConcepts defines them, by default of 2 * d_in concepts; drawn by torch."""
    source = PlantedConcepts(d_in, 1, n_concepts or 2 * d_in, concepts_per_row)
    generator = torch.Generator(device).manual_seed(seed)
    directions_CD, offset_D, popularity_C = (
        torch.from_numpy(of).to(device, torch.float32)
        for of in (source.directions_CD, source.offset_D, source.popularity_C)
    )
    x_ND = torch.empty(n_rows, d_in, device=device)
    for x_BD in x_ND.split(_BLOCK_ROWS):
        extra_B = torch.full((len(x_BD),), concepts_per_row - 1, device=device)
        shown_B = 1 + torch.poisson(extra_B, generator=generator).long()
        concepts_P = torch.multinomial(popularity_C, int(shown_B.sum()), replacement=True, generator=generator)
        strength_P = 0.5 + torch.rand(len(concepts_P), generator=generator, device=device)
        bags_B = shown_B.cumsum(0) - shown_B
        x_BD.normal_(generator=generator).mul_(source.noise).add_(offset_D)
        x_BD += embedding_bag(concepts_P, directions_CD, bags_B, mode="sum", per_sample_weights=strength_P)
    return x_ND
