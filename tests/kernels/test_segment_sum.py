"""segment_sum and the grouping of entries by latent: CPU path, Triton launch wrappers, registration, static compile."""

import pytest
import torch
from torch import Tensor

from saevlm_fast.kernels import reference
from saevlm_fast.kernels.grouping import (
    entry_rows,
    entry_rows_cuda,
    entry_rows_op,
    group_by_latent,
    group_by_latent_cuda,
    group_by_latent_op,
)
from saevlm_fast.kernels.segment_sum import segment_sum, segment_sum_into, segment_sum_op
from sparse_codes import assert_near_truth, random_codes, segment_sum_magnitude
from static_compile import TARGETS, Case, assert_no_spills

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# Lengths around the chunk size 32: no whole chunk, exactly one, several with head and tail, empty segments anywhere.
HEAVY = [0, 31, 32, 33, 64, 1, 0, 100, 95, 7, 0]
SEGMENTS = {
    "empty": [],
    "no_entries": [0, 0, 0],
    "one": [1],
    "light": [1, 0, 2, 3, 0, 5, 1],
    "heavy": HEAVY,
    "one_heavy": [331],
}


def segment_inputs(lengths: list[int], dtype: torch.dtype, d_in: int, before: int = 0, after: int = 0):
    """weights, ids, offsets, source; `before` and `after` entries belong to no segment and carry NaN weights."""
    generator = torch.Generator().manual_seed(1)
    ends = torch.tensor([before, *lengths]).cumsum(0)
    n_entries = int(ends[-1]) + after
    weights = torch.randn(n_entries, generator=generator, dtype=torch.float64)
    weights[:before] = float("nan")
    weights[int(ends[-1]) :] = float("nan")
    ids = torch.randint(1, 19, (n_entries,), generator=generator)
    source = torch.randn(19, d_in, generator=generator, dtype=torch.float64)
    source[0] = float("nan")  # row 0 is in no sum: a masked lane that leaks it is seen
    return weights.to(dtype), ids, ends, source.to(dtype)


def truth_and_magnitude(weights: Tensor, ids: Tensor, offsets: Tensor, source: Tensor) -> tuple[Tensor, Tensor]:
    start = int(offsets[0])  # the reference takes offsets that start at 0
    inputs = weights[start:].double(), ids[start:], offsets - start, source.double()
    return reference.segment_sum(*inputs), segment_sum_magnitude(*inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", SEGMENTS.values(), ids=SEGMENTS)
@pytest.mark.parametrize(("before", "after"), [(0, 0), (5, 40)])
def test_cpu_equals_reference(lengths: list[int], dtype: torch.dtype, before: int, after: int) -> None:
    inputs = segment_inputs(lengths, dtype, 13, before, after)
    out = segment_sum(*inputs)
    assert out.dtype == dtype
    assert_near_truth(out, *truth_and_magnitude(*inputs))


@pytest.mark.parametrize(
    ("lengths", "dtype", "d_in", "before", "after"),
    [
        ([], torch.float32, 3, 0, 0),
        ([0, 0, 0], torch.float32, 3, 0, 0),
        ([1], torch.float32, 1, 0, 0),
        (HEAVY, torch.float32, 13, 0, 0),
        (HEAVY, torch.float64, 13, 5, 40),
        (HEAVY, torch.bfloat16, 7, 37, 32),
        (HEAVY, torch.float16, 7, 32, 1),
        ([331], torch.float32, 3, 0, 0),
        ([2, 70], torch.float32, 1300, 1, 0),
    ],
)
@pytest.mark.usefixtures("poison")
def test_triton_equals_reference(device, lengths, dtype, d_in, before, after) -> None:
    from saevlm_fast.kernels.segment_sum_triton import launch_segment_sum

    inputs = segment_inputs(lengths, dtype, d_in, before, after)
    out = launch_segment_sum(*(tensor.to(device) for tensor in inputs))
    assert_near_truth(out, *truth_and_magnitude(*inputs))
    again = launch_segment_sum(*(tensor.to(device) for tensor in inputs))
    assert torch.equal(out, again)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", SEGMENTS.values(), ids=SEGMENTS)
def test_sums_into_memory_that_is_there(lengths: list[int], dtype: torch.dtype) -> None:
    weights, ids, offsets, source = segment_inputs(lengths, dtype, 13)
    out = torch.full((len(lengths), 13), torch.nan, dtype=dtype)
    segment_sum_into(out, weights, ids, offsets, source)
    truth, magnitude = truth_and_magnitude(weights, ids, offsets, source)
    assert_near_truth(out, truth, magnitude)
    there = torch.randn(len(lengths), 13, dtype=dtype)
    added = there.clone()
    segment_sum_into(added, weights, ids, offsets, source, added=True)
    if dtype in (torch.float32, torch.float64):
        assert_near_truth(added, truth + there, magnitude + there.abs())
    else:  # the sum is rounded before it is added
        assert torch.equal(added, there + out)
    start, stop = len(lengths) // 3, len(lengths)  # a slice of the segments
    segment_sum_into(out[start:stop], weights, ids, offsets[start : stop + 1], source)
    assert_near_truth(out[start:stop], truth[start:stop], magnitude[start:stop])


def test_sums_into_memory_do_not_depend_on_threads_and_check_ids() -> None:
    weights, ids, offsets, source = segment_inputs(HEAVY, torch.float32, 300)
    before, outs = torch.get_num_threads(), []
    try:
        for n_threads in (1, 2, 3):
            torch.set_num_threads(n_threads)
            outs.append(torch.empty(len(HEAVY), 300))
            segment_sum_into(outs[-1], weights, ids, offsets, source)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])
    with pytest.raises(ValueError, match=r"ids: 1\.\.18 is outside 18 rows"):
        segment_sum_into(torch.empty(len(HEAVY), 300), weights, ids, offsets, source[:18])


def test_cpu_repeats_bit_identically() -> None:
    inputs = segment_inputs(HEAVY, torch.float32, 257)
    assert torch.equal(segment_sum(*inputs), segment_sum(*inputs))


def test_a_slice_of_the_offsets_sums_a_slice_of_the_segments() -> None:
    weights, ids, offsets, source = segment_inputs(HEAVY, torch.float64, 5)
    whole = segment_sum(weights, ids, offsets, source)
    torch.testing.assert_close(segment_sum(weights, ids, offsets[3:9], source), whole[3:8])


@pytest.mark.parametrize("layout", ["fixed", "csr"])
@pytest.mark.parametrize(("n_rows", "k", "d_sae"), [(0, 3, 7), (1, 1, 2), (37, 5, 11), (5, 64, 65), (3, 0, 4)])
def test_entry_rows_equals_reference(layout: str, n_rows: int, k: int, d_sae: int) -> None:
    _, latents, row_offsets = random_codes(n_rows, k, d_sae, layout, torch.float32)
    truth = reference.entry_rows(latents, row_offsets)
    assert torch.equal(entry_rows(latents, row_offsets), truth)
    if row_offsets is not None:
        assert torch.equal(entry_rows_cuda(row_offsets, latents.numel()), truth)


@pytest.mark.parametrize("layout", ["fixed", "csr"])
@pytest.mark.parametrize("group", [group_by_latent, group_by_latent_cuda])
@pytest.mark.parametrize(
    ("n_rows", "k", "d_sae"),
    [(0, 3, 7), (1, 1, 2), (37, 5, 11), (5, 64, 65), (3, 0, 4), (29, 7, 65536), (29, 7, 70001)],
)
def test_grouping_is_stable_and_leaves_padding_out(layout: str, group, n_rows: int, k: int, d_sae: int) -> None:
    _, latents, row_offsets = random_codes(n_rows, k, d_sae, layout, torch.float32)
    if group is group_by_latent_cuda:  # plain torch: what runs on a GPU also runs here
        order, offsets = group(latents.flatten(), row_offsets, d_sae)
    else:
        order, offsets = group(latents, row_offsets, d_sae)
    flat = latents.flatten()
    assert torch.equal(order.sort().values, torch.arange(flat.numel()))
    assert offsets.dtype == order.dtype == torch.int64
    assert offsets.shape == (d_sae + 1,)
    n_inside = flat.numel() if row_offsets is None else int(row_offsets[-1])
    assert int(offsets[-1]) == n_inside
    latent_of = torch.repeat_interleave(torch.arange(d_sae), offsets.diff())
    assert torch.equal(flat[order[:n_inside]], latent_of)
    same_latent = latent_of[1:] == latent_of[:-1]
    assert bool((order[:n_inside].diff()[same_latent] > 0).all())


@pytest.mark.parametrize("layout", ["fixed", "csr"])
def test_grouped_segment_sum_is_the_dense_weight_gradient(layout: str) -> None:
    acts, latents, row_offsets = random_codes(97, 7, 53, layout, torch.float64)
    grad = torch.randn(97, 19, dtype=torch.float64)
    order, offsets = group_by_latent(latents, row_offsets, 53)
    out = segment_sum(acts.flatten()[order], entry_rows(latents, row_offsets)[order], offsets, grad)
    truth = reference.densify(acts, latents, row_offsets, 53).T @ grad
    torch.testing.assert_close(out, truth)


def test_opcheck() -> None:
    torch.library.opcheck(segment_sum_op.overload, segment_inputs(HEAVY, torch.float32, 5))
    for layout in ("fixed", "csr"):
        _, latents, row_offsets = random_codes(11, 3, 17, layout, torch.float32)
        torch.library.opcheck(group_by_latent_op.overload, (latents.flatten(), row_offsets, 17))
    torch.library.opcheck(entry_rows_op.overload, (row_offsets, latents.numel()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(weights_M=torch.ones(3, dtype=torch.float64)), "weights: dtype torch.float64 differs from source's"),
        (dict(weights_M=torch.ones(4)), "ids: shape"),
        (dict(weights_M=torch.ones(3, 1)), "weights: shape"),
        (dict(ids_M=torch.zeros(3, dtype=torch.int32)), "ids: dtype torch.int32"),
        (dict(offsets_L1=torch.zeros(0, dtype=torch.int64)), "offsets: shape"),
        (dict(source_RD=torch.ones(2)), "source: shape"),
        (dict(source_RD=torch.ones(2, 4).T), "source: strides"),
        (dict(source_RD=torch.ones(2, 4, dtype=torch.int64)), "source: dtype torch.int64 is not a floating type"),
    ],
)
def test_bad_arguments_are_named(change: dict, message: str) -> None:
    arguments = dict(
        weights_M=torch.ones(3),
        ids_M=torch.zeros(3, dtype=torch.int64),
        offsets_L1=torch.tensor([0, 3]),
        source_RD=torch.ones(2, 4),
    )
    with pytest.raises(ValueError, match=message):
        segment_sum(**(arguments | change))


def test_bad_codes_are_named() -> None:
    latents = torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"latents: shape \(2, 3\), must be \[M\]"):
        group_by_latent(latents, torch.tensor([0, 3, 6]), 5)
    with pytest.raises(ValueError, match=r"latents: shape \(6,\), must be \[B, K\]"):
        group_by_latent(latents.flatten(), None, 5)
    with pytest.raises(ValueError, match="latents: 7 is not below d_sae 5"):
        group_by_latent(latents + 7, None, 5)
    with pytest.raises(ValueError, match="d_sae: 0"):
        group_by_latent(latents, None, 0)
    with pytest.raises(ValueError, match="row_offsets: dtype"):
        group_by_latent(latents.flatten(), torch.tensor([0, 6], dtype=torch.int32), 5)


def compile_cases(element: str, targets: tuple[str, ...]) -> list[Case]:
    from saevlm_fast.kernels.segment_sum_triton import BLOCK_P, CHUNK, row_tiling

    block_d, num_warps = row_tiling(1024)
    constexprs = {"CHUNK": CHUNK, "BLOCK_P": BLOCK_P, "BLOCK_D": block_d, "ACC": "tl.float32"}
    inputs = {"weights_ptr": element, "ids_ptr": "*i64", "offsets_ptr": "*i64", "source_ptr": element, "d_in": "i32:16"}
    whole_chunk = {"chunk_segments_ptr": "*i64", "partials_ptr": "*fp32", "n_segments": "i32"}
    segment = {"partials_ptr": "*fp32", "out_ptr": element}
    module = "saevlm_fast.kernels.segment_sum_triton"
    return [
        Case(module, function, target, inputs | extra, constexprs, num_warps)
        for target in targets
        for function, extra in (("whole_chunk_kernel", whole_chunk), ("segment_kernel", segment))
    ]


def test_static_compile_without_spills() -> None:
    assert_no_spills(compile_cases("*fp32", TARGETS) + compile_cases("*bf16", ("sm_90",)))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gpu_weight_gradient_at_the_real_shape(device, dtype: torch.dtype) -> None:
    acts, latents, row_offsets = random_codes(4096, 20, 65536, "csr", dtype)
    grad = torch.randn(4096, 1024).to(dtype)
    codes = acts.to(device), latents.to(device), row_offsets.to(device)
    grad_gpu = grad.to(device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        order, offsets = group_by_latent(codes[1], codes[2], 65536)
        inputs = codes[0][order], entry_rows(codes[1], codes[2])[order], offsets, grad_gpu
        out, again = segment_sum(*inputs), segment_sum(*inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(out, again)
    truth_inputs = tuple(tensor.double() if tensor.is_floating_point() else tensor for tensor in inputs)
    assert_near_truth(out, reference.segment_sum(*truth_inputs), segment_sum_magnitude(*inputs))
