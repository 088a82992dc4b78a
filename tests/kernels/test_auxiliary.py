"""The auxiliary loss in a GPU's kernels, against its definition in float64; the choice of latents; the list of them."""

import pytest
import torch
from launches import counted_launches

from saevlm_fast.config import SAEConfig
from saevlm_fast.kernels.latent_gradient import latent_slots
from saevlm_fast.sae import SparseAutoencoder
from saevlm_fast.training.dead_latents import DeadLatents, auxiliary
from static_compile import TARGETS, Case, assert_no_spills

PRODUCTS, ROWS, LIST = (f"saevlm_fast.kernels.dead_{name}_triton" for name in ("latents", "rows", "list"))


def made(n_rows: int, d_in: int, d_sae: int, n_dead: int) -> tuple[SparseAutoencoder, torch.Tensor, ...]:
    """An SAE with biases, rows of very different norms, their reconstruction, dead latents."""
    generator = torch.Generator().manual_seed(n_rows)
    sae = SparseAutoencoder(SAEConfig.sized(d_in, d_sae=d_sae, k=3, architecture="topk"))
    sae.reset_parameters(0)
    with torch.no_grad():
        for bias in (sae.b_enc, sae.b_dec):
            bias.copy_(0.1 * torch.randn(bias.shape, generator=generator))
    x, x_hat = torch.randn(2, n_rows, d_in, generator=generator)
    scale = torch.logspace(-3, 1, n_rows)[:, None]
    return sae, x * scale / d_in**0.5, 0.3 * x_hat, torch.randperm(d_sae, generator=generator)[:n_dead].sort().values


def weights(sae: SparseAutoencoder):
    from saevlm_fast.kernels.auxiliary_triton import Weights

    return Weights(sae.W_enc.detach().T, sae.b_enc.detach(), sae.W_dec.detach(), sae.b_dec.detach())


@pytest.mark.parametrize(
    ("shape", "n_listed", "small", "frozen"),
    [
        ((61, 24, 97, 40), 50, False, None),
        ((70, 24, 97, 33), 33, True, "W_enc"),
        ((40, 24, 97, 9), 13, False, "W_dec"),
        ((9, 24, 97, 0), 5, True, None),
    ],
    ids=["more than take part", "wide rows in blocks", "all take part", "none"],
)
def test_loss_and_gradients_are_those_of_float64(device, monkeypatch, shape, n_listed, small, frozen) -> None:
    from saevlm_fast.kernels import auxiliary_triton

    sae, x, x_hat, latents = made(*shape)
    exact, d_sae = SparseAutoencoder(sae.config).double(), shape[2]
    exact.load_state_dict({name: value.double() for name, value in sae.state_dict().items()})
    expected = auxiliary(exact, x.double(), x_hat.double(), DeadLatents(latents, shape[3]), 0.5, frozen)
    if small:
        monkeypatch.setattr(auxiliary_triton, "MOST_IN_REGISTERS", 20)
        monkeypatch.setattr(auxiliary_triton, "MOST_ELEMENTS", n_listed * 37)
    listed = torch.nn.functional.pad(latents, (0, n_listed - len(latents)), value=d_sae).to(device)
    number = torch.tensor(shape[3], device=device)
    given = x.to(device), x_hat.to(device), listed, number, 0.5, frozen
    found = auxiliary_triton.launch_auxiliary(weights(sae.to(device)), *given)
    loss, squares = found.numbers.tolist()
    if expected is None:
        assert loss == squares == 0
        assert not any(bool(rows_AD.any()) for rows_AD, _ in found.rows.values())
        return
    assert loss == pytest.approx(float(expected.loss), rel=1e-6)
    whole = expected.b_enc_A.square().sum()
    close(found.b_enc_A, expected.b_enc_A)
    for name, truth in zip(("W_enc", "W_dec"), expected[1:3]):
        assert (name not in found.rows) == (truth is None) == (name == frozen)
        if truth is not None:
            rows_AD, squared_norm = found.rows[name]
            close(rows_AD, truth.rows_AD)
            assert float(squared_norm) == pytest.approx(float(truth.squared_norm), rel=1e-5)
            whole = whole + truth.squared_norm
    assert squares == pytest.approx(float(whole), rel=1e-5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="launches are counted in the interpreter")
def test_the_loss_is_so_many_launches(monkeypatch) -> None:
    """Of one block of rows; what it counts in is not zero before."""
    from saevlm_fast.kernels.auxiliary_triton import launch_auxiliary
    from saevlm_fast.kernels.dead_list_triton import launch_dead_list
    from saevlm_fast.kernels.dead_rows_triton import launch_biases

    sae, x, x_hat, _ = made(9, 24, 97, 5)
    idle, db_enc, empty = torch.arange(97), torch.zeros(97), torch.empty

    def used(*shape, **more):
        made = empty(*shape, **more)
        made.view(torch.uint8 if made.ndim else made.dtype).numpy().fill(5)  # which no count sees
        return made

    expected = auxiliary(sae, x, x_hat, DeadLatents(torch.arange(92, 97), 5), 0.5)
    monkeypatch.setattr(torch, "empty", used)
    with counted_launches() as counts, torch.no_grad():
        latents, number, _ = launch_dead_list(idle, 92, 8)
        found = launch_auxiliary(weights(sae), x, x_hat, latents, number, 0.5)
        launch_biases(latents, found.b_enc_A, sae.W_enc.T, db_enc)
    assert sum(counts.values()) == 16, counts
    assert counts["zeros"] == counts["fill_"] == 0
    assert float(found.numbers[0]) == pytest.approx(float(expected.loss), rel=1e-5)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """To 1e-6 of the largest; what belongs to padding is 0."""
    n = len(expected)
    assert not bool(found[n:].any())
    assert float((found[:n].cpu().double() - expected).abs().max()) < 1e-6 * float(expected.abs().max())


def test_a_constant_residual_gives_no_loss(device) -> None:
    from saevlm_fast.kernels.auxiliary_triton import launch_auxiliary

    sae, x, _, latents = made(7, 24, 97, 9)
    x = (64 * x).round() / 64
    number = torch.tensor(9, device=device)
    found = launch_auxiliary(
        weights(sae.to(device)), x.to(device), (x - x[:1]).to(device), latents.to(device), number, 0.5
    )
    assert found.numbers.tolist() == [0, 0]


def test_a_residual_that_float32_cannot_square_gives_no_loss_and_finite_gradients(device) -> None:
    from saevlm_fast.kernels.auxiliary_triton import launch_auxiliary

    sae, x, x_hat, latents = made(7, 24, 97, 9)
    number = torch.tensor(9, device=device)
    given = (1e-25 * x).to(device), (1e-25 * x_hat).to(device), latents.to(device), number, 0.5
    found = launch_auxiliary(weights(sae.to(device)), *given)
    assert found.numbers.tolist() == [0, 0]
    assert not any(bool(rows_AD.any()) for rows_AD, _ in found.rows.values())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_a_bad_row_is_told_by_the_loss(device, bad: float) -> None:
    from saevlm_fast.kernels.auxiliary_triton import launch_auxiliary

    sae, x, x_hat, latents = made(40, 24, 97, 9)
    x[7, 3] = bad
    number = torch.tensor(9, device=device)
    given = x.to(device), x_hat.to(device), latents.to(device), number, 0.5
    assert not bool(launch_auxiliary(weights(sae.to(device)), *given).numbers[0].isfinite())


@pytest.mark.parametrize("kernel", ["keep_kernel", "keep_wide_kernel"])
def test_the_largest_are_kept_and_of_equals_the_lowest(device, kernel: str) -> None:
    """Ties at the threshold, fewer than k that are positive, zeros, a tiny value beside a large one, tiny ones."""
    from saevlm_fast.kernels import dead_rows_triton

    generator = torch.Generator().manual_seed(5)
    acts = torch.randint(-4, 6, (12, 75), generator=generator).clamp(min=0).float()
    acts[1] = 0
    acts[2, 20:] = 0
    acts[3] = torch.rand(75, generator=generator)
    acts[4, :9], acts[4, 9:] = 1e6, 0
    acts[4, 70] = 1e-6
    acts[5] *= 2.0**-122  # scales end there
    k = 16
    order = torch.sort(acts, dim=1, descending=True, stable=True).indices[:, :k]
    expected = torch.zeros_like(acts).scatter_(1, order, acts.gather(1, order))
    split, inverse = torch.full((12, 150), 7.0, dtype=torch.float16, device=device), torch.empty(12, device=device)
    block = 128 if kernel == "keep_kernel" else 32
    getattr(dead_rows_triton, kernel)[(12,)](acts.to(device), split.view(torch.float32), inverse, 75, k, BLOCK=block)
    hi, lo = split.cpu().float().split(75, dim=1)
    found = (hi + lo) * inverse.cpu()[:, None]
    assert torch.equal(hi > 0, expected > 0)
    torch.testing.assert_close(found, expected, rtol=2**-19, atol=1e-2)  # the interpreter cuts, a GPU rounds
    torch.testing.assert_close(found[3], expected[3], rtol=2**-19, atol=0)
    assert torch.equal(found[5], expected[5])


@pytest.mark.parametrize(("d_sae", "share", "spare"), [(3000, 0.1, 300), (97, 0.0, 5), (97, 1.0, 0), (1024, 0.5, 1)])
def test_the_list_of_dead_latents(device, d_sae: int, share: float, spare: int) -> None:
    from saevlm_fast.kernels.dead_list_triton import launch_dead_list

    generator = torch.Generator().manual_seed(d_sae)
    dead = torch.rand(d_sae, generator=generator) < share
    idle = torch.where(dead, 10**10, torch.randint(0, 10**9, (d_sae,), generator=generator))
    number = int(dead.sum())
    latents, n_dead, slots = launch_dead_list(idle.to(device), 10**9, number + spare)
    expected = torch.nn.functional.pad(dead.nonzero().squeeze(1), (0, spare), value=d_sae)
    assert torch.equal(latents.cpu(), expected)
    assert int(n_dead) == number
    assert torch.equal(slots.cpu(), latent_slots(expected, d_sae))


@pytest.mark.parametrize("n_dead", [0, 3, 300])
def test_biases_of_dead_latents_are_added(device, n_dead: int) -> None:
    from saevlm_fast.kernels.dead_rows_triton import launch_biases

    generator = torch.Generator().manual_seed(n_dead)
    W_enc, db_enc = torch.randn(400, 10, generator=generator), torch.randn(400, generator=generator).double()
    dead, b_enc = torch.randperm(400, generator=generator)[:n_dead].sort().values, torch.randn(310, generator=generator)
    listed = torch.nn.functional.pad(dead, (0, 310 - n_dead), value=400)
    b_enc[n_dead:] = 0
    expected = db_enc.index_add(0, dead, b_enc[:n_dead].double())
    moved = db_enc.to(device)
    found = launch_biases(listed.to(device), b_enc.to(device), W_enc.to(device), moved)
    assert torch.equal(moved.cpu(), expected)
    torch.testing.assert_close(found.cpu(), b_enc[:n_dead] @ W_enc[dead], rtol=1e-5, atol=1e-5)


# --- compiled --------------------------------------------------------------------------------------------------------

HALVES, FLOATS, DOUBLES, INTS, LONGS, SIZE = "*fp16", "*fp32", "*fp64", "*i32", "*i64", "i32:16"
SIZES = {"n_rows": SIZE, "n_dead": SIZE, "d_in": SIZE}


def named(kind: str, names: str) -> dict[str, str]:
    return {f"{name}_ptr": kind for name in names.split()}


def product_cases(target: str) -> list[Case]:
    from saevlm_fast.kernels.auxiliary_triton import dacts_config, tile_config

    tile = tile_config({"sm_80": (8, 0), "sm_90": (9, 0), "gfx942": (0, 0)}[target])
    launch = {name: tile.pop(name) for name in ("num_warps", "num_stages")}
    dec, inverse = named(HALVES, "w_hi w_lo"), named(FLOATS, "inverse")
    acts = named(HALVES, "c_hi c_lo w_hi w_lo") | named(FLOATS, "c_inverse w_inverse bias acts") | SIZES
    error = named(FLOATS, "acts x x_hat error") | dec | inverse | named(INTS, "largest") | {"stride_x": SIZE} | SIZES
    dacts = named(HALVES, "e_hi e_lo") | dec | inverse | named(FLOATS, "c_inverse acts sums") | named(INTS, "largest")
    gradient = named(FLOATS, "acts parts") | named(HALVES, "r_hi r_lo") | named(INTS, "largest") | SIZES
    gradient |= {"size": SIZE, "add": "i32"}
    return [
        Case(PRODUCTS, "acts_kernel", target, acts, tile, **launch),
        Case(PRODUCTS, "error_kernel", target, error, tile, **launch),
        Case(PRODUCTS, "dacts_kernel", target, dacts | SIZES, dacts_config(tile), **launch),
        Case(PRODUCTS, "gradient_kernel", target, gradient, tile | {"TOP": 9}, **launch),
    ]


def row_cases(target: str) -> list[Case]:
    from saevlm_fast.kernels.auxiliary_triton import keep_config, row_launch

    row, keep = row_launch(1024), dict.fromkeys(("n_dead", "k"), SIZE) | named(FLOATS, "acts split inverse")
    warps, blocks = row.pop("num_warps"), row
    rows = named(FLOATS, "x x_hat b_dec inverse") | named(HALVES, "hi lo") | named(DOUBLES, "sums squares")
    rows |= named(INTS, "zeros") | {"stride_x": SIZE, "n_rows": "i32", "d_in": SIZE, "n_zeros": "i32"}
    latents = named(LONGS, "latents") | named(FLOATS, "W_enc b_enc W_dec enc_inverse bias")
    latents |= named(HALVES, "enc_hi enc_lo dec_hi dec_lo") | {"d_sae": SIZE, "d_in": SIZE}
    error = named(FLOATS, "error inverse c_inverse squares") | named(HALVES, "hi lo") | named(INTS, "largest")
    scalars = named(DOUBLES, "sums squares parts scalars") | named(LONGS, "number") | named(INTS, "counter")
    scalars |= {"n_sums": "i32", "n_rows": "i32", "d_in": SIZE, "alpha": "fp32"}
    finish = named(FLOATS, "parts W_dec sums rows squares b_enc") | named(DOUBLES, "scalars") | named(LONGS, "latents")
    finish |= {"n_parts": "i32", "n_tiles": "i32", "n_dead": SIZE, "d_sae": SIZE, "d_in": SIZE}
    numbers = named(FLOATS, "row_squares squares b_enc numbers") | named(DOUBLES, "scalars")
    listed = named(LONGS, "idle latents number") | named(INTS, "counts slots") | {"d_sae": SIZE, "dead_after": "i32"}
    biases = named(FLOATS, "b_enc W_enc parts") | named(LONGS, "latents") | named(DOUBLES, "db_enc")
    biases |= {"n_dead": SIZE, "d_sae": SIZE, "d_in": SIZE, "size": "i32"}
    cases = [
        Case(ROWS, "biases_kernel", target, biases, blocks | {"ROWS": 4}, num_warps=warps),
        Case(ROWS, "rows_kernel", target, rows, blocks | {"ROWS": 8}, num_warps=warps),
        Case(ROWS, "latents_kernel", target, latents, blocks, num_warps=warps),
        Case(ROWS, "error_rows_kernel", target, error | {"d_in": SIZE}, blocks, num_warps=warps),
        Case(ROWS, "scalars_kernel", target, scalars, {"BLOCK_P": 128, "BLOCK_D": 32, "PROGRAMS": 32}, 8),
        Case(ROWS, "finish_kernel", target, finish, blocks | {"DECODER": 0, "TILES": 32}, num_warps=warps),
        Case(
            ROWS,
            "numbers_kernel",
            target,
            numbers | {"n_rows": "i32", "n_dead": SIZE},
            {"SIDES": 2, "BLOCK": 2048},
            8,
        ),
        Case(LIST, "count_kernel", target, listed, {"BLOCK": 1024}),
        Case(LIST, "place_kernel", target, listed | {"n_listed": "i32"}, {"BLOCK": 1024, "PROGRAMS": 64}),
    ]
    for n_dead in (2048, 16384, 65536):
        kernel, config = keep_config(n_dead, hip=target == "gfx942")
        warps = config.pop("num_warps")
        cases.append(Case(ROWS, kernel, target, keep, config, num_warps=warps))
    return cases


@pytest.mark.parametrize("target", TARGETS)
def test_static_compile_without_spills(target: str) -> None:
    assert_no_spills(product_cases(target) + row_cases(target))
