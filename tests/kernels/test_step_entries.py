"""Entries in latent order and the chunks of heavy latents, against plain torch; and compiled."""

import pytest
import torch

from plain_step import make_case, plain_step
from saevlm_fast.kernels import reference
from sparse_codes import random_codes
from static_compile import TARGETS, Case, assert_no_spills
from test_gradient_norm import totals_of


@pytest.mark.parametrize("layout", ["fixed", "csr"])
@pytest.mark.parametrize("d_sae", [3, 300, 1 << 16, (1 << 16) + 1])
def test_entries_are_in_latent_order_and_rows_ascend(device, layout: str, d_sae: int, monkeypatch) -> None:
    """Around the limit of 16-bit keys; padding, which is at latent 0 in the codes, lies behind the last latent's."""
    from saevlm_fast.kernels import step_entries_triton
    from saevlm_fast.kernels.step_entries_triton import launch_order

    if d_sae > 300:  # few programs: the interpreter takes them one by one
        monkeypatch.setattr(step_entries_triton, "BLOCK_S", 1 << 14)
    _, latents, row_offsets = random_codes(40, 3, d_sae, layout, torch.float32)
    latents.view(-1)[2] = d_sae - 1
    n_inside = latents.numel() if row_offsets is None else int(row_offsets[-1])
    assert layout == "fixed" or n_inside < latents.numel()
    inside = latents.flatten()[:n_inside]
    order = launch_order(latents.to(device), None if row_offsets is None else row_offsets.to(device), d_sae)
    assert torch.equal(order.order_M.cpu()[:n_inside], inside.argsort(stable=True))
    assert torch.equal(order.order_M.cpu().sort().values, torch.arange(latents.numel()))
    expected = torch.searchsorted(inside.sort().values, torch.arange(d_sae + 1))
    assert torch.equal(order.offsets_S1.cpu().long(), expected)


def test_no_entries(device) -> None:
    from saevlm_fast.kernels.step_entries_triton import launch_order

    offsets = torch.zeros(4, dtype=torch.int64, device=device)
    order = launch_order(torch.zeros(6, dtype=torch.int64, device=device), offsets, 5)
    assert order.offsets_S1.tolist() == [0] * 6


@pytest.mark.parametrize("ends", [None, [2, 5, 11]], ids=["flat", "prefixes"])
@pytest.mark.parametrize("n_rows", [9, 33, 70])
@pytest.mark.usefixtures("poison")
def test_chunks_of_heavy_latents(device, n_rows: int, ends) -> None:
    """Latent 0 fires in nearly every row: no whole chunk, one, several."""
    from saevlm_fast.kernels.segment_sum_triton import CHUNK

    case = make_case(n_rows, 2, 11, 6, "csr", ends)
    _, entries, _ = totals_of(case.on(device, torch.float64), torch.zeros(11, dtype=torch.int64, device=device))
    acts, latents, rows, groups = case.flat()
    truth, by_latent, n_groups = plain_step(case), latents.argsort(stable=True), len(case.ends)
    n = len(acts)
    assert torch.equal(entries.acts_M.cpu()[:n], acts[by_latent])
    torch.testing.assert_close(entries.dacts_M.cpu()[:n], truth.dacts_M[by_latent])
    bags = rows * n_groups + groups
    assert torch.equal(entries.bags_M.cpu()[:n].long(), bags[by_latent])
    assert torch.equal(entries.rows_M.cpu()[:n].long(), rows[by_latent])
    suffix, centred = truth.suffix_BGD.flatten(0, 1), case.x_BD - case.b_dec_D
    starts = entries.offsets_S1.cpu()
    n_whole = 0
    for chunk in range(n // CHUNK):
        taken = by_latent[chunk * CHUNK : (chunk + 1) * CHUNK]
        if len(latents[taken].unique()) > 1:
            continue
        n_whole += 1
        dec = (acts[taken, None] * suffix[bags[taken]]).sum(0)
        enc = (truth.dacts_M[taken, None] * centred[rows[taken]]).sum(0)
        torch.testing.assert_close(entries.partials[:, chunk].cpu(), torch.stack([dec, enc]))
    assert n_whole == int(starts[1]) // CHUNK


def compile_cases(d_in: int, targets: tuple[str, ...]) -> list[Case]:
    from saevlm_fast.kernels.segment_sum_triton import CHUNK
    from saevlm_fast.kernels.step_entries_triton import BLOCK_M, BLOCK_P, BLOCK_Q, BLOCK_S, CHUNK_STEP
    from saevlm_fast.kernels.step_rows_triton import whole_row_block

    module = "saevlm_fast.kernels.step_entries_triton"
    fp32, i64, i32 = "*fp32", "*i64", "*i32"
    numbers = dict.fromkeys("n_rows n_entries n_latents n_counts n_groups n_chunks".split(), "i32")
    pointers = {"latents_ptr": i64, "row_offsets_ptr": i64, "order_ptr": i64}
    pointers |= {f"{name}_ptr": i32 for name in "counts block_counts offsets places scattered of_places".split()}
    entries = {"acts_ptr": fp32, "dacts_ptr": fp32, "bags_ptr": i32}
    sources = {"suffix_ptr": fp32, "centred_ptr": fp32, "partials_ptr": fp32, "d_in": "i32:16"}
    signature = numbers | pointers | entries | sources
    block_d, num_warps = whole_row_block(d_in, 8)
    tile = {"PREFIXES": True, "CHUNK": CHUNK, "BLOCK_P": CHUNK_STEP, "BLOCK_D": block_d, "ACC": "tl.float32"}
    kernels = (
        ("zero_kernel", {"BLOCK_M": BLOCK_M}, 4),
        ("count_kernel", {"CSR": True, "BLOCK_M": BLOCK_M, "BLOCK_S": BLOCK_S}, 4),
        ("offset_kernel", {"BLOCK_S": BLOCK_S}, 4),
        ("scatter_kernel", {"CSR": True, "BLOCK_M": BLOCK_M}, 4),
        ("rank_kernel", {"BLOCK_P": BLOCK_P, "BLOCK_Q": BLOCK_Q}, 4),
        ("chunk_kernel", tile, num_warps),
    )
    return [Case(module, name, target, signature, *kernel) for target in targets for name, *kernel in kernels]


def test_static_compile_without_spills() -> None:
    from saevlm_fast.kernels.step_rows_triton import MAX_WIDTH

    assert_no_spills(compile_cases(1024, TARGETS) + compile_cases(MAX_WIDTH, ("sm_90",))[-1:])


def test_the_reference_agrees_with_the_plain_step() -> None:
    """Two definitions of one gradient, one by segments and one by entries."""
    case = make_case(20, 3, 7, 5, "csr")
    acts, latents, rows, _ = case.flat()
    order = latents.argsort(stable=True)
    offsets = torch.searchsorted(latents[order], torch.arange(8))
    truth = plain_step(case)
    g = reference.latent_gradient(acts[order], rows[order], offsets, truth.suffix_BGD[:, 0], case.W_dec_SD)
    torch.testing.assert_close(g, truth.gradients["W_dec"])
