"""The CPU encoders that screen in bfloat16: the codes of float32, bounds that hold, and when they step aside."""

import pytest
import torch
from encoder_inputs import assert_clear, assert_codes, float_inputs, integer_inputs, midway
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from saevlm_fast.kernels import cpu_loops, reference, topk_encode_screened
from saevlm_fast.kernels.common import GROUP
from saevlm_fast.kernels.cpu_loops import in_parts
from saevlm_fast.kernels.low_product_speed import VARIABLE
from saevlm_fast.kernels.topk_encode import batch_topk_encode, rounded_down, threshold_encode, topk_encode
from saevlm_fast.kernels.topk_encode_screened import (
    ROUNDING,
    _best_of_all,
    _best_of_rows,
    _chunks,
    batch_topk_encode_screened,
    nth_largest,
    screens,
    threshold_encode_screened,
)
from saevlm_fast.kernels.topk_encode_screened import topk_encode_screened as topk_screened
from test_step import make

loops = pytest.importorskip(
    "saevlm_fast.kernels.topk_encode_numba", reason="no numba on this machine", exc_type=ImportError
)

SHAPES = [(1, 3, 1009), (33, 7, 1009), (7, 11, 4099), (64, 96, 2048), (70, 129, 6001)]
KS = [1, 3, 8]


@pytest.fixture
def only_screening(monkeypatch):
    """The float32 product is out of reach."""

    def unreachable(*_):
        raise AssertionError("left to the float32 product")

    for name in ("topk_encode_cpu", "batch_topk_encode_cpu", "threshold_encode_cpu"):
        monkeypatch.setattr(topk_encode_screened, name, unreachable)


@pytest.mark.parametrize("buffer_bytes", [None, 30_000])
@pytest.mark.parametrize("kind", ["ties", "negative", "sparse", "nan"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_reference_with_ties(shape, kind, buffer_bytes):
    inputs = integer_inputs(shape, torch.float32, kind)
    for k in (*KS, 40):  # more than 1009 latents have groups; of these BatchTopK is left to float32
        assert_codes(topk_screened(*inputs, k, buffer_bytes), reference.topk_encode(*inputs, k))
        assert_codes(batch_topk_encode_screened(*inputs, k, buffer_bytes), reference.batch_topk_encode(*inputs, k))
    for threshold in (0.0, 1.5, 9.0, 1e39, torch.inf):
        found = threshold_encode_screened(*inputs, rounded_down(threshold, torch.float32), buffer_bytes)
        assert_codes(found, reference.threshold_encode(*inputs, threshold))


@pytest.mark.usefixtures("only_screening")
@pytest.mark.parametrize("buffer_bytes", [None, 2**17], ids=["one chunk", "chunks"])
@pytest.mark.parametrize("shape", SHAPES[3:], ids=str)
def test_equals_float64_by_screening_alone(shape, buffer_bytes):
    inputs = float_inputs(shape, torch.float32)
    truth = [tensor.double() for tensor in inputs]
    close = dict(rtol=1e-5, atol=1e-5, check_dtype=False)
    for k in KS:
        assert_clear(reference.preactivations(*truth), k)
        for found, expected in zip(topk_screened(*inputs, k, buffer_bytes), reference.topk_encode(*truth, k)):
            assert_close(found, expected, **close)
    found = batch_topk_encode_screened(*inputs, 1, buffer_bytes)
    for part, expected in zip(found, reference.batch_topk_encode(*truth, 1)):
        assert_close(part, expected, **close)
    threshold = midway(reference.topk_encode(*truth, 8)[0])
    for found, expected in zip(
        threshold_encode_screened(*inputs, threshold, buffer_bytes), reference.threshold_encode(*truth, threshold)
    ):
        assert_close(found, expected, **close)


@pytest.mark.usefixtures("only_screening")
def test_latents_that_bfloat16_cannot_tell_apart():
    """The best 40 latents differ by a millionth: their order in bfloat16 is chance, in float32 it is known."""
    n_rows, d_in, d_sae, k = 64, 32, 4096, 8
    generator = torch.Generator().manual_seed(0)
    direction_D = torch.randn(d_in, generator=generator)
    W_enc_SD = torch.randn(d_sae, d_in, generator=generator) / 20
    alike = torch.randperm(d_sae, generator=generator)[:40]
    W_enc_SD[alike] = direction_D * (1 + 4e-6 * torch.arange(40))[:, None]
    x_BD = direction_D + torch.randn(n_rows, d_in, generator=generator) / 100
    zeros = torch.zeros(d_sae), torch.zeros(d_in)
    acts, latents = topk_screened(x_BD, W_enc_SD.t(), *zeros, k, None)
    assert torch.equal(latents, alike[-k:].sort().values.expand(n_rows, k))
    assert_close(acts, (x_BD @ W_enc_SD.t()).gather(1, latents), rtol=1e-5, atol=0)


@pytest.mark.parametrize("spread", [0.0, 0.5, 2.0], ids=["even norms", "uneven norms", "wild norms"])
@pytest.mark.parametrize("seed", range(8))
def test_codes_are_bit_for_bit_the_best_of_all_float32_dots(monkeypatch, seed, spread):
    """Near ties, exact ties and outliers included. But for rows left to the float32 product, which adds otherwise."""
    n_rows, d_in, d_sae, k = 64, 48, 2100, 4
    generator = torch.Generator().manual_seed(seed)
    x_BD, b_dec_D = torch.randn(n_rows, d_in, generator=generator), torch.randn(d_in, generator=generator) / 10
    W_SD = torch.randn(d_sae, d_in, generator=generator)
    W_SD[::7] = W_SD[3] * (1 + 1e-4 * torch.randn(300, 1, generator=generator))  # bfloat16 hardly tells them apart
    W_SD[5::50] = W_SD[3]
    W_SD *= (spread * torch.randn(d_sae, 1, generator=generator)).exp()
    b_enc_S = torch.randn(d_sae, generator=generator) / 10
    centred_BD, every = x_BD - b_dec_D, torch.arange(n_rows * d_sae)
    z_BS = torch.empty(n_rows, d_sae)
    in_parts(loops.dots_at, [0, 70_000, len(every)], centred_BD, W_SD, b_enc_S, every, every, d_sae, z_BS.view(-1))
    off_BS = z_BS - (centred_BD.double() @ W_SD.double().t() + b_enc_S)
    assert bool((off_BS.abs() <= 1e-5 * centred_BD.norm(dim=1)[:, None] * (W_SD.norm(dim=1) + 1)).all())
    inputs, left = (x_BD, W_SD.t(), b_enc_S, b_dec_D), []

    def leave(x_RD, *_):
        left.append(x_RD)
        return x_RD.new_zeros(len(x_RD), k), torch.zeros(len(x_RD), k, dtype=torch.int64)

    monkeypatch.setattr(topk_encode_screened, "MAX_SHARE", 1)  # as many candidates as it takes
    monkeypatch.setattr(topk_encode_screened, "topk_encode_cpu", leave)
    acts_BK, latents_BK = topk_screened(*inputs, k, None)
    best_BK = z_BS.sort(dim=1, descending=True, stable=True).indices[:, :k].sort(dim=1).values
    decided_B = ~torch.isin(x_BD[:, 0], torch.cat([x_BD.new_empty(0), *(x_RD[:, 0] for x_RD in left)]))
    assert decided_B.any()
    assert torch.equal(latents_BK[decided_B], best_BK[decided_B])
    assert torch.equal(acts_BK[decided_B], z_BS.gather(1, best_BK)[decided_B])
    acts_M, latents_M, offsets_B1 = batch_topk_encode_screened(*inputs, k, None)
    best_M = z_BS.flatten().sort(descending=True, stable=True).indices[: n_rows * k].sort().values
    assert torch.equal(torch.arange(n_rows).repeat_interleave(offsets_B1.diff()) * d_sae + latents_M, best_M)
    assert torch.equal(acts_M, z_BS.flatten()[best_M])


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**31),
    d_in=st.integers(1, 200),
    scales=st.tuples(*[st.integers(-100, 40)] * 3),
    spread=st.floats(0, 6),
)
def test_bounds_hold(seed, d_in, scales, spread):
    """|z - v| <= slack + r |v| for every latent, at any scale, with outlying dimensions, zeros and biases."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *size: torch.randn(*size, generator=generator) * (spread * torch.randn(*size, generator=generator)).exp()  # noqa: E731, E501  # fmt: skip
    x_BD, W_SD, b_S = draw(5, d_in), draw(130, d_in), draw(130)
    x_BD, W_SD, b_S = (t * 2.0**scale for t, scale in zip((x_BD, W_SD, b_S), scales))
    x_BD[0] = 0
    (chunk,) = _chunks(x_BD, W_SD.t(), b_S, torch.zeros(d_in), None)
    v_BS = chunk.pre_RP.view(torch.bfloat16)[:, :130].double()
    slack_BS = chunk.slack_RG.repeat_interleave(GROUP, 1)[:, :130].double()
    z_BS = x_BD.double() @ W_SD.double().t() + b_S.double()
    sound_B = chunk.slack_RG.amax(1) < loops.MAX_SLACK
    assert bool(sound_B.all()) or float(slack_BS.max()) > 1e29
    error_BS = (z_BS - v_BS).abs() - ROUNDING * v_BS.abs()
    assert bool((error_BS <= slack_BS)[sound_B].all())


@pytest.mark.parametrize("rounded", ["x", "W_enc"])
def test_bounds_are_reached(rounded):
    """All roundings of a factor in one direction, and a sum near 0: the error is all that the slack allows for."""
    d_in, error = 64, 0.99 * 2.0**-8
    ones_1D, hard_1D = torch.ones(1, d_in), torch.tensor([1 + error, -(1 + 2.0**-7 - error)]).repeat(1, d_in // 2)
    x_BD, W_SD = (hard_1D, ones_1D) if rounded == "x" else (ones_1D, hard_1D)
    (chunk,) = _chunks(x_BD, W_SD.t(), torch.zeros(1), torch.zeros(d_in), None)
    v = chunk.pre_RP.view(torch.bfloat16)[0, 0].double()
    found = float((x_BD.double() @ W_SD.double().t() - v).abs())
    assert 0.95 * float(chunk.slack_RG) < found < float(chunk.slack_RG)


@pytest.mark.usefixtures("only_screening")
def test_a_row_may_hold_most_of_a_batch():
    """BatchTopK: one row with far larger activations has entries in every group."""
    inputs = float_inputs((64, 96, 8192), torch.float32)
    inputs[0][5] *= 4
    assert_clear(reference.preactivations(*(tensor.double() for tensor in inputs)), 8)
    assert_equal_in_float32(batch_topk_encode_screened(*inputs, 8, None), reference.batch_topk_encode(*inputs, 8))


def test_outputs_round_too():
    """One weight a latent, which bfloat16 holds exactly: only the output's rounding is left."""
    steps = 1 + torch.arange(128) / 128
    x_BD, W_SD = steps[:, None], steps[:, None]
    (chunk,) = _chunks(x_BD, W_SD.t(), torch.zeros(128), torch.zeros(1), None)
    z_BS, v_BS = (x_BD @ W_SD.t()).double(), chunk.pre_RP.view(torch.bfloat16).double()
    slack_BS = chunk.slack_RG.repeat_interleave(GROUP, 1)
    assert bool(((z_BS - v_BS).abs() > 2.0**-9 * v_BS.abs()).any())
    assert bool(((z_BS - v_BS).abs() <= slack_BS + ROUNDING * v_BS.abs()).all())


@pytest.mark.parametrize("left", [0.99 * 2.0**-8, 0.3 * 2.0**-8 + 0.99 * 2.0**-17, -(2.0**-15)])
def test_bias_is_held_in_two_parts(left):
    """All of it but `left` is taken off again by the product: what bfloat16 loses of a bias is 2^-16 of it at most."""
    bias = torch.tensor([1 + left])
    (chunk,) = _chunks(torch.ones(1, 1), -torch.ones(1, 1), bias, torch.zeros(1), None)
    v, z = float(chunk.pre_RP.view(torch.bfloat16)[0, 0]), float(bias) - 1
    of_product = 1.001 * 9 * 2.0**-24  # |x| |w|, neither of which is rounded: sums are
    assert abs(z - v) <= ROUNDING * abs(v) + float(chunk.slack_RG) - of_product + 1e-9
    assert float(chunk.slack_RG) - of_product < 1.2 * 2.0**-16


def test_vague_rows_alone_are_left_to_float32(monkeypatch):
    """Rows at b_dec: all that is left is b_enc, whose values bfloat16 cannot tell apart."""
    x_BD, W_enc_DS, b_enc_S, b_dec_D = float_inputs((256, 16, 4096), torch.float32)
    b_enc_S = 0.5 + b_enc_S / 1000
    x_BD[::10] = b_dec_D
    left = []
    original = topk_encode_screened.topk_encode_cpu
    monkeypatch.setattr(
        topk_encode_screened, "topk_encode_cpu", lambda x, *rest: left.append(len(x)) or original(x, *rest)
    )
    inputs = x_BD, W_enc_DS, b_enc_S, b_dec_D
    assert_equal_in_float32(topk_screened(*inputs, 5, None), reference.topk_encode(*inputs, 5))
    assert left == [26]


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
def test_neither_autocast_nor_the_default_dtype_touches_the_bounds(autocast):
    inputs = float_inputs((64, 96, 2048), torch.float32)
    (plain,) = _chunks(*inputs, None)
    slack_RG, codes = plain.slack_RG.clone(), topk_screened(*inputs, 3, None)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.autocast("cpu", autocast):
            (chunk,) = _chunks(*inputs, None)
            assert torch.equal(chunk.slack_RG, slack_RG)
            found = topk_screened(*inputs, 3, None), batch_topk_encode_screened(*inputs, 3, None)
    finally:
        torch.set_default_dtype(torch.float32)
    assert_codes(found[0], codes)
    assert_codes(found[1], batch_topk_encode_screened(*inputs, 3, None))


def test_bounds_are_of_use():
    """At most 3 k candidates of random data, so that a bound of plenty cannot pass for a sound one."""
    x_BD, W_enc_DS, b_enc_S, b_dec_D = float_inputs((64, 256, 8192), torch.float32)
    (chunk,) = _chunks(x_BD, W_enc_DS, b_enc_S, b_dec_D, None)
    bound_R = reference.topk_encode(x_BD, W_enc_DS, b_enc_S, b_dec_D, 20)[0].amin(1)
    found = topk_encode_screened._candidates(chunk, bound_R, W_enc_DS, b_enc_S)
    assert bool(found.sure_R.all())
    assert 20 * 64 <= len(found.values_M) < 3 * 20 * 64


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 1e30])
@pytest.mark.parametrize("where", ["x", "W_enc", "b_enc"])
def test_values_without_bounds_are_left_to_float32(bad, where):
    inputs = [tensor.contiguous() for tensor in float_inputs((64, 16, 2048), torch.float32)]
    inputs[1] = inputs[1].t().contiguous().t()
    threshold = midway(reference.preactivations(*(tensor.double() for tensor in inputs)), share=0.98)
    {"x": inputs[0][3], "W_enc": inputs[1].t()[700], "b_enc": inputs[2][900:901]}[where][0] = bad
    assert_equal_in_float32(topk_screened(*inputs, 5, None), reference.topk_encode(*inputs, 5))
    assert_equal_in_float32(batch_topk_encode_screened(*inputs, 5, None), reference.batch_topk_encode(*inputs, 5))
    assert_equal_in_float32(
        threshold_encode_screened(*inputs, threshold, None), reference.threshold_encode(*inputs, threshold)
    )


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e30])
def test_one_row_without_bounds_leaves_the_others_to_screening(monkeypatch, bad):
    x_BD, W_enc_DS, b_enc_S, b_dec_D = float_inputs((256, 16, 4096), torch.float32)
    x_BD[100, 3], x_BD[7] = bad, b_dec_D  # and one with few positives
    left = []
    original = topk_encode_screened.topk_encode_cpu
    monkeypatch.setattr(
        topk_encode_screened, "topk_encode_cpu", lambda x, *rest: left.append(len(x)) or original(x, *rest)
    )
    b_enc_S -= 0.5
    inputs = x_BD, W_enc_DS, b_enc_S, b_dec_D
    assert_equal_in_float32(topk_screened(*inputs, 5, None), reference.topk_encode(*inputs, 5))
    assert 1 <= sum(left) <= 20


def assert_equal_in_float32(found, expected):
    for part, truth in zip(found, expected, strict=True):
        assert_close(part, truth, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.usefixtures("only_screening")
def test_one_latent_of_a_huge_norm_costs_a_group_only():
    inputs = float_inputs((64, 16, 8200), torch.float32)
    inputs[1].t()[-1] *= 1e4  # of the last group, which is not full
    assert_equal_in_float32(topk_screened(*inputs, 5, None), reference.topk_encode(*inputs, 5))


@pytest.mark.parametrize("wanted", [False, True])
def test_the_public_functions_take_this_path(monkeypatch, wanted):
    """Where low products pay, as the environment says here, on any machine."""
    monkeypatch.setenv(VARIABLE, str(int(wanted)))
    inputs = [tensor.contiguous() for tensor in float_inputs((70, 704, 3001), torch.float32)]
    inputs[1] = inputs[1].t().contiguous().t()
    pre_BS = reference.preactivations(*(tensor.double() for tensor in inputs))
    assert_clear(pre_BS, 5)
    threshold = midway(pre_BS, share=0.99)
    expected = (
        reference.topk_encode(*inputs, 5),
        reference.batch_topk_encode(*inputs, 5),
        reference.threshold_encode(*inputs, threshold),
    )
    calls = []
    for name in ("topk_encode_screened", "batch_topk_encode_screened", "threshold_encode_screened"):
        original = getattr(topk_encode_screened, name)
        monkeypatch.setattr(
            topk_encode_screened, name, lambda *args, original=original: calls.append(1) or original(*args)
        )
    found = topk_encode(*inputs, 5), batch_topk_encode(*inputs, 5), threshold_encode(*inputs, threshold)
    for one, other in zip(found, expected):
        assert_equal_in_float32(one, other)
    assert len(calls) == (3 if wanted else 0)


def test_where_it_pays(monkeypatch):
    """On any machine: only what is large in every respect asks whether low products pay."""
    asked = []
    monkeypatch.setattr(topk_encode_screened, "low_products_pay", lambda: asked.append(1) or True)
    x_BD, W_enc_DS, *_ = float_inputs((64, 4096, 640), torch.float32)
    W_enc_DS = W_enc_DS.t().contiguous().t()
    assert screens(x_BD, W_enc_DS, 20)
    assert len(asked) == 1
    assert not screens(x_BD, W_enc_DS, 21)
    assert not screens(x_BD[:63], W_enc_DS, 20)
    assert not screens(x_BD[:, :2048], W_enc_DS[:2048].t().contiguous().t(), 20)
    assert not screens(x_BD, W_enc_DS.contiguous(), 20)
    assert not screens(x_BD.double(), W_enc_DS.double(), 20)
    with monkeypatch.context() as without:
        without.setattr(cpu_loops, "numba_is_here", lambda: False)
        assert not screens(x_BD, W_enc_DS, 20)
    assert len(asked) == 1
    monkeypatch.setattr(topk_encode_screened, "low_products_pay", lambda: False)
    assert not screens(x_BD, W_enc_DS, 20)


@pytest.mark.parametrize("architecture", ["topk", "batch_topk"])
def test_whole_steps(monkeypatch, architecture):
    """Same losses and weights as by float32 products."""
    monkeypatch.setattr(topk_encode_screened, "MIN_PRODUCT", 0)
    monkeypatch.setattr(topk_encode_screened, "MIN_ROWS", 0)
    (plain, _, data), (stepper, _, _) = (
        make(architecture, d_in=32, d_sae=1031, k=3, dead_after=10**6) for _ in range(2)
    )
    screened, original = [], topk_encode_screened._chunks
    monkeypatch.setattr(topk_encode_screened, "_chunks", lambda *args: screened.append(1) or original(*args))
    for start in range(0, 5 * 61, 61):
        x_BD = data[start : start + 61]
        monkeypatch.setenv(VARIABLE, "0")
        losses = plain.step(x_BD).losses
        monkeypatch.setenv(VARIABLE, "1")
        assert_close(stepper.step(x_BD).losses, losses, rtol=1e-5, atol=1e-6)
    assert len(screened) == 5
    assert_close(stepper.sae.W_enc, plain.sae.W_enc, rtol=1e-3, atol=1e-3)  # Adam: small gradients' signs count


@pytest.mark.parametrize("d_in", [241, 250, 252, 255, 256])
def test_equal_latents_tie_in_rows_of_any_length(monkeypatch, d_in):
    """Latents that stand twice, far apart: the lower one is taken first, whichever way a large encode goes."""
    monkeypatch.setenv(VARIABLE, "1")
    x_BD, W_enc_DS, b_enc_S, b_dec_D = float_inputs((64, d_in, 9000), torch.float32)
    W_enc_DS = W_enc_DS.t().contiguous().t()
    W_enc_DS[:, 4501:], b_enc_S[4501:] = W_enc_DS[:, :4499], b_enc_S[:4499]
    assert screens(x_BD, W_enc_DS, 3)
    _, latents_BK = topk_encode(x_BD, W_enc_DS, b_enc_S, b_dec_D, 3)
    below = [(row[row >= 4501, None] - 4501 == row).any(1) for row in latents_BK]
    assert all(bool(found.all()) for found in below)


def chunk_of(values_RP):
    """Of int16 values, [R, P], P whole groups."""
    maxima_RG = values_RP.unflatten(1, (-1, GROUP)).amax(2)
    x_RD, slack_RG = torch.zeros(len(values_RP), 1), torch.zeros(maxima_RG.shape)
    return topk_encode_screened.Chunk(0, x_RD, values_RP.contiguous(), maxima_RG, slack_RG)


def some_values(n_rows, n_groups, spread):
    """Few or many values, negative ones among them; a row of the largest, one of the least, one that is all zero but
    for three entries, and one with all that is above zero in one group."""
    values_RP = torch.randint(-spread, spread + 1, (n_rows, n_groups * GROUP), dtype=torch.int16)
    values_RP[3], values_RP[4], values_RP[5] = 2**15 - 1, -(2**15), 0
    values_RP[5, 7:10] = 5
    values_RP[6] = -1
    values_RP[6, -GROUP:] = torch.arange(GROUP, dtype=torch.int16)
    return values_RP


@pytest.mark.parametrize("spread", [2, 300, 32000])
@pytest.mark.parametrize(("n_groups", "k"), [(7, 3), (7, 7), (7, 8), (7, 50), (300, 20), (1, 64), (1100, 1)])
def test_best_of_rows_are_those_of_a_stable_sort(n_groups, k, spread):
    values_RP = some_values(20, n_groups, spread)
    found, has_R = _best_of_rows(chunk_of(values_RP), k)
    assert torch.equal(has_R, (values_RP > 0).sum(1) >= k)
    order_RP = torch.sort(values_RP.int(), dim=1, descending=True, stable=True).indices
    expected_RK = order_RP[:, :k].sort(1).values + torch.arange(20)[:, None] * values_RP.shape[1]
    assert torch.equal(found, expected_RK[has_R].flatten())


@pytest.mark.parametrize("spread", [2, 300, 32000])
@pytest.mark.parametrize("n", [1, 20, 139, 140, 141, 900, 10**4])
def test_best_of_all_are_those_of_a_sort_and_all_that_tie(monkeypatch, n, spread):
    """140 groups: with more entries than these they give no bound."""
    values_RP = some_values(20, 7, spread)
    assert len(_best_of_all(chunk_of(torch.ones_like(values_RP)), n)) == 0, "all tie: nothing is gained"
    monkeypatch.setattr(topk_encode_screened, "MAX_SHARE", 1)
    found = _best_of_all(chunk_of(values_RP), n)
    descending = values_RP.flatten().sort(descending=True).values
    least = int(descending[n - 1]) if n <= len(descending) else 0
    few_RP = torch.full_like(values_RP, -3)
    few_RP[:, 5] = 1
    assert len(_best_of_all(chunk_of(few_RP), n)) == (20 if n <= 20 else 0)
    expected = (values_RP.flatten() >= least).nonzero().squeeze(1) if least > 0 else torch.empty(0, dtype=torch.int64)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("spread", [1, 300, 20000])
def test_nth_largest_equals_a_sort(spread):
    """The whole range of 16 bits, both its ends, and every n."""
    values_N = torch.randint(-spread, spread, (360,), dtype=torch.int16)
    values_N[:2] = torch.tensor([torch.iinfo(torch.int16).min, torch.iinfo(torch.int16).max], dtype=torch.int16)
    descending = values_N.sort(descending=True).values
    assert [nth_largest(values_N, n) for n in range(1, 361)] == descending.tolist()


@pytest.mark.parametrize("encode", [topk_screened, batch_topk_encode_screened])
def test_no_dot_is_made_twice(monkeypatch, encode):
    """What is proposed is known where candidates are listed."""
    made, original = [], topk_encode_screened._exact

    def exact(chunk, positions_M, places_Q, *rest):
        made.append(positions_M[places_Q])
        original(chunk, positions_M, places_Q, *rest)

    monkeypatch.setattr(topk_encode_screened, "_exact", exact)
    encode(*float_inputs((64, 96, 2048), torch.float32), 8, None)
    assert len(made) == 2
    positions = torch.cat(made)
    assert len(positions.unique()) == len(positions) >= 64 * 8


def test_no_rows():
    inputs = float_inputs((0, 96, 2048), torch.float32)
    assert topk_screened(*inputs, 8, None)[0].shape == (0, 8)
    acts, latents, offsets = batch_topk_encode_screened(*inputs, 8, None)
    assert (len(acts), len(latents), offsets.tolist()) == (0, 0, [0])
    assert [part.tolist() for part in threshold_encode_screened(*inputs, 0.5, None)] == [[], [], [0]]


@pytest.mark.usefixtures("only_screening")
@pytest.mark.parametrize(("d_sae", "k"), [(2048, 64), (2050, 60), (4096, 100), (640, 20)])
def test_many_of_few_latents(d_sae, k):
    """More than there are groups, too: still by screening alone."""
    inputs = float_inputs((8, 96, d_sae), torch.float32)
    assert_clear(reference.preactivations(*(tensor.double() for tensor in inputs)), k)
    assert_equal_in_float32(topk_screened(*inputs, k, None), reference.topk_encode(*inputs, k))
    assert_equal_in_float32(batch_topk_encode_screened(*inputs, k, None), reference.batch_topk_encode(*inputs, k))
