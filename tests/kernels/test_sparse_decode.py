"""sparse_decode, matryoshka_decode and gather_dot: values, gradients, Triton launch wrappers, static compile."""

import pytest
import torch
from torch import Tensor

from saevlm_fast.kernels import reference
from saevlm_fast.kernels.grouping import entry_rows
from saevlm_fast.kernels.sparse_decode import (
    gather_dot,
    gather_dot_op,
    group_bag_offsets,
    matryoshka_decode,
    sparse_decode,
    sparse_decode_op,
)
from sparse_codes import assert_near_truth, random_codes
from static_compile import TARGETS, Case, assert_no_spills

LAYOUTS = ["fixed", "csr"]
HALF_AND_SINGLE = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [  # B, k, d_sae, d_in
    (0, 3, 11, 5),
    (1, 1, 2, 1),
    (7, 3, 13, 11),
    (13, 5, 97, 37),
    (5, 64, 67, 19),
    (211, 2, 5, 3),  # every latent fires on dozens of rows
    (4, 0, 5, 3),
]


def decoder(d_sae: int, d_in: int, dtype: torch.dtype, device: str | torch.device = "cpu") -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    W_dec = torch.randn(d_sae, d_in, generator=generator).to(dtype)
    return W_dec.to(device), torch.randn(d_in, generator=generator).to(dtype).to(device)


def group_ends(d_sae: int) -> list[int]:
    return sorted({1, max(1, d_sae // 5), max(1, d_sae // 2), d_sae})


def doubles(*tensors: Tensor) -> list[Tensor]:
    return [tensor.detach().double() for tensor in tensors]


def decode_truth(acts, latents, row_offsets, W_dec, b_dec, ends=None) -> tuple[Tensor, Tensor]:
    """Reference [G, B, D] (or [B, D]) in float64, and the same with absolute terms."""
    acts, W_dec, b_dec = doubles(acts, W_dec, b_dec)
    absolute = acts.abs(), latents, row_offsets, W_dec.abs(), b_dec.abs()
    if ends is None:
        return reference.sparse_decode(acts, latents, row_offsets, W_dec, b_dec), reference.sparse_decode(*absolute)
    truth = reference.matryoshka_decode(acts, latents, row_offsets, W_dec, b_dec, ends)
    return truth, reference.matryoshka_decode(*absolute, ends)


def values_and_gradients(decode, acts, latents, row_offsets, W_dec, b_dec, *ends) -> list[Tensor]:
    leaves = [tensor.clone().requires_grad_() for tensor in (acts, W_dec, b_dec)]
    x_hat = decode(leaves[0], latents, row_offsets, leaves[1], leaves[2], *ends)
    weights = torch.randn(x_hat.shape, generator=torch.Generator().manual_seed(3)).to(x_hat)
    return [x_hat.detach(), *torch.autograd.grad((x_hat * weights).sum(), leaves)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients_in_float64(layout: str, shape: tuple[int, int, int, int]) -> None:
    n_rows, k, d_sae, d_in = shape
    codes = random_codes(n_rows, k, d_sae, layout, torch.float64)
    inputs = *codes, *decoder(d_sae, d_in, torch.float64)
    for out, truth in zip(
        values_and_gradients(sparse_decode, *inputs), values_and_gradients(reference.sparse_decode, *inputs)
    ):
        torch.testing.assert_close(out, truth)
    for out, truth in zip(
        values_and_gradients(matryoshka_decode, *inputs, group_ends(d_sae)),
        values_and_gradients(reference.matryoshka_decode, *inputs, group_ends(d_sae)),
    ):
        torch.testing.assert_close(out, truth)


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_values_and_gather_dot_within_one_rounding(layout: str, dtype: torch.dtype) -> None:
    codes = random_codes(17, 5, 29, layout, dtype)
    _, latents, row_offsets = codes
    W_dec, b_dec = decoder(29, 1031, dtype)
    # The CPU path adds the bias after the sum is rounded: two roundings of a half type, and one more for every group.
    assert_near_truth(sparse_decode(*codes, W_dec, b_dec), *decode_truth(*codes, W_dec, b_dec), roundings=2)
    ends = group_ends(29)
    x_hats = matryoshka_decode(*codes, W_dec, b_dec, ends)
    assert_near_truth(x_hats, *decode_truth(*codes, W_dec, b_dec, ends), roundings=2 * len(ends))
    g = torch.randn(17, 1031).to(dtype)
    dots = gather_dot(g, latents, row_offsets, W_dec)
    g64, W64 = doubles(g, W_dec)
    magnitude = reference.gather_dot(g64.abs(), latents, row_offsets, W64.abs())
    assert_near_truth(dots, reference.gather_dot(g64, latents, row_offsets, W64), magnitude)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradcheck(layout: str) -> None:
    acts, latents, row_offsets = random_codes(5, 3, 11, layout, torch.float64)
    acts = acts.nan_to_num(0.0).requires_grad_()
    W_dec, b_dec = (tensor.requires_grad_() for tensor in decoder(11, 4, torch.float64))
    assert torch.autograd.gradcheck(lambda a, W, b: sparse_decode(a, latents, row_offsets, W, b), (acts, W_dec, b_dec))
    ends = [2, 5, 11]
    assert torch.autograd.gradcheck(
        lambda a, W, b: matryoshka_decode(a, latents, row_offsets, W, b, ends), (acts, W_dec, b_dec)
    )


def test_padding_and_unused_latents_get_zero_gradients() -> None:
    acts, latents, row_offsets = random_codes(9, 3, 50, "csr", torch.float32)
    n_inside = int(row_offsets[-1])
    assert n_inside < len(acts)
    _, d_acts, d_W_dec, _ = values_and_gradients(
        sparse_decode, acts, latents, row_offsets, *decoder(50, 7, torch.float32)
    )
    assert bool((d_acts[n_inside:] == 0).all())
    used = torch.zeros(50, dtype=torch.bool).index_fill(0, latents[:n_inside], True)
    assert bool((d_W_dec[~used] == 0).all())
    assert bool((d_W_dec[used] != 0).any(1).all())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_repeat_is_bit_identical(layout: str) -> None:
    inputs = *random_codes(211, 4, 7, layout, torch.float32), *decoder(7, 33, torch.float32)
    for decode, ends in ((sparse_decode, ()), (matryoshka_decode, ([2, 7],))):
        first = values_and_gradients(decode, *inputs, *ends)
        second = values_and_gradients(decode, *inputs, *ends)
        assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_a_nan_activation_reaches_its_row_only() -> None:
    acts, latents, _ = random_codes(4, 3, 11, "fixed", torch.float32)
    acts[2, 1] = float("nan")
    x_hat = sparse_decode(acts, latents, None, *decoder(11, 5, torch.float32))
    assert x_hat.isnan().any(1).tolist() == [False, False, True, False]


def test_any_strides_of_activations_and_gradients() -> None:
    acts, latents, _ = random_codes(6, 3, 11, "fixed", torch.float64)
    W_dec, b_dec = decoder(11, 5, torch.float64)
    strided_acts, strided_latents = acts.T.contiguous().T, latents.T.contiguous().T
    torch.testing.assert_close(
        sparse_decode(strided_acts, strided_latents, None, W_dec, b_dec),
        reference.sparse_decode(acts, latents, None, W_dec, b_dec),
    )
    leaf = W_dec.clone().requires_grad_()
    sparse_decode(acts, latents, None, leaf, b_dec).sum().backward()  # an expanded gradient, strides 0
    dense = reference.densify(acts, latents, None, 11)
    torch.testing.assert_close(leaf.grad, dense.sum(0)[:, None].expand(11, 5))
    g = torch.randn(5, 6, dtype=torch.float64).T
    torch.testing.assert_close(gather_dot(g, latents, None, W_dec), reference.gather_dot(g, latents, None, W_dec))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((0, 3, 11, 5), torch.float32),
        ((1, 1, 2, 1), torch.float32),
        ((3, 5, 97, 37), torch.float64),
        ((3, 5, 13, 11), torch.bfloat16),
        ((3, 5, 13, 11), torch.float16),
        ((2, 32, 67, 3), torch.float32),
        ((2, 64, 67, 3), torch.float32),  # fixed k above the unrolled limit
        ((2, 3, 7, 1300), torch.float32),  # two tiles of d_in
        ((2, 0, 5, 3), torch.float32),
    ],
    ids=str,
)
@pytest.mark.usefixtures("poison")
def test_triton_equals_reference(device, layout: str, shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    from saevlm_fast.kernels.sparse_decode_triton import launch_gather_dot, launch_sparse_decode

    n_rows, k, d_sae, d_in = shape
    codes = random_codes(n_rows, k, d_sae, layout, dtype, seed=1)
    acts, latents, row_offsets = (None if tensor is None else tensor.to(device) for tensor in codes)
    W_dec, b_dec = decoder(d_sae, d_in, dtype, device)
    ends = group_ends(d_sae)
    bags = group_bag_offsets(latents, row_offsets, ends, d_sae)
    g = torch.randn(n_rows, d_in).to(dtype)

    x_hat = launch_sparse_decode(acts, latents, row_offsets, W_dec, b_dec, 1)
    assert x_hat.shape == (n_rows, 1, d_in)
    host = *codes, W_dec.cpu(), b_dec.cpu()
    assert_near_truth(x_hat[:, 0], *decode_truth(*host))
    x_hats = launch_sparse_decode(acts.flatten(), latents.flatten(), bags, W_dec, b_dec, len(ends))
    assert_near_truth(x_hats.transpose(0, 1), *decode_truth(*host, ends))

    rows = entry_rows(latents, row_offsets)
    dots = launch_gather_dot(g.to(device), rows, latents.flatten(), W_dec)
    g64, W64 = doubles(g, W_dec.cpu())
    truth = reference.gather_dot(g64, codes[1], codes[2], W64).flatten()
    assert_near_truth(dots, truth, reference.gather_dot(g64.abs(), codes[1], codes[2], W64.abs()).flatten())
    assert torch.equal(x_hats, launch_sparse_decode(acts.flatten(), latents.flatten(), bags, W_dec, b_dec, len(ends)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(layout: str) -> None:
    acts, latents, row_offsets = random_codes(11, 3, 17, layout, torch.float32)
    acts = acts.nan_to_num(0.0).requires_grad_()
    W_dec, b_dec = (tensor.requires_grad_() for tensor in decoder(17, 5, torch.float32))
    torch.library.opcheck(sparse_decode_op.overload, (acts, latents, row_offsets, W_dec, b_dec, 1))
    bags = group_bag_offsets(latents, row_offsets, [2, 17], 17)
    flat = acts.flatten().detach().requires_grad_()
    torch.library.opcheck(sparse_decode_op.overload, (flat, latents.flatten(), bags, W_dec, b_dec, 2))
    g, rows = torch.randn(11, 5), entry_rows(latents, row_offsets)
    torch.library.opcheck(gather_dot_op.overload, (g, rows, latents.flatten(), W_dec.detach()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            dict(acts=torch.ones(2, 3, dtype=torch.float64)),
            "acts: dtype torch.float64 differs from W_dec's",
        ),
        (dict(acts=torch.ones(2, 2)), r"acts: shape \(2, 2\), must be latents' \(2, 3\)"),
        (dict(latents=torch.zeros(2, 3, dtype=torch.int32)), "latents: dtype torch.int32"),
        (dict(row_offsets=torch.tensor([0, 3, 6])), r"latents: shape \(2, 3\), must be \[M\]"),
        (dict(W_dec_SD=torch.ones(4, 5).T), "W_dec: shape"),
        (dict(b_dec_D=torch.ones(3)), r"b_dec: shape \(3,\), must be \[D\] = \(4,\)"),
        (dict(group_ends=[]), "group_ends: "),
        (dict(group_ends=[0, 5]), "group_ends: "),
        (dict(group_ends=[3, 3, 5]), "group_ends: "),
        (dict(group_ends=[3, 4]), r"group_ends: \[3, 4\] must ascend strictly from above 0 and end at d_sae 5"),
    ],
)
def test_bad_arguments_are_named(change: dict, message: str) -> None:
    arguments = dict(
        acts=torch.ones(2, 3),
        latents=torch.zeros(2, 3, dtype=torch.int64),
        row_offsets=None,
        W_dec_SD=torch.ones(5, 4),
        b_dec_D=torch.ones(4),
        group_ends=[2, 5],
    )
    with pytest.raises(ValueError, match=message):
        matryoshka_decode(**(arguments | change))


def test_bad_gather_dot_arguments_are_named() -> None:
    latents = torch.tensor([[0, 7]])
    with pytest.raises(ValueError, match=r"latents: 0..7 is outside W's 5 rows"):
        gather_dot(torch.ones(1, 4), latents, None, torch.ones(5, 4))
    with pytest.raises(ValueError, match=r"g: shape \(2, 4\), must be \[B, D\] = \(1, 4\)"):
        gather_dot(torch.ones(2, 4), latents, None, torch.ones(5, 4))
    with pytest.raises(ValueError, match="W: shape"):
        gather_dot(torch.ones(1, 4), latents, None, torch.ones(4, 8).T)


def compile_cases(element: str, targets: tuple[str, ...]) -> list[Case]:
    from saevlm_fast.kernels.segment_sum_triton import BLOCK_P, row_tiling
    from saevlm_fast.kernels.sparse_decode_triton import GATHER_DOT_WARPS, MAX_UNROLLED_K, gather_dot_block_d

    block_d, num_warps = row_tiling(1024)
    tile = {"BLOCK_D": block_d, "ACC": "tl.float32"}
    dot_tile = {"BLOCK_P": BLOCK_P, "BLOCK_D": gather_dot_block_d(1024), "ACC": "tl.float32"}
    common = {"latents_ptr": "*i64", "out_ptr": element, "d_in": "i32:16"}
    decode = common | {"acts_ptr": element, "W_dec_ptr": element, "b_dec_ptr": element}
    bags = decode | {"bag_offsets_ptr": "*i64", "n_groups": "i32"}
    dot = common | {"g_ptr": element, "rows_ptr": "*i64", "W_ptr": element, "n_entries": "i32", "n_rows": "i32"}
    kernels = (
        ("fixed_k_decode_kernel", decode, tile | {"K": MAX_UNROLLED_K}, num_warps),
        ("bag_decode_kernel", bags, tile | {"BLOCK_P": BLOCK_P}, num_warps),
        ("gather_dot_kernel", dot, dot_tile, GATHER_DOT_WARPS),
    )
    module = "saevlm_fast.kernels.sparse_decode_triton"
    return [
        Case(module, function, target, signature, constexprs, warps)
        for target in targets
        for function, signature, constexprs, warps in kernels
    ]


def test_static_compile_without_spills() -> None:
    assert_no_spills(compile_cases("*fp32", TARGETS) + compile_cases("*bf16", ("sm_90",)))


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gpu_at_the_real_shape(device, dtype: torch.dtype, layout: str) -> None:
    n_rows, k, d_sae, d_in = 4096, 20, 65536, 1024
    codes = [None if t is None else t.to(device) for t in random_codes(n_rows, k, d_sae, layout, dtype)]
    W_dec, b_dec = decoder(d_sae, d_in, dtype, device)
    ends = [4096, 12288, 28672, 65536]
    torch.cuda.set_sync_debug_mode("error")
    try:
        leaves = [tensor.clone().requires_grad_() for tensor in (codes[0], W_dec, b_dec)]
        x_hats = matryoshka_decode(leaves[0], *codes[1:], *leaves[1:], ends)
        x_hat = sparse_decode(leaves[0], *codes[1:], *leaves[1:])
        gradients = torch.autograd.grad(x_hat.sum(), leaves)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_near_truth(x_hat.detach(), *decode_truth(*codes, W_dec, b_dec))
    assert_near_truth(x_hats[-1].detach(), *decode_truth(*codes, W_dec, b_dec))
    ones = torch.ones(n_rows, d_in, dtype=torch.float64, device=device)
    W64 = W_dec.double()
    dots = reference.gather_dot(ones, *codes[1:], W64)
    assert_near_truth(gradients[0], dots, reference.gather_dot(ones, *codes[1:], W64.abs()))
    fired = reference.densify(codes[0].double(), *codes[1:], d_sae).sum(0)[:, None].expand(d_sae, d_in)
    assert_near_truth(gradients[1], fired, fired)


@pytest.mark.gpu
def test_gpu_offsets_beyond_32_bits(device) -> None:
    d_sae, d_in = 2**21 + 8, 1024
    W_dec = torch.zeros(d_sae, d_in, dtype=torch.bfloat16, device=device)
    W_dec[-1] = 1.0
    acts = torch.ones(3, 2, dtype=torch.bfloat16, device=device)
    latents = torch.tensor([0, d_sae - 1], device=device).repeat(3, 1)
    b_dec = torch.zeros(d_in, dtype=torch.bfloat16, device=device)
    assert bool((sparse_decode(acts, latents, None, W_dec, b_dec) == 1).all())
    assert gather_dot(torch.ones_like(W_dec[:3]), latents, None, W_dec).tolist() == [[0.0, 1024.0]] * 3


def test_gather_dot_takes_a_single_row() -> None:
    """The row numbers of one row are an expanded view."""
    g, W = torch.randn(1, 7), torch.randn(9, 7)
    latents = torch.tensor([[1, 4, 8]])
    torch.testing.assert_close(gather_dot(g, latents, None, W), reference.gather_dot(g, latents, None, W))
