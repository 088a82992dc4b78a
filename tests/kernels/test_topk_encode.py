"""topk_encode, batch_topk_encode, threshold_encode against kernels/reference.py: CPU, gradients, Triton kernels."""

import threading

import pytest
import torch
from encoder_inputs import assert_codes, float_inputs, integer_inputs
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from saevlm_fast.kernels import reference
from saevlm_fast.kernels import topk_encode_cpu as plain
from saevlm_fast.kernels.topk_encode import (
    batch_topk_encode,
    batch_topk_encode_op,
    threshold_encode,
    threshold_encode_op,
    topk_encode,
    topk_encode_op,
)
from static_compile import TARGETS, Case, assert_no_spills

SHAPES = [(1, 1, 1), (3, 5, 7), (17, 13, 64), (5, 3, 65), (33, 7, 1009), (0, 3, 70), (7, 11, 4099), (64, 8, 2048)]
KS = [1, 2, 5, 20, 64]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
THRESHOLD = 1.5
EPSILON = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """torch.empty hands out NaN (and the largest integers), so that whatever a kernel leaves unwritten shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("n", [3, 512, 513, 3000])
def test_kth_largest_equals_a_sort(n, dtype):
    """Mostly zeros, as after a ReLU; all equal; all different; the ends of the range."""
    keys_RN = torch.randint(0, 30_000, (5, n)).to(dtype)
    keys_RN[0, torch.rand(n) < 0.95], keys_RN[1], keys_RN[2] = 0, 7, torch.arange(n).to(dtype)
    keys_RN[3, 0], keys_RN[4, 0] = torch.iinfo(dtype).max, torch.iinfo(dtype).min
    for k in {1, 2, n // 3 + 1, n}:
        expected_R1 = keys_RN.sort(dim=1, descending=True).values[:, k - 1, None]
        assert torch.equal(plain.kth_largest(keys_RN, k), expected_R1)


# --- the public functions on CPU ------------------------------------------------------------------------------------


@pytest.mark.parametrize("buffer_bytes", [None, 4096])
@pytest.mark.parametrize("kind", ["ties", "negative", "sparse", "nan"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cpu_equals_reference_with_ties(dtype, kind, buffer_bytes):
    for shape in SHAPES:
        inputs = integer_inputs(shape, dtype, kind)
        for k in (k for k in (KS if dtype == torch.float32 else KS[::2]) if k <= shape[2]):
            assert_codes(topk_encode(*inputs, k, buffer_bytes=buffer_bytes), reference.topk_encode(*inputs, k))
            assert_codes(
                batch_topk_encode(*inputs, k, buffer_bytes=buffer_bytes), reference.batch_topk_encode(*inputs, k)
            )
        assert_codes(
            threshold_encode(*inputs, THRESHOLD, buffer_bytes=buffer_bytes),
            reference.threshold_encode(*inputs, THRESHOLD),
        )


@pytest.mark.parametrize("contiguous_W", [False, True])
@pytest.mark.parametrize("shape", [*SHAPES, (31, 37, 6007)], ids=str)
def test_cpu_equals_reference_in_float64(shape, contiguous_W):
    x_BD, W_enc_DS, b_enc_S, b_dec_D = float_inputs(shape)
    inputs = x_BD, W_enc_DS.contiguous() if contiguous_W else W_enc_DS, b_enc_S, b_dec_D
    for k in (k for k in KS if k <= shape[2]):
        for buffer_bytes in (None, 100_000):
            assert_codes(topk_encode(*inputs, k, buffer_bytes=buffer_bytes), reference.topk_encode(*inputs, k))
            assert_codes(
                batch_topk_encode(*inputs, k, buffer_bytes=buffer_bytes), reference.batch_topk_encode(*inputs, k)
            )


@pytest.mark.parametrize("threshold", [-1.0, 0.0, 0.3, 1e9, float("inf")])
def test_threshold_encode_at_any_threshold(threshold):
    inputs = float_inputs((9, 5, 131))
    assert_codes(threshold_encode(*inputs, threshold), reference.threshold_encode(*inputs, threshold))


@settings(max_examples=60)
@given(data=st.data())
def test_selection_properties(data):
    """Any pre-activations (an identity encoder), with ties, signed zeros, NaN and infinity in the bias."""
    d_sae = data.draw(st.integers(1, 300))
    n_rows = data.draw(st.integers(1, 6))
    k = data.draw(st.integers(1, min(d_sae, 70)))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    levels = torch.tensor([-1.0, -0.0, 0.0, 0.5, 1.0, 2.0**-140, 3.0])
    n_levels = data.draw(st.integers(1, len(levels)))
    x_BD = levels[torch.randint(n_levels, (n_rows, d_sae), generator=generator)]
    b_enc_S = torch.zeros(d_sae)
    for value in data.draw(st.lists(st.sampled_from([float("nan"), float("inf"), -float("inf"), -2.0]), max_size=3)):
        b_enc_S[data.draw(st.integers(0, d_sae - 1))] = value
    inputs = x_BD, torch.eye(d_sae), b_enc_S, torch.zeros(d_sae)
    buffer_bytes = data.draw(st.sampled_from([None, 1, 2000]))
    acts_BK, latents_BK = topk_encode(*inputs, k, buffer_bytes=buffer_bytes)
    assert_codes((acts_BK, latents_BK), reference.topk_encode(*inputs, k))
    assert (latents_BK.diff(dim=1) > 0).all()
    assert not (acts_BK < 0).any()
    acts_M, latents_M, row_offsets = batch_topk_encode(*inputs, k, buffer_bytes=buffer_bytes)
    assert_codes((acts_M, latents_M, row_offsets), reference.batch_topk_encode(*inputs, k))
    assert (acts_M[: row_offsets[-1]] != 0).all()
    assert_codes(threshold_encode(*inputs, 0.75), reference.threshold_encode(*inputs, 0.75))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("d_sae", [1, 64, 1009, 1024, 6144, 16384, 65536])
def test_rows_of_pre_activations_are_not_whole_pages_apart(d_sae, dtype):
    """And hold whole groups, of -inf behind the latents."""
    inputs = torch.ones(3, 1), torch.ones(1, d_sae), torch.zeros(d_sae), torch.zeros(1)
    ((_, pre_RP, maxima_RG),) = plain._chunks(*(each.to(dtype) for each in inputs), None)
    assert pre_RP.stride(0) * pre_RP.element_size() % 4096
    assert pre_RP.shape == (3, 64 * maxima_RG.shape[1])
    assert bool((pre_RP[:, :d_sae] == 1).all() and (pre_RP[:, d_sae:] == -torch.inf).all())
    assert torch.equal(maxima_RG, pre_RP.unflatten(1, (-1, 64)).amax(2))


def test_buffer_survives_inference_mode_and_threads():
    inputs = integer_inputs((40, 7, 1009), torch.float32)
    expected = reference.topk_encode(*inputs, 5)
    failures = []

    def encode():
        try:
            with torch.inference_mode():
                topk_encode(*inputs, 5)
            assert_codes(topk_encode(*inputs, 5), expected)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=encode) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 0}, r"k: 0 is outside 1\.\.d_sae = 7"),
        ({"k": 8}, r"k: 8 is outside"),
        ({"x": torch.zeros(3)}, r"x: shape \(3,\)"),
        ({"W_enc": torch.zeros(4, 7)}, r"W_enc: shape \(4, 7\)"),
        ({"W_enc": torch.zeros(5, 0)}, r"W_enc: shape \(5, 0\)"),
        ({"b_enc": torch.zeros(6)}, r"b_enc: shape \(6,\)"),
        ({"b_dec": torch.zeros(7)}, r"b_dec: shape \(7,\)"),
        ({"b_dec": torch.zeros(5, dtype=torch.float64)}, "b_dec: dtype torch.float64"),
        ({"buffer_bytes": 0}, "buffer_bytes: 0"),
    ],
)
def test_bad_arguments(change, message):
    arguments = {
        "x": torch.zeros(3, 5),
        "W_enc": torch.zeros(5, 7),
        "b_enc": torch.zeros(7),
        "b_dec": torch.zeros(5),
        "k": 2,
        "buffer_bytes": None,
    } | change
    buffer_bytes = arguments.pop("buffer_bytes")
    for function in (topk_encode, batch_topk_encode):
        with pytest.raises(ValueError, match=message):
            function(*arguments.values(), buffer_bytes=buffer_bytes)


def test_threshold_nan_is_refused():
    with pytest.raises(ValueError, match="threshold: is NaN"):
        threshold_encode(*float_inputs((2, 3, 4)), float("nan"))


# --- gradients ------------------------------------------------------------------------------------------------------


FUNCTIONS = [
    (topk_encode, reference.topk_encode),
    (batch_topk_encode, reference.batch_topk_encode),
    (threshold_encode, reference.threshold_encode),
]


def gradients(function, inputs, amount):
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    acts = function(*leaves, amount)[0]
    weights = torch.sin(torch.arange(acts.numel(), dtype=acts.dtype)).view(acts.shape) + 2
    (acts**2 * weights + acts * weights).sum().backward()
    return [leaf.grad for leaf in leaves]


@pytest.mark.parametrize("functions", FUNCTIONS, ids=lambda pair: pair[0].__name__)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_equal_autograd_of_the_reference(functions, shape):
    ours, theirs = functions
    for k in (k for k in (1, 5, 64) if k <= shape[2]):
        for shift in (0.0, 1.5):  # the shift leaves rows with fewer than k positives, and rows with none
            x_BD, W_enc_DS, b_enc_S, b_dec_D = float_inputs(shape)
            inputs = x_BD, W_enc_DS, b_enc_S - shift, b_dec_D
            amount = 0.4 if ours is threshold_encode else k
            for found, expected in zip(gradients(ours, inputs, amount), gradients(theirs, inputs, amount)):
                assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_gradients_only_where_asked():
    x_BD, W_enc_DS, b_enc_S, b_dec_D = float_inputs((6, 5, 130))
    b_enc_S.requires_grad_()
    topk_encode(x_BD, W_enc_DS, b_enc_S, b_dec_D, 3)[0].sum().backward()
    assert x_BD.grad is None
    assert W_enc_DS.grad is None
    assert b_enc_S.grad.sum() == 18
    acts, latents = topk_encode(x_BD, W_enc_DS, b_enc_S, b_dec_D, 3)
    assert not latents.requires_grad
    assert acts.requires_grad


def test_zero_filled_entries_have_no_gradient():
    x_BD, W_enc_DS, b_enc_S, b_dec_D = float_inputs((4, 5, 130))
    for gradient in gradients(topk_encode, (x_BD, W_enc_DS, b_enc_S - 100, b_dec_D), 7):
        assert (gradient == 0).all()


def test_gradcheck():
    inputs = [tensor.requires_grad_() for tensor in float_inputs((3, 4, 70))]
    assert torch.autograd.gradcheck(lambda *leaves: topk_encode(*leaves, 3)[0], inputs)
    assert torch.autograd.gradcheck(lambda *leaves: batch_topk_encode(*leaves, 3)[0], inputs)


@pytest.mark.parametrize(
    ("op", "amount"), [(topk_encode_op, 3), (batch_topk_encode_op, 3), (threshold_encode_op, 0.5)], ids=lambda a: str(a)
)
def test_opcheck(op, amount):
    torch.use_deterministic_algorithms(False)  # opcheck compares two runs' uninitialised memory otherwise
    inputs = [tensor.requires_grad_() for tensor in float_inputs((5, 4, 70), torch.float32)]
    torch.library.opcheck(op.overload, (*inputs, amount, None))


# --- Triton kernels: in the interpreter, or on the GPU where there is one --------------------------------------------


TRITON_CASES = [  # shape, k, dtype, kind, buffer_bytes
    ((1, 1, 1), 1, torch.float32, "ties", None),
    ((5, 3, 65), 64, torch.float32, "ties", None),
    ((9, 40, 300), 5, torch.float32, "ties", None),
    ((9, 40, 300), 20, torch.bfloat16, "sparse", 2 * 300 * 4),
    ((7, 11, 1009), 7, torch.float16, "nan", 3 * 1009 * 2),
    ((3, 5, 7), 5, torch.float16, "negative", None),
    ((2, 3, 2100), 150, torch.float32, "sparse", None),
    ((2, 3, 300), 300, torch.bfloat16, "ties", None),
    ((0, 3, 70), 3, torch.float32, "ties", None),
]


@pytest.mark.parametrize(("shape", "k", "dtype", "kind", "buffer_bytes"), TRITON_CASES, ids=str)
def test_triton_equals_reference(shape, k, dtype, kind, buffer_bytes, device):
    from saevlm_fast.kernels.topk_encode_batch_triton import launch_batch_topk_encode, launch_threshold_encode
    from saevlm_fast.kernels.topk_encode_triton import launch_topk_encode

    inputs = integer_inputs(shape, dtype, kind, device=device)
    assert_codes(launch_topk_encode(*inputs, k, buffer_bytes), reference.topk_encode(*inputs, k))
    assert_codes(launch_batch_topk_encode(*inputs, k, buffer_bytes), reference.batch_topk_encode(*inputs, k))
    assert_codes(
        launch_threshold_encode(*inputs, THRESHOLD, buffer_bytes), reference.threshold_encode(*inputs, THRESHOLD)
    )


def test_triton_more_rows_than_a_tile(device):
    from saevlm_fast.kernels.topk_encode_batch_triton import launch_batch_topk_encode, launch_threshold_encode
    from saevlm_fast.kernels.topk_encode_triton import gemm_config

    rows = gemm_config(torch.bfloat16, hip=False)["BLOCK_B"] + 1
    inputs = integer_inputs((rows, 3, 7), torch.bfloat16, device=device)
    assert torch.equal(preactivations_and_maxima(inputs)[0], reference.preactivations(*inputs))
    assert_codes(launch_batch_topk_encode(*inputs, 2, None), reference.batch_topk_encode(*inputs, 2))
    assert_codes(launch_threshold_encode(*inputs, THRESHOLD, None), reference.threshold_encode(*inputs, THRESHOLD))


def preactivations_and_maxima(inputs):
    from saevlm_fast.kernels.topk_encode_triton import preactivation_chunks

    ((_, pre_BS, maxima_BG),) = preactivation_chunks(*inputs, None)
    return pre_BS, maxima_BG


@pytest.mark.parametrize("contiguous_W", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_triton_preactivations(dtype, contiguous_W, device):
    """Values within the dtype's rounding of float64; maxima exactly those of the stored values."""
    x_BD, W_enc_DS, b_enc_S, b_dec_D = float_inputs((19, 83, 331), dtype, device=device)
    inputs = x_BD, W_enc_DS.contiguous() if contiguous_W else W_enc_DS, b_enc_S, b_dec_D
    pre_BS, maxima_BG = preactivations_and_maxima(inputs)
    centred = (x_BD - b_dec_D).double()  # the subtraction is part of the operation, in its dtype
    expected = torch.relu(centred @ W_enc_DS.double() + b_enc_S.double())
    assert_close(pre_BS.double(), expected, rtol=EPSILON[dtype], atol=EPSILON[dtype])
    padded = torch.nn.functional.pad(pre_BS.float(), (0, -pre_BS.shape[1] % 64))
    assert_close(maxima_BG.view(torch.float32), padded.unflatten(1, (-1, 64)).amax(2), rtol=0, atol=0)


def test_triton_refuses_what_it_cannot_select(device):
    from saevlm_fast.kernels.topk_encode_triton import launch_topk_encode

    with pytest.raises(ValueError, match="k: 1025 is above 1024"):
        launch_topk_encode(*float_inputs((2, 3, 2000), torch.float32, device=device), 1025, None)


def kernel_cases(target: str) -> list[Case]:
    from saevlm_fast.kernels.common import GROUP
    from saevlm_fast.kernels.topk_encode_batch_triton import BINS, BLOCK_U, SHIFTS
    from saevlm_fast.kernels.topk_encode_triton import candidate_warps, gemm_config, group_warps

    rows, batch = "saevlm_fast.kernels.topk_encode_triton", "saevlm_fast.kernels.topk_encode_batch_triton"
    cases = []
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        config = gemm_config(dtype, hip=target == "gfx942")
        launch = {"num_warps": config.pop("num_warps"), "num_stages": config.pop("num_stages")}
        signature = {f"{tensor}_ptr": f"*{name}" for tensor in ("x", "W_enc", "b_enc", "pre")} | {"maxima_ptr": "*i32"}
        signature |= dict.fromkeys(("n_rows", "d_in", "d_sae", "stride_W_s", "n_groups"), "i32:16")
        constexprs = config | {"stride_W_d": 1, "GROUP": GROUP}
        cases.append(Case(rows, "preactivation_kernel", target, signature, constexprs, **launch))
    signature = {"maxima_ptr": "*i32", "groups_ptr": "*i32", "n_groups": "i32:16", "k": "i32"}
    cases.append(Case(rows, "best_groups_kernel", target, signature, {"BLOCK_G": 1024}, num_warps=group_warps(1024)))
    signature = {"pre_ptr": "*bf16", "groups_ptr": "*i32", "acts_ptr": "*bf16", "latents_ptr": "*i64"}
    signature |= {"d_sae": "i32:16", "n_chosen": "i32", "k": "i32"}
    for block in (2048, 4096) if target == "gfx942" else (2048, 4096, 8192):  # k to 32, to 64, to 128
        constexprs = {"GROUP": GROUP, "BLOCK_C": block}
        cases.append(
            Case(rows, "topk_of_groups_kernel", target, signature, constexprs, num_warps=candidate_warps(block))
        )
    source = {"data_ptr": "*bf16", "units_ptr": "*i64", "found_ptr": "*i32"}
    source |= dict.fromkeys(("width", "units_per_row", "n_units"), "i32:16")
    common = {"LISTED": True, "KEYS": False, "GROUP": GROUP, "BLOCK_U": BLOCK_U}
    digit = {"SHIFT": SHIFTS[0], "BINS": BINS}
    counts = dict.fromkeys(("unit_maxima_ptr", "above_ptr", "equal_ptr"), "*i32")
    until = dict.fromkeys(("unit_maxima_ptr", "above_until_ptr", "equal_until_ptr"), "*i32") | {"positions_ptr": "*i64"}
    histogram = {"histogram_ptr": "*i32"}
    return [
        *cases,
        Case(batch, "histogram_kernel", target, source | histogram, common | digit | {"BITS": 11}),
        Case(batch, "next_digit_kernel", target, histogram | {"found_ptr": "*i32"}, digit, num_warps=8),
        Case(batch, "count_kernel", target, source | counts, common | {"SKIP": False}),
        Case(batch, "compact_kernel", target, source | until, common | {"SKIP": False}),
        *latent_threshold_cases(target, {"GROUP": GROUP, "BLOCK_U": BLOCK_U}),
    ]


def latent_threshold_cases(target: str, constexprs: dict[str, int]) -> list[Case]:
    """Of a threshold for every latent, whose tests are in test_threshold_encode.py."""
    module = "saevlm_fast.kernels.topk_encode_latent_triton"
    common = {"pre_ptr": "*fp32", "keys_ptr": "*i32"}
    common |= dict.fromkeys(("n_units", "d_sae", "units_per_row"), "i32:16")
    written = {"ends_ptr": "*i64", "acts_ptr": "*fp32", "latents_ptr": "*i64"}
    return [
        Case(module, "above_kernel", target, common | {"counts_ptr": "*i32"}, constexprs),
        Case(module, "write_above_kernel", target, common | written, constexprs),
    ]


def test_static_compile_without_spills():
    assert_no_spills([case for target in TARGETS for case in kernel_cases(target)])


# --- real shapes, on a GPU only -------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(2048, 1024, 32768), (1021, 768, 6143)], ids=str)
def test_gpu_selection_is_exact_on_its_own_preactivations(shape, dtype):
    """Scores within rounding of float32, and selection exactly the reference's on the scores that were stored.

    Of the plain path: in float32 the public functions screen where d_sae allows (test_topk_encode_cuda.py).
    """
    from saevlm_fast.kernels.topk_encode_batch_triton import launch_batch_topk_encode, launch_threshold_encode
    from saevlm_fast.kernels.topk_encode_triton import launch_topk_encode

    inputs = float_inputs(shape, dtype, device="cuda")
    pre_BS, maxima_BG = preactivations_and_maxima(inputs)
    x_BD, W_enc_DS, b_enc_S, b_dec_D = inputs
    expected = torch.relu((x_BD - b_dec_D).double() @ W_enc_DS.double() + b_enc_S.double())
    assert_close(pre_BS.double(), expected, rtol=2 * EPSILON[dtype], atol=2 * EPSILON[dtype])
    padded = torch.nn.functional.pad(pre_BS.float(), (0, -pre_BS.shape[1] % 64))
    assert torch.equal(maxima_BG.view(torch.float32), padded.unflatten(1, (-1, 64)).amax(2))
    for k in (1, 20, 64, 300):
        assert_codes(launch_topk_encode(*inputs, k, None), reference.topk_select(pre_BS, k))
        assert_codes(launch_batch_topk_encode(*inputs, k, None), reference.batch_topk_select(pre_BS, k))
    assert_codes(launch_threshold_encode(*inputs, 2.0, None), reference.threshold_select(pre_BS, 2.0))
    chunked = pre_BS.numel() * pre_BS.element_size() // 3
    for function in (topk_encode, batch_topk_encode):
        assert_codes(function(*inputs, 20, buffer_bytes=chunked), function(*inputs, 20))


@pytest.mark.gpu
def test_gpu_nan_in_bfloat16():
    """Not in the interpreter, whose float32 to bfloat16 cast loses NaN."""
    inputs = integer_inputs((17, 13, 640), torch.bfloat16, "nan", device="cuda")
    assert_codes(topk_encode(*inputs, 5), reference.topk_encode(*inputs, 5))
    assert_codes(batch_topk_encode(*inputs, 5), reference.batch_topk_encode(*inputs, 5))


@pytest.mark.gpu
def test_gpu_batch_topk_does_not_synchronise():
    inputs = float_inputs((256, 64, 4096), torch.float32, device="cuda")
    batch_topk_encode(*inputs, 20)
    torch.cuda.set_sync_debug_mode("error")
    try:
        batch_topk_encode(*inputs, 20)
        topk_encode(*inputs, 20)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("share", [0, 0.02, 0.5, 1])
@pytest.mark.parametrize("n_units", [0, 1, 77])
def test_few_nonzero_finds_all(share, n_units):
    mask_UG = torch.rand(n_units, 64, generator=torch.Generator().manual_seed(n_units)) < share
    assert torch.equal(plain.few_nonzero(mask_UG), mask_UG.flatten().nonzero().squeeze(1))


@pytest.mark.gpu
@pytest.mark.parametrize("functions", FUNCTIONS, ids=lambda pair: pair[0].__name__)
def test_gpu_gradients(functions):
    ours, theirs = functions
    inputs = float_inputs((64, 48, 1000), torch.float32)
    amount = 0.5 if ours is threshold_encode else 20
    expected = gradients(theirs, tuple(tensor.double() for tensor in inputs), amount)
    leaves = [tensor.cuda().requires_grad_() for tensor in inputs]
    for _ in range(2):
        acts = ours(*leaves, amount)[0]
        weights = torch.sin(torch.arange(acts.numel(), dtype=torch.float64)).view(acts.shape).float().cuda() + 2
        found = torch.autograd.grad((acts**2 * weights + acts * weights).sum(), leaves)
    for a, b in zip(found, expected):
        assert_close(a.cpu().double(), b, rtol=1e-4, atol=1e-4)
