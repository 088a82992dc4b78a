"""The shuffle buffer: every row once, how far rows travel, and that it goes on anywhere."""

import numpy as np
import pytest
import torch

from saevlm_fast.data.mixing import MixingBuffer


def fed(buffer, first_row=0, piece=7):
    """Row numbers in the order in which they come out, when rows are fed in pieces of some size."""
    out, row = [], first_row
    while buffer.n_in < buffer.n_wanted:
        for batch in buffer.feed(torch.arange(row, row + piece)[:, None].float()):
            out += batch[:, 0].long().tolist()
        row += piece
    for batch in buffer.drain():
        out += batch[:, 0].long().tolist()
    return out


@pytest.mark.parametrize(
    ("n_steps", "batch", "capacity"), [(1, 4, 4), (10, 4, 16), (7, 5, 13), (23, 3, 9), (50, 8, 400)]
)
@pytest.mark.parametrize("piece", [1, 5, 64])
def test_every_row_comes_out_once(n_steps, batch, capacity, piece):
    buffer = MixingBuffer(n_steps, batch, capacity, 1)
    assert len(buffer.rows_RD) <= capacity
    out = fed(buffer, piece=piece)
    assert sorted(out) == list(range(n_steps * batch))


def test_the_order_does_not_depend_on_how_rows_arrive_and_does_on_the_seed():
    orders = [fed(MixingBuffer(20, 6, 40, 1, seed), piece=piece) for seed, piece in ((0, 1), (0, 13), (0, 99), (1, 13))]
    assert orders[0] == orders[1] == orders[2]
    assert orders[0] != orders[3]


def test_rows_are_mixed_as_is_said():
    """Distances between places in and out are triangular on (-R, R): mean R / 3, and a quarter beyond R / 2."""
    n_steps, batch, capacity = 600, 20, 3000
    out = np.array(fed(MixingBuffer(n_steps, batch, capacity, 1), piece=100))
    windows = out.reshape(4, capacity)
    assert [set(window) for window in windows] == [set(range(w * capacity, (w + 1) * capacity)) for w in range(4)]
    distance = np.abs(out - np.arange(len(out)))
    assert distance.mean() == pytest.approx(capacity / 3, rel=0.05)
    assert (distance > capacity / 2).mean() == pytest.approx(0.25, abs=0.03)
    place = np.argsort(out)
    apart = np.abs(np.diff(place.reshape(4, capacity), axis=1))
    assert apart.mean() == pytest.approx(capacity / 3, rel=0.05), "neighbours that went in"
    # Of a batch, no part of its window has more than its share: 20 rows over 10 tenths.
    tenths = np.stack(
        [np.bincount((batch_rows % capacity) * 10 // capacity, minlength=10) for batch_rows in out.reshape(-1, batch)]
    )
    assert np.abs(tenths.mean(0) - 2).max() < 0.25


@pytest.mark.parametrize(("n_steps", "batch", "capacity"), [(10, 4, 16), (7, 5, 13), (23, 3, 9)])
def test_it_goes_on_at_any_step_from_the_first_row_of_its_window(n_steps, batch, capacity):
    whole = MixingBuffer(n_steps, batch, capacity, 1, seed=3)
    order = fed(whole)
    for step in range(n_steps):
        window = whole.window_of(step)
        first = whole.first_step(window)
        assert first <= step < whole.first_step(window + 1)
        resumed = MixingBuffer(n_steps, batch, capacity, 1, seed=3, first_window=window)
        assert fed(resumed, first_row=first * batch) == order[first * batch :]
    assert whole.window_of(n_steps) == whole.n_windows - 1


def test_the_last_window_stays():
    buffer = MixingBuffer(23, 3, 9, 1)
    out = fed(buffer)
    last = torch.cat(list(buffer.last_rows(4)))[:, 0].long().tolist()
    assert sorted(last) == sorted(out[buffer.first_step(buffer.n_windows - 1) * 3 :])
    assert len(last) >= 6


def test_peeking_shows_what_comes():
    buffer = MixingBuffer(6, 4, 12, 1)
    assert not buffer.is_full
    batches = list(buffer.feed(torch.arange(12)[:, None].float()))
    assert batches == []
    assert buffer.is_full
    shown = [buffer.peek(step) for step in range(3)]
    came = list(buffer.feed(torch.arange(12, 24)[:, None].float()))
    assert all(torch.equal(one, other) for one, other in zip(shown, came))


def test_it_waits_until_it_is_full():
    buffer = MixingBuffer(100, 4, 40, 1)
    assert list(buffer.feed(torch.zeros(40, 1))) == []
    assert len(list(buffer.feed(torch.zeros(1, 1)))) == 1


def test_what_is_refused():
    with pytest.raises(ValueError, match="buffer: 3 rows must be at least batch_size = 4"):
        MixingBuffer(10, 4, 3, 1)
    with pytest.raises(ValueError, match="40 rows have not been fed"):
        list(MixingBuffer(10, 4, 8, 1).drain())
