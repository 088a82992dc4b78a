"""The processes that share a harvest: torchrun's ranks, which only ever wait for each other."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from saevlm_fast.errors import Interrupted


@dataclass(frozen=True)
class Ranks:
    """The processes of a torchrun, or the only one."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1

    def barrier(self) -> None:
        if self.world == 1:
            return
        try:
            dist.barrier()
        except RuntimeError as error:
            raise Interrupted("another rank has ended; its message says why") from error

    def device(self, name: str) -> str:
        """`auto` and `cuda` are the rank's own GPU."""
        own = self.world > 1 and name in ("auto", "cuda") and torch.cuda.is_available()
        return f"cuda:{self.local_rank}" if own else name


ALONE = Ranks()


@contextmanager
def torchrun_ranks() -> Iterator[Ranks]:
    """This process among those that torchrun started; joins them with gloo (ranks only wait for each other)."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield ALONE
        return
    dist.init_process_group("gloo", timeout=timedelta(days=7))  # a rank may wait long for the slowest
    try:
        local_rank, local_world = (int(os.environ.get(name, "0")) for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))
        yield Ranks(dist.get_rank(), world, local_rank, max(1, local_world))
    finally:
        dist.destroy_process_group()
