"""Rows of planted concepts in seconds, however many: saevlm_fast.data.synthetic's kind of data, made in torch."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, normalize

BLOCK_ROWS = 1 << 15


def planted_blocks(
    n_rows: int, d_in: int, n_concepts: int, concepts_per_row: float, device: str = "cpu"
) -> Iterator[Tensor]:
    """float32 [<= BLOCK_ROWS, d_in] at a time. A row is a sum of directions of some concepts, an offset and noise; some
    concepts are common, most are rare. Every device has its own rows, the same every time."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, generator=generator)

    directions_CD, offset_D = normalize(normal(n_concepts, d_in)), normal(d_in)
    popularity_C = torch.arange(1, n_concepts + 1, device=device) ** -0.5
    for start in range(0, n_rows, BLOCK_ROWS):
        mean_B = torch.full((min(BLOCK_ROWS, n_rows - start),), concepts_per_row - 1, device=device)
        per_row_B = 1 + torch.poisson(mean_B, generator).long()
        places_P = torch.multinomial(popularity_C, int(per_row_B.sum()), replacement=True, generator=generator)
        strength_P = 0.5 + torch.rand(len(places_P), device=device, generator=generator)
        first_B = per_row_B.cumsum(0) - per_row_B
        x_BD = embedding_bag(places_P, directions_CD, first_B, mode="sum", per_sample_weights=strength_P)
        yield x_BD + offset_D + 0.02 * normal(*x_BD.shape)
