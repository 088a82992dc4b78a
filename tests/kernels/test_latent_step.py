"""The update kernel of a GPU's step: gradient rows made from entries, Adam, unit norm, low copy; and compiled."""

import pytest
import torch

from plain_step import make_case, plain_step
from saevlm_fast.kernels import reference
from saevlm_fast.kernels.latent_gradient import latent_slots
from saevlm_fast.kernels.low_weights import LowWeights
from static_compile import TARGETS, Case, assert_no_spills
from test_gradient_norm import CASES, totals_of

BETAS, EPS, LR, STEP, CLIP = (0.9, 0.999), 1e-8, 1e-2, 4, 0.3


def scalars(device, clip: float = CLIP):
    from saevlm_fast.kernels.latent_update import AdamSettings
    from saevlm_fast.kernels.latent_update_triton import Scalars

    schedule = torch.tensor(AdamSettings(LR, BETAS, EPS, STEP).schedule_values(), dtype=torch.float64, device=device)
    return Scalars(torch.tensor([clip], dtype=torch.float64, device=device), schedule, BETAS, EPS)


def state_of(W: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    m, v = torch.rand(2, *W.shape, generator=generator, dtype=torch.float64).unbind()
    return W, 0.1 * m, 0.01 * v


def expected(state, g: torch.Tensor, unit_norm: bool) -> tuple[torch.Tensor, ...]:
    return reference.latent_update(*state, g, CLIP, LR, BETAS, EPS, STEP, unit_norm)


def rows_of_latents(case, generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of an auxiliary loss for latents 1 and the last, its list padded."""
    latents_A = torch.tensor([1, len(case.W_dec_SD) - 1, len(case.W_dec_SD)])
    rows_AD = torch.randn(3, case.x_BD.shape[1], generator=generator, dtype=torch.float64)
    rows_AD[2] = 0
    return latents_A, rows_AD


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("with_aux", [False, True], ids=["plain", "aux"])
@pytest.mark.parametrize("shape", [CASES[name] for name in ("flat", "heavy", "prefixes")], ids=str)
@pytest.mark.usefixtures("poison")
def test_both_sides_equal_the_definition(device, shape, with_aux: bool, dtype) -> None:
    """Empty latents, light ones, one with whole chunks; odd numbers of latents and columns."""
    from saevlm_fast.kernels.latent_update_triton import launch_update

    case = make_case(*shape)
    truth, d_sae, d_in = plain_step(case), shape[2], shape[3]
    placed = case.on(device, dtype)
    _, entries, totals = totals_of(placed, torch.zeros(d_sae, dtype=torch.int64, device=device))
    aux, g_aux = None, torch.zeros_like(case.W_dec_SD)
    if with_aux:
        latents_A, rows_AD = rows_of_latents(case, torch.Generator().manual_seed(4))
        g_aux[latents_A[:2]] = rows_AD[:2]
        aux = rows_AD.to(device, dtype), latent_slots(latents_A, d_sae + 1)[:d_sae].to(device)
    close = dict(rtol=1e-11 if dtype == torch.float64 else 1e-4, atol=1e-11 if dtype == torch.float64 else 1e-6)

    start = state_of(case.W_dec_SD)
    decoder = tuple(t.to(device, dtype, copy=True) for t in start)
    launch_update(entries, totals.parallel_S, scalars(device), decoder, None, aux)
    for out, value in zip(decoder, expected(start, truth.gradients["W_dec"] + g_aux, True)):
        torch.testing.assert_close(out.cpu(), value, check_dtype=False, **close)

    start, start_b = state_of(case.W_enc_SD), state_of(torch.zeros(d_sae, dtype=torch.float64))
    encoder, biases = (tuple(t.to(device, dtype, copy=True) for t in state) for state in (start, start_b))
    width = -(-d_in // 8) * 8
    low = torch.zeros(d_sae, width, dtype=torch.float16, device=device), *torch.full((2, d_sae), 7.0, device=device)
    launch_update(entries, totals.db_enc_S, scalars(device), encoder, biases, aux, low)
    for out, value in zip(encoder, expected(start, truth.gradients["W_enc"] + g_aux, False)):
        torch.testing.assert_close(out.cpu(), value, check_dtype=False, **close)
    for out, value in zip(biases, expected(start_b, truth.gradients["b_enc"], False)):
        torch.testing.assert_close(out.cpu(), value, check_dtype=False, **close)
    W, copy = encoder[0].double(), low[0][:, :d_in].double()
    assert bool(((copy - W).abs() <= W.abs() * 2**-10 + 2**-24).all())  # the interpreter cuts, a GPU rounds
    assert not bool(low[0][:, d_in:].any())
    torch.testing.assert_close(low[1].double(), W.norm(dim=1), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(low[2].double(), (W - copy).norm(dim=1), rtol=1e-3, atol=1e-9)


def test_a_clip_of_nan_reaches_every_latent(device) -> None:
    from saevlm_fast.kernels.latent_update_triton import launch_update

    case = make_case(*CASES["heavy"]).on(device, torch.float32)
    _, entries, totals = totals_of(case, torch.zeros(5, dtype=torch.int64, device=device))
    decoder = case.W_dec_SD, torch.zeros_like(case.W_dec_SD), torch.zeros_like(case.W_dec_SD)
    launch_update(entries, totals.parallel_S, scalars(device, float("nan")), decoder, None)
    assert all(bool(t.isnan().all()) for t in decoder)


def test_repeats_bit_identically(device) -> None:
    from saevlm_fast.kernels.latent_update_triton import launch_update

    case = make_case(*CASES["heavy"]).on(device, torch.float32)
    results = []
    for _ in range(2):
        _, entries, totals = totals_of(case, torch.zeros(5, dtype=torch.int64, device=device))
        decoder = case.W_dec_SD.clone(), torch.zeros_like(case.W_dec_SD), torch.zeros_like(case.W_dec_SD)
        launch_update(entries, totals.parallel_S, scalars(device), decoder, None)
        results.append(decoder)
    assert all(torch.equal(*pair) for pair in zip(*results))


@pytest.mark.gpu
@pytest.mark.parametrize("unit", [False, True], ids=["W_enc", "W_dec"])
def test_gpu_low_copy_is_what_the_encoder_would_make(device, unit: bool) -> None:
    """Bit for bit: the update and LowWeights.write_ take the same norms of the same rows."""
    from saevlm_fast.kernels.latent_update_triton import launch_update

    case = make_case(200, 8, 1000, 500, "csr").on(device, torch.float32)
    _, entries, totals = totals_of(case, torch.zeros(1000, dtype=torch.int64, device=device))
    W = case.W_dec_SD if unit else case.W_enc_SD
    state = W, torch.zeros_like(W), torch.zeros_like(W)
    biases = tuple(torch.zeros(1000, device=device) for _ in range(3))
    low, again = (LowWeights.empty(1000, 500, device) for _ in range(2))
    launch_update(entries, totals.db_enc_S, scalars(device), state, biases, None, low)
    again.write_(0, W)
    assert torch.equal(low.W_SD, again.W_SD)
    torch.testing.assert_close(low.norm_S, again.norm_S, rtol=1e-6, atol=0)
    torch.testing.assert_close(low.error_S, again.error_S, rtol=2e-4, atol=0)  # the bound leaves 1e-3 for it


def compile_cases(d_in: int, targets: tuple[str, ...]) -> list[Case]:
    from saevlm_fast.kernels.latent_update_triton import BLOCK_S, PER_THREAD, REGISTERS, TINY
    from saevlm_fast.kernels.segment_sum_triton import CHUNK
    from saevlm_fast.kernels.step_rows_triton import whole_row_block

    floats = "weights source partials totals clip aux_rows W exp_avg exp_avg_sq b b_exp_avg b_exp_avg_sq first"
    signature = {f"{name}_ptr": "*fp32" for name in f"{floats} low_norm low_error".split()}
    signature |= {"ids_ptr": "*i32", "offsets_ptr": "*i32", "aux_slots_ptr": "*i32", "schedule_ptr": "*fp64"}
    signature |= {"low_ptr": "*fp16", "n_latents": "i32", "low_stride": "i32:16", "d_in": "i32:16"}
    block_d, num_warps = whole_row_block(d_in, PER_THREAD)
    constants = {"HAS_AUX": True, "BETA1": 0.9, "BETA2": 0.999, "EPS": 1e-8, "NORM_EPS": 1e-7, "TINY": TINY}
    constants |= {"CHUNK": CHUNK, "BLOCK_D": block_d, "ACC": "tl.float32"}
    cone = {"COSINE": 0.8, "SINE": 0.6, "ROUNDING": 3e-4}
    sides = (
        {"DECODER": True, "HAS_LOW": False, "CONE": False},
        {"DECODER": True, "HAS_LOW": False, "CONE": True},
        {"DECODER": False, "HAS_LOW": True, "CONE": False},
    )
    registers = REGISTERS if block_d <= 2048 else None
    path = "saevlm_fast.kernels.latent_update_triton"
    kernels = [("update_kernel", constants | cone | side, num_warps, 2, registers) for side in sides]
    kernels.append(("bias_kernel", {"BETA1": 0.9, "BETA2": 0.999, "EPS": 1e-8, "BLOCK_S": BLOCK_S}, 4))
    return [Case(path, name, target, signature, *kernel) for target in targets for name, *kernel in kernels]


def test_static_compile_without_spills() -> None:
    from saevlm_fast.kernels.step_rows_triton import MAX_WIDTH

    assert_no_spills(compile_cases(1024, TARGETS) + compile_cases(MAX_WIDTH, ("sm_90",)))
