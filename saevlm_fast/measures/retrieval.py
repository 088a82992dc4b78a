"""Whether images keep their neighbours, and their texts: exact nearest neighbours by cosine, block by block.

Shape suffixes: N images, Q of them asked (evenly spaced), D width, K neighbours, U different texts.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saevlm_fast.errors import require
from saevlm_fast.measures.results import Figures, share

NEIGHBOURS = 10
MOST_QUERIES = 5000
_BLOCK_NUMBERS = 1 << 25  # cosines at a time


def queries_of(n_images: int, most: int = MOST_QUERIES) -> Tensor:
    """int64 [Q]: images that are asked for their neighbours, evenly spaced."""
    return torch.from_numpy(np.unique(np.linspace(0, n_images - 1, min(n_images, most)).round().astype(np.int64)))


def nearest(x_ND: Any, k: int = NEIGHBOURS, queries_Q: Tensor | None = None) -> Tensor:
    """int64 [Q, K]: of each query the nearest other images by cosine, the nearest first; of all images without queries.

    x_ND: a tensor, or scipy's sparse array in CSR form. All cosines with what has no length are 0.

    Raises:
        ValueError: k is not 1 to N - 1.
    """
    n = x_ND.shape[0]
    require(1 <= k < n, f"k: {k} neighbours of {n} images; must be 1 to {n - 1}")
    unit_ND = torch.nn.functional.normalize(x_ND.double(), dim=1) if isinstance(x_ND, Tensor) else _unit_rows(x_ND)
    queries_Q = torch.arange(n) if queries_Q is None else queries_Q
    found = []
    for some in queries_Q.split(max(1, _BLOCK_NUMBERS // n)):
        if isinstance(unit_ND, Tensor):
            cosine_qN = unit_ND[some] @ unit_ND.T
        else:
            cosine_qN = torch.from_numpy((unit_ND[some.numpy()] @ unit_ND.T).toarray())
        cosine_qN[torch.arange(len(some)), some] = -math.inf
        found.append(cosine_qN.topk(k, 1).indices)
    return torch.cat(found)


def _unit_rows(x_ND: Any) -> Any:
    from scipy.sparse import diags_array

    x_ND = x_ND.astype(np.float64)
    length_N = np.sqrt(np.asarray((x_ND**2).sum(1)).reshape(-1))
    return (diags_array(1 / np.where(length_N > 0, length_N, 1.0)) @ x_ND).tocsr()


def overlap(first_QK: Tensor, second_QK: Tensor) -> Tensor:
    """float64 [Q]: the share of neighbours that both have. Of random ones it is K / (N - 1)."""
    return (first_QK[:, :, None] == second_QK[:, None, :]).any(2).double().mean(1)


def votes(neighbours_QK: Tensor, labels_N: Tensor, n_labels: int) -> Tensor:
    """int64 [Q]: the label that most neighbours have, of equals that of the nearest; -1 has no say."""
    labels_QK = labels_N[neighbours_QK]
    k = labels_QK.shape[1]
    weight_K = 1 + 1e-3 / k * torch.arange(k, 0, -1, dtype=torch.float64) / k
    votes_QL = torch.zeros(len(labels_QK), n_labels + 1, dtype=torch.float64)
    votes_QL.scatter_add_(1, labels_QK % (n_labels + 1), weight_K.expand(labels_QK.shape))
    return votes_QL[:, :n_labels].argmax(1)


def image_text_recall(
    images_NE: Tensor, texts_UE: Tensor, text_of_image: Tensor, ks: Sequence[int] = (1, 5)
) -> dict[str, Figures]:
    """R@k both ways: the image's own text among its k nearest, and one of the text's own images among its.

    Args:
        images_NE, texts_UE: embeddings; texts_UE of different texts. text_of_image: int64 [N].

    Returns:
        image_to_text, text_to_image: {"1": share, "5": share}; of texts, those that an image has.
    """
    cosine_NU = torch.nn.functional.normalize(images_NE.double(), dim=1) @ texts_UE.double().T
    own_N = cosine_NU[torch.arange(len(images_NE)), text_of_image]
    rank_N = (cosine_NU > own_N[:, None]).sum(1)
    best_U = torch.full((len(texts_UE),), -math.inf, dtype=torch.float64)
    best_U.scatter_reduce_(0, text_of_image, own_N, "amax")
    rank_U = (cosine_NU > best_U).sum(0)[best_U.isfinite()]
    return {
        "image_to_text": {str(k): share((rank_N < k).numpy()) for k in ks},
        "text_to_image": {str(k): share((rank_U < k).numpy()) for k in ks},
    }
