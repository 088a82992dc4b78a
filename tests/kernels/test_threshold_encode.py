"""threshold_encode with a threshold for every latent (JumpReLU), and with 0 (ReLU): CPU, gradients, Triton kernels.

The kernels are compiled for GPUs that are not here in test_topk_encode.py, with the other encoders'.
"""

import pytest
import torch
from encoder_inputs import integer_inputs
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from saevlm_fast.kernels import reference
from saevlm_fast.kernels.topk_encode import latent_threshold_encode_op, threshold_encode

SHAPES = [(1, 1, 1), (3, 5, 7), (17, 13, 64), (5, 3, 65), (33, 7, 1009), (0, 3, 70), (7, 11, 4099)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
TRITON_CASES = [  # shape, dtype, kind, rows of a chunk
    ((1, 1, 1), torch.float32, "ties", None),
    ((9, 40, 300), torch.float32, "ties", 2),
    ((7, 11, 1009), torch.float16, "nan", 3),
    ((3, 5, 7), torch.float16, "negative", None),
    ((129, 3, 7), torch.bfloat16, "ties", None),
    ((0, 3, 70), torch.float32, "ties", None),
]


def threshold_inputs(shape, dtype, kind="ties", seed=0, device="cpu"):
    """integer_inputs, and thresholds of which many are equal to their activations."""
    generator = torch.Generator().manual_seed(seed + 1)
    threshold_S = torch.randint(-3, 7, (shape[2],), generator=generator).float()
    threshold_S[1::5] += 0.5
    threshold_S[::7], threshold_S[5::11], threshold_S[3::13] = -0.0, torch.inf, torch.nan
    return integer_inputs(shape, dtype, kind, seed, device), threshold_S.to(device)


def dense(inputs, threshold):
    """What is kept, in float64, with no function of this package; NaN is kept."""
    x_BD, W_enc_DS, b_enc_S, b_dec_D = (tensor.double() for tensor in inputs)
    h_BS = (x_BD - b_dec_D) @ W_enc_DS + b_enc_S
    kept = ((h_BS > torch.as_tensor(threshold, dtype=torch.float64)) & (h_BS > 0)) | h_BS.isnan()
    return torch.where(kept, h_BS, 0)


def assert_equal(found, inputs, threshold, **tolerance):
    acts_M, latents_M, row_offsets = found
    d_sae = inputs[1].shape[1]
    assert int(row_offsets[-1]) == len(acts_M) == len(latents_M)
    expected_BS = dense(inputs, threshold)
    counts = row_offsets.diff()
    assert torch.equal(counts, (expected_BS != 0).sum(1))
    rows = torch.arange(len(counts)).repeat_interleave(counts)
    assert bool(((rows * d_sae + latents_M).diff() > 0).all()), "ascending, each once"
    assert_close(acts_M.double(), expected_BS[rows, latents_M], equal_nan=True, **tolerance or {"rtol": 0, "atol": 0})


@pytest.mark.parametrize("buffer_bytes", [None, 4096])
@pytest.mark.parametrize("kind", ["ties", "negative", "nan"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cpu_is_the_definition(dtype, kind, buffer_bytes):
    for shape in [*SHAPES, (5, 3, 4096 // dtype.itemsize)]:  # whose rows would be a page apart
        inputs, threshold_S = threshold_inputs(shape, dtype, kind)
        for threshold in (threshold_S, 0.0, -3.0):
            found = threshold_encode(*inputs, threshold, buffer_bytes=buffer_bytes)
            assert_equal(found, inputs, threshold)
            for ours, plain in zip(found, reference.threshold_encode(*inputs, threshold), strict=True):
                assert_close(ours, plain, equal_nan=True)


@settings(max_examples=40)
@given(data=st.data())
def test_any_preactivations_and_thresholds(data):
    """Pre-activations as they are (an identity encoder): signed zeros, ties, subnormals, NaN and infinity."""
    d_sae, n_rows = data.draw(st.integers(1, 150)), data.draw(st.integers(1, 4))
    values = st.sampled_from([0.0, -0.0, 1.0, 1.0 + 2.0**-52, -1.0, 5e-324, 2.0, float("inf"), float("nan")])
    seed = data.draw(st.integers(0, 1 << 30))
    table = torch.tensor(data.draw(st.lists(values, min_size=2, max_size=6)), dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    pre_BS = table[torch.randint(len(table), (n_rows, d_sae), generator=generator)]
    threshold_S = table[torch.randint(len(table), (d_sae,), generator=generator)]
    inputs = pre_BS[:1].new_zeros(1, 1), torch.zeros(1, d_sae, dtype=torch.float64), pre_BS[0], torch.zeros(1).double()
    assert_equal(threshold_encode(*inputs, threshold_S), inputs, threshold_S)


def test_a_threshold_equal_to_the_others_is_the_scalar():
    inputs, _ = threshold_inputs((40, 6, 333), torch.float32)
    for scalar in (-1.0, 0.0, 2.0, 2.5, float("inf")):
        found = threshold_encode(*inputs, torch.full((333,), scalar))
        for ours, plain in zip(found, threshold_encode(*inputs, scalar), strict=True):
            assert torch.equal(ours, plain)


def test_thresholds_are_compared_as_numbers_and_not_rounded():
    """1 + 2^-20 is above 1 and no bfloat16."""
    x_BD, eye = torch.ones(1, 1, dtype=torch.bfloat16), torch.ones(1, 3, dtype=torch.bfloat16)
    zero = torch.zeros(3, dtype=torch.bfloat16)
    threshold_S = torch.tensor([1.0, 1 + 2.0**-20, 1 - 2.0**-20])
    assert threshold_encode(x_BD, eye, zero, zero[:1], threshold_S)[1].tolist() == [2]
    for threshold, n in zip(threshold_S.tolist(), (0, 0, 3)):
        assert len(threshold_encode(x_BD, eye, zero, zero[:1], threshold)[1]) == n


@settings(max_examples=200, deadline=None)
@given(
    threshold=st.floats(0, allow_nan=False) | st.sampled_from([65504.0, 65519.0, 2.0**-24, 2.0**-26, 1e-45, 3.4e38]),
    dtype=st.sampled_from(DTYPES),
    wide=st.booleans(),
)
def test_one_threshold_of_any_size_is_compared_as_numbers(threshold, dtype, wide):
    """With the numbers around it, in every dtype: as if one a latent were given."""
    near = torch.tensor(threshold, dtype=torch.float64).to(dtype).double()
    steps = 1 + torch.tensor([-2, -1, 0, 1, 2]) * torch.finfo(dtype).eps
    tiny = torch.tensor([-1, 1]) * torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    pre_S = torch.cat([near * steps.double(), near + tiny.double()]).nan_to_num(0.0, torch.inf).to(dtype)
    if wide:
        pre_S = pre_S.repeat(40)
    inputs = torch.zeros(1, 1, dtype=dtype), torch.zeros(1, len(pre_S), dtype=dtype), pre_S, torch.zeros(1, dtype=dtype)
    assert_equal(threshold_encode(*inputs, threshold), inputs, threshold)
    assert_equal(reference.threshold_encode(*inputs, threshold), inputs, threshold)


def test_thirteen_hundred_of_65536_stay_exact_in_bounded_chunks():
    """Of ReLU, and with thresholds: one row of pre-activations at a time, and the codes alone grow."""
    generator = torch.Generator().manual_seed(3)
    x_BD, W_enc_SD = (
        torch.randn(6, 4, generator=generator).double(),
        torch.randn(65536, 4, generator=generator).double(),
    )
    inputs = x_BD, W_enc_SD.t(), torch.full((65536,), -4.1).double(), torch.zeros(4).double()
    for threshold in (0.0, torch.rand(65536, generator=generator)):
        found = threshold_encode(*inputs, threshold, buffer_bytes=1)
        assert 300 < len(found[0]) / 6 < 4000
        assert_equal(found, inputs, threshold, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_are_autograd_s(shape):
    def gradients(function, threshold):
        leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
        acts = function(*leaves, threshold)[0]
        (acts**2 + torch.sin(torch.arange(acts.numel(), dtype=acts.dtype)) * acts).sum().backward()
        return [leaf.grad for leaf in leaves]

    n_rows, d_in, d_sae = shape
    generator = torch.Generator().manual_seed(0)
    sizes = (n_rows, d_in), (d_in, d_sae), (d_sae,), (d_in,)
    inputs = [torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes]
    threshold_S = torch.randn(d_sae, generator=generator, dtype=torch.float64)
    for threshold in (threshold_S, 0.0):
        both = (gradients(each, threshold) for each in (threshold_encode, reference.threshold_encode))
        for found, expected in zip(*both):
            assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_no_gradient_reaches_a_threshold():
    inputs, _ = threshold_inputs((4, 3, 9), torch.float32)
    threshold_S = torch.zeros(9, requires_grad=True)
    acts_M, _, _ = threshold_encode(inputs[0].requires_grad_(), *inputs[1:], threshold_S)
    acts_M.sum().backward()
    assert threshold_S.grad is None


@pytest.mark.parametrize(
    ("threshold", "message"),
    [
        (torch.zeros(8), r"threshold: shape \(8,\), must be \[9\], or a number"),
        (torch.zeros(1, 9), r"threshold: shape \(1, 9\), must be \[9\]"),
        (torch.zeros(9, dtype=torch.int64), "threshold: dtype torch.int64, must be floating point"),
        (torch.zeros(9, device="meta"), "threshold: on meta, but x is on cpu"),
        (float("nan"), "threshold: is NaN"),
    ],
)
def test_thresholds_that_do_not_fit(threshold, message):
    inputs, _ = threshold_inputs((4, 3, 9), torch.float32)
    with pytest.raises(ValueError, match=message):
        threshold_encode(*inputs, threshold)


def test_opcheck():
    inputs, threshold_S = threshold_inputs((5, 4, 70), torch.float32)
    inputs = [tensor.clone().requires_grad_() for tensor in inputs]
    torch.library.opcheck(latent_threshold_encode_op.overload, (*inputs, threshold_S, None))


# --- Triton kernels: in the interpreter, or on the GPU where there is one --------------------------------------------


@pytest.mark.parametrize(("shape", "dtype", "kind", "chunk"), TRITON_CASES, ids=str)
def test_triton_is_the_definition(shape, dtype, kind, chunk, device):
    from saevlm_fast.kernels.topk_encode_latent_triton import launch_latent_threshold_encode

    inputs, threshold_S = threshold_inputs(shape, dtype, kind, device=device)
    buffer_bytes = None if chunk is None else chunk * shape[2] * inputs[0].element_size()
    found = launch_latent_threshold_encode(*inputs, threshold_S, buffer_bytes)
    on_host = [tensor.cpu() for tensor in inputs]
    assert_equal([tensor.cpu() for tensor in found], on_host, threshold_S.cpu())
