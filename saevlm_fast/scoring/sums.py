"""What the Monosemanticity Score is made of: the range of every latent's activations, and sums over pairs of images.

The maths is told in monosemanticity.py. Shape suffixes: n images of a chunk, N all images, S latents, K neurons, E
embedding, M entries grouped by latent, A latents that fire on every image.
"""

from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple, Protocol, Self

import torch
from torch import Tensor

from saevlm_fast.kernels.common import on_gpu, zeros_of
from saevlm_fast.kernels.latent_range import latent_range
from saevlm_fast.kernels.pairwise_similarity import inner_product_sums, pairwise_gram_sums, pairwise_sums
from saevlm_fast.kernels.scaled_rows import scaled_rows, scaled_sum
from saevlm_fast.kernels.streamed_cosine import StreamedState, streamed_cosine_update
from saevlm_fast.sparse_codes import GroupedCodes, SparseCodes

if TYPE_CHECKING:  # Triton is not everywhere
    from saevlm_fast.kernels.dense_score_triton import Sums

STATUSES = ("defined", "dead", "constant", "single")
_BLOCK_ROWS = 256  # images of a block of raw neurons on a CPU, which keeps their float64 copies in its cache


# --- embeddings ---


class Embeddings(NamedTuple):
    """Embeddings of n images [n, E] as they came, and their squared norms, float64 [n]: on the device of the sums."""

    emb_nE: Tensor
    sqnorm_n: Tensor

    @classmethod
    def join(cls, chunks: list["Embeddings"]) -> "Embeddings":
        """All these images; of one chunk nothing is copied."""
        return chunks[0] if len(chunks) == 1 else cls(*(torch.cat(parts) for parts in zip(*chunks)))

    def scales(self, similarity: str) -> tuple[Tensor, Tensor]:
        """scale [n] of the vectors u = scale * emb whose inner product is the similarity, and their |u|^2."""
        if similarity != "cosine":
            return torch.ones_like(self.sqnorm_n), self.sqnorm_n
        scale_n = self.sqnorm_n.rsqrt()
        return scale_n, self.sqnorm_n * scale_n.square()


# --- range ---


def status_of(low_S: Tensor, high_S: Tensor, n_above_S: Tensor) -> Tensor:
    """Index into STATUSES, int8, of minimum, maximum and the number of images above the minimum.

    Counted, never judged by the sums: images above the minimum carry the weight.
    """
    status_S = torch.where(n_above_S == 1, STATUSES.index("single"), STATUSES.index("defined"))
    status_S = torch.where(n_above_S == 0, STATUSES.index("constant"), status_S)
    status_S = torch.where((low_S == 0) & (high_S == 0), STATUSES.index("dead"), status_S)
    return status_S.to(torch.int8)


class ActivationRange:
    """Minimum and maximum of every latent over n images; how many images lie above zero and at the minimum.

    Other images are for CodesRange or DenseRange.
    """

    def __init__(self, low_S: Tensor, high_S: Tensor, n_active_S: Tensor, n_low_S: Tensor, n_images: int) -> None:
        self.low_S, self.high_S, self.n_active_S, self.n_low_S = low_S, high_S, n_active_S, n_low_S
        self.n_images = n_images

    @classmethod
    def of_none(cls, n_latents: int, device: torch.device) -> Self:
        """Before any image: zeros."""
        zeros_4S = torch.zeros(4, n_latents, dtype=torch.float64, device=device)  # one fill
        (low_S, high_S), (n_active_S, n_low_S) = zeros_4S[:2], zeros_4S[2:].view(torch.int64)
        return cls(low_S, high_S, n_active_S, n_low_S, 0)

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What it was made of, but for n_images."""
        return self.low_S, self.high_S, self.n_active_S, self.n_low_S

    def n_above(self) -> Tensor:
        """Images whose activation is above the minimum."""
        return self.n_images - self.n_low_S

    def _merge(self, low_S: Tensor, high_S: Tensor, at_low_S: Tensor, n_rows: int) -> Tensor:
        """Takes in the range of n_rows images; returns by how much every minimum fell (0 for the first images)."""
        if self.n_images == 0:
            self.low_S, self.high_S, self.n_low_S = low_S, high_S, at_low_S
            self.n_images = n_rows
            return torch.zeros_like(low_S)
        before_S = self.low_S
        self.n_low_S = torch.where(before_S <= low_S, self.n_low_S, 0) + torch.where(low_S <= before_S, at_low_S, 0)
        self.low_S = torch.minimum(before_S, low_S)
        self.high_S = torch.maximum(self.high_S, high_S)
        self.n_images += n_rows
        return before_S - self.low_S


class CodesRange(ActivationRange):
    """The range of sparse codes: low_S is 0 for a latent unless it has fired on every image.

    n_low_S counts images at the minimum only where that is above 0: elsewhere every image that does not fire is at it.
    """

    def observe(self, grouped: GroupedCodes, n_rows: int) -> Tensor:
        """Takes n_rows >= 1 images in, activations float64; returns by how much every latent's minimum fell."""
        low_S, high_S, at_low_S = latent_range(grouped.acts_M, grouped.offsets_S1, n_rows)
        self.n_active_S += grouped.offsets_S1.diff()
        return self._merge(low_S, high_S, at_low_S, n_rows)

    def n_above(self) -> Tensor:
        return torch.where(self.low_S > 0, self.n_images - self.n_low_S, self.n_active_S)


class DenseRange(ActivationRange):
    """The range of neurons with an activation, of any sign, on every image."""

    def observe(self, acts_nK: Tensor, low_K: Tensor, high_K: Tensor) -> Tensor:
        """Takes n >= 1 images and their extremes in; returns by how much every neuron's minimum fell."""
        self.n_active_S += (acts_nK > 0).sum(0)
        at_low_K = (acts_nK == low_K).sum(0)
        return self._merge(low_K.to(torch.float64), high_K.to(torch.float64), at_low_K, len(acts_nK))


# --- sums over pairs ---


class Pairs(Protocol):
    """What takes checked images in, chunk by chunk (intake.py): activations as they come, and the minimum so far."""

    device: torch.device

    def lower(self, drop_S: Tensor) -> None:
        """The minimum is lower by drop >= 0 than it was for the images so far."""

    def add_codes(self, codes: SparseCodes, grouped: GroupedCodes, low_S: Tensor, images: list[Embeddings]) -> None:
        """A chunk of codes, also grouped with float64 activations."""

    def add_dense(self, acts_nK: Tensor, low_K: Tensor, images: Embeddings) -> None:
        """A chunk of activations of every neuron."""


class ShiftedSums:
    """Sums of a - low for an inner-product similarity, and those of the images alone that lowering low needs.

    Memory does not depend on the number of images: n_latents x d_emb float64. It is taken when it is first asked for:
    what a GPU makes of raw neurons' first images takes its place.
    """

    def __init__(self, n_latents: int, d_emb: int, similarity: str, device: torch.device) -> None:
        self.similarity, self.device, self.n_images = similarity, device, 0
        self._shape = n_latents, d_emb
        self._all_at_zero = False  # every minimum of codes is 0 and cannot fall: no device is asked any more

    @cached_property
    def _zeros(self) -> list[Tensor]:
        n_latents, d_emb = self._shape
        return zeros_of(self.device, (n_latents, d_emb), *[(n_latents,)] * 4, (d_emb,), (), ())  # one fill

    @cached_property
    def state(self) -> StreamedState:
        """Of a - low and u."""
        return StreamedState(*self._zeros[:4])

    @cached_property
    def self_S(self) -> Tensor:
        """Q_a of the formulas, [S]."""
        return self._zeros[4]

    @cached_property
    def unit_sum_E(self) -> Tensor:
        """U, [E]."""
        return self._zeros[5]

    @cached_property
    def pair_sum(self) -> Tensor:
        """T, 0-d."""
        return self._zeros[6]

    @cached_property
    def square_sum(self) -> Tensor:
        """Q, 0-d."""
        return self._zeros[7]

    def lower(self, drop_S: Tensor, told: Tensor | None = None) -> None:
        """Lowers low by drop >= 0: every activation so far rises by as much. The formulas of the module's docstring.

        told: what dense_on_gpu.py will be told is wrong; only if nothing is.
        """
        if self.n_images == 0 or self._all_at_zero:
            return
        if on_gpu(drop_S):
            from saevlm_fast.kernels.dense_score_triton import launch_lower

            with torch.cuda.device_of(drop_S):  # Triton launches on the current device
                launch_lower(self.launched(), drop_S, self.n_images, told, self.similarity == "cosine")
            return
        rows = torch.nonzero(drop_S).squeeze(1)
        if len(rows) == 0:
            return
        sums_SE, num_S, den_S, total_S = self.state
        drop_R, n = drop_S[rows], self.n_images
        cross_R = sums_SE[rows] @ self.unit_sum_E - self.self_S[rows]
        num_S[rows] += drop_R * cross_R + drop_R.square() * self.pair_sum
        den_S[rows] += drop_R * (n - 1) * total_S[rows] + drop_R.square() * (n * (n - 1) / 2)
        sums_SE[rows] += drop_R[:, None] * self.unit_sum_E
        total_S[rows] += drop_R * n
        self.self_S[rows] += drop_R * self.square_sum

    def add_codes(self, codes: SparseCodes, grouped: GroupedCodes, low_S: Tensor, images: list[Embeddings]) -> None:
        """Adds a chunk of codes, also grouped with float64 activations.

        low_S is above 0 only for latents that fire on every image so far, this chunk's too.
        """
        images_M = codes.entry_rows()[grouped.order_M]
        self.add_entries(grouped.acts_M, images_M, grouped.offsets_S1, low_S, Embeddings.join(images))

    def add_entries(
        self, acts_M: Tensor, images_M: Tensor, offsets_S1: Tensor, low_S: Tensor, images: Embeddings
    ) -> None:
        """The same of entries latent by latent (float64), with the images (rows of `images`) that they are on."""
        scale_n, square_n = images.scales(self.similarity)
        always = low_S[:0] if self._all_at_zero else torch.nonzero(low_S > 0).squeeze(1)
        self._all_at_zero = len(always) == 0
        if len(always) > 0:
            acts_M = acts_M - torch.repeat_interleave(low_S, offsets_S1.diff())
            positions_An = offsets_S1[always, None] + torch.arange(len(square_n), device=always.device)
            # Q_a is needed only where low may still fall, and there only.
            self.self_S[always] += (acts_M[positions_An] * square_n[images_M[positions_An]]).sum(1)
        streamed_cosine_update(self.state, acts_M, images_M, offsets_S1, images.emb_nE, scale_n)
        self._add_images(scaled_sum(images.emb_nE, scale_n), square_n)

    def add_half(self, acts_M: Tensor, images_M: Tensor, offsets_S1: Tensor, images: Embeddings, first: int) -> None:
        """Adds entries of every second image from `first` (0 or 1) on, if the minimum of every latent is 0."""
        scale_n, square_n = images.scales(self.similarity)
        streamed_cosine_update(self.state, acts_M, images_M, offsets_S1, images.emb_nE, scale_n, first)
        scale_n, square_n = scale_n.clone(), square_n[first::2]
        scale_n[1 - first :: 2] = 0.0
        self._add_images(scaled_sum(images.emb_nE, scale_n), square_n)

    def add_dense(self, acts_nK: Tensor, low_K: Tensor, images: Embeddings) -> None:
        """Adds a chunk of activations of every neuron, on a CPU a block at a time: pairs within it, and the merge."""
        sums_SE, num_S, den_S, total_S = self.state
        scale_n, square_n = images.scales(self.similarity)
        for acts_bK, emb_bE, scale_b, square_b in zip(
            *(t.split(_BLOCK_ROWS) for t in (acts_nK, images.emb_nE, scale_n, square_n))
        ):
            unit_bE = scaled_rows(emb_bE, scale_b)
            added = inner_product_sums(acts_bK, unit_bE, square_b, low_K)
            if self.n_images > 0:
                num_S += torch.linalg.vecdot(added.sums_KE, sums_SE)
                den_S += added.total_K * total_S
            num_S += added.num_K
            den_S += added.den_K
            sums_SE += added.sums_KE
            total_S += added.total_K
            self.self_S += added.self_K
            self._add_images(unit_bE.sum(0), square_b)

    def launched(self) -> "Sums":
        """What kernels/dense_score_triton.py adds to."""
        from saevlm_fast.kernels.dense_score_triton import Sums

        return Sums(*self.state, self.self_S, self.unit_sum_E, self.pair_sum, self.square_sum)

    def begin(self, sums: "Sums") -> None:
        """With these, of the first images."""
        self.state = StreamedState(*sums[:4])
        self.self_S, self.unit_sum_E, self.pair_sum, self.square_sum = sums[4:]
        self._zeros = []  # they may have been asked for before

    def _add_images(self, chunk_E: Tensor, sqnorm_n: Tensor) -> None:
        """Sums of a neuron that is 1 on every image, from the sum of u and each |u|^2 of n images.

        Weights are equal, so the closed form is safe within the chunk.
        """
        squares = sqnorm_n.sum()
        if len(sqnorm_n) > 1:
            self.pair_sum += (chunk_E @ chunk_E - squares) / 2
        if self.n_images > 0:
            self.pair_sum += chunk_E @ self.unit_sum_E
        self.unit_sum_E += chunk_E
        self.square_sum += squares
        self.n_images += len(sqnorm_n)

    def pair_sums(self, low_S: Tensor) -> tuple[Tensor, Tensor]:
        """num and den [S] of the score, whose low_S these sums have already."""
        return self.state.num_S, self.state.den_S

    def mean_embedding(self) -> Tensor:
        """sum_i r_ik u_i / sum_i r_ik, [S, E]."""
        return self.state.sums_SE / self.state.total_S[:, None]

    def mean_of_images(self) -> Tensor:
        """[E]."""
        return self.unit_sum_E / self.n_images


class HalvedSums:
    """ShiftedSums of the images of even and of odd number apart: each half has scores of its own.

    Memory: twice that of ShiftedSums, until `merged`. first_image: number of the first that comes.
    """

    def __init__(self, n_latents: int, d_emb: int, similarity: str, device: torch.device, first_image: int = 0) -> None:
        self.device, self._first_image = device, first_image
        self._pair_sums: tuple[Tensor, Tensor] | None = None  # of all images so far, once they were asked for
        self._all_at_zero = False  # as of ShiftedSums
        self.halves = [ShiftedSums(n_latents, d_emb, similarity, device) for _ in range(2)]

    def lower(self, drop_S: Tensor, told: Tensor | None = None) -> None:
        self._pair_sums = None
        for half in () if self._all_at_zero else self.halves:
            half.lower(drop_S, told)

    def add_codes(self, codes: SparseCodes, grouped: GroupedCodes, low_S: Tensor, images: list[Embeddings]) -> None:
        joined, n_latents = Embeddings.join(images), len(low_S)
        acts_M, latents_M = grouped.acts_M, grouped.latents_M
        images_M = codes.entry_rows()[grouped.order_M]
        if on_gpu(acts_M) and not self._all_at_zero:
            self._all_at_zero = not bool((low_S > 0).any())
        if self._all_at_zero:
            for half, _, first in self.split(codes.n_rows):
                half.add_half(acts_M, images_M, grouped.offsets_S1, joined, first)
            return
        for half, rows, first in self.split(codes.n_rows):
            chosen_M = (images_M & 1) == first
            counts_S = torch.bincount(latents_M[chosen_M], minlength=n_latents)
            offsets_S1 = torch.nn.functional.pad(counts_S.cumsum(0), (1, 0))
            of_half = Embeddings(joined.emb_nE[rows], joined.sqnorm_n[rows])
            half.add_entries(acts_M[chosen_M], images_M[chosen_M] >> 1, offsets_S1, low_S, of_half)

    def add_dense(self, acts_nK: Tensor, low_K: Tensor, images: Embeddings) -> None:
        for half, rows, _ in self.split(len(acts_nK)):
            half.add_dense(acts_nK[rows], low_K, Embeddings(images.emb_nE[rows], images.sqnorm_n[rows]))

    def split(self, n_rows: int) -> list[tuple[ShiftedSums, slice, int]]:
        """The halves with images among the next n_rows, those of them, and the first: even images are halves[0]'s."""
        next_image = self._first_image + sum(half.n_images for half in self.halves)
        first = next_image % 2  # the row of this chunk that is the next even image
        return [(self.halves[h], slice(r, None, 2), r) for h, r in ((0, first), (1, 1 - first)) if r < n_rows]

    def pair_sums(self, low_S: Tensor) -> tuple[Tensor, Tensor]:
        """num and den [S] of all images."""
        if self._pair_sums is None:
            a, b = (half.state for half in self.halves)
            num_S = a.num_S + b.num_S + torch.linalg.vecdot(a.sums_SE, b.sums_SE)
            self._pair_sums = num_S, a.den_S + b.den_S + a.total_S * b.total_S
        return self._pair_sums

    def half_scores(self) -> Tensor:
        """[2, S]: the scores over the even and over the odd images, NaN where fewer than two carry weight."""
        num_2S, den_2S = (torch.stack([half.state[part] for half in self.halves]) for part in (1, 2))
        return (num_2S / den_2S).masked_fill(den_2S <= 0, torch.nan)

    def merged(self) -> tuple[ShiftedSums, Tensor]:
        """(the sums of all images but for S, of which it has a half's; S of the other half). The halves are gone."""
        (a, b), pair_sums = self.halves, self.pair_sums(self.halves[0].state.num_S)
        self.halves = []
        if a.n_images and b.n_images:
            a.pair_sum += b.pair_sum + a.unit_sum_E @ b.unit_sum_E
        else:
            a.pair_sum += b.pair_sum
        a.state.total_S.add_(b.state.total_S)
        a.state.num_S.copy_(pair_sums[0])
        a.state.den_S.copy_(pair_sums[1])
        a.self_S += b.self_S
        a.unit_sum_E += b.unit_sum_E
        a.square_sum += b.square_sum
        a.n_images += b.n_images
        return a, b.state.sums_SE


class KeptPairs:
    """For a similarity that is no inner product: activations and embeddings kept, all pairs evaluated at the end.

    Attributes:
        codes, dense, images: of all chunks; codes or dense is empty. found: of all pairs, if somebody has it already.
    """

    def __init__(self, n_latents: int, similarity: str, gamma: float | None, device: torch.device) -> None:
        self.n_latents, self.similarity, self.gamma, self.device = n_latents, similarity, gamma, device
        self.codes: list[SparseCodes] = []
        self.dense: list[Tensor] = []
        self.images: list[Embeddings] = []
        self.found: tuple[Tensor, Tensor] | None = None

    def lower(self, drop_S: Tensor) -> None:
        """Nothing is shifted before the end."""

    def add_codes(self, codes: SparseCodes, grouped: GroupedCodes, low_S: Tensor, images: list[Embeddings]) -> None:
        self.codes.append(codes)
        self.images += images

    def add_dense(self, acts_nK: Tensor, low_K: Tensor, images: Embeddings) -> None:
        self.dense.append(acts_nK)
        self.images.append(images)

    def pair_sums(self, low_S: Tensor) -> tuple[Tensor, Tensor]:
        """num and den [S] of the score over all images."""
        return self.pair_sums_of(low_S, range(self.n_latents)) if self.found is None else self.found

    def pair_sums_of(self, low_S: Tensor, latents: range) -> tuple[Tensor, Tensor]:
        """The same of some neighbouring latents. low_S: of all of them."""
        some = slice(latents.start, latents.stop)
        low_L = low_S[some]
        if not self.images or not len(latents):
            return torch.zeros_like(low_L), torch.zeros_like(low_L)
        emb_NE = Embeddings.join(self.images).emb_nE
        if self.dense:
            acts_NK = torch.cat([acts_nK[:, some].to(torch.float64) - low_L for acts_nK in self.dense])
            return pairwise_sums(acts_NK, emb_NE, self.similarity, self.gamma)
        codes = SparseCodes.join(self.codes, self.n_latents)
        grouped, rows_M = codes.by_latent(), codes.entry_rows()
        offsets_L1 = grouped.offsets_S1[latents.start : latents.stop + 1]
        own = slice(int(offsets_L1[0]), int(offsets_L1[-1]))
        shifted_M = grouped.acts_M[own].to(torch.float64) - low_S[grouped.latents_M[own]]
        images_M, offsets_L1 = rows_M[grouped.order_M[own]], offsets_L1 - offsets_L1[0]
        return pairwise_gram_sums(shifted_M, images_M, offsets_L1, emb_NE, self.similarity, self.gamma)
