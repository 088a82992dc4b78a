"""The order of training rows, and reading ahead in it."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saevlm_fast.data import order as order_module
from saevlm_fast.data import rows as rows_module
from saevlm_fast.data.order import ShuffledRows, batches
from saevlm_fast.data.prefetch import prefetch
from saevlm_fast.data.rows import open_activations
from stores import DTYPES, rows_of, write_store

# Order ----------------------------------------------------------------------------------------------------------------


def order_of(n, batch_size, seed=0, windowed=False):
    sizes = {"exact_bytes": 0, "window_bytes": 512 * 20, "block_bytes": 512 * 4} if windowed else {}
    return ShuffledRows(SimpleNamespace(n_rows=n, row_bytes=512), batch_size, seed, **sizes)


def epoch_rows(order, epoch):
    first = epoch * order.batches_per_epoch
    return [order.batch(first + b).tolist() for b in range(order.batches_per_epoch)]


@settings(max_examples=100)
@given(n=st.integers(1, 150), batch_size=st.integers(1, 60), epoch=st.integers(0, 2))
def test_blocks_begin_once_an_epoch_and_before_their_rows(n, batch_size, epoch):
    order = order_of(n, batch_size, windowed=True)
    first, announced = epoch * order.batches_per_epoch, []
    for step in range(first, first + order.batches_per_epoch):
        rows = set(order.batch(step).tolist())
        announced += [row for start, stop in order.blocks_begun(step) for row in range(start, stop)]
        assert rows <= set(announced)
        anew = [row for start, stop in order.blocks_begun(step, anew=True) for row in range(start, stop)]
        assert rows <= set(anew), "a resumed run has announced nothing before"
    assert len(announced) == len(set(announced))


@pytest.fixture
def announced(monkeypatch):
    """Rows that were announced to the kernel, as they are read by those who announce them."""
    rows = []
    monkeypatch.setattr(rows_module, "will_need", lambda mapped_ND: rows.extend(mapped_ND.float().tolist()))
    return rows


def test_what_is_read_in_order_is_announced(tmp_path, announced):
    x = rows_of(50)
    activations = open_activations(write_store(tmp_path / "store", x, 20))
    for start, x_BD in activations.chunks(15):
        assert x_BD.tolist() == x[start : start + 15].tolist()
    assert sorted(announced) == sorted(x.tolist())


@pytest.mark.parametrize("announce", [True, False])
def test_a_window_is_announced_wherever_in_it_batches_start(tmp_path, announced, announce):
    x = rows_of(64)
    activations = open_activations(write_store(tmp_path / "store", x, 20))
    order = ShuffledRows(activations, 4, exact_bytes=0, window_bytes=512 * 16, block_bytes=512 * 2)
    ((rows, x_BD),) = batches(activations, order, 1, 1, announce=announce)  # the second of the window's four
    assert torch.equal(x_BD, x[rows])
    assert len(announced) == (16 if announce else 0)
    assert not announce or all(row in announced for row in x_BD.tolist())


def test_threads_that_ask_for_one_permutation_make_it_once():
    made, all_ask = [], threading.Barrier(4)

    @order_module._MadeOnce
    def slow(n):
        made.append(n)
        time.sleep(0.05)
        return np.arange(n)

    def ask(_):
        all_ask.wait()
        return len(slow(3))

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(ask, range(4))) == [3] * 4
    assert made == [3]


def test_a_permutation_is_begun_in_the_background_and_tried_again_where_it_failed():
    made, may_end = [], threading.Event()

    @order_module._MadeOnce
    def slow(n):
        made.append(n)
        assert may_end.wait(60)
        if len(made) == 1:
            raise MemoryError
        return np.arange(n)

    slow.begin(3)
    slow.begin(3)
    may_end.set()
    with pytest.raises(MemoryError):
        slow(3)
    assert len(slow(3)) == 3
    assert made == [3, 3]


@pytest.mark.parametrize("windowed", [False, True])
def test_the_next_permutation_is_made_before_it_is_needed(monkeypatch, windowed):
    monkeypatch.setattr(order_module, "_SLOW", 1)
    asked = []
    for name in ("_permutation", "_window"):
        monkeypatch.setattr(getattr(order_module, name), "begin", lambda *args: asked.append(args))
    order = order_of(40, 10, 5, windowed=windowed)  # windows of 5 blocks of 4 rows
    for step in (0, 3):
        order.batch(step)
    if windowed:
        assert asked == [(40, 4, 5, 5, 0, 1), (40, 4, 5, 5, 1, 0)]
    else:
        assert asked == [(40, 5, 1)] * 2
    after = order_of(40, 10, 5, windowed=windowed).batch(4)
    assert torch.equal(order.batch(4), after)


def test_an_exact_permutation_announces_no_blocks():
    assert order_of(100, 10).blocks_begun(0, anew=True) == []


@settings(max_examples=150)
@given(
    n=st.integers(1, 150),
    batch_size=st.integers(1, 60),
    seed=st.integers(0, 2**40),
    epoch=st.integers(0, 5),
    windowed=st.booleans(),
)
def test_every_row_at_most_once_an_epoch(n, batch_size, seed, epoch, windowed):
    order = order_of(n, batch_size, seed, windowed)
    got = epoch_rows(order, epoch)
    flat = [row for batch in got for row in batch]
    assert len(set(flat)) == len(flat) == max(n // batch_size * batch_size, min(n, batch_size))
    assert set(flat) <= set(range(n))
    assert all(batch == sorted(batch) and len(batch) == min(batch_size, n) for batch in got)
    step = epoch * order.batches_per_epoch + len(got) - 1
    assert order_of(n, batch_size, seed, windowed).batch(step).tolist() == got[-1]  # no state: resumable anywhere


@pytest.mark.parametrize("windowed", [False, True])
@settings(max_examples=40)
@given(n=st.integers(1, 150), a=st.integers(1, 20), times=st.integers(1, 5), seed=st.integers(0, 9))
def test_the_order_does_not_depend_on_the_batch_size(windowed, n, a, times, seed):
    small, large = order_of(n, a, seed, windowed), order_of(n, a * times, seed, windowed)
    if n < a * times:
        return
    union = [row for b in range(times) for row in small.batch(small.batches_per_epoch + b).tolist()]
    assert sorted(union) == large.batch(large.batches_per_epoch).tolist()


@pytest.mark.parametrize("windowed", [False, True])
def test_epochs_and_seeds_differ_and_every_row_has_its_turn(windowed):
    order = order_of(100, 30, 1, windowed)
    assert epoch_rows(order, 0) != epoch_rows(order, 1)
    assert epoch_rows(order, 0) != epoch_rows(order_of(100, 30, 2, windowed), 0)
    seen = {row for epoch in range(20) for batch in epoch_rows(order, epoch) for row in batch}
    assert seen == set(range(100))  # the ten dropped rows are others in every epoch


def test_the_permutation_is_the_same_on_every_machine():
    assert [order_of(12, 4, 5).batch(b).tolist() for b in range(3)] == [[3, 6, 10, 11], [2, 4, 5, 7], [0, 1, 8, 9]]
    assert order_of(97, 10, 5, windowed=True).batch(3).tolist() == [13, 24, 25, 26, 27, 40, 43, 44, 45, 46]


def test_the_permutation_is_uniform():
    """Over many epochs every row comes in the first batch equally often (6 standard deviations)."""
    counts = np.zeros(20)
    for epoch in range(4000):
        counts[order_of(20, 5).batch(epoch * 4).numpy()] += 1
    assert np.abs(counts - 1000).max() < 6 * np.sqrt(4000 * 0.25 * 0.75)


def test_windows_keep_a_batch_within_few_blocks_and_mix_them():
    order = order_of(10_000, 20, 0, windowed=True)  # blocks of 4 rows, windows of 5 blocks = one batch
    blocks = [np.unique(order.batch(b).numpy() // 4) for b in range(100)]
    assert all(len(b) == 5 for b in blocks)
    assert np.median([np.ptp(b) for b in blocks]) > 1000


@pytest.mark.parametrize(("arguments", "message"), [((10, 0), "batch_size is 0"), ((10, 5, -1), "seed is -1")])
def test_order_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        order_of(*arguments)


# Reading ahead --------------------------------------------------------------------------------------------------------


@pytest.fixture
def loader_threads():
    """Gives those that this test has begun and that are there still."""
    before = set(threading.enumerate())
    return lambda: [t for t in threading.enumerate() if t.name.startswith("activations") and t not in before]


@pytest.mark.parametrize("dtype", DTYPES)
def test_batches_resume_at_any_step(tmp_path, dtype, loader_threads):
    x = rows_of(50, 4, dtype)
    store = open_activations(write_store(tmp_path / "s", x))
    order = ShuffledRows(store, 8, seed=3)
    whole = list(batches(store, order, 0, 20))
    assert len(whole) == 20
    for rows, batch in whole:
        assert torch.equal(batch, x.float()[rows])
    for (rows, batch), (rows_again, batch_again) in zip(whole[13:], batches(store, order, 13, 7)):
        assert torch.equal(rows, rows_again)
        assert torch.equal(batch, batch_again)
    assert len({batch.data_ptr() for _, batch in whole}) == 20  # a consumer may keep its batches
    assert list(batches(store, order, 5, 0)) == []
    with pytest.raises(ValueError, match=r"order is over 7 rows; .* has 50"):
        batches(store, order_of(7, 2), 0, 1)
    assert not loader_threads()


@pytest.fixture
def three_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    yield 3
    torch.set_num_threads(threads)


def test_prefetch_stays_in_order_raises_in_the_consumer_and_closes(three_threads, loader_threads):
    started = []

    def load(job):
        started.append(job)
        if job == 3:
            raise ValueError("job 3")
        return job, torch.get_num_threads()

    stream = prefetch(load, range(10))
    assert [next(stream) for _ in range(3)] == [(0, 1), (1, 1), (2, 1)]
    with pytest.raises(ValueError, match="job 3"):
        next(stream)
    assert not loader_threads()
    started.clear()
    stream = prefetch(load, range(4, 1000))
    next(stream)
    assert loader_threads()
    stream.close()
    assert not loader_threads()
    assert len(started) < 20
    assert torch.get_num_threads() == three_threads
    probe = []
    thread = threading.Thread(target=lambda: probe.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert probe == [three_threads]


def test_prefetch_begins_as_many_jobs_as_it_is_told():
    started, begun = [], threading.Event()

    def load(job):
        started.append(job)
        if len(started) == 7:
            begun.set()
        return job

    stream = prefetch(load, range(100), 2, ahead=6)
    assert next(stream) == 0
    assert begun.wait(60)
    assert sorted(started) == list(range(7))
    assert list(stream) == list(range(1, 100))
