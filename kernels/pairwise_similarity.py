"""Pair sums behind the Monosemanticity Score, for any similarity (arXiv 2504.02821; docs/recipe.md section 3).

    num_k = sum_{i<j} r_ik s_ij r_jk        den_k = sum_{i<j} r_ik r_jk        score_k = num_k / den_k

which equals, in torch, with S = triu(similarity(emb, emb), 1) and O = triu(ones, 1),

    num = (r * (S @ r)).sum(0)        den = (r * (O @ r)).sum(0)

without S: tiles of it are made from two blocks of images (i-block <= j-block, so each pair once), used and forgotten.
`pairwise_sums` takes dense activations (raw neurons); `pairwise_gram_sums` takes sparse codes grouped by latent, and
looks, for every latent, at the images it fires on, nothing else. For cosine and dot of sparse codes
streamed_cosine.py gives the same sums in linear time; this file is its oracle and serves every other similarity.

cosine and dot of dense activations follow from the closed form (|sum r e|^2 - sum r^2 |e|^2) / 2 wherever it loses few
digits, and where one image dominates, block by block: N E K operations either way. On the CPU, the pairs of a latent's
images in sparse codes: those of different runs of 16 images by the sums of the runs,

    sum_{i in I, j in J} r_i <e_i, e_j> r_j = <sum_{i in I} r_i e_i, sum_{j in J} r_j e_j>

with nothing subtracted, so sum_s n_s^2 E becomes sum_s n_s run E.

A similarity is any function of the inner product and the two squared norms. To add one: its name in SIMILARITIES,
its formula in `_rbf_tile` (here), in `_similarity_tile` (pairwise_similarity_triton.py, selected by a
constexpr) and in reference.similarity_matrix (for the tests).

Accuracy: float64 whatever comes in, but for two cases on a GPU: sparse codes (similarities in float32, embeddings cast,
products with the precision of 3xTF32 or better) and `fast` (float32 accuracy from float16 tensor cores); both add their
tiles in float64. den is float64 always, in a form that never subtracts (`distinct_pair_products`). A zero embedding
under cosine gives NaN, as 0 / 0 does in the reference. Neither operator is differentiable: reference.py is.
"""

from collections.abc import Callable, Iterator
from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor

from .common import check, check_similarity, custom_op, on_gpu

_LATENT_BLOCK = 4096
_PAIR_BLOCK = {"cpu": 128, "cuda": 1024}
_CPU_IMAGE_BLOCK = 256
_CPU_BATCH_ELEMENTS = 1 << 20
_CPU_SEGMENT_BLOCKS = 128, 1024
_CPU_RUN = 16

# --- public functions ------------------------------------------------------------------------------------------------


def pairwise_sums(
    r_NK: Tensor, emb_NE: Tensor, similarity: str = "cosine", gamma: float | None = None, fast: bool = False
) -> tuple[Tensor, Tensor]:
    """num_K and den_K (float64) of dense activations r [N, K] over embeddings [N, E]; gamma: of rbf, 1 / E by default.

    Cost N E K multiply-adds, for rbf N^2 (E + K) / 2 with the E once per 4096 latents. Memory O(N E) and, in float64,
    4096 columns of r (those that one image dominates twice) beside the inputs; for rbf on a GPU also a panel of at most
    1280 x 32768 similarities.

    fast: for rbf on a GPU, similarities and sums of float32 accuracy in a fraction of the time; num is then within 3e-6
    of den (6e-7 measured at 20,000 images), while num otherwise, and den always, are good to 1e-12. ValueError: unknown
    similarity, shapes that do not match.
    """
    check_similarity(similarity)
    shapes = tuple(r_NK.shape), tuple(emb_NE.shape)
    fits = r_NK.ndim == emb_NE.ndim == 2 and len(r_NK) == len(emb_NE)
    check(fits, f"r_NK, emb_NE: shapes {shapes[0]} and {shapes[1]} are not [N, K] and [N, E]")
    return pairwise_sums_op(r_NK, emb_NE, similarity, default_gamma(gamma, emb_NE.shape[1]), fast)


def pairwise_gram_sums(
    acts_M: Tensor,
    images_M: Tensor,
    offsets_S1: Tensor,
    emb_NE: Tensor,
    similarity: str = "cosine",
    gamma: float | None = None,
) -> tuple[Tensor, Tensor]:
    """num_S and den_S (float64) of sparse codes grouped by latent: latent s fires on images[offsets[s]:offsets[s + 1]].

    acts [M] float, images [M] int64 in [0, N) (not checked), offsets [S + 1] int64 ascending from 0, embeddings [N, E];
    entries at or after offsets[S] are ignored. Cost sum_s n_s^2 E. ValueError: unknown similarity, shapes that do not
    match.
    """
    check_similarity(similarity)
    shapes = tuple(acts_M.shape), tuple(images_M.shape)
    fits = acts_M.ndim == 1 and shapes[0] == shapes[1]
    check(fits, f"acts_M, images_M: shapes {shapes[0]} and {shapes[1]} are not [M] and [M]")
    shapes = tuple(offsets_S1.shape), tuple(emb_NE.shape)
    fits = offsets_S1.ndim == 1 and len(offsets_S1) > 0 and emb_NE.ndim == 2
    check(fits, f"offsets_S1, emb_NE: shapes {shapes[0]}, {shapes[1]} are not [S + 1], [N, E]")
    return pairwise_gram_sums_op(
        acts_M, images_M, offsets_S1, emb_NE, similarity, default_gamma(gamma, emb_NE.shape[1])
    )


def default_gamma(gamma: float | None, d_emb: int) -> float:
    """gamma, or 1 / E as in scikit-learn's rbf_kernel. ValueError unless it is positive and finite."""
    if gamma is None:
        return 1.0 / max(d_emb, 1)
    fits = isinstance(gamma, Real) and 0.0 < gamma < float("inf")
    check(fits, f"gamma: {' '.join(repr(gamma).split()):.60} is not a positive finite number")
    return float(gamma)


def prepare_embeddings(emb_NE: Tensor, similarity: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Embeddings whose inner products and squared norms give the similarity, and those squared norms [N].

    emb_NE: any floating dtype; the results are in `dtype`, made in float64. cosine: rows divided by their norm. rbf:
    centred, which changes no distance and keeps ||a||^2 + ||b||^2 - 2 <a, b> from cancelling. dot: as they are.
    """
    if on_gpu(emb_NE):
        from .pairwise_float64_triton import launch_prepare

        with torch.cuda.device_of(emb_NE):  # Triton launches on the current device
            return launch_prepare(emb_NE, similarity, dtype)
    emb_NE = emb_NE.to(torch.float64, copy=similarity != "dot")
    if similarity == "cosine":
        emb_NE /= torch.linalg.vector_norm(emb_NE, dim=1, keepdim=True)
    elif similarity == "rbf" and len(emb_NE) > 0:
        emb_NE -= emb_NE.mean(0)
    emb_NE = emb_NE.to(dtype).contiguous()
    return emb_NE, torch.linalg.vector_norm(emb_NE, dim=1).square()


def distinct_pair_products(x_BL: Tensor) -> Tensor:
    """sum over i < j of x_i * x_j along dim 1, elementwise over the other dimensions, by folding halves.

    Equals ((sum x)^2 - sum x^2) / 2 without its subtraction: exact to rounding for x >= 0, even if one x dominates.
    Fold: the pairs (i, i + h) are counted here; every other pair of entries is a product of two different entries of
    x[:h] + x[h:], exactly once. About three passes over x.
    """
    total_B = x_BL.new_zeros(x_BL.shape[:1] + x_BL.shape[2:])
    x_BL = x_BL.clone()
    while (length := x_BL.shape[1]) > 1:
        half = length // 2
        left, right = x_BL[:, :half], x_BL[:, length - half :]
        total_B += (left * right).sum(1)
        left += right
        x_BL = x_BL[:, : length - half]
    return total_B


def well_conditioned(total_K: Tensor, square_K: Tensor) -> Tensor:
    """Where (total^2 - square) / 2, a sum over pairs, keeps a hundredth of total^2: its error stays near 1e-13."""
    return total_K.square() - square_K > 2e-2 * total_K.square()


# --- inner products, on any device ------------------------------------------------------------------------------------


class InnerProductSums(NamedTuple):
    """Of activations r [N, K] over vectors e [N, E], float64: sum r e [K, E]; num, den; sum r and sum r |e|^2."""

    sums_KE: Tensor
    num_K: Tensor
    den_K: Tensor
    total_K: Tensor
    self_K: Tensor


def inner_product_sums(r_NK: Tensor, emb_NE: Tensor, sqnorm_N: Tensor, low_K: Tensor | None = None) -> InnerProductSums:
    """num by the closed form, block by block for latents that one image (its activation by its norm) dominates.

    r in any floating dtype, less low, >= 0 for the accuracy told above; embeddings, squared norms and low float64. A
    device is asked once, whether there are dominated latents.
    """
    if on_gpu(r_NK):
        from .pairwise_float64_triton import launch_inner_products

        with torch.cuda.device_of(r_NK):
            r_NK, sums_KE, (total_K, den_K, self_K, num_K), dominated_K = launch_inner_products(
                r_NK, emb_NE, sqnorm_N, low_K
            )
    else:
        r_NK = r_NK.to(torch.float64) if low_K is None else r_NK.to(torch.float64) - low_K
        sums_KE, total_K, den_K, self_K = r_NK.T @ emb_NE, r_NK.sum(0), dense_pair_weights(r_NK), sqnorm_N @ r_NK
        square_K = r_NK.new_zeros(r_NK.shape[1])
        for r_nK, sqnorm_n in zip(r_NK.split(_PAIR_BLOCK["cpu"]), sqnorm_N.split(_PAIR_BLOCK["cpu"])):
            square_K += sqnorm_n @ r_nK.square()
        num_K = (torch.linalg.vector_norm(sums_KE, dim=1).square() - square_K) / 2
        dominated_K = ~well_conditioned(sqnorm_N.sqrt() @ r_NK, square_K) & (square_K > 0)
    if dominated_K.cpu().numpy().any():  # a copy alone: nothing is launched for it
        num_K[dominated_K] = inner_product_blocks(r_NK[:, dominated_K], emb_NE)
    return InnerProductSums(sums_KE, num_K, den_K, total_K, self_K)


def inner_product_blocks(r_NK: Tensor, emb_NE: Tensor) -> Tensor:
    """num_K: pairs within a block of images by their similarities, pairs of blocks by their sums. No subtraction."""
    before_KE, num_K = r_NK.new_zeros(r_NK.shape[1], emb_NE.shape[1]), r_NK.new_zeros(r_NK.shape[1])
    block = _PAIR_BLOCK[r_NK.device.type]
    for r_nK, emb_nE in zip(r_NK.split(block), emb_NE.split(block)):
        sums_KE = r_nK.T @ emb_nE
        num_K += (before_KE * sums_KE).sum(1) + (r_nK * ((emb_nE @ emb_nE.T).triu_(1) @ r_nK)).sum(0)
        before_KE += sums_KE
    return num_K


# --- custom ops: CUDA ------------------------------------------------------------------------------------------------


@custom_op("pairwise_sums")
def pairwise_sums_op(r_NK: Tensor, emb_NE: Tensor, similarity: str, gamma: float, fast: bool) -> tuple[Tensor, Tensor]:
    emb_NE, sqnorm_N = prepare_embeddings(emb_NE, similarity, torch.float64)

    def sums_of(r_Nk: Tensor) -> tuple[Tensor, Tensor]:
        if similarity == "rbf":
            return all_pairs_sums(r_Nk, emb_NE, sqnorm_N, similarity, gamma, fast)
        return inner_product_sums(r_Nk, emb_NE, sqnorm_N)[1:3]

    with torch.cuda.device_of(r_NK):  # Triton launches on the current device
        return by_blocks(r_NK, sums_of)


def by_blocks(r_NK: Tensor, sums_of: Callable[[Tensor], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """num and den of blocks of latents, put together; of one block they are not copied."""
    parts = [sums_of(r_Nk) for r_Nk in r_NK.split(_LATENT_BLOCK, dim=1)]
    nums, dens = zip(*parts)
    return parts[0] if len(parts) == 1 else (torch.cat(nums), torch.cat(dens))


def all_pairs_sums(
    r_NK: Tensor, emb_NE: Tensor, sqnorm_N: Tensor, similarity: str, gamma: float, fast: bool
) -> tuple[Tensor, Tensor]:
    """num and den by the kernels that make every pair, whatever the similarity; embeddings prepared in float64."""
    from .pairwise_float64_triton import launch_column_sums, launch_panel_num, pair_weights
    from .pairwise_similarity_triton import launch_pairwise_num

    fast = fast and emb_NE.shape[1] > 0
    wide_NK, parts = launch_column_sums(r_NK, torch.ones_like(sqnorm_N), widen=not fast)
    den_K = pair_weights(parts)
    if not fast:
        return launch_panel_num(wide_NK, emb_NE, sqnorm_N, similarity, gamma), den_K
    num_K = launch_pairwise_num(r_NK, emb_NE, sqnorm_N, similarity, gamma)
    total_K, square_K = parts[:, 0].sum(0), parts[:, 3].sum(0)
    dominated_K = ~well_conditioned(total_K, square_K) & (square_K > 0)  # two float16 do not hold both it and the rest
    if bool(dominated_K.any()):
        wide_NK = r_NK[:, dominated_K].to(torch.float64)
        num_K[dominated_K] = launch_panel_num(wide_NK, emb_NE, sqnorm_N, similarity, gamma)
    return num_K, den_K


@custom_op("pairwise_gram_sums")
def pairwise_gram_sums_op(
    acts_M: Tensor, images_M: Tensor, offsets_S1: Tensor, emb_NE: Tensor, similarity: str, gamma: float
) -> tuple[Tensor, Tensor]:
    from .pairwise_similarity_triton import launch_gram_sums

    emb_NE, sqnorm_N = prepare_embeddings(emb_NE, similarity, torch.float32)
    with torch.cuda.device_of(acts_M):
        return launch_gram_sums(acts_M, images_M, offsets_S1, emb_NE, sqnorm_N, similarity, gamma)


def dense_pair_weights(r_NK: Tensor) -> Tensor:
    """den_K: sum over i < j of r_ik * r_jk in float64, in blocks of images so that memory stays bounded."""
    den_K = r_NK.new_zeros(r_NK.shape[1], dtype=torch.float64)
    before_K = torch.zeros_like(den_K)
    for r_nK in r_NK.split(1024):
        r_nK = r_nK.to(torch.float64)
        total_K = r_nK.sum(0)
        den_K += distinct_pair_products(r_nK[None])[0] + before_K * total_K
        before_K += total_K
    return den_K


# --- CPU -------------------------------------------------------------------------------------------------------------


@pairwise_sums_op.register_kernel("cpu")
def pairwise_sums_cpu(r_NK: Tensor, emb_NE: Tensor, similarity: str, gamma: float, fast: bool) -> tuple[Tensor, Tensor]:
    emb_NE, sqnorm_N = prepare_embeddings(emb_NE, similarity, torch.float64)

    def sums_of(r_Nk: Tensor) -> tuple[Tensor, Tensor]:
        if similarity == "rbf":
            r_Nk = r_Nk.to(torch.float64)
            num_k = _tiled_num(r_Nk[None], emb_NE[None], sqnorm_N[None], gamma, _CPU_IMAGE_BLOCK)[0]
            return num_k, dense_pair_weights(r_Nk)
        return inner_product_sums(r_Nk, emb_NE, sqnorm_N)[1:3]

    return by_blocks(r_NK, sums_of)


def _tiled_num(r_BNK: Tensor, emb_BNE: Tensor, sqnorm_BN: Tensor, gamma: float, block: int) -> Tensor:
    """num over tiles i-block <= j-block; sum_j s_ij r_j grows in one buffer, so r_i is read once per i-block."""
    num_BK = r_BNK.new_zeros(len(r_BNK), r_BNK.shape[2])
    r, emb, sqnorm = (t.split(block, 1) for t in (r_BNK, emb_BNE, sqnorm_BN))
    for i in range(len(r)):
        weighted_BIK = torch.zeros_like(r[i])
        for j in range(i, len(r)):
            s_BIJ = _rbf_tile(emb[i], emb[j], sqnorm[i], sqnorm[j], gamma)
            weighted_BIK.baddbmm_(s_BIJ.triu_(1) if i == j else s_BIJ, r[j])
        num_BK += weighted_BIK.mul_(r[i]).sum(1)
    return num_BK


def _rbf_tile(emb_BIE: Tensor, emb_BJE: Tensor, sqnorm_BI: Tensor, sqnorm_BJ: Tensor, gamma: float) -> Tensor:
    """Similarities [B, I, J] of prepared embeddings, from ||e_i||^2 + ||e_j||^2 - 2 <e_i, e_j>."""
    distance_BIJ = (sqnorm_BI[:, :, None] + sqnorm_BJ[:, None, :]).baddbmm_(emb_BIE, emb_BJE.mT, alpha=-2.0)
    return distance_BIJ.clamp_min_(0.0).mul_(-gamma).exp_()


@pairwise_gram_sums_op.register_kernel("cpu")
def pairwise_gram_sums_cpu(
    acts_M: Tensor, images_M: Tensor, offsets_S1: Tensor, emb_NE: Tensor, similarity: str, gamma: float
) -> tuple[Tensor, Tensor]:
    """Latents of about equally many images together, padded to the longest; embeddings gathered for some at a time."""
    emb_NE, sqnorm_N = prepare_embeddings(emb_NE, similarity, torch.float64)
    acts_M = acts_M.to(torch.float64)
    num_S, den_S = acts_M.new_zeros(len(offsets_S1) - 1), acts_M.new_zeros(len(offsets_S1) - 1)
    for latents_B, longest in _length_groups(offsets_S1.diff()):
        longest += -longest % -(-longest // _CPU_RUN)  # to runs of equal length
        r_BL, images_BL = _padded_segments(acts_M, images_M, offsets_S1, latents_B, longest)
        den_S[latents_B] = distinct_pair_products(r_BL)
        size = max(1, _CPU_BATCH_ELEMENTS // (longest * max(emb_NE.shape[1], 1)))
        emb_BLE = emb_NE.new_empty(min(size, len(r_BL)), longest, emb_NE.shape[1])
        nums = []
        for r_bL, images_bL in zip(r_BL.split(size), images_BL.split(size)):
            emb_bLE = emb_BLE[: len(r_bL)]
            torch.index_select(emb_NE, 0, images_bL.flatten(), out=emb_bLE.view(-1, emb_NE.shape[1]))
            if similarity == "rbf":
                block = min(max(longest // 8, _CPU_SEGMENT_BLOCKS[0]), _CPU_SEGMENT_BLOCKS[1])
                nums.append(_tiled_num(r_bL[:, :, None], emb_bLE, sqnorm_N[images_bL], gamma, block)[:, 0])
            else:
                nums.append(_inner_product_num(r_bL, emb_bLE))
        num_S[latents_B] = torch.cat(nums)
    return num_S, den_S


def _inner_product_num(r_BL: Tensor, emb_BLE: Tensor) -> Tensor:
    """num_B: pairs within a run of images by their similarities, pairs of runs by their sums."""
    n_latents, longest, d_emb = emb_BLE.shape
    run = longest // -(-longest // _CPU_RUN)
    r_RI, emb_RIE = r_BL.reshape(-1, run), emb_BLE.view(-1, run, d_emb)
    within_R = ((emb_RIE @ emb_RIE.mT).triu_(1) @ r_RI[:, :, None]).squeeze(2).mul_(r_RI).sum(1)
    sums_BRE = (r_RI[:, None, :] @ emb_RIE).view(n_latents, longest // run, d_emb)
    return within_R.view(n_latents, -1).sum(1) + distinct_pair_products(sums_BRE).sum(1)


def _length_groups(lengths_S: Tensor) -> Iterator[tuple[Tensor, int]]:
    """Latents that fire on two images or more, by falling number of images: groups within 1/8 of their longest."""
    lengths, order = lengths_S.sort(descending=True)
    ascending, first = -lengths, 0
    while first < len(order) and (longest := int(lengths[first])) > 1:
        last = int(torch.searchsorted(ascending, -max(2, longest - longest // 8), right=True))
        yield order[first:last], longest
        first = last


def _padded_segments(
    acts_M: Tensor, images_M: Tensor, offsets_S1: Tensor, latents_B: Tensor, longest: int
) -> tuple[Tensor, Tensor]:
    """Segments of the latents as rows [B, longest]; padding repeats a segment's last image with activation 0."""
    starts_B1, ends_B1 = offsets_S1[latents_B, None], offsets_S1[latents_B + 1, None]
    positions_BL = starts_B1 + torch.arange(longest, device=acts_M.device)
    inside_BL = positions_BL < ends_B1
    positions_BL = positions_BL.minimum(ends_B1 - 1)
    return acts_M[positions_BL].masked_fill_(~inside_BL, 0.0), images_M[positions_BL]


# --- fakes -----------------------------------------------------------------------------------------------------------


@pairwise_sums_op.register_fake
def pairwise_sums_fake(
    r_NK: Tensor, emb_NE: Tensor, similarity: str, gamma: float, fast: bool
) -> tuple[Tensor, Tensor]:
    sums_K = r_NK.new_empty(r_NK.shape[1], dtype=torch.float64)
    return sums_K, torch.empty_like(sums_K)


@pairwise_gram_sums_op.register_fake
def pairwise_gram_sums_fake(
    acts_M: Tensor, images_M: Tensor, offsets_S1: Tensor, emb_NE: Tensor, similarity: str, gamma: float
) -> tuple[Tensor, Tensor]:
    sums_S = acts_M.new_empty(offsets_S1.shape[0] - 1, dtype=torch.float64)
    return sums_S, torch.empty_like(sums_S)
