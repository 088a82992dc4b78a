"""What is said of ranks that are gone, and what is left of a group."""

import signal
import subprocess
import sys

import pytest

from saevlm_fast.runtime import interruptible
from saevlm_fast.training import process_group
from saevlm_fast.training.process_group import lost, take_the_word

UNKNOWN = "NCCL communicator was aborted on rank 2: " + "a long story " * 40 + "ends here"


@pytest.mark.parametrize(
    ("raw", "cause"),
    [
        ("[../gloo/transport/tcp/pair.cc:538] Connection closed by peer [127.0.0.1]:34324", "its connection to rank 2"),
        ("[../gloo/transport/tcp/pair.cc:547] Read error [127.0.0.1]:1: Connection reset by peer", "its connection to"),
        (
            "[../gloo/transport/tcp/pair.cc:460] Timed out waiting 8000ms for recv operation",
            "rank 2 has waited in vain",
        ),
        ("Application timeout caused pair closure", "rank 2 has waited in vain"),
        (UNKNOWN + "\nException raised from somewhere", f"rank 2 met: {UNKNOWN}"),
    ],
)
def test_a_lost_rank_is_told_of_in_our_words_or_in_whole_ones_of_others(raw, cause):
    said = lost(RuntimeError(raw), 2, 4, 8.0)
    head = "another of the 4 ranks has ended, or has not answered for 8 s (collective_timeout): "
    assert said.startswith(head + cause)
    assert ("pair.cc" in said, said.endswith("ends here")) == (False, raw.startswith(UNKNOWN))


@pytest.fixture
def sigterm():
    before = signal.getsignal(signal.SIGTERM)
    yield before
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("speaks", [True, False])
def test_who_tells_why_all_end_is_not_ended_before(speaks, sigterm, monkeypatch):
    """From where the end is seen to where the message is printed, also where a run is left on the way."""
    monkeypatch.setattr(process_group, "speaks", lambda: speaks)
    with interruptible():
        take_the_word()
        assert (signal.getsignal(signal.SIGTERM) is signal.SIG_IGN) == speaks
    assert signal.getsignal(signal.SIGTERM) is (signal.SIG_IGN if speaks else sigterm)


LEFT = """
import weakref

import torch
import torch.distributed as dist

from saevlm_fast.training import process_group

init, store = dist.init_process_group, dist.HashStore()
dist.init_process_group = lambda backend, timeout: init("gloo", store=store, rank=0, world_size=1)
with process_group.joined(torch.device("cpu"), 60) as peers:
    group = weakref.ref(peers.group)
    assert peers.add_up(torch.ones(2)).tolist() == [1, 1]
assert group() is None, "it would be ended with Python"
assert peers.ranks is not None
"""


def test_a_group_does_not_outlive_the_work():
    """Its threads, met by Python's end, can end a rank by SIGABRT."""
    done = subprocess.run([sys.executable, "-c", LEFT], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
