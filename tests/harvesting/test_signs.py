"""Ranks of a harvest wait for each other as long as each goes on."""

import threading
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from saevlm_fast.errors import Interrupted
from saevlm_fast.harvesting import ranks
from saevlm_fast.harvesting.ranks import Signs


class Work:
    """A collective that ends when it is told to."""

    def __init__(self):
        self.done = threading.Event()

    def is_completed(self):
        return self.done.is_set()

    def wait(self, limit=timedelta(0)):
        if not self.done.wait(limit.total_seconds()):
            raise RuntimeError("not in time")


@pytest.fixture(autouse=True)
def often(monkeypatch):
    monkeypatch.setattr(ranks, "_SIGN_SECONDS", 0.01)
    monkeypatch.setattr(ranks, "_POLL_SECONDS", 0.01)


def nothing():
    pass


def test_who_leaves_no_sign_is_not_waited_for():
    store = dist.HashStore()
    own, _ = (Signs(store, rank, 2, 0.3) for rank in range(2))
    with pytest.raises(
        Interrupted, match=r"another of the 2 ranks has not answered for 0.3 s \(collective_timeout\): rank 1"
    ):
        own.wait(Work(), nothing)


def test_who_goes_on_is_waited_for(monkeypatch):
    """For three times the timeout: by a clock that goes on when a rank sleeps, and that no other work holds up."""
    now = [1.0]
    monkeypatch.setattr(ranks, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=lambda seconds: passes(seconds)))
    store, work = dist.HashStore(), Work()
    own, slow = (Signs(store, rank, 2, 0.5) for rank in range(2))

    def passes(seconds):
        now[0] += seconds
        slow.leave()
        if now[0] > 2.5:
            work.done.set()

    assert not own.waits
    own.wait(work, nothing)
    assert not own.waits
    assert now[0] > 2.5


def test_an_interrupt_ends_the_waiting():
    store = dist.HashStore()
    own, _ = (Signs(store, rank, 2, 60.0) for rank in range(2))

    def stop():
        raise Interrupted("interrupted")

    with pytest.raises(Interrupted, match="interrupted"):
        own.wait(Work(), stop)
    assert own.waits, "its collective goes on"


def test_a_store_that_has_gone_leaves_it_to_the_collective():
    class Gone:
        def add(self, key, number):
            return number

        def multi_get(self, keys):
            raise dist.DistNetworkError("closed")

    own, work = Signs(Gone(), 0, 2, 0.1), Work()
    with pytest.raises(RuntimeError, match="not in time"):
        own.wait(work, nothing)
    threading.Timer(0.02, work.done.set).start()
    Signs(Gone(), 0, 2, 30.0).wait(work, nothing)
