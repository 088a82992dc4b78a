"""The kernel of a step's rows: decoder, losses and what they pass back, against float64, and compiled."""

import pytest
import torch

from plain_step import make_case, plain_step
from static_compile import TARGETS, Case, assert_no_spills

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6}
# rows, k, d_sae, d_in, layout, ends. Entries of a row that are not held are gone through twice.
SHAPES = {
    "fixed": (7, 5, 11, 24, "fixed", None),
    "one": (4, 1, 3, 7, "fixed", None),
    "long": (3, 37, 60, 9, "fixed", None),
    "prefixes": (5, 6, 13, 10, "fixed", [1, 4, 9, 13]),
    "ragged": (9, 5, 11, 24, "csr", None),
    "ragged long": (5, 40, 60, 5, "csr", None),
    "ragged prefixes": (7, 6, 13, 10, "csr", [1, 4, 9, 13]),
    "ragged long prefixes": (4, 50, 70, 5, "csr", [2, 3, 20, 70]),
    "three prefixes": (6, 6, 13, 10, "csr", [2, 5, 13]),
}


def launched(case, centred=None):
    from saevlm_fast.kernels.step_rows_triton import launch_rows

    ends = torch.tensor(case.ends, device=case.x_BD.device)
    return launch_rows(case.x_BD, case.acts, case.latents, case.row_offsets, ends, case.W_dec_SD, case.b_dec_D, centred)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.usefixtures("poison")
def test_rows_equal_the_definition(device, shape, dtype) -> None:
    case = make_case(*shape)
    truth, (acts, _, rows_M, groups_M) = plain_step(case), case.flat()
    rows = launched(case.on(device, dtype))
    close = dict(rtol=TOLERANCE[dtype], atol=10 * TOLERANCE[dtype], check_dtype=False)
    n_groups = len(case.ends)
    torch.testing.assert_close(rows.x_hat_BD.cpu(), truth.x_hat_BD, **close)
    torch.testing.assert_close(rows.suffix_RD.cpu(), truth.suffix_BGD.flatten(0, 1), **close)
    torch.testing.assert_close(rows.norms_R.cpu(), truth.suffix_BGD.flatten(0, 1).norm(dim=1), **close)
    torch.testing.assert_close(rows.squared_B.cpu(), truth.squared_B, **close)
    torch.testing.assert_close(rows.dacts_M.cpu()[: len(acts)], truth.dacts_M, **close)
    assert torch.equal(rows.bags_M.cpu()[: len(acts)].long(), rows_M * n_groups + groups_M)
    torch.testing.assert_close(rows.centred_BD.cpu(), case.x_BD - case.b_dec_D, **close)
    torch.testing.assert_close(rows.x_norms_B.cpu(), (case.x_BD - case.b_dec_D).norm(dim=1), **close)
    if case.row_offsets is not None:
        least = torch.full((len(case.x_BD),), torch.inf, dtype=torch.float64)
        positive = torch.where(acts > 0, acts, torch.inf)
        least.scatter_reduce_(0, rows_M, positive, "amin")
        torch.testing.assert_close(rows.smallest_B.cpu(), least, **close)


def test_centred_rows_that_are_at_hand_are_passed_on(device) -> None:
    case = make_case(*SHAPES["ragged"]).on(device, torch.float32)
    centred = torch.randn(9, 24, device=device), torch.randn(9, device=device)
    expected = [t.clone() for t in centred]
    rows = launched(case, centred)
    assert rows.centred_BD is centred[0]
    assert all(torch.equal(*pair) for pair in zip(centred, expected))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_is_told(device, bad: float) -> None:
    case = make_case(*SHAPES["fixed"]).on(device, torch.float32)
    case.x_BD[3, 5] = bad
    rows = launched(case)
    finite = rows.squared_B.isfinite().tolist()
    assert finite == [True, True, True, False, True, True, True]
    assert bool(rows.x_hat_BD.isfinite().all())


def test_too_wide_a_row_is_named() -> None:
    from saevlm_fast.kernels.step_rows_triton import MAX_WIDTH, whole_row_block

    with pytest.raises(ValueError, match=f"d_in: {MAX_WIDTH + 1} is above {MAX_WIDTH}"):
        whole_row_block(MAX_WIDTH + 1, 8)


def compile_case(d_in: int, k: int, n_groups: int, target: str) -> Case:
    from saevlm_fast.kernels.step_rows_triton import row_tile

    floats = "x acts W b x_hat suffix norms centred x_norms dacts squared smallest".split()
    signature = {f"{name}_ptr": "*fp32" for name in floats}
    signature |= {f"{name}_ptr": "*i64" for name in ("latents", "row_offsets", "group_ends")}
    signature |= {"bags_ptr": "*i32", "n_rows": "i32", "d_in": "i32:16"}
    constants = row_tile(d_in, k, n_groups, amd=target == "gfx942")
    launch = {name: constants.pop(name) for name in ("num_warps", "maxnreg") if name in constants}
    constexprs = {"K": k, "CENTRE": False, "ACC": "tl.float32"} | constants
    return Case("saevlm_fast.kernels.step_rows_triton", "row_kernel", target, signature, constexprs, **launch)


def test_static_compile_without_spills() -> None:
    from saevlm_fast.kernels.step_rows_triton import MAX_WIDTH, REGISTERS

    kinds = [(20, 1), (64, 1), (0, 1), (0, 4)]  # Matryoshka codes are ragged
    cases = [compile_case(1024, *kind, target) for kind in kinds for target in TARGETS]
    wide = [compile_case(d_in, 0, n_groups, "sm_90") for d_in in (2048, 4096, MAX_WIDTH) for n_groups in (1, 4)]
    for case, used in zip([*cases, *wide], assert_no_spills([*cases, *wide])):
        assert case.maxnreg is None or used.registers <= REGISTERS, (case, used)
