"""The GPU's encoders that screen in float16: the codes of float32, and what is done again.

In Triton's interpreter where there is no GPU: few and small shapes.
"""

from types import SimpleNamespace

import pytest
import torch
from encoder_inputs import assert_clear, assert_codes, float_inputs, integer_inputs, midway
from screened_weights import low_weights
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


@pytest.mark.parametrize(("shape", "least"), [((3, 4, 128), 256), ((2, 4, 300), 2)], ids=["narrow", "wide"])
def test_a_thresholds_pool_is_within_the_buffer(device, monkeypatch, shape, least):
    monkeypatch.setattr(topk_encode_cuda, "_POOL_ENTRIES", least)  # as of 16,448 latents and more, where it is 256
    inputs, rows = integer_inputs(shape, torch.float32, device=device), []
    width = -(-shape[2] // 64) * 64

    def measured(capacity, n_rows, counters, make=Pool.empty):
        assert 12 * capacity + 4 * width * n_rows <= limit
        rows.append(n_rows)
        return make(capacity, n_rows, counters)

    monkeypatch.setattr(Pool, "empty", measured)
    limit = (shape[0] - 1) * (4 * width + 12 * min(shape[2], max(least, shape[2] // 64)))
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
