"""Other scores that go by the name of monosemanticity, under their own names (docs/concepts/monosemanticity.md).

    visaebench   of each latent only the 16 images on which it is most active: the paper's formula over these, with the
                 minimum over all images. Rows of an image are max-pooled. (Its wheel takes 1,000 random latents.)
    tms          no encoder: a latent is on in the images where it is above its own mean over all images; the mean over
                 pairs of its images of the Jaccard index of the sets of latents that are on (arXiv 2607.17770). All
                 pairs up to 1,000 of them, else 1,000 drawn.
    patch        rows are patches with embeddings of their own; pairs of patches of one image are left out
                 (patch_score.py).

The two here have neither interval nor null. visaebench's score is a function of the 16 largest activations of N:
without one of these images the 17th takes its place, and how far that moves the score does not settle as N grows, so
jackknife and bootstrap are inconsistent, as for a maximum. In tms an image stands in a latent's set, in the sets that
are compared and in the mean that decides both, and pairs are drawn: there is no closed form without an image.

Shape suffixes: N images, n rows or images of a chunk, S latents, M entries grouped by latent, P pairs of a latent and
an image (tms: of images), E embedding, L latents that are on.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from saevlm_fast.data.codes import Rows
from saevlm_fast.data.rows import Matrix
from saevlm_fast.errors import require
from saevlm_fast.kernels.common import sums_at
from saevlm_fast.peers import Peers
from saevlm_fast.runtime import exact_defaults
from saevlm_fast.sae import SparseAutoencoder
from saevlm_fast.scoring.intake import CodesIntake, DenseIntake, checked_embeddings
from saevlm_fast.scoring.merging import all_codes, merge_range
from saevlm_fast.scoring.monosemanticity import MonosemanticityScores, StreamedScore
from saevlm_fast.scoring.source import Pool, ScoredImages
from saevlm_fast.scoring.sums import Embeddings, status_of
from saevlm_fast.scoring.top_images import BestImages
from saevlm_fast.sparse_codes import GroupedCodes, SparseCodes

N_TOP = 16
N_PAIRS = 1000
_SET_ELEMENTS = 1 << 24  # comparisons of latents at a time


@exact_defaults()
def visaebench_score(
    activations: Rows,
    embeddings: Matrix,
    sae: SparseAutoencoder | None = None,
    *,
    pool: Pool | None = None,
    n_top: int = N_TOP,
    batch_rows: int = 4096,
    device: torch.device | str = "cpu",
    on_rows: Callable[[int], None] = lambda done: None,
    peers: Peers | None = None,
) -> MonosemanticityScores:
    """The score over each latent's n_top most active images alone; of equally active ones the earlier.

    Arguments and errors as trust.trusted_score; status, n_active and maximum are those of all images. Two passes.
    """
    images = ScoredImages(activations, {"": embeddings}, sae, pool=pool, batch_rows=batch_rows, peers=peers)
    target, tops = images.device_of(device), _Tops(images.n_latents, n_top, images.first_image)
    intake = CodesIntake(images.n_latents, 1, tops) if images.sparse else DenseIntake(images.n_latents, tops)
    n_images = 0
    for start, values, emb_nE in images.chunks():
        checked = checked_embeddings(emb_nE[""], len(emb_nE[""]), start, torch.device("cpu"))
        intake.add(values.to("cpu"), checked.emb_nE, start, checked.sqnorm_n)
        n_images = start + len(emb_nE[""])
        on_rows(images.done(n_images))
    if peers is not None:
        merge_range(intake.range, peers)
        tops.merge_ranks(peers)
        n_images = images.n_images
    seen, score = intake.range, StreamedScore(images.n_latents, device=target)
    acts_M, latents_M, images_M = tops.best.acts_M, tops.best.slots_M, tops.best.images_M
    order_M = images_M.argsort(stable=True)
    acts_M, latents_M, images_M = acts_M[order_M], latents_M[order_M], images_M[order_M]
    above_M = acts_M.to(torch.float64) - seen.low_S[latents_M]
    for start, _, emb_nE in images.chunks():
        bounds = torch.arange(start, start + len(emb_nE[""]) + 1)
        offsets = torch.searchsorted(images_M, bounds)
        low, high = int(offsets[0]), int(offsets[-1])
        codes = SparseCodes.from_flat(above_M[low:high], latents_M[low:high], offsets - low, images.n_latents)
        score.update(codes, emb_nE[""])
        on_rows(n_images + images.done(start + len(emb_nE[""])))
    if peers is not None:
        score.merge_ranks(peers, True, images.encoders[""].d)
    status_S = status_of(seen.low_S, seen.high_S, seen.n_above())
    return replace(
        score.result(),
        ms=score.result().ms.masked_fill(status_S != 0, torch.nan),
        status=status_S,
        n_active=seen.n_active_S,
        max_activation=seen.high_S,
        variant="visaebench",
    )


class _Tops:
    """Takes checked images in (sums.Pairs): the most active images of every latent."""

    def __init__(self, n_latents: int, n_top: int, first_image: int) -> None:
        self.device, self.next_image = torch.device("cpu"), first_image
        self.best, self.n_top = BestImages(n_latents, n_top, torch.float64), n_top

    def lower(self, drop_S: Tensor) -> None:
        """Nothing is above a minimum here."""

    def add_codes(self, codes: SparseCodes, grouped: GroupedCodes, low_S: Tensor, images: list[Embeddings]) -> None:
        images_M = codes.entry_rows()[grouped.order_M] + self.next_image
        self.best.add(grouped.acts_M, grouped.latents_M, images_M)
        self.next_image += codes.n_rows

    def add_dense(self, acts_nK: Tensor, low_K: Tensor, images: Embeddings) -> None:
        sorted_nK, rows_nK = acts_nK.to(torch.float64).sort(dim=0, descending=True, stable=True)
        rows_nK = rows_nK[: self.n_top]
        latents_nK = torch.arange(acts_nK.shape[1]).expand_as(rows_nK)
        self.best.add(sorted_nK[: self.n_top].flatten(), latents_nK.flatten(), rows_nK.flatten() + self.next_image)
        self.next_image += len(acts_nK)

    def merge_ranks(self, peers: Peers) -> None:
        """Takes in the other ranks' images, the first rank's first."""
        parts = peers.collect((self.best.acts_M, self.best.slots_M, self.best.images_M))
        self.best = BestImages(self.best.n_slots, self.n_top, torch.float64)
        for part in parts:
            self.best.add(*part)


@exact_defaults()
def tms_score(
    activations: Rows,
    sae: SparseAutoencoder | None = None,
    *,
    pool: Pool | None = None,
    n_pairs: int = N_PAIRS,
    seed: int = 0,
    batch_rows: int = 4096,
    on_rows: Callable[[int], None] = lambda done: None,
    peers: Peers | None = None,
) -> MonosemanticityScores:
    """Coherence of a latent's images without an encoder: see the module. It asks what fires together, not what is seen.

    Memory: 16 bytes an entry of all codes. status is single where a latent is on in one image only, and `constant`
    where it is on in none though it fires: its activations are all equal.

    Raises:
        ValueError: raw neurons, which are on in half of all images; and as trust.trusted_score.
    """
    images = ScoredImages(activations, {}, sae, pool=pool, batch_rows=batch_rows, peers=peers)
    require(
        images.sparse,
        "variant: tms compares sets of latents; raw neurons have no sets, give an SAE or codes",
    )
    pieces = []
    for start, codes, _ in images.chunks():
        assert isinstance(codes, SparseCodes)
        pieces.append(codes.to("cpu").compact())
        on_rows(images.done(start + codes.n_rows))
    codes = SparseCodes.join(pieces, images.n_latents)
    codes.check("codes", images.first_image)
    codes = codes if peers is None else all_codes(codes, peers)
    acts_M, latents_M, n_latents = codes.top_acts.to(torch.float64), codes.top_indices, images.n_latents
    rows_M, n_images = codes.entry_rows(), codes.n_rows
    total_S = sums_at(latents_M, acts_M, n_latents)
    n_active_S = torch.bincount(latents_M, minlength=n_latents)
    # a > mean by products, not by a quotient: for equal activations on all images rounding must not decide.
    on_M = acts_M * n_images > total_S[latents_M] * (1 + 1e-12)
    rows_M, latents_M = rows_M[on_M], latents_M[on_M]
    on = SparseCodes.from_flat(
        acts_M[on_M], latents_M, pad(torch.bincount(rows_M, minlength=n_images).cumsum(0), (1, 0)), n_latents
    )
    high_S = torch.segment_reduce(codes.by_latent().acts_M.double(), "max", lengths=n_active_S, initial=0.0)
    n_on_S = torch.bincount(latents_M, minlength=n_latents)
    status_S = status_of(torch.where(n_on_S == 0, high_S, 0.0), high_S, n_on_S)
    return MonosemanticityScores(
        ms=_mean_jaccard(on, n_on_S, n_pairs, seed, peers).masked_fill(status_S != 0, torch.nan),
        status=status_S,
        n_active=n_active_S,
        max_activation=high_S,
        n_images=n_images,
        similarity="jaccard",
        variant="tms",
    )


def _mean_jaccard(on: SparseCodes, n_on_S: Tensor, n_pairs: int, seed: int, peers: Peers | None) -> Tensor:
    """[S]: over pairs of the images that each latent is on in. Every rank draws all pairs, and compares its share."""
    rank, world = (0, 1) if peers is None else (peers.rank, peers.world)
    grouped, images_M = on.by_latent(), on.entry_rows()
    images_M, offsets_S1 = images_M[grouped.order_M], grouped.offsets_S1
    offsets_N1 = on.csr()[2]
    lengths_N, starts_N = offsets_N1.diff(), offsets_N1[:-1]
    generator = torch.Generator().manual_seed(seed)
    mean_S = torch.full((len(n_on_S),), torch.nan, dtype=torch.float64)
    for latent in torch.nonzero(n_on_S > 1).flatten().tolist():
        members_n = images_M[offsets_S1[latent] : offsets_S1[latent + 1]]
        n = len(members_n)
        if n * (n - 1) // 2 <= n_pairs:
            a_P, b_P = torch.tril_indices(n, n, -1)
        else:
            a_P = torch.randint(n, (n_pairs,), generator=generator)
            b_P = (a_P + torch.randint(1, n, (n_pairs,), generator=generator)) % n
        if latent % world == rank:
            mean_S[latent] = _jaccard(on.top_indices, starts_N, lengths_N, members_n[a_P], members_n[b_P]).mean()
    if peers is not None:
        mean_S = peers.gather(mean_S)[torch.arange(len(mean_S)) % world, torch.arange(len(mean_S))]
    return mean_S


def _jaccard(latents_M: Tensor, starts_N: Tensor, lengths_N: Tensor, a_P: Tensor, b_P: Tensor) -> Tensor:
    """Of the sets of latents of two images each, float64 [P]."""
    width = int(torch.maximum(lengths_N[a_P].max(), lengths_N[b_P].max()))
    step = max(1, _SET_ELEMENTS // (width * width))
    parts = []
    for a_p, b_p in zip(a_P.split(step), b_P.split(step)):
        sets = []
        for images_p, absent in ((a_p, -1), (b_p, -2)):
            places_pL = starts_N[images_p, None] + torch.arange(width)
            inside_pL = torch.arange(width) < lengths_N[images_p, None]
            sets.append(torch.where(inside_pL, latents_M[places_pL.clamp_max(len(latents_M) - 1)], absent))
        common_p = (sets[0][:, :, None] == sets[1][:, None, :]).sum((1, 2))
        parts.append(common_p.double() / (lengths_N[a_p] + lengths_N[b_p] - common_p))
    return torch.cat(parts)
