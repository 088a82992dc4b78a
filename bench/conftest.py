"""Cases, and the one way of measuring. bench/report.py makes a table.

`pytest bench/ --benchmark-only` runs every kind of operation; with `--large` also the sizes that take minutes and
gigabytes, and each reference as a bench of its own.

A bench names several ways of doing one thing (ours, plain dense torch, ...). `measure` first checks ours against the
reference, so a wrong result never gets a speed. It then times the way this test is for, and between its rounds the
reference and the encoder's GEMM, so that the ratios in extra_info are medians over pairs taken side by side.
"""

import functools
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch

from bench.helpers import machine
from saevlm_fast.data.synthetic import PlantedConcepts
from saevlm_fast.runtime import tf32_products

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# The paper's batch is 4096; a CPU step at that size takes half a minute in dense torch.
ROWS, SECONDS, MOST_ROUNDS = (4096, 0.5, 50) if DEVICE.type == "cuda" else (1024, 2.0, 15)
START = time.perf_counter()


@dataclass(frozen=True)
class Case:
    """Shape of a real SAE (k = 20 as in the paper, except for the smoke test)."""

    d_in: int
    d_sae: int
    n_rows: int
    k: int = 20

    @property
    def shape(self) -> dict[str, int]:
        return {"B": self.n_rows, "d_in": self.d_in, "d_sae": self.d_sae, "k": self.k}

    @property
    def dense_bytes(self) -> int:
        """Of a dense step and ours beside it: weights, gradients and moments, and about 12 matrices [B, d_sae]."""
        return 4 * (12 * self.d_in * self.d_sae + 12 * self.n_rows * self.d_sae)


CASES = {
    "smoke": Case(32, 203, 16, k=4),
    "clip-b32-x8": Case(768, 6144, ROWS),
    "clip-l14-x16": Case(1024, 16384, ROWS),
    "clip-l14-x64": Case(1024, 65536, ROWS if DEVICE.type == "cuda" else 512),
}
# Under --large alone: what takes more than half a minute or 4 GiB on two cores.
LARGE = {"clip-l14-x64", "N=50000", "N=200000", "N=1281167", "vit-base, 500 px"}
REFERENCES = {"dense", "double_loop", "block_loop", "forward"}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--check-goals", action="store_true", help="fail where a measured ratio misses its stated goal")
    parser.addoption("--time-limit", type=float, default=420.0, help="seconds after which no further bench is started")
    parser.addoption(
        "--large",
        action="store_true",
        help="also 65,536 latents, 200,000 and more images, and the references by themselves: 20 GiB and half an hour "
        "on two cores (give --time-limit too)",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Small cases first, benches of whole models (minutes each) last, which the time limit may leave out.

    The smoke shapes show that a bench runs, not how fast: only where -k asks for them. A reference is timed beside ours
    in any case: a bench of its own adds no ratio.
    """
    names = [*CASES, None]
    items.sort(key=lambda item: names.index(case if (case := _parameter(item, "case")) in CASES else None))
    wanted = _wants_smoke if "smoke" in config.option.keyword else _wants_large
    dropped = [item for item in items if not wanted(item, config.getoption("--large"))]
    items[:] = [item for item in items if item not in dropped]
    config.hook.pytest_deselected(items=dropped)


def _wants_smoke(item: pytest.Item, large: bool) -> bool:
    return _parameter(item, "case") == "smoke"


def _wants_large(item: pytest.Item, large: bool) -> bool:
    case, impl = _parameter(item, "case"), _parameter(item, "impl")
    return case != "smoke" and (large or (case not in LARGE and impl not in REFERENCES))


def _parameter(item: pytest.Item, name: str) -> str | None:
    return item.callspec.params.get(name) if hasattr(item, "callspec") else None


def pytest_runtest_setup(item: pytest.Item) -> None:
    limit = item.config.getoption("--time-limit")
    if time.perf_counter() - START > limit:
        pytest.skip(f"--time-limit: {limit:g} s have passed")


@pytest.fixture
def device() -> torch.device:
    return DEVICE


@pytest.fixture
def memory() -> int:
    """Bytes that the device has in all."""
    if DEVICE.type == "cuda":
        return torch.cuda.mem_get_info()[1]
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, memory: int) -> Case:
    case = CASES[request.param]
    if case.dense_bytes > 0.7 * memory:
        pytest.skip(f"needs about {case.dense_bytes / 2**30:.0f} GiB, {DEVICE.type} has {memory / 2**30:.0f} GiB")
    return case


@pytest.fixture(params=["float32", "bfloat16"] if DEVICE.type == "cuda" else ["float32"])
def precision(request: pytest.FixtureRequest) -> Iterator[str]:
    """Of the matrix products, ours and dense alike. bfloat16 is slower than float32 on most CPUs: not run there."""
    with tf32_products(False):
        yield request.param


@pytest.fixture
def tensor_dtype(precision: str) -> torch.dtype:
    return torch.bfloat16 if precision == "bfloat16" else torch.float32


@pytest.fixture
def tolerance(precision: str) -> float:
    """Largest accepted difference between ours and dense, as a share of the largest value."""
    return {"float32": 1e-5, "bfloat16": 2e-2}[precision]


@pytest.fixture
def batches(case: Case) -> list[torch.Tensor]:
    """Four batches [B, d_in] of planted concepts, divided by the norm factor, float32 on the device."""
    x_BD = planted(4 * case.n_rows, case.d_in)[0].to(DEVICE)
    return list((x_BD / x_BD.square().sum(1).mean().sqrt()).split(case.n_rows))


@functools.lru_cache(maxsize=4)
def planted(n_rows: int, d_in: int, d_embedding: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    source = PlantedConcepts(d_in, d_embedding, n_concepts=2 * d_in, concepts_per_image=8.0)
    x_ND, e_NE = source.sample(n_rows)
    return torch.from_numpy(x_ND), torch.from_numpy(e_NE)


@pytest.fixture
def planted_images() -> Callable:
    """planted(n_rows, d_in, d_embedding) -> activations [n_rows, d_in], embeddings [n_rows, d_embedding]."""
    return planted


@pytest.fixture
def encoder_gemm() -> Callable:
    """encoder_gemm(x_BD, W_enc_DS) -> call: the floor of encoding, into a buffer that is there already.

    On CPU 2048 latents at a time into one buffer that stays in cache: faster than one product as large as d_sae.
    """

    def make(x_BD: torch.Tensor, W_enc_DS: torch.Tensor) -> Callable[[], None]:
        width = 2048 if x_BD.device.type == "cpu" else W_enc_DS.shape[1]
        panels = W_enc_DS.split(width, dim=1)
        buffer = x_BD.new_empty(x_BD.shape[0] * width)

        def gemm() -> None:
            for W_DP in panels:
                out_BP = buffer[: x_BD.shape[0] * W_DP.shape[1]].view(x_BD.shape[0], W_DP.shape[1])
                torch.mm(x_BD, W_DP, out=out_BP)

        return gemm

    return make


@pytest.fixture
def measure(benchmark, request: pytest.FixtureRequest) -> Callable[..., dict[str, float]]:
    """measure(operation, impl, ways, check=..., shape=..., dtype=..., floor=...) -> the others' times over this way's.

    ways: name -> (call, {unit such as "GFLOP/s": amount of it in a call}); impl is the one that this test is for and
    `reference` the one that check() compares the others with. floor is the encoder GEMM's call. Returns nothing where
    benchmarks are disabled.
    """

    def run(
        operation: str, impl: str, ways: dict, *, check: Callable[[], None], shape: dict, dtype: str,
        floor: Callable[[], None] | None = None, reference: str = "dense",
    ) -> dict[str, float]:  # fmt: skip
        case = request.node.callspec.params["case"]
        benchmark.group = f"{operation} | {case} | {dtype}"
        call, work = ways[impl]
        others = {} if floor is None else {"encoder_gemm": floor}
        if impl != reference:
            check()
            others |= {name: way for name, (way, _) in ways.items() if name == reference}
        cycle = _seconds(call) + sum(_seconds(other) for other in others.values())  # the check was the warm-up
        rounds = max(3, min(MOST_ROUNDS, int(SECONDS / cycle)))
        if case == "smoke":
            rounds = 2
        beside: dict[str, list[float]] = {name: [] for name in others}

        def time_the_others() -> None:
            for name, other in others.items():
                beside[name].append(_seconds(other))

        what = {"operation": operation, "case": case, "impl": impl, "shape": shape, "dtype": dtype}
        benchmark.extra_info |= what | machine.describe(DEVICE)
        benchmark.pedantic(lambda: _finish(call()), setup=time_the_others, rounds=rounds)
        if benchmark.disabled:
            return {}
        seconds = benchmark.stats.stats.data
        ratios = {name: statistics.median(b / s for b, s in zip(times, seconds)) for name, times in beside.items()}
        rates = {unit: round(amount / statistics.median(seconds), 2) for unit, amount in work.items()}
        benchmark.extra_info |= rates | {f"{name}_over_this": round(ratio, 4) for name, ratio in ratios.items()}
        if "encoder_gemm" in ratios:
            benchmark.extra_info["this_over_encoder_gemm"] = round(1 / ratios["encoder_gemm"], 3)
        return ratios

    return run


@pytest.fixture
def goal(request: pytest.FixtureRequest) -> Callable[[str, float, float], None]:
    """goal(what, ratio, at_least): fails where the ratio is lower, under --check-goals only."""

    def check(what: str, ratio: float, at_least: float) -> None:
        if request.config.getoption("--check-goals"):
            assert ratio >= at_least, f"{what}: {ratio:.2f}x, the goal is {at_least:g}x"

    return check


@pytest.fixture
def environment() -> Callable[[], dict[str, str | int | float]]:
    return partial(machine.describe, DEVICE)


@pytest.fixture
def peak_memory() -> Callable[[], int]:
    """peak_memory() -> the most bytes taken since the call before, above what was taken then. CPU: Linux only."""
    base = [0]

    def peak() -> int:
        if DEVICE.type == "cuda":
            highest, now = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        else:
            highest, now = machine.status_bytes("VmHWM"), machine.status_bytes("VmRSS")
            try:
                Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
            except OSError:  # a sandbox: what goes beyond the peak of before is seen alone
                now = highest
        taken, base[0] = highest - base[0], now
        return taken

    return peak


def _finish(_: object) -> None:
    """Waits for the device, and drops the result so that no round is measured while an older result holds memory."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def _seconds(call: Callable[[], object]) -> float:
    _finish(None)
    start = time.perf_counter()
    _finish(call())
    return time.perf_counter() - start
