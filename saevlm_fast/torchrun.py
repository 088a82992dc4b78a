"""What torchrun's agent keeps for the ranks that it has started: a store, which outlives them.

By it they say what no collective can: that they have come, and that one of them has ended.
"""

import os
import time
from datetime import timedelta
from typing import Any

import torch.distributed as dist

# Its functions' default is the group there is when it is imported. Imported before there is one, it does not keep that
# group, whose threads would then outlive it and, where Python ends beside them, could end the process by SIGABRT.
import torch.distributed.nn  # noqa: F401

from saevlm_fast.errors import Interrupted

_CAME, _ENDED = "saevlm_fast/came", "saevlm_fast/ended"
_LOOK_SECONDS = 0.2
_VOICE_SECONDS = 5.0  # to reach the store that says who speaks


def world_size() -> int:
    """How many processes torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank_store(patience: float) -> Any:
    """The store by which the ranks meet, where this start of them has a place of its own.

    Raises:
        RuntimeError: it is not there within `patience` seconds. KeyError, ValueError: nobody says where it is.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    start = os.environ.get("TORCHELASTIC_RUN_ID"), os.environ.get("TORCHELASTIC_RESTART_COUNT"), world_size()
    limit = timedelta(seconds=patience)
    store = dist.TCPStore(address, port, is_master=False, timeout=limit)  # pyright: ignore[reportPrivateImportUsage]
    return dist.PrefixStore("/".join(map(str, start)), store)  # pyright: ignore[reportPrivateImportUsage]


def _has_agent() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def meet(timeout: float) -> None:
    """Waits until all ranks have come; c10d, which would wait too, does not see that one will never come.

    Without torchrun's agent nothing is waited for: the store is then rank 0's own.

    Raises:
        Interrupted: a rank has ended before, as one with a bad option; they do not come within `timeout` seconds.
        RuntimeError: the store is not there.
    """
    if not _has_agent():
        return
    world, store, end = world_size(), rank_store(timeout), time.monotonic() + timeout
    came = store.add(_CAME, 1)
    while came < world:
        if store.add(_ENDED, 0) > 0:
            raise Interrupted(f"another of the {world} ranks has ended before all had met")
        if time.monotonic() > end:
            raise Interrupted(f"the {world} ranks did not meet within {timeout:g} s: {came} of them came")
        time.sleep(_LOOK_SECONDS)
        came = store.add(_CAME, 0)


def first_to_end() -> bool:
    """Whether no other rank has said that it ends, which this one says hereby. True without an agent."""
    if world_size() == 1 or not _has_agent():
        return True
    try:
        return bool(rank_store(_VOICE_SECONDS).add(_ENDED, 1) == 1)
    except (RuntimeError, KeyError, ValueError):
        return True


_speaks: bool | None = None


def speaks() -> bool:
    """Whether this process tells why the work has ended: the first of a torchrun's that asks does, and any other.

    Asked before the others can see that this one is gone, which is not what they should tell.
    """
    global _speaks
    if _speaks is None:
        _speaks = first_to_end()
    return _speaks
