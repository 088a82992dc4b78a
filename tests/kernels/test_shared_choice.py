"""The one choice of several ranks by a GPU's kernels, against that of whole rows and batches."""

import pytest
import torch
from turns import taking_turns

from saevlm_fast.kernels import reference

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="ranks are threads that take the interpreter in turn")


def told(peers):
    from saevlm_fast.kernels.shared_choice_triton import Told

    return Told(peers.add_up, peers.gather, peers.rank)


def values(n_rows, n_values, ties=True):
    """Many of them equal, a third of them 0, some NaN or infinite."""
    generator = torch.Generator().manual_seed(n_rows)
    drawn = torch.randn(n_rows, n_values, generator=generator).relu()
    drawn = (drawn * 4).round() / 4 if ties else drawn
    drawn[1, 3], drawn[2, :2] = torch.nan, torch.inf
    return drawn


@pytest.mark.parametrize("k", [5, 40])
def test_the_largest_of_every_row_of_all_ranks(k):
    """Ranks have 7, 0 and 30 values of a row: ties go to the first."""
    from saevlm_fast.kernels.shared_largest_triton import launch_keep_largest_

    whole = values(5, 37)
    pieces = list(whole.split([7, 0, 30], dim=1))

    def work(peers):
        own = pieces[peers.rank].clone()
        launch_keep_largest_(own, k, told(peers))
        return own

    found = torch.cat(taking_turns(3, work), dim=1)
    ordered = torch.where(whole.isnan(), torch.inf, whole).sort(dim=1, descending=True, stable=True).indices[:, :k]
    kept = torch.zeros_like(whole, dtype=torch.bool).scatter_(1, ordered, True)
    torch.testing.assert_close(found, torch.where(kept, whole, 0), equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize(("n_wanted", "ties"), [(40, True), (33, False), (10_000, True)])
def test_the_largest_of_a_batch_of_all_ranks(n_wanted, ties):
    """Offers ragged by row, with places behind; more rows than one program has entries' places for."""
    from saevlm_fast.kernels.shared_choice_triton import launch_compact, launch_keep_of_batch

    whole = values(90, 24, ties)
    whole[2, :2] = 9.0
    whole[1, 3] = 8.0
    pieces = list(whole.split([9, 15], dim=1))

    def work(peers):
        dense = pieces[peers.rank]
        rows, latents = (dense > 0).nonzero().T
        offsets = torch.nn.functional.pad((dense > 0).sum(1).cumsum(0), (1, 0))
        acts = torch.cat([dense[rows, latents], torch.zeros(11)])
        latents = torch.cat([latents, torch.full((11,), 5)])
        mask, smallest = launch_keep_of_batch(acts, offsets, n_wanted, told(peers))
        codes = launch_compact(acts, latents, offsets, mask)
        assert not any(behind[codes[2][-1] :].any() for behind in codes[:2])
        return reference.densify(*codes, dense.shape[1]), smallest

    found = taking_turns(2, work)
    order = whole.flatten().sort(descending=True, stable=True).indices[:n_wanted]
    kept = torch.zeros(whole.numel(), dtype=torch.bool).index_fill_(0, order, True).view_as(whole) & (whole > 0)
    assert torch.equal(torch.cat([dense for dense, _ in found], dim=1), torch.where(kept, whole, 0))
    assert all(torch.equal(smallest, whole[kept].min().view(1)) for _, smallest in found)


@pytest.mark.parametrize(("n_ranks", "k"), [(1, 3), (3, 5), (2, 40)])
def test_the_offers_of_a_row_that_are_kept(n_ranks, k):
    """Against the choice of a CPU; the last rank has fewer latents than places."""
    from saevlm_fast.kernels.shared_choice_triton import launch_keep
    from saevlm_fast.training.choice import _keep_of_offers

    offers = torch.stack([values(6, k + 1)[:, 1:] for _ in range(n_ranks)])
    offers[-1, :, k // 2 + 1 :] = -1.0 if n_ranks > 1 else offers[-1, :, k // 2 + 1 :]
    for rank in range(n_ranks):
        n_own = k // 2 + 1 if rank == n_ranks - 1 else k
        mask = launch_keep(offers, rank, n_own)
        assert torch.equal(mask.bool(), _keep_of_offers(offers, rank, k)[:, :n_own])
