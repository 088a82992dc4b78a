"""Streamed pair sums of inner-product similarities: CPU path and Triton kernels against the pair-by-pair definition."""

import pytest
import torch

from saevlm_fast.kernels import reference, streamed_cosine
from saevlm_fast.kernels.pairwise_similarity import prepare_embeddings
from saevlm_fast.kernels.streamed_cosine import StreamedState, streamed_cosine_state, streamed_cosine_update
from sparse_codes import group_by_latent
from static_compile import TARGETS, Case, assert_no_spills

SHAPES = [(1, 1, 1), (2, 3, 5), (71, 13, 17), (40, 5, 33)]


def make_data(n_images: int, n_latents: int, d_emb: int, seed: int = 0):
    """Non-negative activations; where there is room, two-image latents 1 : 1e6 both ways, dominated and full ones."""
    generator = torch.Generator().manual_seed(seed)
    r_NK = torch.rand(n_images, n_latents, generator=generator, dtype=torch.float64)
    r_NK *= torch.rand(n_images, n_latents, generator=generator) < 0.3
    if n_latents > 4:
        r_NK[:, :3] = 0
        r_NK[3, 0], r_NK[20, 0] = 1.0, 1e-6
        r_NK[3, 1], r_NK[4, 1] = 1e-6, 1.0
        r_NK[7, 2] = 2.0
        r_NK[:, 3] = torch.rand(n_images, generator=generator)
        r_NK[9, 4] = 1e6
    return r_NK, torch.randn(n_images, d_emb, generator=generator, dtype=torch.float64)


def assert_state(state: StreamedState, r_NK, emb_NE, similarity: str) -> None:
    """Against pairs: num to 1e-13 of what the pairs weigh, everything else to 1e-13 of itself."""
    vectors_NE = prepare_embeddings(emb_NE, similarity, torch.float64)[0]
    num, den = reference.pairwise_sums(r_NK, emb_NE, similarity)
    weight = reference.pairwise_sums(r_NK * vectors_NE.norm(dim=1, keepdim=True), emb_NE, similarity)[1]
    assert ((state.num_S - num).abs() <= 1e-13 * weight).all()
    torch.testing.assert_close(state.den_S, den, rtol=1e-13, atol=0)
    torch.testing.assert_close(state.sums_SE, r_NK.T @ vectors_NE, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(state.total_S, r_NK.sum(0), rtol=1e-13, atol=0)


def update_on_cpu(state, codes, emb_NE, scale_N, half=-1):
    streamed_cosine_update(state, *codes, emb_NE, scale_N, half)


def update_by_kernels(state, codes, emb_NE, scale_N, half=-1):
    """Small pieces and blocks, so that these shapes meet heavy latents, many column blocks and their remainders."""
    from saevlm_fast.kernels.streamed_cosine_triton import launch_streamed_update

    launch_streamed_update(*state, *codes, emb_NE, scale_N, half, heavy=8, block_e=16)


@pytest.mark.parametrize("update", [update_on_cpu, update_by_kernels])
@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_chunks_against_reference(shape, similarity, update, device, monkeypatch):
    monkeypatch.setattr(streamed_cosine, "_CPU_PANEL_ELEMENTS", 5 * shape[2])
    monkeypatch.setattr(streamed_cosine, "_CPU_FOLD_ELEMENTS", 60 * shape[2])
    where = device if update is update_by_kernels else torch.device("cpu")
    r_NK, emb_NE = (t.to(where) for t in make_data(*shape))
    scale_N = emb_NE.norm(dim=1).reciprocal() if similarity == "cosine" else torch.ones_like(emb_NE[:, 0])
    state = streamed_cosine_state(shape[1], shape[2], where)
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch.empty comes filled with NaN
    try:
        for rows in (slice(0, 1), slice(1, 1), slice(1, 28), slice(28, None)):
            if len(r_NK[rows]) > 0:
                update(state, group_by_latent(r_NK[rows]), emb_NE[rows], scale_N[rows])
    finally:
        torch.use_deterministic_algorithms(False)
    assert_state(state, r_NK, emb_NE, similarity)


@pytest.mark.parametrize("update", [update_on_cpu, update_by_kernels])
def test_halves_against_reference(update, device):
    where = device if update is update_by_kernels else torch.device("cpu")
    r_NK, emb_NE = (t.to(where) for t in make_data(*SHAPES[-1]))
    scale_N = emb_NE.norm(dim=1).reciprocal()
    for half in (0, 1):
        state = streamed_cosine_state(*SHAPES[-1][1:], where)
        update(state, group_by_latent(r_NK), emb_NE, scale_N, half)
        assert_state(state, r_NK[half::2], emb_NE[half::2], "cosine")


def test_dot_dominated_by_an_embedding():
    """Even activations, but one embedding 1e6 times longer: the closed form would lose the pairs of the others."""
    emb_NE = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    emb_NE[0] *= 1e-9
    emb_NE[1] *= 1e-9
    emb_NE[2] *= 1e6
    r_NK = torch.ones(3, 1, dtype=torch.float64)
    state = streamed_cosine_state(1, 4)
    streamed_cosine_update(state, *group_by_latent(r_NK), emb_NE)
    assert_state(state, r_NK, emb_NE, "dot")


def test_dot_dominated_by_an_activation_of_a_short_embedding():
    """The other way round: the closed form would keep num and lose the pairs of den."""
    emb_NE = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    emb_NE[0] *= 1e-12
    r_NK = torch.tensor([[1e12], [1.0], [1.0]], dtype=torch.float64)
    state = streamed_cosine_state(1, 4)
    streamed_cosine_update(state, *group_by_latent(r_NK), emb_NE)
    assert_state(state, r_NK, emb_NE, "dot")


def test_float32_codes_and_padding():
    r_NK, emb_NE = make_data(30, 6, 8)
    r_NK = r_NK.float()
    acts_M, images_M, offsets_S1 = group_by_latent(r_NK)
    padded = torch.nn.functional.pad(acts_M, (0, 5), value=3.0), torch.nn.functional.pad(images_M, (0, 5)), offsets_S1
    unit_NE = prepare_embeddings(emb_NE, "cosine", torch.float64)[0]
    state = streamed_cosine_state(6, 8)
    streamed_cosine_update(state, *padded, unit_NE)
    assert_state(state, r_NK.double(), emb_NE, "cosine")


def test_kernels_repeat_bit_for_bit(device):
    from saevlm_fast.kernels.streamed_cosine_triton import launch_streamed_update

    r_NK, emb_NE = (t.to(device) for t in make_data(60, 6, 20))
    states = [streamed_cosine_state(6, 20, device) for _ in range(2)]
    for state in states:
        launch_streamed_update(*state, *group_by_latent(r_NK), emb_NE.float(), torch.ones_like(emb_NE[:, 0]), heavy=8)
    for first, second in zip(*states):
        assert torch.equal(first, second)


@pytest.mark.parametrize(("n_images", "n_latents"), [(0, 3), (4, 0), (4, 3)])
def test_nothing_fires(n_images, n_latents, device):
    from saevlm_fast.kernels.streamed_cosine_triton import launch_streamed_update

    codes = group_by_latent(torch.zeros(n_images, n_latents))
    state = streamed_cosine_state(n_latents, 5)
    streamed_cosine_update(state, *codes, torch.ones(n_images, 5))
    assert all((tensor == 0).all() for tensor in state)
    state = streamed_cosine_state(n_latents, 5, device)
    ones = torch.ones(n_images, 5, device=device), torch.ones(n_images, device=device, dtype=torch.float64)
    launch_streamed_update(*state, *(t.to(device) for t in codes), *ones)
    assert all((tensor == 0).all() for tensor in state)


def test_opcheck():
    r_NK, emb_NE = make_data(25, 6, 4)
    arguments = (*streamed_cosine_state(6, 4), *group_by_latent(r_NK), emb_NE, None, -1)
    torch.library.opcheck(torch.ops.saevlm_fast.streamed_cosine_update.default, arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images_M": torch.zeros(3, dtype=torch.int64)}, r"images_M: shapes \(2,\) and \(3,\)"),
        ({"offsets_S1": torch.tensor([0, 2])}, r"offsets_S1: shape \(2,\) is not \[3\]"),
        ({"emb_NE": torch.ones(4, 6)}, r"emb_NE: shape \(4, 6\) is not \[N, 5\]"),
        ({"scale_N": torch.ones(4)}, r"scale_N: must be float64 \[4\]"),
    ],
)
def test_errors(change, message):
    arguments = {
        "acts_M": torch.ones(2),
        "images_M": torch.zeros(2, dtype=torch.int64),
        "offsets_S1": torch.tensor([0, 1, 2]),
        "emb_NE": torch.ones(4, 5),
    }
    with pytest.raises(ValueError, match=message):
        streamed_cosine_update(streamed_cosine_state(2, 5), **(arguments | change))


def static_cases(target: str) -> list[Case]:
    module = "saevlm_fast.kernels.streamed_cosine_triton"
    doubles = ("sums", "den", "total", "num_parts", "piece_sums", "piece_den", "piece_total", "piece_num_parts")
    longs = ("images", "offsets", "piece_latents", "piece_offsets")
    signature = {f"{name}_ptr": "*fp64" for name in (*doubles, "acts", "scale")} | {f"{n}_ptr": "*i64" for n in longs}
    signature |= {"emb_ptr": "*fp32", "n_latents": "i32:16", "n_pieces": "i32", "d_emb": "i32:16"}
    update = {"HEAVY": 256, "BLOCK_E": 256, "UNROLL": 4}
    signature |= {"half": "i32"}
    return [
        *(
            Case(module, "streamed_update_kernel", target, signature, update | {"HALVED": halved}, num_warps=2)
            for halved in (False, True)
        ),
        Case(module, "merge_pieces_kernel", target, signature, {"BLOCK_E": 256}, num_warps=2),
    ]


def test_static_compile_without_spills():
    from saevlm_fast.kernels import streamed_cosine_triton as kernels

    assert (kernels.HEAVY, kernels.BLOCK_E, kernels.UNROLL, kernels.NUM_WARPS) == (256, 256, 4, 2)
    assert_no_spills([case for target in TARGETS for case in static_cases(target)])


@pytest.mark.gpu
@pytest.mark.parametrize("d_emb", [512, 768])
def test_gpu_real_shapes(d_emb):
    """20,000 images, 16,384 latents, k = 20, and one latent that fires on every image; two chunks."""
    generator = torch.Generator().manual_seed(0)
    unit_NE = torch.nn.functional.normalize(torch.randn(20000, d_emb, generator=generator, dtype=torch.float64))
    latents_Nk = torch.randint(1, 16384, (20000, 20), generator=generator)
    acts_Nk = torch.rand(20000, 20, generator=generator) + 0.01
    states = [streamed_cosine_state(16384, d_emb), streamed_cosine_state(16384, d_emb, "cuda")]
    for rows in (slice(0, 12000), slice(12000, None)):
        latents_M, acts_M = latents_Nk[rows].clone(), acts_Nk[rows].flatten()
        latents_M[:, 0] = 0
        latents_M, order_M = latents_M.flatten().sort(stable=True)
        offsets_S1 = torch.nn.functional.pad(torch.bincount(latents_M, minlength=16384).cumsum(0), (1, 0))
        chunk = (acts_M[order_M], order_M // 20, offsets_S1, unit_NE[rows])
        streamed_cosine_update(states[0], *chunk)
        streamed_cosine_update(states[1], *(t.cuda() for t in chunk))
    for cpu, cuda in zip(*states):
        torch.testing.assert_close(cuda.cpu(), cpu, rtol=1e-11, atol=1e-11)
