"""The choice of several ranks against that of one process, over all latents."""

import pytest
import torch
from thread_peers import together

from saevlm_fast.kernels import reference
from saevlm_fast.kernels.grouping import entry_rows
from saevlm_fast.training import choice
from saevlm_fast.training.choice import keep_largest_of_all, keep_of_batch, keep_of_rows


def preactivations(n_rows, d_sae, seed, levels):
    """Many ties, among them at 0."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-levels, levels, (n_rows, d_sae), generator=generator).clamp(min=0).float()


def cuts(d_sae, n_ranks):
    return [rank * d_sae // n_ranks for rank in range(n_ranks + 1)]


def with_nan(pre_BS, share):
    return torch.where(torch.rand(pre_BS.shape, generator=torch.Generator().manual_seed(9)) < share, torch.nan, pre_BS)


@pytest.mark.parametrize("few_offers", [0, 10_000], ids=["counts", "offers"])
@pytest.mark.parametrize("n_ranks", [1, 2, 5])
@pytest.mark.parametrize(("d_sae", "k", "levels"), [(7, 5, 2), (40, 6, 3), (40, 6, 1000), (11, 11, 2)])
@pytest.mark.parametrize("nan", [0, 0.1])
def test_top_k_of_rows(monkeypatch, few_offers, n_ranks, d_sae, k, levels, nan):
    monkeypatch.setattr(choice, "FEW_OFFERS", few_offers)
    pre_BS = with_nan(preactivations(9, d_sae, 1, levels), nan)
    _, latents_BK = reference.topk_select(pre_BS, k)
    edges = cuts(d_sae, n_ranks)

    def work(peers):
        start, stop = edges[peers.rank : peers.rank + 2]
        acts_BC, own_BC = reference.topk_select(pre_BS[:, start:stop], min(k, stop - start))
        kept_BC = keep_of_rows(acts_BC, k, peers)
        return [own_BC[row][kept_BC[row]] + start for row in range(9)]

    found, _ = together(n_ranks, work)
    for row in range(9):
        assert torch.equal(torch.cat([kept[row] for kept in found]), latents_BK[row])


@pytest.mark.parametrize(("n_ranks", "n_replicas"), [(1, 1), (2, 1), (5, 1), (1, 2), (3, 2), (2, 4)])
@pytest.mark.parametrize(("d_sae", "k", "levels"), [(7, 5, 2), (40, 6, 3), (40, 6, 1000), (11, 11, 2), (30, 9, 1)])
@pytest.mark.parametrize("nan", [0, 0.1])
def test_top_k_of_a_batch(n_ranks, n_replicas, d_sae, k, levels, nan):
    n_rows = 9
    pre_BS = with_nan(preactivations(n_rows, d_sae, 2, levels), nan)
    acts_M, latents_M, row_offsets = reference.batch_topk_select(pre_BS, k)
    edges, lines = cuts(d_sae, n_ranks), cuts(n_rows, n_replicas)
    wanted = reference.densify(acts_M, latents_M, row_offsets, d_sae) != 0
    positive = acts_M[acts_M > 0]

    def work(peers):
        part, replica = peers.ranks.latents.rank, peers.ranks.rows.rank
        rows, latents = slice(*lines[replica : replica + 2]), slice(*edges[part : part + 2])
        own_BS = pre_BS[rows, latents]
        own_k = min(-(-n_rows * k // len(own_BS)), own_BS.shape[1])
        acts, latents_M, offsets = reference.batch_topk_select(own_BS, own_k)
        rows_M = entry_rows(latents_M, offsets)
        kept = keep_of_batch(acts, rows_M, len(own_BS), n_rows * k, peers.ranks)
        places = torch.zeros(own_BS.shape, dtype=torch.bool)
        places[rows_M[kept.mask], latents_M[kept.mask]] = True
        assert torch.equal(places, wanted[rows, latents])
        if not nan:
            assert float(kept.smallest) == (float(positive.min()) if len(positive) else 0)

    together(n_ranks * n_replicas, work, n_replicas)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("levels", "k"), [(3, 4), (100_000, 4), (2, 30), (100_000, 11), (5, 12)])
def test_the_largest_of_all_by_digits(dtype, levels, k):
    values_BN = preactivations(6, 12, 3, levels).to(dtype) / 7
    pieces = values_BN.split((5, 0, 7), dim=1)
    kept, _ = together(
        3, lambda ranks: keep_largest_of_all(pieces[ranks.rank], k, ranks.add_up, ranks.gather, ranks.rank)
    )
    kept_BN = torch.cat(kept, dim=1)
    order = torch.sort(values_BN, dim=1, descending=True, stable=True).indices[:, :k]
    wanted_BN = torch.zeros_like(kept_BN).scatter_(1, order, True)
    assert torch.equal(kept_BN & (values_BN > 0), wanted_BN & (values_BN > 0))
