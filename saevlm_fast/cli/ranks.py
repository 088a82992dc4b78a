"""Commands under torchrun: which of them share their work, and who speaks."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from saevlm_fast.cli.terminal import err, out
from saevlm_fast.config import RunOptions, SAEConfig
from saevlm_fast.errors import require

if TYPE_CHECKING:
    from saevlm_fast.peers import Peers
    from saevlm_fast.training.process_group import MeshPeers

_SHARING = "train, harvest, ms-score and evaluate"
Made = TypeVar("Made")


def n_processes() -> int:
    """How many torchrun started; 1 without it."""
    text = os.environ.get("WORLD_SIZE", "1")
    require(text.isdecimal() and int(text) > 0, f"WORLD_SIZE: {text!r} is not a whole number of at least 1")
    return int(text)


def check_shares(name: str, shared: bool) -> None:
    """ValueError: torchrun started several processes of a command that is of one: all would write the same output."""
    n = n_processes()
    require(
        shared or n == 1,
        f"{name}: runs in one process, and torchrun started {n} (WORLD_SIZE); {_SHARING} share their work",
    )


def speaks() -> bool:
    """Whether this process says why the work has ended: of torchrun's the first one does."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return True
    from saevlm_fast.torchrun import speaks as speaks_of_all

    return speaks_of_all()


@contextmanager
def joined_ranks(device: str, timeout: float, n_replicas: int = 1) -> "Iterator[MeshPeers | None]":
    """This process among torchrun's, of which rank 0 alone prints; None if it is the only one.

    ValueError: as many do not make so many replicas.
    """
    check_replicas(n_replicas)
    if n_processes() == 1:
        yield None
        return
    from saevlm_fast.runtime import resolve_device
    from saevlm_fast.training.process_group import joined, own_device

    with joined(resolve_device(own_device(device)), timeout, n_replicas) as peers, one_voice():
        yield peers


@contextmanager
def one_voice() -> Iterator[None]:
    """Of torchrun's processes rank 0 alone prints."""
    quiet = out.quiet, err.quiet
    try:
        if os.environ.get("RANK", "0") != "0":
            out.quiet = err.quiet = True
        yield
    finally:
        out.quiet, err.quiet = quiet


def leads(peers: "Peers | None") -> bool:
    """Whether this process writes and prints."""
    return peers is None or peers.rank == 0


def check_replicas(n_replicas: int) -> None:
    """ValueError: torchrun's processes do not make so many replicas."""
    n = n_processes()
    require(
        n % n_replicas == 0,
        f"data_parallel: {n_replicas} replicas must divide the ranks that torchrun started, {n if n > 1 else 'none'}",
    )


def part_of_a_rank(sae: SAEConfig, n_replicas: int) -> SAEConfig:
    """The largest of what torchrun's processes each hold of an SAE; all of it without torchrun. ValueError: as
    `check_replicas`."""
    check_replicas(n_replicas)
    if (world := n_processes() // n_replicas) == 1:
        return sae
    from saevlm_fast.training.shards import Shard

    return Shard(sae, world - 1, world).config


def first_rank_first(peers: "Peers | None", work: "Callable[[], Made]") -> "Made":
    """work() of every rank, after that of rank 0: what it leaves behind, or refuses, the others need not."""
    if peers is None:
        return work()
    if leads(peers):
        made = work()
        peers.share()
        return made
    peers.share()
    return work()


def device_of_rank(device: str, peers: "Peers | None") -> str:
    """The rank's own GPU."""
    if peers is None:
        return device
    from saevlm_fast.training.process_group import own_device

    return own_device(device)


def ranks_options(options: RunOptions, peers: "MeshPeers | None") -> RunOptions:
    """With the rank's own device."""
    return replace(options, device=device_of_rank(options.device, peers))
