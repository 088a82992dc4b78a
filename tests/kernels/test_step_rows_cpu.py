"""The compiled loop of a step's rows on a CPU, against float64: decoder, residuals, what they pass back, and faults."""

import pytest
import torch

from plain_step import make_case, plain_step
from saevlm_fast.config import SAEConfig
from saevlm_fast.kernels.cpu_loops import in_parts
from saevlm_fast.sae import SparseAutoencoder
from saevlm_fast.sparse_codes import SparseCodes
from saevlm_fast.training.dead_latents import DeadLatents
from saevlm_fast.training.gradients import loss_and_gradients
from test_step_rows import SHAPES as GPU_SHAPES
from test_step_rows import TOLERANCE

loops = pytest.importorskip("saevlm_fast.kernels.step_rows_numba", reason="no numba here", exc_type=ImportError)
SHAPES = GPU_SHAPES | {"one row": (1, 2, 5, 33, "csr", None), "no entries": (4, 0, 3, 6, "csr", None)}


def bag_offsets_of(case) -> torch.Tensor:
    """By counting: where the entries of every row and group begin."""
    _, _, rows_M, groups_M = case.flat()
    counts = torch.bincount(rows_M * len(case.ends) + groups_M, minlength=len(case.x_BD) * len(case.ends))
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0))


def through(case, bounds=None):
    """(x_hat, squared, centred, norms, suffix, norms, dots) of the loop; memory is poisoned before."""
    n_rows, d_in = case.x_BD.shape
    n_groups, nan = len(case.ends), torch.nan
    empty = lambda *shape: case.x_BD.new_full(shape, nan)  # noqa: E731
    of_rows = empty(n_rows, d_in), empty(n_rows), empty(n_rows, d_in), empty(n_rows)
    made = *of_rows, empty(n_rows, n_groups, d_in), empty(n_rows, n_groups), empty(case.acts.numel())
    scale = case.x_BD.new_tensor([2 / max(n_rows * n_groups, 1)])
    given = case.acts.flatten(), case.latents.flatten(), bag_offsets_of(case), case.x_BD, case.W_dec_SD, case.b_dec_D
    in_parts(loops.step_rows, bounds or [0, n_rows // 2, n_rows], *given, scale, *made)
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_rows_equal_the_definition(shape, dtype):
    case = make_case(*shape)
    truth, (acts, latents, rows_M, groups_M) = plain_step(case), case.flat()
    x_hat_BD, squared_B, centred_BD, centred_norm_B, suffix_BGD, suffix_norm_BG, dots_M = through(case.on("cpu", dtype))
    close = dict(rtol=TOLERANCE[dtype], atol=10 * TOLERANCE[dtype], check_dtype=False)
    torch.testing.assert_close(x_hat_BD, truth.x_hat_BD, **close)
    torch.testing.assert_close(squared_B, truth.squared_B, **close)
    torch.testing.assert_close(suffix_BGD, truth.suffix_BGD, **close)
    torch.testing.assert_close(suffix_norm_BG, truth.suffix_BGD.norm(dim=2), **close)
    torch.testing.assert_close(centred_BD, case.x_BD - case.b_dec_D, **close)
    torch.testing.assert_close(centred_norm_B, (case.x_BD - case.b_dec_D).norm(dim=1), **close)
    dots = (truth.suffix_BGD[rows_M, groups_M] * case.W_dec_SD[latents]).sum(1)
    torch.testing.assert_close(dots_M[: len(acts)], dots, **close)
    assert bool(dots_M[len(acts) :].isnan().all()), "padding is not written to"


def test_a_batch_without_rows_is_gone_through():
    case = make_case(3, 2, 5, 4, "fixed")
    case = case._replace(x_BD=case.x_BD[:0], acts=case.acts[:0], latents=case.latents[:0])
    assert all(made.numel() == 0 for made in through(case))


def test_the_number_of_threads_changes_no_bit():
    case = make_case(*SHAPES["ragged long prefixes"]).on("cpu", torch.float32)
    several = [through(case, bounds) for bounds in ([0, 4], [0, 1, 2, 3, 4], [0, 3, 4])]
    for made in zip(*several):
        assert torch.equal(made[0].nan_to_num(7), made[1].nan_to_num(7))
        assert torch.equal(made[0].nan_to_num(7), made[2].nan_to_num(7))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_in_its_row(bad):
    case = make_case(*SHAPES["ragged"]).on("cpu", torch.float32)
    case.x_BD[3, 5] = bad
    _, squared_B, _, centred_norm_B, _, suffix_norm_BG, _ = through(case)
    expected = [row != 3 for row in range(9)]
    assert squared_B.isfinite().tolist() == expected
    assert centred_norm_B.isfinite().tolist() == expected
    assert suffix_norm_BG.isfinite().all(1).tolist() == expected


@pytest.mark.parametrize("latent", [-1, 13])
def test_codes_of_another_sae_are_refused(latent):
    """A loop would read what lies beside the weights."""
    sae = SparseAutoencoder(SAEConfig(d_in=6, d_sae=13, k=2, architecture="topk"))
    codes = SparseCodes.from_flat(torch.ones(3, 2), torch.tensor([[0, 1], [2, latent], [3, 4]]), None, 13)
    none = DeadLatents(torch.empty(0, dtype=torch.int64), 0)
    with pytest.raises(ValueError, match=r"13"):
        loss_and_gradients(sae, torch.randn(3, 6), codes, none, 0.0)
