"""Raw neurons' score as a GPU makes it, in the interpreter: against the CPU's and float64; its launches and waits."""

import weakref
from collections.abc import Iterator
from copy import deepcopy

import pytest
import torch
from launches import counted_launches

from saevlm_fast.kernels import reference
from saevlm_fast.scoring import dense_on_gpu, intake, monosemanticity, sums
from saevlm_fast.scoring.monosemanticity import STATUSES, StreamedScore
from static_compile import TARGETS, Case, assert_no_spills

N_IMAGES, N_NEURONS, D_EMB = 40, 9, 13
GPU = torch.cuda.is_available()


def make_data(dtype=torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Neurons of any sign and offset: dead, constant, single and dominated ones are among them."""
    generator = torch.Generator().manual_seed(0)
    acts_NK = torch.randn(N_IMAGES, N_NEURONS, generator=generator) + torch.linspace(-3, 40, N_NEURONS)
    acts_NK[:, 0], acts_NK[:, 1], acts_NK[:, 2] = 0.0, -2.5, 1.0
    acts_NK[20, 2], acts_NK[3, 3], acts_NK[30, 4] = 4.0, 1e6, 1e6
    acts_NK[35:, 5] = acts_NK[:, 5].min()
    emb_NE = torch.randn(N_IMAGES, D_EMB, generator=generator) + 0.3
    return acts_NK.to(dtype), emb_NE.to(dtype)


@pytest.fixture
def waits(monkeypatch) -> Iterator[list[int]]:
    """Where there is no GPU the score takes its way all the same; one entry a time that the device is waited for.

    torch.empty hands out NaN and the largest integers, so that whatever a kernel leaves unwritten shows.
    """
    from saevlm_fast.kernels import dense_prepared_triton, dense_range_triton, pairwise_float64_triton

    monkeypatch.setattr(dense_range_triton, "LEAST_ROWS", 8)
    monkeypatch.setattr(dense_prepared_triton, "BLOCK_LEAST_ROWS", 8)
    monkeypatch.setattr(pairwise_float64_triton, "COLUMN_ROWS", 8)
    if not GPU:
        for module in (intake, monosemanticity, sums):
            monkeypatch.setattr(module, "on_gpu", lambda _: True)
    read, found = dense_on_gpu._Told.read, []
    monkeypatch.setattr(dense_on_gpu._Told, "read", lambda told, heard: (found.append(1), read(told, heard))[1])
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield found
    torch.use_deterministic_algorithms(False)


def score(acts_NK, emb_NE, similarity="cosine", sizes=(), device="cpu", **options) -> StreamedScore:
    streamed = StreamedScore(acts_NK.shape[1], similarity, device=device, **options)
    sizes = [*sizes, len(emb_NE) - sum(sizes)]
    for acts_nK, emb_nE in zip(acts_NK.split(sizes), emb_NE.split(sizes)):
        streamed.update(acts_nK, emb_nE)
    return streamed


def assert_same(actual, expected, tolerance=1e-12) -> None:
    assert torch.equal(actual.status, expected.status)
    assert torch.equal(actual.n_active, expected.n_active)
    assert torch.equal(actual.max_activation, expected.max_activation)
    torch.testing.assert_close(actual.ms, expected.ms, rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize(
    ("similarity", "sizes", "halves"),
    [("cosine", (), False), ("dot", (1, 20), False), ("cosine", (2, 1, 1), True)],
    ids=str,
)
def test_against_the_cpu_and_the_double_loop(similarity, sizes, halves, device, request, monkeypatch):
    acts_NK, emb_NE = make_data()
    cpu = score(acts_NK, emb_NE, similarity, sizes, halves=halves)
    waits = request.getfixturevalue("waits")
    monkeypatch.setattr(dense_on_gpu, "_BLOCK_ROWS", 15)
    gpu = score(acts_NK, emb_NE, similarity, sizes, device, halves=halves)
    assert_same(gpu.result(), cpu.result())
    truth_K = reference.monosemanticity(acts_NK.double(), emb_NE.double(), similarity)
    torch.testing.assert_close(gpu.result().ms, truth_K, rtol=1e-9, atol=1e-9, equal_nan=True)
    assert waits
    if not halves:
        for ours, theirs in zip(numbers_of(gpu), numbers_of(cpu)):
            torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-12, atol=1e-10)


def numbers_of(streamed: StreamedScore) -> list[torch.Tensor]:
    """What lowering a minimum needs, too."""
    sums = streamed._sums()
    return [sums.self_S, sums.unit_sum_E, sums.pair_sum, sums.square_sum, sums.state.total_S]


@pytest.mark.parametrize(("dtype", "similarity"), [(torch.float16, "cosine"), (torch.float64, "rbf")], ids=str)
def test_other_dtypes_and_rbf(dtype, similarity, device, request):
    acts_NK, emb_NE = (t.clamp_max(999).to(dtype) for t in make_data())
    expected = score(acts_NK, emb_NE, similarity).result()
    request.getfixturevalue("waits")
    assert_same(score(acts_NK, emb_NE, similarity, (7,), device).result(), expected)


def test_what_is_wrong_is_named_and_the_sums_stay(device, waits):
    data = make_data()
    streamed = StreamedScore(N_NEURONS, device=device)
    streamed.update(*(each[:3] for each in data))
    for part, row, value, message in (
        (0, 7, float("nan"), "^activations: image 7: acts_nK holds NaN"),
        (0, 11, float("-inf"), "image 11: acts_nK holds NaN"),
        (1, 4, float("nan"), "image 4: embedding is NaN, infinite or too large to square"),
        (1, 9, float("inf"), "image 9: embedding is NaN"),
        (1, 5, 0.0, "image 5: embedding is zero"),
    ):
        bad = [each.clone() for each in data]
        bad[part][row] = value
        with pytest.raises(ValueError, match=message):
            streamed.update(*(each[3:12] for each in bad))
    streamed.update(*(each[3:] for each in data))
    assert_same(streamed.result(), score(*data, sizes=(3,), device=device).result())
    assert score(*(each[3:12] for each in bad), "dot", device=device).result().ms.isfinite().any()


def test_what_is_wrong_with_the_first_images_leaves_no_sums(device, waits):
    data = [each[:10, :4] for each in make_data()]
    streamed = StreamedScore(4, device=device, halves=True)
    for part, value in ((0, float("nan")), (1, 0.0)):
        bad = [each.clone() for each in data]
        bad[part][2] = value
        with pytest.raises(ValueError, match="image 2: "):
            streamed.update(*bad)
        assert streamed.result().n_images == 0
    streamed.update(*data)
    assert_same(streamed.result(), score(*data, device=device, halves=True).result(), 0.0)


def test_results_between_chunks_are_of_their_images(device, waits):
    """Later chunks, empty ones among them, leave them as they were; sums of no images are not kept beside others."""
    acts_NK, emb_NE = (each.to(device) for each in make_data())
    acts_NK = acts_NK[:, [0, 1, 5, 6, 7, 8]]  # no image dominates any: scores come with the first chunk
    streamed = StreamedScore(acts_NK.shape[1], device=device)
    streamed.update(acts_NK[:0], emb_NE[:0])
    assert streamed.result().status.tolist() == [STATUSES.index("dead")] * acts_NK.shape[1]
    of_none = weakref.ref(streamed._sums().state.sums_SE)
    streamed.update(acts_NK[:9], emb_NE[:9])
    assert of_none() is None
    first = streamed.result()
    kept = deepcopy(first)
    streamed.update(acts_NK[:0], emb_NE[:0])
    assert_same(streamed.result(), first)
    streamed.update(acts_NK[9:20], emb_NE[9:20])
    assert_same(streamed.result(), score(acts_NK[:20], emb_NE[:20], sizes=(9,), device=device).result(), 0.0)
    assert_same(first, kept, 0.0)


@pytest.mark.skipif(GPU, reason="launches are counted in the interpreter")
def test_a_chunk_is_so_many_launches_and_one_wait(waits):
    """Of docs/gpu.md: a first chunk and its result; and a later chunk. The copy to the host is counted."""
    generator = torch.Generator().manual_seed(0)
    acts_NK, emb_NE = (torch.rand(20, n, generator=generator) for n in (N_NEURONS, D_EMB))
    with counted_launches() as counts:
        streamed = StreamedScore(N_NEURONS)
        streamed.update(acts_NK[:12], emb_NE[:12])
        streamed.result()
    assert sum(counts.values()) == 5, counts
    assert len(waits) == 1
    with counted_launches() as counts:
        streamed.update(acts_NK[12:], emb_NE[12:])
    assert sum(counts.values()) == 6, counts
    assert len(waits) == 2


def scored_by(streamed: StreamedScore) -> tuple[str, ...]:
    """Kernels that result launches."""
    with counted_launches() as counts:
        streamed.result()
    return tuple(name for name in counts if name.endswith("_kernel"))


@pytest.mark.skipif(GPU, reason="launches are counted in the interpreter")
def test_scores_of_a_first_chunk_come_with_its_sums_once(waits):
    acts_NK, emb_NE = make_data()
    again = ("score_result_kernel",)
    others_NK = acts_NK[:, [0, 1, 5, 6, 7, 8]]
    streamed = score(others_NK, emb_NE)
    first = streamed.result()
    assert_same(first, streamed.result(), 0.0)
    assert first.ms.data_ptr() != streamed.result().ms.data_ptr()
    assert first.status.unique().tolist() == [0, 1, 2]
    assert scored_by(score(others_NK, emb_NE)) == ()
    assert scored_by(streamed) == again
    assert scored_by(score(others_NK, emb_NE, sizes=(20,))) == again
    assert scored_by(score(acts_NK, emb_NE)) == again, "one image dominates neurons: their pairs are added later"


def test_no_neurons_and_single_images(device, waits):
    emb_NE = make_data()[1]
    assert len(score(torch.empty(N_IMAGES, 0), emb_NE, device=device).result().ms) == 0
    one = score(torch.ones(1, 2), emb_NE[:1], device=device)
    assert one.result().status.tolist() == [STATUSES.index("constant")] * 2
    assert float(one._sums().pair_sum) == 0.0


def static_cases(target: str) -> list[Case]:
    ranges, prepared, module = (f"saevlm_fast.kernels.dense_{name}_triton" for name in ("range", "prepared", "score"))
    doubles = "parts range_parts all_sqnorm low high new_reals faults sqnorm wide column_parts unit unit_sums squares"
    doubles += " sums num den total self drop unit_sum pair_sum square_sum added_sums reals told"
    signature = {f"{name}_ptr": "*fp64" for name in doubles.split()}
    signature |= {f"{name}_ptr": "*i64" for name in ("active", "at_low", "new_counts", "counts")}
    signature |= {"flags_ptr": "*i8"}
    signature |= {"acts_ptr": "*fp32", "emb_ptr": "*fp32", "n_neurons": "i32:16", "d_emb": "i32:16"}
    counts = "n_images n_parts n_before rows n_range_parts n_merging n_block n_faults n_scored"
    signature |= dict.fromkeys(counts.split(), "i32")
    tile = {"BLOCK_K": 8, "BLOCK_E": 128, "FAULTS": 64, "COSINE": True}
    merge = {"PARTS": 128, "MERGE_BLOCK_K": 8, "MERGE_ROWS": 256, "BLOCK": 128, "UNROLL": 8, "UNIT_ROWS": 4}
    merge |= {"COSINE": True}
    parts = {"BLOCK_K": 128, "UNROLL": 8, "NORM_ROWS": 4, "NORM_BLOCK_E": 128}
    statuses = {name.upper(): number for number, name in enumerate(STATUSES)}
    return [
        Case(ranges, "range_kernel", target, signature, parts, num_warps=2),
        Case(prepared, "prepared_kernel", target, signature, merge, num_warps=2),
        Case(module, "lower_kernel", target, signature, tile),
        Case(module, "add_kernel", target, signature, tile | statuses | {"PARTS": 64}),
    ]


def test_static_compile_without_spills():
    from saevlm_fast.kernels import dense_prepared_triton, dense_range_triton
    from saevlm_fast.kernels import dense_score_triton as kernels

    ranges = dense_range_triton
    assert (ranges.RANGE_BLOCK_K, ranges.RANGE_UNROLL, ranges.PARTS, ranges.RANGE_WARPS) == (128, 8, 128, 2)
    assert (ranges.MERGE_BLOCK_K, ranges.MERGE_ROWS, dense_prepared_triton.UNIT_ROWS) == (8, 256, 4)
    assert (ranges.NORM_ROWS, ranges.NORM_BLOCK_E) == (4, 128)
    assert dense_prepared_triton.BLOCK_PARTS == 64
    assert (kernels.SUM_BLOCK_K, kernels.SUM_BLOCK_E, kernels.FAULTS, kernels.NUM_WARPS) == (8, 128, 64, 4)
    assert_no_spills([case for target in TARGETS for case in static_cases(target)])


@pytest.mark.gpu
def test_gpu_a_chunk_is_at_most_8_launches(device):
    """With the result, copies and fills counted: five, but cuBLAS may take more than one for a product."""
    from torch.profiler import ProfilerActivity, profile

    acts_NK, emb_NE = (torch.rand(5000, 768, device=device) for _ in range(2))
    score(acts_NK, emb_NE, device=device).result()  # compiles
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        score(acts_NK, emb_NE, device=device).result()
    events = [event for event in profiled.key_averages() if "cuda" in str(event.device_type).lower()]
    counts = {event.key: event.count for event in events}
    assert 0 < sum(counts.values()) <= 8, counts
