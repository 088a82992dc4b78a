"""The GPU's encoders that screen in float16: the codes of float32, bounds that hold, and what is done again.

In Triton's interpreter where there is no GPU: few and small shapes.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from saevlm_fast.kernels import low_weights as low_weights_module
from saevlm_fast.kernels import reference, topk_encode_cuda
from saevlm_fast.kernels.common import MAX_K
from saevlm_fast.kernels.low_weights import LowWeights, keeps_subnormals
from saevlm_fast.kernels.topk_encode import batch_topk_encode, threshold_encode, topk_encode
from saevlm_fast.kernels.topk_encode_batch_triton import launch_threshold_encode
from saevlm_fast.kernels.topk_encode_cuda import (
    Centred,
    Screening,
    batch_topk_encode_screened_cuda,
    group_size,
    threshold_encode_screened_cuda,
    topk_encode_screened_cuda,
)
from saevlm_fast.kernels.topk_encode_list_triton import Pool
from static_compile import TARGETS, Case, assert_no_spills
from test_topk_encode import assert_clear, assert_codes, float_inputs, integer_inputs, midway


def low_weights(W_enc_DS):
    """LowWeights by torch: quick in the interpreter, and an oracle of the kernel."""
    W_SD = W_enc_DS.t()
    low = LowWeights.empty(*W_SD.shape, W_SD.device)
    low.W_SD[:, : W_SD.shape[1]] = W_SD
    low.norm_S.copy_(W_SD.norm(dim=1) + 2.0**-40)
    low.error_S.copy_((W_SD - low.W_SD[:, : W_SD.shape[1]].float()).norm(dim=1) + 2.0**-40)
    return low


def all_codes(inputs, k, threshold, buffer_bytes=None):
    low = low_weights(inputs[1])
    return (
        topk_encode_screened_cuda(*inputs, k, buffer_bytes, low),
        batch_topk_encode_screened_cuda(*inputs, k, buffer_bytes, low),
        threshold_encode_screened_cuda(*inputs, threshold, buffer_bytes, low),
    )


def expected_codes(inputs, k, threshold):
    return (
        reference.topk_encode(*inputs, k),
        reference.batch_topk_encode(*inputs, k),
        reference.threshold_encode(*inputs, threshold),
    )


def assert_all_codes(inputs, k, threshold, buffer_bytes=None):
    found = all_codes(inputs, k, threshold, buffer_bytes)
    for codes, truth in zip(found, expected_codes(inputs, k, threshold), strict=True):
        assert_codes(codes, truth)


@pytest.fixture
def tiny_pools(monkeypatch):
    original = topk_encode_cuda._pool
    monkeypatch.setattr(topk_encode_cuda, "_pool", lambda capacity, *rest, **named: original(3, *rest, **named))


# --- codes -----------------------------------------------------------------------------------------------------------

CASES = [  # shape, k, kind, buffer_bytes
    ((1, 1, 1), 1, "ties", None),
    ((3, 3, 65), 64, "ties", None),
    ((2, 40, 300), 5, "ties", None),
    ((2, 9, 130), 20, "sparse", None),
    ((3, 11, 200), 3, "nan", 2 * 256 * 4),
    ((2, 5, 70), 5, "negative", None),
    ((3, 8, 128), 1, "ties", 2 * 128 * 4),
    ((0, 3, 70), 3, "ties", None),
    ((2, 3, 700), 300, "ties", None),
]


@pytest.mark.parametrize(("shape", "k", "kind", "buffer_bytes"), CASES, ids=str)
def test_equals_reference_with_ties(shape, k, kind, buffer_bytes, device):
    assert_all_codes(integer_inputs(shape, torch.float32, kind, device=device), k, 1.5, buffer_bytes)


@pytest.mark.parametrize("scales", [(-100, 0), (40, 0), (0, -40), (0, 40), (-50, 20)], ids=str)
def test_equals_reference_at_any_scale(scales, device):
    """Where float16 holds nothing of W, or not its magnitude, float32 decides for all."""
    x_BD, W_enc_DS, b_enc_S, b_dec_D = integer_inputs((2, 5, 80), torch.float32, device=device)
    of_x, of_W = (2.0**scale for scale in scales)
    inputs = x_BD * of_x, W_enc_DS * of_W, b_enc_S * (of_x * of_W), b_dec_D * of_x
    assert_all_codes(inputs, 3, 1.5 * of_x * of_W)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 3e30])
def test_values_without_bounds(bad, device):
    inputs = integer_inputs((3, 6, 70), torch.float32, device=device)
    inputs[0][1] = 0
    inputs[0][1, 2] = bad
    assert_all_codes(inputs, 3, 1.5)


@pytest.mark.parametrize("place", ["W_enc", "b_enc"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e6])
def test_weights_without_bounds(place, bad, device):
    inputs = integer_inputs((2, 6, 70), torch.float32, device=device)
    (inputs[1].t()[66] if place == "W_enc" else inputs[2][66:67])[0] = bad
    assert_all_codes(inputs, 3, 1.5)


@pytest.mark.usefixtures("tiny_pools")
@pytest.mark.parametrize("kind", ["ties", "sparse"])
def test_a_full_pool_is_done_again(kind, device):
    assert_all_codes(integer_inputs((4, 7, 150), torch.float32, kind, device=device), 4, 1.5)


def test_a_row_with_too_many_candidates_is_done_again(device, monkeypatch):
    """Rows at b_dec: all that is left is b_enc, whose values float16 cannot tell apart."""
    x_BD, W_enc_DS, b_enc_S, b_dec_D = float_inputs((4, 16, 1500), torch.float32, device=device)
    b_enc_S = 0.5 + b_enc_S / 1e6
    x_BD[1] = b_dec_D
    pools = []
    original = topk_encode_cuda._pool
    monkeypatch.setattr(topk_encode_cuda, "_pool", lambda *a, **n: pools.append(original(*a, **n)) or pools[-1])
    inputs = x_BD, W_enc_DS, b_enc_S, b_dec_D
    found = topk_encode_screened_cuda(*inputs, 3, None, low_weights(W_enc_DS))
    assert_close(found, reference.topk_encode(*inputs, 3), rtol=1e-5, atol=1e-6)
    pool = pools[0][0]
    assert pool.count_R.tolist()[1] == -1
    assert int(pool.counters[1]) == 1
    assert int(pool.counters[0]) < pool.capacity


def test_equals_float64_without_redoing(device, monkeypatch):
    monkeypatch.setattr("saevlm_fast.kernels.topk_encode_redo_triton.launch_redo_product", lambda *_, **__: None)
    monkeypatch.setattr("saevlm_fast.kernels.topk_encode_redo_triton.launch_redo_topk", lambda *_, **__: None)
    inputs = float_inputs((6, 70, 400), torch.float32, device=device)
    truth = [tensor.double() for tensor in inputs]
    pre_BS = reference.preactivations(*truth)
    assert_clear(pre_BS, 2)
    threshold = midway(pre_BS, share=0.97)
    for codes, expected in zip(all_codes(inputs, 2, threshold), expected_codes(truth, 2, threshold)):
        assert_close(codes, expected, rtol=1e-5, atol=1e-5, check_dtype=False)


def test_few_positives_are_filled_from_the_lowest_free_latents(device):
    x_BD = torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]], device=device)
    W_enc_DS = -torch.ones(4, 300, device=device)
    W_enc_DS[0, [2, 5, 299]], W_enc_DS[3, 0] = torch.tensor([1.0, 3.0, 2.0], device=device), 1
    inputs = x_BD, W_enc_DS.t().contiguous().t(), torch.zeros(300, device=device), torch.zeros(4, device=device)
    acts, latents = topk_encode_screened_cuda(*inputs, 6, None, low_weights(inputs[1]))
    assert latents.tolist() == [[0, 1, 2, 3, 5, 299], [0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5]]
    assert acts.tolist() == [[0, 0, 1, 0, 3, 2], [1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]]


def test_a_threshold_of_minus_zero_is_zero(device):
    inputs = integer_inputs((2, 16, 256), torch.float32, device=device)
    truth = reference.threshold_encode(*inputs, 0.0)
    assert_codes(threshold_encode_screened_cuda(*inputs, -0.0), truth)
    assert_codes(launch_threshold_encode(*inputs, -0.0, None), truth)


def test_many_candidates_of_a_row(device):
    """More than one block ranks: bit by bit over the stretch, with ties at the last place."""
    values_S = torch.randint(1, 40, (700,), generator=torch.Generator().manual_seed(0)).float()
    inputs = torch.ones(1, 1, device=device), values_S[None].to(device), torch.zeros(700), torch.zeros(1)
    inputs = inputs[0], inputs[1], inputs[2].to(device), inputs[3].to(device)
    for k in (20, 90):
        found = topk_encode_screened_cuda(*inputs, k, None, low_weights(inputs[1]))
        assert_codes(found, reference.topk_encode(*inputs, k))


def test_centred_rows_are_handed_out(device):
    inputs = float_inputs((3, 9, 130), torch.float32, device=device)
    centred = Centred.empty(3, 9, device)
    for encode, buffer_bytes in ((topk_encode_screened_cuda, 2 * 192 * 4), (batch_topk_encode_screened_cuda, None)):
        encode(*inputs, 1, buffer_bytes, low_weights(inputs[1]), centred)
        assert torch.equal(centred.x_BD, inputs[0] - inputs[3])
        assert_close(centred.norm_B, (inputs[0] - inputs[3]).norm(dim=1))


def test_low_weights_kernel(device):
    W_SD = torch.randn(7, 21, generator=torch.Generator().manual_seed(0)).to(device)
    W_SD[2, 3], W_SD[3] = 7e4, 0
    low, expected = LowWeights.empty(7, 21, device), low_weights(W_SD.t())
    assert low.W_SD.shape == (7, 24)
    low.write_(0, W_SD)
    assert torch.equal(low.W_SD, expected.W_SD)
    assert_close(low.norm_S, expected.norm_S)
    assert_close(low.error_S, expected.error_S)


def test_the_rule_for_groups():
    assert group_size(65536, 20) == 64
    assert group_size(65536, 512) == 64
    assert group_size(65536, 1024) == 16
    assert group_size(8192, 128) == 16
    assert group_size(2 * 20 * 64, 20) == 64
    assert group_size(2 * 20 * 64 - 1, 20) == 16
    assert group_size(2 * 20 * 16 - 1, 20) is None
    assert group_size(2**24, MAX_K + 1) is None


@pytest.mark.parametrize("device_properties", ["gfx90a:sramecc+:xnack-", "gfx942:sramecc+:xnack-"])
def test_a_chip_that_flushes_subnormals_does_not_screen(monkeypatch, device_properties):
    """Half of a row's norm can lie in factors below 2^-14, far more than the bound allows for."""
    low_weights_module.screening_is_sound.cache_clear()
    monkeypatch.setattr(torch.version, "hip", "6.4")
    chip = SimpleNamespace(gcnArchName=device_properties)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: chip)
    x, W = (
        SimpleNamespace(dtype=torch.float32, is_cuda=True, shape=shape, device="cuda:0")
        for shape in ((4, 8), (8, 65536))
    )
    assert topk_encode_cuda.screens_cuda(x, W, 20) == device_properties.startswith("gfx942")
    low_weights_module.screening_is_sound.cache_clear()


def test_the_chips_that_keep_subnormals():
    assert keeps_subnormals(None)
    assert keeps_subnormals("gfx950:sramecc+:xnack-")
    assert not any(map(keeps_subnormals, ("gfx908", "gfx90a", "gfx1100", "gfx1201", "gfx9420", "")))


@pytest.mark.parametrize("shape", [(3, 4, 128), (2, 4, 16_700)], ids=["narrow", "wide"])
def test_a_thresholds_pool_is_within_the_buffer(device, monkeypatch, shape):
    inputs, rows = integer_inputs(shape, torch.float32, device=device), []
    width = -(-shape[2] // 64) * 64

    def measured(capacity, n_rows, counters, make=Pool.empty):
        assert 12 * capacity + 4 * width * n_rows <= limit
        rows.append(n_rows)
        return make(capacity, n_rows, counters)

    monkeypatch.setattr(Pool, "empty", measured)
    limit = (shape[0] - 1) * (4 * width + 12 * min(shape[2], max(256, shape[2] // 64)))
    codes = threshold_encode_screened_cuda(*inputs, 9.5, limit, low_weights(inputs[1]))
    assert rows == {3: [2, 1], 2: [1, 1]}[shape[0]]
    assert_codes(codes, reference.threshold_encode(*inputs, 9.5))


def test_products_agree(device):
    """Through tensor descriptors and through pointers."""
    from saevlm_fast.kernels.topk_encode_screen_triton import launch_product

    inputs = float_inputs((37, 70, 300), torch.float32, device=device)
    screening = Screening(*inputs[1:], 64, low_weights(inputs[1]))
    ((_, screen),) = screening.chunks(inputs[0], None, None)
    first = screen.pre_RP.clone(), screen.maxima_RG.clone()
    low_RP = torch.nn.functional.pad((screen.x_RD * screen.inverse_R[:, None]).half(), (0, 2))
    for tma in (True, False):
        if tma and device.type == "cuda" and torch.cuda.get_device_capability() < (9, 0):
            continue
        screen.pre_RP.fill_(torch.nan)
        screen.maxima_RG.fill_(torch.nan)
        launch_product(low_RP, screening.W_low_SP, inputs[2], screen, tma)
        assert_close((screen.pre_RP, screen.maxima_RG), first, rtol=1e-3, atol=1e-3)


# --- the bound -------------------------------------------------------------------------------------------------------


def truncating_product(x_BP, w_SP):
    """A tensor core at its worst: 16 products and the sum so far, all cut off at 24 bits of the largest, one way."""
    x, w = x_BP.double().numpy(), w_SP.double().numpy()
    acc = np.zeros((len(x), len(w)))
    for d in range(0, x.shape[1], 16):
        terms = np.concatenate([x[:, None, d : d + 16] * w[None, :, d : d + 16], acc[..., None]], axis=2)
        largest = np.abs(terms).max(axis=2, keepdims=True)
        unit = 2.0 ** (np.floor(np.log2(np.maximum(largest, 1e-300))) - 23)
        acc = (np.floor(terms / unit) * unit).sum(axis=2)
        unit = 2.0 ** (np.floor(np.log2(np.maximum(np.abs(acc), 1e-300))) - 23)
        acc = np.floor(acc / unit) * unit
    return torch.from_numpy(acc)


def bounds(x_BD, W_SD, b_S, device):
    """(screened values [B, P] and inverse [B, 1] of the rows' units, slack [B, G]), float64, with no b_dec."""
    x_BD, W_DS, b_S, zeros_D = (t.to(device) for t in (x_BD, W_SD.t(), b_S, torch.zeros(x_BD.shape[1])))
    ((_, screen),) = Screening(W_DS, b_S, zeros_D, 64, low_weights(W_DS)).chunks(x_BD, None, None)
    by_error_G, by_norm_G, constant_G = screen.factors_3G.double().cpu()
    error_B1, norm_B1, inverse_B1 = (
        t.double().cpu()[:, None] for t in (screen.error_R, screen.norm_R, screen.inverse_R)
    )
    slack_BG = error_B1 * by_error_G + norm_B1 * by_norm_G + constant_G
    return screen.pre_RP.double().cpu(), inverse_B1, 1.001 * slack_BG


@settings(max_examples=12)
@given(
    seed=st.integers(0, 2**31),
    d_in=st.integers(1, 130),
    scales=st.tuples(st.integers(-100, 40), st.integers(-20, 8), st.integers(-60, 40)),
    spread=st.floats(0, 4),
    one_sign=st.booleans(),
)
def test_bounds_hold(device, seed, d_in, scales, spread, one_sign):
    """|z - v| <= slack + R |v| for every latent, with the worst roundings of a tensor core."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*size):
        values = torch.randn(*size, generator=generator) * (spread * torch.randn(*size, generator=generator)).exp()
        return values.abs() if one_sign else values

    x_BD, W_SD, b_S = (t * 2.0**scale for t, scale in zip((draw(3, d_in), draw(70, d_in), draw(70)), scales))
    x_BD[0] = 0
    pre_BP, inverse_B1, slack_BG = bounds(x_BD, W_SD, b_S, device)
    slack_BS = slack_BG.repeat_interleave(64, 1)[:, :70]
    z_BS = x_BD.double() @ W_SD.double().t() + b_S.double()
    worst_BS = truncating_product((x_BD.double() * inverse_B1).half(), W_SD.half())
    worst_BS = (worst_BS + b_S.double() * inverse_B1).half().double() / inverse_B1
    found_BS = pre_BP[:, :70] / inverse_B1
    sound_BS = found_BS.abs() + slack_BS < 3e4 / inverse_B1
    for v_BS in (worst_BS, found_BS):
        assert bool(((z_BS - v_BS).abs() <= slack_BS + 1.02 * 2.0**-11 * v_BS.abs())[sound_BS].all())


def test_bounds_are_reached(device):
    """All roundings of x in one direction, and a sum near 0: the error is a good part of what the slack allows for."""
    error = 0.99 * 2.0**-11
    x_BD = torch.tensor([1 + error, -(1 + 2.0**-10 - error)]).repeat(1, 32)
    pre_BP, inverse_B1, slack_BG = bounds(x_BD, torch.ones(1, 64), torch.zeros(1), device)
    found = float((x_BD.double().sum() - pre_BP[0, 0] / inverse_B1).abs())
    assert 0.4 * float(slack_BG) < found < float(slack_BG)


# --- compiling -------------------------------------------------------------------------------------------------------

SCREEN, LIST, CHOOSE, LARGEST, REDO, ROWS = (
    f"saevlm_fast.kernels.topk_encode_{name}_triton" for name in ("screen", "list", "choose", "largest", "redo", "rows")
)
FLOATS, HALVES, INTS, LONGS, SIZE = "*fp32", "*fp16", "*i32", "*i64", "i32:16"
BOUND = {"maxima_ptr": HALVES} | dict.fromkeys(("factors_ptr", "norm_ptr", "error_ptr", "inverse_ptr"), FLOATS)
POOL = {"value_ptr": FLOATS, "latent_ptr": INTS, "base_ptr": INTS, "count_ptr": INTS, "counters_ptr": LONGS}
POOL |= {"capacity": "i32"}


def product_cases(target: str, group: int) -> list[Case]:
    from saevlm_fast.kernels.topk_encode_screen_triton import tile_config

    capability = {"sm_80": (8, 0), "sm_90": (9, 0), "gfx942": (0, 0)}[target]
    cases = []
    tail = {"b_enc_ptr": FLOATS, "inverse_ptr": FLOATS, "maxima_ptr": HALVES}
    for tma, config in (tile_config(capability), (False, tile_config((0, 0) if target == "gfx942" else (8, 0))[1])):
        launch = {name: config[name] for name in ("num_warps", "num_stages")}
        blocks = {name: value for name, value in config.items() if name not in launch} | {"GROUP": group}
        sides = [config[f"BLOCK_{side}"] for side in "BSD"]
        if tma:
            described = {"x_desc": (sides[0], sides[2]), "W_desc": sides[1:], "pre_desc": sides[:2]}
            signature = {name: f"tensordesc<fp16[{a},{b}]>" for name, (a, b) in described.items()} | tail
            signature |= dict.fromkeys(("d_in", "d_sae", "n_groups"), SIZE) | {"n_rows": "i32"}
            cases.append(Case(SCREEN, "product_kernel", target, signature, blocks | {"PROGRAMS": 132}, **launch))
        else:
            signature = dict.fromkeys(("x_ptr", "W_ptr", "pre_ptr"), HALVES) | tail
            signature |= dict.fromkeys(("width_in", "d_sae", "width_sae", "n_groups"), SIZE) | {"n_rows": "i32"}
            cases.append(Case(SCREEN, "tile_product_kernel", target, signature, blocks, **launch))
    return cases


def list_case(target: str, group: int, n_groups: int, bounded: bool) -> Case:
    from saevlm_fast.kernels.topk_encode_list_triton import list_config

    signature = BOUND | {"pre_ptr": HALVES, "cut_ptr": FLOATS, "counters_ptr": LONGS, "k": "i32"}
    pointers = ("bound", "groups", "pool_row", "pool_latent", "base", "count", "failed")
    signature |= {f"{name}_ptr": INTS for name in pointers}
    signature |= dict.fromkeys(("n_groups", "d_sae", "width_sae"), SIZE) | {"most": "i32", "capacity": "i32"}
    blocks = list_config(n_groups, group, few=not bounded)
    warps = blocks.pop("num_warps")
    return Case(LIST, "list_kernel", target, signature, blocks | {"BOUNDED": bounded, "GROUP": group}, num_warps=warps)


def copy_cases(target: str) -> list[Case]:
    weights = {"W_ptr": FLOATS, "low_ptr": HALVES, "norm_ptr": FLOATS, "error_ptr": FLOATS, "d_in": SIZE, "width": SIZE}
    rows = dict.fromkeys(("x_ptr", "b_dec_ptr", "centred_ptr", "norm_ptr", "error_ptr", "inverse_ptr"), FLOATS)
    rows |= {"low_ptr": HALVES, "zeros_ptr": INTS, "stride_x": SIZE, "d_in": SIZE, "width": SIZE, "n_zeros": "i32"}
    factors = dict.fromkeys(("norm_ptr", "error_ptr", "b_enc_ptr", "factors_ptr"), FLOATS)
    factors |= {"d_sae": SIZE, "n_groups": SIZE, "gamma": "fp32"}
    dots = dict.fromkeys(("x_ptr", "W_ptr", "b_enc_ptr", "value_ptr"), FLOATS) | {"counters_ptr": LONGS}
    dots |= {"pool_row_ptr": INTS, "pool_latent_ptr": INTS, "capacity": "i32", "d_in": SIZE}
    return [
        Case(SCREEN, "low_weights_kernel", target, weights, {"BLOCK_D": 1024}),
        Case(SCREEN, "low_rows_kernel", target, rows, {"BLOCK_D": 1024}),
        Case(SCREEN, "group_factors_kernel", target, factors, {"GROUP": 64, "BLOCK_G": 16}),
        Case(LIST, "pool_dots_kernel", target, dots, {"BLOCK_P": 2, "BLOCK_D": 1024}, num_warps=2),
    ]


def choice_cases(target: str) -> list[Case]:
    topk = POOL | {"acts_ptr": FLOATS, "latents_ptr": LONGS, "k": "i32"}
    found = {"histogram_ptr": INTS, "found_ptr": INTS, "n": "i32"}
    bound = BOUND | found | {"n_rows": "i32", "n_groups": SIZE}
    digit = found | {"value_ptr": FLOATS, "z_ptr": FLOATS, "counters_ptr": LONGS, "capacity": "i32", "n_z": "i32"}
    count = POOL | {"z_ptr": FLOATS, "d_sae": SIZE, "n_rows": "i32"}
    count |= dict.fromkeys(("found_ptr", "above_ptr", "equal_ptr", "parts_ptr"), INTS)
    write = count | {"row_offsets_ptr": LONGS, "acts_ptr": FLOATS, "latents_ptr": LONGS, "n_places": "i32"}
    rows = {"ROWS": 8, "BLOCK": 64}
    digits = {"FIRST": False}
    ranked = {"RANKED": target != "gfx942", "BLOCK": 256}
    return [
        Case(CHOOSE, "topk_of_pool_kernel", target, topk, ranked, num_warps=1),
        Case(CHOOSE, "topk_of_pool_kernel", target, topk, {"RANKED": False, "BLOCK": 2048}, num_warps=8),
        Case(LARGEST, "bound_digit_kernel", target, bound, digits | {"SHIFT": 15, "ROWS": 4, "BLOCK_G": 1024}),
        Case(LARGEST, "digit_kernel", target, digit, digits | {"SHIFT": 7, "BITS": 8, "BLOCK": 1024}),
        Case(LARGEST, "digit_kernel", target, digit, digits | {"SHIFT": 0, "BITS": 7, "BLOCK": 1024}),
        Case(LARGEST, "count_kernel", target, count, rows, num_warps=2),
        Case(LARGEST, "write_kernel", target, write, rows | {"PARTS": 256}, num_warps=2),
    ]


def redo_cases(target: str) -> list[Case]:
    product = dict.fromkeys(("x_ptr", "W_ptr", "b_enc_ptr", "z_ptr"), FLOATS)
    product |= {"failed_ptr": INTS, "counters_ptr": LONGS}
    product |= {"capacity": "i32", "n_rows": "i32", "d_in": SIZE, "d_sae": SIZE}
    blocks = {"BATCH": True, "BLOCK_B": 32, "BLOCK_S": 128, "BLOCK_D": 16}
    codes = {"z_ptr": FLOATS, "acts_ptr": FLOATS, "latents_ptr": LONGS, "k": "i32"}
    topk = codes | {"failed_ptr": INTS, "counters_ptr": LONGS, "capacity": "i32", "n_rows": "i32", "d_sae": SIZE}
    return [
        Case(REDO, "redo_product_kernel", target, product, blocks, num_stages=3),
        Case(REDO, "redo_topk_kernel", target, topk, {"BLOCK": 2048}, num_warps=8),
        Case(ROWS, "topk_of_rows_kernel", target, codes | {"width": SIZE}, {"BLOCK": 1024}, num_warps=8),
    ]


def test_static_compile_without_spills():
    cases = []
    for target in TARGETS:
        cases += product_cases(target, 64) + product_cases(target, 16)
        cases += [list_case(target, 64, 1024, bounded=False), list_case(target, 64, 1024, bounded=True)]
        cases += [list_case(target, 64, 128, bounded=False), list_case(target, 16, 4096, bounded=False)]
        cases += copy_cases(target) + choice_cases(target) + redo_cases(target)
    assert_no_spills(cases)


# --- real shapes, on a GPU only --------------------------------------------------------------------------------------

GPU_SHAPES = [(1024, 1024, 65536, 20), (512, 1024, 8192, 128), (256, 1024, 65536, 256), (256, 1024, 65536, 1000)]
GPU_SHAPES += [(1000, 768, 5001, 20), (333, 1021, 6143, 33)]


@pytest.mark.gpu
@pytest.mark.parametrize(("n_rows", "d_in", "d_sae", "k"), GPU_SHAPES)
def test_gpu_equals_float64(n_rows, d_in, d_sae, k):
    """The same sets, but for latents whose values lie within float32's rounding of one another."""
    inputs = float_inputs((n_rows, d_in, d_sae), torch.float32, device="cuda")
    pre_BS = reference.preactivations(*(tensor.double() for tensor in inputs))
    acts, latents = topk_encode(*inputs, k)
    found = pre_BS.gather(1, latents)
    assert_close(acts.double(), found, rtol=1e-5, atol=1e-5)
    assert_close(found.sort(dim=1).values, pre_BS.topk(k).values.sort(dim=1).values, rtol=0, atol=1e-5)
    assert (latents.diff(dim=1) > 0).all()
    acts_M, latents_M, row_offsets = batch_topk_encode(*inputs, k)
    rows_M = torch.repeat_interleave(row_offsets.diff())
    found_M = pre_BS[rows_M, latents_M]
    assert_close(acts_M.double(), found_M, rtol=1e-5, atol=1e-5)
    assert_close(found_M.sort().values, pre_BS.flatten().topk(n_rows * k).values.sort().values, rtol=0, atol=1e-5)
    threshold = float(acts_M.min())
    acts_T, latents_T, _ = threshold_encode(*inputs, threshold)
    assert len(acts_T) == int((acts_M > threshold).sum())
    assert torch.equal(latents_T, latents_M[acts_M > threshold])


@pytest.mark.gpu
def test_gpu_repeats_captures_and_never_waits():
    inputs = float_inputs((700, 1024, 16384), torch.float32, device="cuda")
    low = low_weights(inputs[1])
    for encode in (topk_encode_screened_cuda, batch_topk_encode_screened_cuda):
        first = encode(*inputs, 20, low=low)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            again = encode(*inputs, 20, low=low)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = encode(*inputs, 20, low=low)
        graph.replay()
        for codes in (again, captured):
            for one, other in zip(codes, first, strict=True):
                assert torch.equal(one, other)
