"""Rows of planted concepts, made where they are needed: a GPU makes a million in a second, numpy some thousand.

Fresh rows matter. An SAE that meets the same few batches again and again learns them by heart; its activations crowd
below the smallest one kept, and an encoder that screens has five times as many candidates as in a run.
"""

import torch
from torch import Tensor

from saevlm_fast.data.synthetic import PlantedConcepts

_BLOCK_ROWS = 8192


def planted_rows(n_rows: int, d_in: int, device: str | torch.device, seed: int = 0) -> Tensor:
    """[n_rows, d_in] float32 as PlantedConcepts defines them, 8 of 2 * d_in concepts a row; drawn by torch."""
    source = PlantedConcepts(d_in, 1, n_concepts=2 * d_in, concepts_per_image=8.0)
    generator = torch.Generator(device).manual_seed(seed)
    directions_CD, offset_D, popularity_C = (
        torch.from_numpy(of).to(device, torch.float32)
        for of in (source.directions_CD, source.offset_D, source.popularity_C)
    )
    x_ND = torch.empty(n_rows, d_in, device=device)
    for x_BD in x_ND.split(_BLOCK_ROWS):
        extra_B = torch.full((len(x_BD),), source.concepts_per_image - 1, device=device)
        shown_B = 1 + torch.poisson(extra_B, generator=generator).long()
        rows_P = torch.arange(len(x_BD), device=device).repeat_interleave(shown_B)
        concepts_P = torch.multinomial(popularity_C, len(rows_P), replacement=True, generator=generator)
        strength_BC = torch.zeros(len(x_BD), len(popularity_C), device=device)
        strength_BC[rows_P, concepts_P] = 0.5 + torch.rand(len(rows_P), generator=generator, device=device)
        x_BD.normal_(generator=generator).mul_(source.noise).add_(offset_D).addmm_(strength_BC, directions_CD)
    return x_ND
