"""What is steered: latents of an SAE, or neurons of the residual stream itself, which are asked in the same way.

A unit has a value on every token and a direction, along which the residual stream moves when the value changes. Of a
neuron the value is its coordinate and the direction its axis.

Shape suffixes: N tokens, D width, S units, J chosen ones, B images, M values above 0.
"""

from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from saevlm_fast.files import weights_sha256
from saevlm_fast.kernels.sparse_decode import gather_dot_op
from saevlm_fast.sae import SparseAutoencoder
from saevlm_fast.sparse_codes import SparseCodes
from saevlm_fast.steering.edits import Encoded, encode_tokens, latent_values

_NEURON_TOKENS = 16_384  # whose values are kept to find the quantiles of neurons


class Tokens(Protocol):
    """N tokens as units see them."""

    @property
    def scale(self) -> Tensor | None:
        """[N, 1] by which a change of values becomes one of the stream; None for 1."""
        ...

    def values(self, units_J: Tensor) -> Tensor:
        """[N, J] float32."""
        ...

    @property
    def reconstruction_ND(self) -> Tensor | None:
        """What the units make of the tokens without their error; None of units that have none."""
        ...

    def positive(self) -> tuple[Tensor, Tensor]:
        """Values above 0, and of which unit each is: [M], [M]."""
        ...

    def pulled(self, gradient_ND: Tensor, image_N: Tensor, n_images: int) -> Tensor:
        """[B, S]: the sum over an image's tokens of value * (gradient . direction)."""
        ...


class Units(Protocol):
    """All of a kind: how many, and how wide the stream is."""

    kind: str
    n: int
    width: int

    @property
    def made_of(self) -> str:
        """By which units are known again."""
        ...

    def read(self, x_ND: Tensor) -> Tokens:
        """Their values on tokens."""
        ...

    def directions(self, units_J: Tensor) -> Tensor:
        """[J, D] float32."""
        ...

    def along(self, gradient_BD: Tensor) -> Tensor:
        """[B, S]: gradient . direction."""
        ...

    def sample_every(self, n_tokens: int) -> int:
        """Of so many tokens every how many-th is enough for quantiles."""
        ...


class Neurons:
    """Every coordinate of the residual stream is a unit."""

    kind = made_of = "neuron"

    def __init__(self, width: int) -> None:
        self.n = self.width = width

    def read(self, x_ND: Tensor) -> "NeuronTokens":
        """The coordinates themselves."""
        return NeuronTokens(x_ND.float())

    def directions(self, units_J: Tensor) -> Tensor:
        """Axes [J, D]."""
        return torch.nn.functional.one_hot(units_J, self.width).float()

    def along(self, gradient_BD: Tensor) -> Tensor:
        """[B, D], the gradient itself."""
        return gradient_BD

    def sample_every(self, n_tokens: int) -> int:
        """All of at most 16,384, then every so many-th: neurons have a value on every token."""
        return -(-n_tokens // _NEURON_TOKENS)


class NeuronTokens:
    """N tokens as neurons see them."""

    scale: Tensor | None = None
    reconstruction_ND: Tensor | None = None

    def __init__(self, x_ND: Tensor) -> None:
        self.x_ND = x_ND

    def values(self, units_J: Tensor) -> Tensor:
        """[N, J]."""
        return self.x_ND[:, units_J]

    def positive(self) -> tuple[Tensor, Tensor]:
        """Coordinates above 0, and which."""
        above_ND = self.x_ND > 0
        return self.x_ND[above_ND], above_ND.nonzero()[:, 1]

    def pulled(self, gradient_ND: Tensor, image_N: Tensor, n_images: int) -> Tensor:
        """[B, D]."""
        return gradient_ND.new_zeros(n_images, self.x_ND.shape[1]).index_add_(0, image_N, self.x_ND * gradient_ND)


class Latents:
    """The latents of an SAE of that residual stream, encoded as at inference."""

    kind = "latent"

    def __init__(self, sae: SparseAutoencoder) -> None:
        self.sae, self.n, self.width = sae, sae.config.d_sae, sae.config.d_in
        self.W_SD = sae.W_dec.detach().float()

    @cached_property
    def made_of(self) -> str:
        """Of its weights."""
        return weights_sha256(self.sae)

    @torch.no_grad()
    def read(self, x_ND: Tensor) -> "LatentTokens":
        """Codes of the tokens."""
        return LatentTokens(encode_tokens(self.sae, x_ND), self.W_SD)

    def directions(self, units_J: Tensor) -> Tensor:
        """Decoder rows [J, D]."""
        return self.W_SD[units_J]

    def along(self, gradient_BD: Tensor) -> Tensor:
        """[B, S]."""
        return gradient_BD @ self.W_SD.T

    def sample_every(self, n_tokens: int) -> int:
        """All: codes are sparse."""
        return 1


class LatentTokens:
    """N tokens as latents see them."""

    def __init__(self, encoded: Encoded, W_SD: Tensor) -> None:
        self.codes: SparseCodes = encoded.codes
        self.reconstruction_ND: Tensor | None = encoded.x_hat_ND
        self.scale = None if encoded.statistics is None else encoded.statistics.scale.float()
        self.W_SD = W_SD

    def values(self, units_J: Tensor) -> Tensor:
        """[N, J], 0 where a latent does not fire."""
        return latent_values(self.codes, units_J.expand(self.codes.n_rows, -1)).float()

    def positive(self) -> tuple[Tensor, Tensor]:
        """Activations, and of which latent."""
        return self.entries()[:2]

    def entries(self) -> tuple[Tensor, Tensor, Tensor]:
        """Activations above 0, their latents and their tokens, [M] each."""
        acts_M, latents_M, _ = self.codes.csr()
        above_M = acts_M > 0
        return acts_M[above_M].float(), latents_M[above_M], self.codes.entry_rows()[above_M]

    def pulled(self, gradient_ND: Tensor, image_N: Tensor, n_images: int) -> Tensor:
        """[B, S], touching only what fires."""
        acts_M, latents_M, rows_M = self.entries()
        dots_M = gather_dot_op(gradient_ND, rows_M, latents_M, self.W_SD) * acts_M
        n_latents = len(self.W_SD)
        found = gradient_ND.new_zeros(n_images * n_latents)
        return found.index_add_(0, image_N[rows_M] * n_latents + latents_M, dots_M).view(n_images, n_latents)
