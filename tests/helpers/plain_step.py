"""A training step's parts in plain float64 torch, entry by entry: what the GPU's kernels are held against."""

from typing import NamedTuple

import torch
from torch import Tensor

from sparse_codes import random_codes


class Case(NamedTuple):
    """One batch with its codes: float64, on the CPU. Padding carries NaN."""

    x_BD: Tensor
    acts: Tensor
    latents: Tensor
    row_offsets: Tensor | None
    ends: list[int]
    W_dec_SD: Tensor
    W_enc_SD: Tensor
    b_dec_D: Tensor

    def flat(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """acts, latents, row and Matryoshka group of every entry, without padding."""
        if self.row_offsets is None:
            rows = torch.arange(len(self.acts)).repeat_interleave(self.acts.shape[1])
        else:
            rows = torch.arange(len(self.x_BD)).repeat_interleave(self.row_offsets.diff())
        acts, latents = self.acts.flatten()[: len(rows)], self.latents.flatten()[: len(rows)]
        groups = torch.searchsorted(latents.new_tensor(self.ends), latents, right=True)
        return acts, latents, rows, groups

    def on(self, device, dtype: torch.dtype) -> "Case":
        """In that dtype on that device."""

        def moved(value):
            if not isinstance(value, Tensor):
                return value
            return value.to(device, dtype if value.is_floating_point() else None, copy=True)

        return Case(*(moved(value) for value in self))


def make_case(n_rows: int, k: int, d_sae: int, d_in: int, layout: str, ends: list[int] | None = None) -> Case:
    """Latent 0 fires in nearly every row; every seventh activation is 0; some rows of "csr" are empty."""
    acts, latents, row_offsets = random_codes(n_rows, k, d_sae, layout, torch.float64)
    acts.view(-1)[3::7] *= 0
    generator = torch.Generator().manual_seed(5)
    draw = lambda *size: torch.randn(*size, generator=generator, dtype=torch.float64)  # noqa: E731
    W_dec_SD = torch.nn.functional.normalize(draw(d_sae, d_in), dim=1)
    weights = W_dec_SD, W_dec_SD + 0.1 * draw(d_sae, d_in), draw(d_in)
    return Case(draw(n_rows, d_in), acts, latents, row_offsets, ends or [d_sae], *weights)


class Truth(NamedTuple):
    """Of one step: reconstruction, suffixes [B, G, D], dact of every entry, squared residuals; gradients by name."""

    x_hat_BD: Tensor
    suffix_BGD: Tensor
    dacts_M: Tensor
    squared_B: Tensor
    gradients: dict[str, Tensor]

    def norm(self) -> Tensor:
        return torch.stack([g.square().sum() for g in self.gradients.values()]).sum().sqrt()


def plain_step(case: Case) -> Truth:
    """The definitions of docs/recipe.md, with the codes taken as they are."""
    acts, latents, rows, groups = case.flat()
    (n_rows, d_in), n_groups = case.x_BD.shape, len(case.ends)
    terms = acts[:, None] * case.W_dec_SD[latents]
    parts = torch.zeros(n_rows * n_groups, d_in, dtype=terms.dtype).index_add_(0, rows * n_groups + groups, terms)
    x_hat_BGD = parts.view(n_rows, n_groups, d_in).cumsum(1) + case.b_dec_D
    residual = x_hat_BGD - case.x_BD[:, None]
    suffix = (residual.flip(1).cumsum(1).flip(1)) * (2 / (n_rows * n_groups))
    dacts = torch.where(acts > 0, (suffix[rows, groups] * case.W_dec_SD[latents]).sum(1), 0)
    centred, zeros = case.x_BD - case.b_dec_D, torch.zeros_like(case.W_dec_SD)
    dW_dec = zeros.index_add(0, latents, acts[:, None] * suffix[rows, groups])
    dW_dec -= (dW_dec * case.W_dec_SD).sum(1, keepdim=True) * case.W_dec_SD
    db_enc = torch.zeros(len(zeros), dtype=terms.dtype).index_add(0, latents, dacts)
    gradients = {
        "W_dec": dW_dec,
        "W_enc": zeros.index_add(0, latents, dacts[:, None] * centred[rows]),
        "b_enc": db_enc,
        "b_dec": suffix[:, 0].sum(0) - db_enc @ case.W_enc_SD,
    }
    return Truth(x_hat_BGD[:, -1], suffix, dacts, residual.square().sum((1, 2)), gradients)
