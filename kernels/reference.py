"""Plain-torch definition of every kernel: what the fast code must equal, written to be read.

Nothing here is clever. Every function works in the dtype of its input (the tests call it in float64), on any device,
and is differentiable wherever the operation is. Shape suffixes: B batch rows, N images, D d_in, S d_sae, K k,
E embedding width, M entries of sparse codes, L segments, G Matryoshka groups.

Sparse codes are triples (acts, latents, row_offsets):

* fixed k: acts and latents are [B, K] and row_offsets is None. A row with fewer than k positive pre-activations is
  filled with zero activations at its lowest latents of value zero.
* ragged (CSR): acts and latents are [M], row_offsets is [B + 1] int64 and row b owns entries
  row_offsets[b]:row_offsets[b + 1]. M is a capacity (B * k for BatchTopK, so that no device has to be asked how many
  there are): entries at or after row_offsets[B] are padding, activation 0 at latent 0, and belong to no row.

In both, latents are int64 and ascend within a row. The order of selection is (value descending, latent ascending)
within a row and (value descending, flat position b * S + s ascending) over a batch; NaN ranks above every number, as
in torch.topk, so that it reaches the loss and is reported instead of vanishing in a ReLU.
"""

import torch
from torch import Tensor


def preactivations(x_BD: Tensor, W_enc_DS: Tensor, b_enc_S: Tensor, b_dec_D: Tensor) -> Tensor:
    """relu((x - b_dec) @ W_enc + b_enc), NaN kept. docs/recipe.md section 1."""
    pre_BS = (x_BD - b_dec_D) @ W_enc_DS + b_enc_S
    return torch.where(pre_BS <= 0, torch.zeros_like(pre_BS), pre_BS)


def topk_select(pre_BS: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of every row, ties to the lower latent; returned with latents ascending."""
    latents_BK = torch.sort(pre_BS, dim=1, descending=True, stable=True).indices[:, :k].sort(dim=1).values
    return pre_BS.gather(1, latents_BK), latents_BK


def batch_topk_select(pre_BS: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The B * k largest of the whole batch, ties to the lower flat position; zeros never compete."""
    n_rows, d_sae = pre_BS.shape
    flat = pre_BS.flatten()
    kept = torch.sort(flat, descending=True, stable=True).indices[: n_rows * k]
    kept = kept[flat[kept] != 0].sort().values
    return _to_csr(flat[kept], kept, n_rows, d_sae, capacity=n_rows * k)


def threshold_select(pre_BS: Tensor, threshold: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Every activation above the threshold, one or [d_sae], and above 0 (and NaN). Nothing is padded."""
    n_rows, d_sae = pre_BS.shape
    flat = pre_BS.flatten()
    above_BS = pre_BS.double() > threshold  # as numbers: torch would round one to the dtype of pre
    kept = torch.nonzero(((above_BS & (pre_BS > 0)) | pre_BS.isnan()).flatten()).squeeze(1)
    return _to_csr(flat[kept], kept, n_rows, d_sae, capacity=len(kept))


def _to_csr(
    acts: Tensor, flat_positions: Tensor, n_rows: int, d_sae: int, capacity: int
) -> tuple[Tensor, Tensor, Tensor]:
    counts_B = torch.bincount(flat_positions // max(d_sae, 1), minlength=n_rows)
    row_offsets = torch.cat([counts_B.new_zeros(1), counts_B.cumsum(0)])
    padding = capacity - len(acts)
    latents = flat_positions % max(d_sae, 1)
    return (
        torch.nn.functional.pad(acts, (0, padding)),
        torch.nn.functional.pad(latents, (0, padding)),
        row_offsets,
    )


def topk_encode(x_BD: Tensor, W_enc_DS: Tensor, b_enc_S: Tensor, b_dec_D: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """TopK codes [B, K] of x."""
    return topk_select(preactivations(x_BD, W_enc_DS, b_enc_S, b_dec_D), k)


def batch_topk_encode(
    x_BD: Tensor, W_enc_DS: Tensor, b_enc_S: Tensor, b_dec_D: Tensor, k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """BatchTopK codes (CSR, capacity B * k) of x."""
    return batch_topk_select(preactivations(x_BD, W_enc_DS, b_enc_S, b_dec_D), k)


def threshold_encode(
    x_BD: Tensor, W_enc_DS: Tensor, b_enc_S: Tensor, b_dec_D: Tensor, threshold: float | Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (CSR, exact size) of x: every activation above the threshold, one or [d_sae]."""
    return threshold_select(preactivations(x_BD, W_enc_DS, b_enc_S, b_dec_D), threshold)


def entry_rows(latents: Tensor, row_offsets: Tensor | None) -> Tensor:
    """The row of every entry, flat [M]; B for padding."""
    if row_offsets is None:
        return torch.arange(latents.shape[0], device=latents.device).repeat_interleave(latents.shape[1])
    positions = torch.arange(latents.numel(), device=latents.device)
    return torch.searchsorted(row_offsets[1:].contiguous(), positions, right=True)


def densify(acts: Tensor, latents: Tensor, row_offsets: Tensor | None, d_sae: int) -> Tensor:
    """Dense [B, S] activations of sparse codes."""
    n_rows = latents.shape[0] if row_offsets is None else row_offsets.numel() - 1
    rows = entry_rows(latents, row_offsets)
    inside = rows < n_rows
    dense_BS = acts.new_zeros(n_rows, d_sae)
    return dense_BS.index_put((rows[inside], latents.flatten()[inside]), acts.flatten()[inside], accumulate=True)


def sparse_decode(
    acts: Tensor, latents: Tensor, row_offsets: Tensor | None, W_dec_SD: Tensor, b_dec_D: Tensor
) -> Tensor:
    """x_hat [B, D] = b_dec + sum over a row's entries of act * W_dec[latent]."""
    return densify(acts, latents, row_offsets, W_dec_SD.shape[0]) @ W_dec_SD + b_dec_D


def matryoshka_decode(
    acts: Tensor, latents: Tensor, row_offsets: Tensor | None, W_dec_SD: Tensor, b_dec_D: Tensor, group_ends: list[int]
) -> Tensor:
    """Prefix reconstructions [G, B, D]: the g-th uses latents below group_ends[g] only."""
    dense_BS = densify(acts, latents, row_offsets, W_dec_SD.shape[0])
    return torch.stack([dense_BS[:, :end] @ W_dec_SD[:end] + b_dec_D for end in group_ends])


def segment_sum(weights_M: Tensor, ids_M: Tensor, offsets_L1: Tensor, source_RD: Tensor) -> Tensor:
    """out[l] = sum over p in offsets[l]:offsets[l + 1] of weights[p] * source[ids[p]]."""
    segments = torch.searchsorted(
        offsets_L1[1:].contiguous(), torch.arange(len(ids_M), device=ids_M.device), right=True
    )
    inside = segments < len(offsets_L1) - 1
    out_LD = source_RD.new_zeros(len(offsets_L1) - 1, source_RD.shape[1])
    terms = weights_M[inside, None] * source_RD[ids_M[inside]]
    return out_LD.index_add(0, segments[inside], terms)


def gather_dot(g_BD: Tensor, latents: Tensor, row_offsets: Tensor | None, W_SD: Tensor) -> Tensor:
    """out[p] = <g[row of p], W[latent of p]>, in the shape of latents; 0 for padding."""
    rows = entry_rows(latents, row_offsets)
    inside = rows < g_BD.shape[0]
    out = g_BD.new_zeros(latents.numel())
    out[inside] = (g_BD[rows[inside]] * W_SD[latents.flatten()[inside]]).sum(1)
    return out.view(latents.shape)


def latent_gradient(
    weights_M: Tensor, ids_M: Tensor, offsets_S1: Tensor, source_RD: Tensor, unit_rows_SD: Tensor | None
) -> Tensor:
    """[S, D] segment sums, without their components along the unit rows if these are given."""
    g_SD = segment_sum(weights_M, ids_M, offsets_S1, source_RD)
    if unit_rows_SD is not None:
        g_SD = g_SD - (g_SD * unit_rows_SD).sum(1, keepdim=True) * unit_rows_SD
    return g_SD


def latent_update(
    W: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    g: Tensor,
    clip: Tensor | float,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    step: int,
    unit_norm: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(W, exp_avg, exp_avg_sq) after one step of Adam (Kingma and Ba 2015) on clip * g; step is 1-based."""
    exp_avg = betas[0] * exp_avg + (1 - betas[0]) * clip * g
    exp_avg_sq = betas[1] * exp_avg_sq + (1 - betas[1]) * (clip * g) ** 2
    W = W - lr * (exp_avg / (1 - betas[0] ** step)) / ((exp_avg_sq / (1 - betas[1] ** step)).sqrt() + eps)
    return W / W.norm(dim=1, keepdim=True) if unit_norm else W, exp_avg, exp_avg_sq


def similarity_matrix(emb_IE: Tensor, emb_JE: Tensor, similarity: str, gamma: float | None = None) -> Tensor:
    """s_ij between two blocks of embeddings: cosine, dot, or rbf exp(-gamma |e_i - e_j|^2), gamma 1 / E by default."""
    if similarity == "cosine":
        return (
            torch.nn.functional.normalize(emb_IE, dim=1, eps=0.0)
            @ torch.nn.functional.normalize(emb_JE, dim=1, eps=0.0).T
        )
    if similarity == "dot":
        return emb_IE @ emb_JE.T
    if similarity == "rbf":
        gamma = 1.0 / emb_IE.shape[1] if gamma is None else gamma
        return torch.exp(-gamma * (emb_IE[:, None, :] - emb_JE[None, :, :]).pow(2).sum(-1))
    raise ValueError(f"similarity: {similarity!r} is not one of cosine, dot, rbf")


def pairwise_sums(r_NK: Tensor, emb_NE: Tensor, similarity: str, gamma: float | None = None) -> tuple[Tensor, Tensor]:
    """num_k = sum_{i<j} r_ik s_ij r_jk and den_k = sum_{i<j} r_ik r_jk: the score's two sums, pair by pair."""
    s_NN = similarity_matrix(emb_NE, emb_NE, similarity, gamma).triu(diagonal=1)
    ones_NN = torch.ones_like(s_NN).triu(diagonal=1)
    return (r_NK * (s_NN @ r_NK)).sum(0), (r_NK * (ones_NN @ r_NK)).sum(0)


def monosemanticity(acts_NK: Tensor, emb_NE: Tensor, similarity: str = "cosine", gamma: float | None = None) -> Tensor:
    """Monosemanticity Score of every column of dense activations, NaN where undefined. docs/recipe.md section 3.

    Undefined: a column that is constant (dead is constant at zero), or has fewer than two images above its minimum.
    """
    if acts_NK.shape[0] == 0:
        return acts_NK.new_full((acts_NK.shape[1],), float("nan"))
    low, high = acts_NK.amin(0), acts_NK.amax(0)
    r_NK = (acts_NK - low) / (high - low)
    num, den = pairwise_sums(r_NK.nan_to_num(0.0), emb_NE, similarity, gamma)
    return torch.where((acts_NK > low).sum(0) >= 2, num / den, torch.full_like(num, float("nan")))
