"""Compiled loops of a CPU: how rows are shared out, and the small loops of a screened encode against plain torch."""

import os
import signal
import subprocess
import sys
import threading
import time
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from saevlm_fast.kernels import cpu_loops
from saevlm_fast.kernels.cpu_loops import bounds_by_work, compiled, compiles, even_bounds, in_parts

ROOT = Path(__file__).resolve().parents[2]
needs_numba = pytest.mark.skipif(not cpu_loops.numba_is_here(), reason="no numba on this machine")


@pytest.fixture(params=[1, 2, 5])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(params=["torch's threads", "others"])
def team(request, monkeypatch):
    if request.param == "others":
        monkeypatch.setattr(cpu_loops, "_openmp", lambda process: None)
    return request.param


@cache
def count_rows():
    """A loop that adds 1 to every row, many times over."""

    @compiled
    def loop(seen_N, times, start, stop):
        for _ in range(times):
            for n in range(start, stop):
                seen_N[n] += 1

    return loop


@pytest.mark.skipif(sys.platform != "linux" or "OpenMP" not in torch.__config__.parallel_info(), reason="no OpenMP")
def test_torch_has_threads_for_loops():
    """Without them the tests of its team would be those of the others."""
    assert cpu_loops._openmp(os.getpid()) is not None


@pytest.mark.skipif(sys.platform != "linux" or "OpenMP" not in torch.__config__.parallel_info(), reason="no OpenMP")
def test_the_threads_are_those_of_torch(monkeypatch):
    """Where torch keeps its OpenMP to itself, as for ARM: another one would not know torch's number of threads."""
    *_, library = cpu_loops._loaded()
    monkeypatch.setattr(cpu_loops, "_loaded", lambda: iter([library]))
    assert cpu_loops._openmp.__wrapped__(os.getpid()) is not None
    before = torch.get_num_threads()
    try:
        for n in (3, 2):
            torch.set_num_threads(n)
            assert library.omp_get_max_threads() == n
    finally:
        torch.set_num_threads(before)


@needs_numba
@pytest.mark.usefixtures("team")
def test_every_row_is_gone_over_once(threads):
    seen_N = torch.zeros(23, dtype=torch.int64)
    in_parts(count_rows(), even_bounds(23), seen_N, 1)
    assert seen_N.tolist() == [1] * 23
    assert len(even_bounds(23)) == threads + 1
    assert even_bounds(0) == [0, 0]
    assert even_bounds(1) == [0, 1]


@needs_numba
def test_a_team_that_is_smaller_than_asked_for_does_all():
    """In a process of its own, whose OpenMP may not have more than two threads."""
    code = """
import torch
from saevlm_fast.kernels.cpu_loops import compiled, in_parts

@compiled
def loop(seen_N, start, stop):
    for n in range(start, stop):
        seen_N[n] += 1

seen_N = torch.zeros(9, dtype=torch.int64)
in_parts(loop, [0, 2, 5, 6, 9], seen_N)
assert seen_N.tolist() == [1] * 9
"""
    run_python(code, OMP_THREAD_LIMIT="2")


@needs_numba
@pytest.mark.usefixtures("team")
def test_loops_of_several_python_threads_at_once():
    """They have teams of their own."""
    seen_TN = torch.zeros(6, 50, dtype=torch.int64)

    def repeat(t):
        for _ in range(20):
            in_parts(count_rows(), [0, 20, 50], seen_TN[t], 1)

    several = [threading.Thread(target=repeat, args=(t,), daemon=True) for t in range(6)]
    for thread in several:
        thread.start()
    for thread in several:
        thread.join(60)
    assert bool((seen_TN == 20).all())


@needs_numba
def test_an_interrupt_is_heard_and_no_range_is_left_out(team, request):
    """Of 20 signals that come while loops run each raises KeyboardInterrupt once, and a call ends what it began."""
    seen_N, heard, calls = torch.zeros(40, dtype=torch.int64), 0, 0
    in_parts(count_rows(), [0, 20, 40], seen_N, 1)
    seen_N.zero_()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # the command's own may be there
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    for _ in range(20):
        timer = threading.Timer(0.01, signal.raise_signal, (signal.SIGINT,))
        try:
            timer.start()
            while timer.is_alive() or not timer.finished.is_set():
                in_parts(count_rows(), [0, 20, 40], seen_N, 1000)
                calls += 1
            time.sleep(0.01)
        except KeyboardInterrupt:
            heard += 1
        timer.join()
    assert heard == 20
    assert bool((seen_N[:20] % 1000 == 0).all())
    if team == "torch's threads":
        assert bool((seen_N == seen_N[0]).all())
    assert int(seen_N[0]) >= 1000 * calls


@needs_numba
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_process_has_threads_of_its_own():
    """It would wait for those of its parent."""
    code = """
import os, signal, torch
from saevlm_fast.kernels.cpu_loops import compiled, in_parts

@compiled
def loop(seen_N, start, stop):
    for n in range(start, stop):
        seen_N[n] += 1

seen_N = torch.zeros(9, dtype=torch.int64)
in_parts(loop, [0, 4, 9], seen_N)
child = os.fork()
if child == 0:
    signal.alarm(30)
    in_parts(loop, [0, 4, 9], seen_N)
    os._exit(0 if seen_N.tolist() == [2] * 9 else 1)
assert os.waitpid(child, 0)[1] == 0
"""
    run_python(code)


def run_python(code, *given, **environment):
    """What it writes to stderr."""
    done = subprocess.run(
        [sys.executable, "-c", code, *given],
        cwd=ROOT,
        text=True,
        capture_output=True,
        env=os.environ | environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


@given(counts=st.lists(st.integers(0, 50), max_size=40), first=st.integers(0, 9), work=st.integers(1, 8))
def test_work_is_shared_out(counts, first, work):
    """Of all rows, in order; and no range has more than its share and two rows."""
    offsets_S1 = torch.tensor([first, *counts]).cumsum(0)
    bounds = bounds_by_work(offsets_S1, work)
    assert bounds == sorted(bounds)
    assert (bounds[0], bounds[-1]) == (0, len(counts))
    parts = [sum(counts[a:b]) + work * (b - a) for a, b in pairwise(bounds)]
    assert max(parts) <= sum(parts) / len(parts) + 2 * (max(counts, default=0) + work)


def test_what_is_compiled_for(monkeypatch):
    W_SD = torch.zeros(4, 6)
    here = cpu_loops.numba_is_here()
    assert compiles(W_SD) == compiles(W_SD.double()) == compiles(W_SD, W_SD) == here
    assert not compiles(W_SD.half())
    assert not compiles(W_SD.bfloat16())
    assert not compiles(W_SD, W_SD.double())
    assert not compiles(W_SD.t())
    assert not compiles(W_SD.to("meta"))
    monkeypatch.setattr(cpu_loops, "numba_is_here", lambda: False)
    assert not compiles(W_SD)


@needs_numba
def test_rounding_is_that_of_bfloat16():
    """Every upper half with lower halves at, beside and between its ties; NaN need not stay one."""
    from saevlm_fast.kernels.topk_encode_numba import round_rows

    upper_R1 = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32)[:, None] << 16
    values_RD = (upper_R1 | torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=torch.int32)).view(torch.float32)
    values_RD = values_RD[~values_RD.isnan().any(1)]
    low_RD, (norm_R, error_R) = torch.empty_like(values_RD, dtype=torch.bfloat16), torch.empty(2, len(values_RD))
    in_parts(round_rows, [0, 5, len(values_RD)], values_RD, low_RD.view(torch.int16), norm_R, error_R)
    assert torch.equal(low_RD.view(torch.int16), values_RD.to(torch.bfloat16).view(torch.int16))
    small_R = (values_RD.abs().amax(1) < 1e18) & (values_RD.abs().amin(1) > 1e-16)  # whose squares are numbers
    truth_RD = values_RD[small_R].double()
    lost_RD = truth_RD - truth_RD.to(torch.bfloat16)
    torch.testing.assert_close(norm_R[small_R].double(), truth_RD.norm(dim=1), rtol=1e-6, atol=0)
    torch.testing.assert_close(error_R[small_R].double(), lost_RD.norm(dim=1), rtol=1e-6, atol=0)
    assert int(small_R.sum()) > 10_000


@needs_numba
def test_a_row_with_nan_or_infinity_has_no_finite_norm():
    from saevlm_fast.kernels.topk_encode_numba import round_rows

    values_RD = torch.ones(4, 40)
    values_RD[[0, 1, 2], [3, 17, 39]] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    low_RD, (norm_R, error_R) = torch.empty(4, 40, dtype=torch.bfloat16), torch.empty(2, 4)
    in_parts(round_rows, [0, 4], values_RD, low_RD.view(torch.int16), norm_R, error_R)
    assert norm_R.isfinite().tolist() == [False, False, False, True]


@needs_numba
@given(seed=st.integers(0, 2**31), k=st.integers(1, 12), spread=st.sampled_from([1, 3, 1000]))
def test_best_entries_are_those_of_a_stable_sort(seed, k, spread):
    """Ragged rows, ties, zeros and negatives; rows with fewer than k positives are left alone."""
    from saevlm_fast.kernels.topk_encode_numba import best_entries

    generator = torch.Generator().manual_seed(seed)
    counts_R = torch.randint(0, 30, (9,), generator=generator)
    offsets_R1 = torch.nn.functional.pad(counts_R.cumsum(0), (1, 0))
    values_M = torch.randint(-spread, spread + 1, (int(counts_R.sum()),), generator=generator) / 4
    positions_M = torch.arange(len(values_M)) * 3
    acts_RK, latents_RK = torch.full((9, k), -1.0), torch.full((9, k), -1)
    decided_R = torch.zeros(9, dtype=torch.bool)
    in_parts(best_entries, [0, 4, 9], values_M, positions_M, offsets_R1, 1000, acts_RK, latents_RK, decided_R)
    for r, (a, b) in enumerate(pairwise(offsets_R1.tolist())):
        assert bool(decided_R[r]) == (int((values_M[a:b] > 0).sum()) >= k)
        order = values_M[a:b].sort(descending=True, stable=True).indices[:k].sort().values + a
        expected = (values_M[order], positions_M[order] % 1000) if decided_R[r] else (torch.full((k,), -1.0),) * 2
        assert torch.equal(acts_RK[r], expected[0])
        assert torch.equal(latents_RK[r], expected[1].long())


@needs_numba
@pytest.mark.parametrize("damage", ["index", "data", "full disk"])
def test_a_cache_of_numba_that_fails_costs_no_run(damage, tmp_path):
    """Files cut short are compiled anew, and kept; a disk that is full when the index is written keeps nothing."""
    code = """
import sys, torch
from saevlm_fast.kernels.cpu_loops import compiled, in_parts
from saevlm_fast.kernels.topk_encode_numba import round_rows
if sys.argv[1:] == ["full"]:
    def full(*given):
        raise OSError(28, "No space left on device")
    import numba.core.caching as caching
    caching.IndexDataCacheFile._save_data = full
torch.set_num_threads(2)
values, low, norms = torch.ones(2, 3), torch.zeros(2, 3, dtype=torch.int16), torch.zeros(2, 2)
in_parts(round_rows, [0, 1, 2], values, low, norms[0], norms[1])
assert (norms[0] - 3**0.5).abs().amax() < 1e-6
"""
    run_python(code, *["full"] * (damage == "full disk"), NUMBA_CACHE_DIR=str(tmp_path))
    files = {kind: list(tmp_path.rglob(f"*round_rows*.{kind}")) for kind in ("nbi", "nbc")}
    assert all(len(paths) == (damage != "full disk") for paths in files.values())
    for path in files["nbi" if damage == "index" else "nbc"]:
        path.write_bytes(path.read_bytes()[:100])
    assert (damage == "full disk") != ("compiled anew" in run_python(code, NUMBA_CACHE_DIR=str(tmp_path)))
    assert "compiled anew" not in run_python(code, NUMBA_CACHE_DIR=str(tmp_path))
    kept = [path.stat().st_size for path in tmp_path.rglob("*round_rows*.nbc")]
    assert max(kept) > 1000


@needs_numba
def test_where_nothing_can_be_written_loops_are_compiled_anew():
    """A home and a package that are read-only: Numba finds no place for its cache, and refuses to look for one."""
    code = """
import numba.core.caching as caching, torch
(getattr(caching, "CacheImpl", None) or caching._CacheImpl)._locator_classes = []
from saevlm_fast.kernels.cpu_loops import in_parts
from saevlm_fast.kernels.topk_encode_numba import round_rows
values, low, norms = torch.ones(2, 3), torch.zeros(2, 3, dtype=torch.int16), torch.zeros(2, 2)
in_parts(round_rows, [0, 1, 2], values, low, norms[0], norms[1])
assert (norms[0] - 3**0.5).abs().amax() < 1e-6
"""
    run_python(code)
