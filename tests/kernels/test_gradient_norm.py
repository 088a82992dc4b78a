"""The clip factor decided on the device: totals, bound, norm, losses and counters, against float64; and compiled."""

import pytest
import torch

from plain_step import Case as Codes
from plain_step import make_case, plain_step
from static_compile import TARGETS, Case, assert_no_spills
from test_step_rows import launched

BETAS, EPS = (0.9, 0.999), 1e-8
CASES = {
    "flat": (9, 2, 9, 12, "fixed", None),
    "ragged": (12, 3, 21, 7, "csr", None),
    "heavy": (40, 2, 5, 6, "csr", None),
    "prefixes": (12, 3, 21, 7, "csr", [2, 9, 21]),
    "single entries": (6, 1, 40, 5, "fixed", None),
}


def totals_of(case: Codes, idle_S: torch.Tensor):
    """(rows, entries, totals) of a case on its device."""
    from saevlm_fast.kernels.step_entries_triton import launch_chunks, launch_order, new_entries
    from saevlm_fast.kernels.step_totals_triton import launch_totals

    rows = launched(case)
    order = launch_order(case.latents, case.row_offsets, len(case.W_dec_SD))
    entries = new_entries(rows, order)
    launch_chunks(entries, case.acts, rows, order)
    return rows, entries, launch_totals(entries, case.acts, rows, order, case.W_enc_SD, idle_S)


def counters(device, step: int = 5, threshold: float = -1.0) -> list[torch.Tensor]:
    values = torch.tensor(step), torch.tensor(-1), torch.tensor(threshold)
    return [value.to(device) for value in values]


def clipped(case: Codes, clip_norm: float, aux=None, made=None):
    """(decision, clip, b_dec and its moments after one step) of a case on its device; made: totals_of it."""
    from saevlm_fast.kernels.gradient_norm_triton import launch_clip, launch_decide

    device = case.x_BD.device
    rows, entries, totals = made or totals_of(case, torch.zeros(len(case.W_dec_SD), dtype=torch.int64, device=device))
    decision = launch_decide(rows, totals, tuple(counters(device)), clip_norm, 0.5, None, aux)
    schedule = torch.tensor([1e-2, 0.5], dtype=torch.float64, device=device)
    b_dec = case.b_dec_D.clone(), torch.zeros_like(case.b_dec_D), torch.zeros_like(case.b_dec_D)
    clip = launch_clip(entries, totals, decision, clip_norm, schedule, BETAS, EPS, b_dec)
    return decision, clip, b_dec


@pytest.mark.parametrize("shape", CASES.values(), ids=CASES)
@pytest.mark.usefixtures("poison")
def test_totals_and_idle_counters(device, shape) -> None:
    case = make_case(*shape)
    acts, latents, _, _ = case.flat()
    truth, d_sae = plain_step(case), shape[2]
    idle_S = torch.arange(d_sae, device=device)
    _, _, totals = totals_of(case.on(device, torch.float64), idle_S)
    parallel = torch.zeros(d_sae, dtype=torch.float64).index_add_(0, latents, acts * truth.dacts_M)
    torch.testing.assert_close(totals.db_enc_S.cpu(), truth.gradients["b_enc"])
    torch.testing.assert_close(totals.parallel_S.cpu(), parallel)
    torch.testing.assert_close(totals.db_parts.sum(0).cpu(), truth.gradients["b_dec"])
    fired = torch.zeros(d_sae, dtype=torch.bool).index_fill_(0, latents[acts > 0], True)
    assert torch.equal(idle_S.cpu(), torch.where(fired, 0, torch.arange(d_sae) + shape[0]))
    rest = truth.norm().square() - truth.gradients["b_dec"].square().sum()
    assert float(totals.square_parts.sum()) >= float(rest) * (1 - 1e-12), "a bound of the others' squares"
    if shape[1] == 1:  # rows of one entry: nothing but latent 0 is bounded
        bounded = truth.gradients["W_dec"][0].square().sum() + truth.gradients["W_enc"][0].square().sum()
        torch.testing.assert_close(totals.square_parts[:, 0].sum().cpu(), rest - bounded)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("shape", CASES.values(), ids=CASES)
@pytest.mark.usefixtures("poison")
def test_the_clip_factor_with_and_without_the_norm(device, shape, dtype) -> None:
    """Limits above the bound, between bound and norm, and below the norm; db_dec and b_dec's step as well."""
    case = make_case(*shape)
    truth, placed = plain_step(case), case.on(device, dtype)
    norm = float(truth.norm())
    close = dict(rtol=1e-11 if dtype == torch.float64 else 2e-5, atol=1e-7, check_dtype=False)
    needed, made = [], totals_of(placed, torch.zeros(shape[2], dtype=torch.int64, device=device))
    for limit in (norm * 100, norm * 1.002, norm * 0.3):
        decision, clip, (b, exp_avg, _) = clipped(placed, limit, made=made)
        expected = min(1.0, limit / (norm + 1e-6))
        torch.testing.assert_close(clip.cpu()[0], torch.tensor(expected, dtype=torch.float64), **close)
        torch.testing.assert_close(decision.db_dec_D.cpu(), truth.gradients["b_dec"], **close)
        torch.testing.assert_close(exp_avg.cpu(), 0.1 * expected * truth.gradients["b_dec"], **close)
        step = 1e-2 * exp_avg.cpu() / ((0.001**0.5 * expected * truth.gradients["b_dec"]).abs() / 0.5 + EPS)
        torch.testing.assert_close(b.cpu(), case.b_dec_D - step, **close)
        needed.append(int(decision.needed))
    assert needed[0] == 0
    assert needed[2] == 1
    mse = truth.squared_B.sum() / (len(case.x_BD) * len(case.ends))
    torch.testing.assert_close(decision.losses.cpu(), torch.stack([mse, mse, 0 * mse]), **close)


def test_the_auxiliary_loss_is_part_of_both(device) -> None:
    case = make_case(*CASES["ragged"])
    truth, placed = plain_step(case), case.on(device, torch.float64)
    numbers = torch.tensor([3.0, 50.0], dtype=torch.float64, device=device)
    aux_db = torch.arange(7.0, dtype=torch.float64, device=device)
    decision, clip, _ = clipped(placed, 1.0, (numbers, aux_db))
    db_dec = truth.gradients["b_dec"] - aux_db.cpu()
    squares = truth.norm().square() - truth.gradients["b_dec"].square().sum() + db_dec.square().sum() + 50.0
    torch.testing.assert_close(decision.db_dec_D.cpu(), db_dec)
    torch.testing.assert_close(float(clip), 1 / (float(squares) ** 0.5 + 1e-6))
    mse = float(decision.losses[1])
    assert decision.losses.tolist() == pytest.approx([mse + 0.5 * 3.0, mse, 3.0])


@pytest.mark.parametrize(("step", "bad", "expected"), [(7, -1, 7), (7, 3, 3)])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_the_first_bad_step_is_kept(device, step: int, bad: int, expected: int, value: float) -> None:
    from saevlm_fast.kernels.gradient_norm_triton import launch_decide

    case = make_case(*CASES["flat"]).on(device, torch.float32)
    case.x_BD[3, 2] += value
    rows, _, totals = totals_of(case, torch.zeros(9, dtype=torch.int64, device=device))
    step_index, bad_step, threshold = counters(device, step)
    bad_step.fill_(bad)
    decision = launch_decide(rows, totals, (step_index, bad_step, threshold), 1.0, 0.0)
    assert int(bad_step) == (bad if value == 0.0 else expected)
    assert float(threshold) == -1.0
    if value != 0.0:
        assert int(decision.needed) == 1, "what is not a number is not below the limit"


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_norm_that_is_not_finite_clips_nothing_away(device, bad: float) -> None:
    """As in clip_grad_norm_: the factor is NaN, or 0, and 0 times infinity is NaN in what has it."""
    case = make_case(*CASES["flat"]).on(device, torch.float32)
    case.x_BD[3, 2] = bad
    _, clip, (b, *_) = clipped(case, 1.0)
    assert float(clip) == 0.0 or bool(clip.isnan())
    assert not bool(b.isfinite().all())


@pytest.mark.parametrize(("old", "step", "expected"), [(-1.0, 5, "least"), (0.5, 5, "mean"), (0.5, 2, "old")])
def test_the_threshold_moves_after_its_start(device, old: float, step: int, expected: str) -> None:
    from saevlm_fast.kernels.gradient_norm_triton import launch_decide

    case = make_case(*CASES["ragged"])
    acts = case.flat()[0]
    least = float(acts[acts > 0].min())
    rows, _, totals = totals_of(case.on(device, torch.float32), torch.zeros(21, dtype=torch.int64, device=device))
    state = counters(device, step, old)
    launch_decide(rows, totals, tuple(state), 1.0, 0.0, (0.9, 2))
    values = {"least": least, "mean": 0.9 * old + 0.1 * least, "old": old}
    assert float(state[2]) == pytest.approx(values[expected], rel=1e-6)


def test_no_positive_activation_is_a_threshold_of_zero(device) -> None:
    from saevlm_fast.kernels.gradient_norm_triton import launch_decide

    case = make_case(*CASES["ragged"]).on(device, torch.float32)
    case.acts.zero_()
    rows, _, totals = totals_of(case, torch.zeros(21, dtype=torch.int64, device=device))
    state = counters(device)
    launch_decide(rows, totals, tuple(state), 1.0, 0.0, (0.9, 2))
    assert float(state[2]) == 0.0


@pytest.mark.parametrize("parallel", [1.0, 100.0, 10_000.0])
def test_the_bound_holds_however_long_the_part_along_the_row(device, parallel: float) -> None:
    """64 equal entries in float32, 1.01 across the decoder's row and much more along it: neither hides the other."""
    n = 64
    W_dec = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    residual = torch.tensor([parallel, 1.01])
    x = (W_dec[0] - residual / 2 * 1.0).expand(n, 2).contiguous()  # suffix = 2 / n (W_dec[0] - x) = residual / n
    acts, latents = torch.ones(n, 1), torch.zeros(n, 1, dtype=torch.int64)
    case = Codes(x, acts, latents, None, [2], W_dec, torch.zeros(2, 2), torch.zeros(2))
    enc = plain_step(case.on("cpu", torch.float64))
    _, _, totals = totals_of(case.on(device, torch.float32), torch.zeros(2, dtype=torch.int64, device=device))
    others = enc.gradients["W_enc"].square().sum() + enc.gradients["b_enc"].square().sum()
    assert float(totals.square_parts.sum()) >= 1.01**2 + float(others) * (1 - 1e-6)


def compile_cases(d_in: int, targets: tuple[str, ...]) -> list[Case]:
    import saevlm_fast.kernels.gradient_norm_triton as module
    import saevlm_fast.kernels.step_totals_triton as of_totals
    from saevlm_fast.kernels.segment_sum_triton import CHUNK
    from saevlm_fast.kernels.step_rows_triton import whole_row_block

    names = "acts dacts norms x_norms l1 W_enc db_enc parallel db_parts square_parts source out sums"
    names += " squared smallest aux aux_db db_dec exact losses threshold suffix centred dec_partials enc_partials"
    names += " squares clip b"
    signature = {f"{name}_ptr": "*fp32" for name in f"{names} exp_avg exp_avg_sq".split()}
    signature |= {f"{name}_ptr": "*i32" for name in "bags rows offsets needed arrivals".split()}
    signature |= {f"ordered_{name}_ptr": signature[f"{name}_ptr"] for name in ("acts", "dacts", "bags", "rows")}
    signature |= {
        "order_ptr": "*i64",
        "idle_ptr": "*i64",
        "step_index_ptr": "*i64",
        "bad_step_ptr": "*i64",
        "schedule_ptr": "*fp64",
    }
    counts = "n_latents n_rows n_parts n_sums n_programs n_groups threshold_start n_squares"
    signature |= dict.fromkeys(counts.split(), "i32") | {"d_in": "i32:16", "suffix_stride": "i32:16"}
    block_d, warps_8 = whole_row_block(d_in, 8)
    row = {"BLOCK_D": block_d, "ACC": "tl.float32"}
    adam = {"BETA1": 0.9, "BETA2": 0.999, "EPS": 1e-8}
    totals = {name: getattr(of_totals, name) for name in ("SLACK", "LATENTS", "TILE_E", "HEAVY_E", "ROWS_B")} | row
    totals |= {"DECODER": True, "ENCODER": True, "PREFIXES": True, "HAS_L1": True}
    totals["ROWS_W"] = of_totals.ROWS_W if block_d <= 2048 else of_totals.ROWS_WIDE
    decide = {"LIMIT": 1.0, "ALPHA": 0.03, "BETA": 0.999, "HAS_AUX": True, "THRESHOLD": True, "ROWS": module.DB_ROWS}
    decide |= {"STEP": module.sum_step(block_d), "BLOCK": module.DECIDE_BLOCK, "BLOCK_C": module.BLOCK_C}
    clip = {"FIRST": 0, "LIMIT": 1.0, "CHUNK": CHUNK, "BLOCK": module.CLIP_BLOCK} | adam
    regs, wide_regs = (of_totals.REGISTERS, None) if block_d <= 2048 else (None, module.WIDE_REGISTERS)
    kernels = (
        (of_totals, "totals_kernel", totals, max(2, warps_8), 2, regs),
        (module, "decide_kernel", decide | row, 8),
        (module, "clip_kernel", clip | row, whole_row_block(d_in, 4)[1], 2, wide_regs),
    )
    return [
        Case(home.__name__, name, target, signature, *kernel) for target in targets for home, name, *kernel in kernels
    ]


def test_static_compile_without_spills() -> None:
    from saevlm_fast.kernels.step_rows_triton import MAX_WIDTH

    assert_no_spills(compile_cases(1024, TARGETS) + compile_cases(MAX_WIDTH, ("sm_90",)))
