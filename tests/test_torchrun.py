"""How ranks meet by the store of torchrun's agent, which is here one of this process."""

import subprocess
import sys
import threading
import time

import pytest
import torch.distributed as dist

from saevlm_fast import torchrun
from saevlm_fast.errors import Interrupted


@pytest.fixture
def store(monkeypatch):
    """torchrun's, and the environment that says where it is, of two ranks."""
    agent = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    told = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": agent.port, "WORLD_SIZE": 2, "TORCHELASTIC_RUN_ID": "run"}
    for name, value in (told | {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": 0}).items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(torchrun, "_LOOK_SECONDS", 0.01)
    return agent


def test_ranks_that_all_come_meet(store):
    other = threading.Thread(target=torchrun.meet, args=(60,))
    other.start()
    torchrun.meet(60)
    other.join(60)
    assert not other.is_alive()


@pytest.mark.parametrize("first", [True, False])
def test_a_rank_that_ends_before_it_has_come_is_not_waited_for(store, first):
    """It ends before the other comes, or while that one waits."""
    ending = threading.Timer(0 if first else 0.2, torchrun.first_to_end)
    ending.start()
    if first:
        ending.join()
    start = time.monotonic()
    with pytest.raises(Interrupted, match="another of the 2 ranks has ended before all had met"):
        torchrun.meet(60)
    assert time.monotonic() - start < 30
    ending.join()
    assert not torchrun.first_to_end(), "the other one has spoken"


def test_a_rank_that_does_not_come_is_waited_for_within_the_timeout(store):
    with pytest.raises(Interrupted, match=r"the 2 ranks did not meet within 0\.1 s: 1 of them came"):
        torchrun.meet(0.1)


def test_ranks_that_are_started_again_have_nothing_of_those_before(store, monkeypatch):
    assert torchrun.first_to_end()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert torchrun.first_to_end()


def test_without_an_agent_nobody_is_waited_for(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    torchrun.meet(60)
    assert torchrun.first_to_end()


def test_nothing_of_torch_keeps_a_group_that_is_destroyed():
    """Threads of a group that Python's end meets can end a rank by SIGABRT. Imports are made once: a new process."""
    code = """
import torch.distributed as dist
from saevlm_fast import torchrun
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
import inspect, torch.distributed.nn.functional as functional
group = inspect.signature(functional.all_reduce).parameters["group"].default
assert dist.group.WORLD is not None
assert group is not dist.group.WORLD, group
dist.destroy_process_group()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
