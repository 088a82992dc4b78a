"""Images on their way into the sums of the Monosemanticity Score: checked, and gathered where that is worth it."""

from typing import NamedTuple

import torch
from torch import Tensor

from saevlm_fast.errors import require
from saevlm_fast.kernels.common import on_gpu
from saevlm_fast.kernels.scaled_rows import squared_norms
from saevlm_fast.scoring.refusals import refuse_activations, refuse_embeddings
from saevlm_fast.scoring.sums import CodesRange, DenseRange, Embeddings, Pairs
from saevlm_fast.sparse_codes import SparseCodes

Scores = tuple[Tensor, Tensor, Tensor, Tensor]  # ms and maximum float64, n_active int64, status int8: [S] on the host
_ONE_KIND = "activations: one StreamedScore takes sparse codes or dense activations, not both"


def embeddings_on(emb_nE: Tensor, n_rows: int, d_emb: int | None, device: torch.device) -> Tensor:
    """Embeddings of n_rows images, of width d_emb if that is known, on the device. ValueError: another shape."""
    require(
        emb_nE.dim() == 2 and len(emb_nE) == n_rows,
        f"emb_nE: shape {tuple(emb_nE.shape)} is not [{n_rows}, E], one row for each image",
    )
    width = emb_nE.shape[1]
    require(d_emb in (None, width), f"emb_nE: width {width} differs from the {d_emb} of the images before")
    return emb_nE.detach().to(device)  # no gradient goes through the sums


def with_norms(emb_nE: Tensor, sqnorm_n: Tensor | None = None) -> Embeddings:
    """Embeddings with their squared norms, which are made if nobody has them."""
    return Embeddings(emb_nE, squared_norms(emb_nE) if sqnorm_n is None else sqnorm_n)


def check_embeddings(images: Embeddings, similarity: str, first_image: int) -> None:
    """That the similarity is defined of every image.

    Raises:
        ValueError: NaN, infinity, under cosine a zero embedding, naming the image (the first is first_image).
    """
    if len(images.sqnorm_n) > 0:
        least, most = torch.stack(images.sqnorm_n.aminmax()).tolist()  # a device is waited for once; NaN is both
        refuse_embeddings(images, similarity, first_image, least == 0, not (least >= 0 and most < float("inf")))


def checked_embeddings(emb_nE: Tensor, n_rows: int, first_image: int, device: torch.device) -> Embeddings:
    """embeddings_on and check_embeddings, for cosines."""
    images = with_norms(embeddings_on(emb_nE, n_rows, None, device))
    check_embeddings(images, "cosine", first_image)
    return images


class _Checked(NamedTuple):
    """A chunk whose codes are sound. n_entries: of its rows, where the host knows; clean: no activation is 0."""

    codes: SparseCodes
    images: Embeddings
    n_entries: int | None = None
    clean: bool = False


class CodesIntake:
    """Sparse codes, gathered until block_rows images wait: a pass over the sums is then small beside what is added."""

    def __init__(self, n_latents: int, block_rows: int, pairs: Pairs, similarity: str | None = None) -> None:
        self.n_latents, self.block_rows, self.pairs, self.similarity = n_latents, block_rows, pairs, similarity
        self.range = CodesRange.of_none(n_latents, pairs.device)
        self._pending: list[_Checked] = []
        self._n_pending = 0

    def add(
        self, activations: SparseCodes | Tensor, emb_nE: Tensor, first_image: int, sqnorm_n: Tensor | None = None
    ) -> Tensor:
        """Codes of the next images, the first of which is number first_image, with their embeddings.

        Returns their squared norms: sqnorm_n, if somebody has them.

        Raises:
            ValueError: no codes, codes of another number of latents, and what SparseCodes.check refuses; with a
                similarity what check_embeddings does.
        """
        if not isinstance(activations, SparseCodes):
            raise ValueError(_ONE_KIND)
        d_sae = activations.d_sae
        require(d_sae == self.n_latents, f"codes: of {d_sae} latents, not {self.n_latents}")
        codes = activations._replace(top_acts=activations.top_acts.detach()).to(self.pairs.device)
        images = with_norms(emb_nE, sqnorm_n)
        self._pending.append(self._checked(codes, images, first_image))
        self._n_pending += codes.n_rows
        if self._n_pending >= self.block_rows:
            self.flush()
        return images.sqnorm_n

    def _checked(self, codes: SparseCodes, images: Embeddings, first_image: int) -> _Checked:
        """A GPU is waited for once, unless something is wrong."""
        if not on_gpu(images.sqnorm_n) or not codes.fits_shape():
            if self.similarity is not None:
                check_embeddings(images, self.similarity, first_image)
            codes.check("codes", first_image)
            return _Checked(codes, images)
        from saevlm_fast.kernels.code_faults_triton import code_faults

        with torch.cuda.device_of(images.sqnorm_n):  # Triton launches on the current device
            found = code_faults(*codes.flat(), images.sqnorm_n, self.n_latents)
        if self.similarity is not None:
            refuse_embeddings(images, self.similarity, first_image, found.zero > 0, found.unfit > 0)
        if found.wrong > 0:
            codes.check("codes", first_image)
        return _Checked(codes, images, found.n_entries, found.silent == 0)

    def flush(self) -> None:
        """Adds what waits to the sums."""
        pending, self._pending, self._n_pending = self._pending, [], 0
        ends = [each.n_entries for each in pending if each.n_entries is not None]
        codes = SparseCodes.join(
            [each.codes for each in pending], self.n_latents, ends if len(ends) == len(pending) else None
        )
        if not all(each.clean for each in pending):
            codes = codes.compact()
        if codes.n_rows == 0 or codes.d_sae == 0:
            return
        grouped = codes.to(dtype=torch.float64).by_latent()
        self.pairs.lower(self.range.observe(grouped, codes.n_rows))
        self.pairs.add_codes(codes, grouped, self.range.low_S, [each.images for each in pending])


class DenseIntake:
    """Activations of every neuron: added as they come."""

    def __init__(self, n_neurons: int, pairs: Pairs, similarity: str | None = None) -> None:
        self.n_neurons, self.pairs, self.similarity = n_neurons, pairs, similarity
        self._range: DenseRange | None = None
        self._scores: Scores | None = None

    @property
    def range(self) -> DenseRange:
        """Of the images so far."""
        if self._range is None:
            self._range = DenseRange.of_none(self.n_neurons, self.pairs.device)
        return self._range

    def add(
        self, activations: SparseCodes | Tensor, emb_nE: Tensor, first_image: int, sqnorm_n: Tensor | None = None
    ) -> Tensor:
        """Activations [n, K] of the next images, the first of which is number first_image, with their embeddings.

        Returns their squared norms: sqnorm_n, if somebody has them.

        Raises:
            ValueError: codes, another shape, or NaN or infinity, naming the image; with a similarity what
                check_embeddings refuses.
        """
        if isinstance(activations, SparseCodes):
            raise ValueError(_ONE_KIND)
        fits = activations.dim() == 2 and activations.shape[1] == self.n_neurons
        require(fits, f"acts_nK: shape {tuple(activations.shape)} is not [n, {self.n_neurons}]")
        self._scores = None
        if len(activations) == 0:
            return with_norms(emb_nE, sqnorm_n).sqnorm_n
        acts_nK = activations.detach().to(self.pairs.device)
        if on_gpu(acts_nK):
            from saevlm_fast.scoring.dense_on_gpu import add_on_gpu

            of_images = emb_nE, sqnorm_n, self.similarity, first_image
            with torch.cuda.device_of(acts_nK):  # Triton launches on the current device
                self._range, sqnorm_n, self._scores = add_on_gpu(self._range, self.pairs, acts_nK, *of_images)
            return sqnorm_n
        images = with_norms(emb_nE, sqnorm_n)
        if self.similarity is not None:
            check_embeddings(images, self.similarity, first_image)
        low_K, high_K = torch.aminmax(acts_nK, dim=0)  # NaN is both
        spread = (high_K.to(torch.float64) - low_K.to(torch.float64)).sum()
        if not bool(spread < float("inf")):
            refuse_activations(acts_nK, first_image)
        self.pairs.lower(self.range.observe(acts_nK, low_K, high_K))
        self.pairs.add_dense(acts_nK, self.range.low_S, images)
        return images.sqnorm_n

    def scores(self) -> Scores | None:
        """Those of the images so far, if a GPU made them beside the sums; handed out once."""
        scores, self._scores = self._scores, None
        return scores

    def flush(self) -> None:
        """Nothing waits; the sums may be changed from here on."""
        self._scores = None
