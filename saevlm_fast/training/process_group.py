"""The processes of a torchrun that share a piece of work: how they meet, what they tell each other, who speaks.

PyTorch's own engine carries everything: torchrun starts the ranks, c10d connects them (gloo between CPUs, NCCL between
GPUs), a DeviceMesh of D replicas ("rows") times L parts of an SAE ("latents") has the groups. Rank d * L + l has the
rows of replica d and the latents of part l: neighbours share a replica. What work needs of the others is peers.Peers,
of all of them and along either dimension (peers.Ranks); tests have threads for it.

A rank that is gone, or does not answer within the timeout, ends the others in an `Interrupted`. Of all ranks that end,
the first one speaks (`speaks`): a person reads one message, whoever failed.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from saevlm_fast.errors import Interrupted, first_line, require
from saevlm_fast.peers import Alone, Ranks
from saevlm_fast.torchrun import meet, speaks, world_size

ROWS, LATENTS = "rows", "latents"  # the dimensions of the mesh
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before torch 2.14


class MeshPeers:
    """The ranks of a group, all or those along a dimension of the mesh, by c10d's collectives.

    Attributes:
        ranks: of all of them, what a step needs.

    Raises:
        Interrupted: (of each method) a rank has ended, or has not answered within the timeout.
    """

    def __init__(self, group: "dist.ProcessGroup", timeout: float, mesh: DeviceMesh | None = None):
        self.group: dist.ProcessGroup | None = group
        self.timeout = timeout
        self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)
        self.ranks = Ranks.of(self)
        if mesh is not None and mesh.size(0) > 1:
            of_latents = MeshPeers(mesh.get_group(LATENTS), timeout) if mesh.size(1) > 1 else Alone()
            self.ranks = Ranks(self, of_latents, MeshPeers(mesh.get_group(ROWS), timeout))

    def leave(self) -> None:
        """Nothing of these keeps a group any more: its threads must not outlive it (saevlm_fast/torchrun.py)."""
        for peers in (self, self.ranks.latents, self.ranks.rows):
            if isinstance(peers, MeshPeers):
                peers.group = None

    def gather(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        parts = x.new_empty(self.world, *x.shape)
        with self._together():
            _all_gather(parts.view(-1), x.view(-1), group=self.group)
        return parts

    def exchange(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        received = torch.empty_like(x)
        with self._together():
            dist.all_to_all_single(received, x, group=self.group)
        return received

    def add_up(self, x: Tensor) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        with self._together():
            dist.all_reduce(total, group=self.group)
        return total

    def share(self, value: Any = None) -> Any:
        """Rank 0's value, on every rank: anything that pickles, of our own making."""
        box = [value]
        with self._together():
            dist.broadcast_object_list(box, group=self.group, group_src=0, device=torch.device("cpu"))
        return box[0]

    def collect(self, value: Any) -> list[Any]:
        """Every rank's value, in order; by way of the host."""
        values: list[Any] = [None] * self.world
        with self._together():
            dist.all_gather_object(values, value, group=self.group)
        return values

    def to_first(self, x: Tensor, shapes: list[tuple[int, ...]]) -> list[Tensor] | None:
        """On rank 0 every rank's x, of these shapes, on the CPU; None on the others."""
        x = x.detach().cpu()
        others = [self.hand_over(x, shapes[rank], x.dtype, rank, 0) for rank in range(1, self.world)]
        received = [x, *(each for each in others if each is not None)]
        return received if self.rank == 0 else None

    def hand_over(
        self, x: Tensor, shape: tuple[int, ...], dtype: torch.dtype, source: int, target: int
    ) -> Tensor | None:
        """Rank source's x, which has this shape and dtype, for another rank, target, on the CPU; None for the others.
        All may call it; the two wait for each other."""
        with self._together():
            if self.rank == source:
                dist.send(x.detach().cpu().contiguous().flatten().view(torch.uint8), group=self.group, group_dst=target)
            if self.rank != target:
                return None
            received = torch.empty(shape, dtype=dtype)
            dist.recv(received.flatten().view(torch.uint8), group=self.group, group_src=source)
            return received

    def agree(self, *flags: bool) -> list[bool]:
        """Of each flag whether any rank has it. Between hosts: a GPU is not waited for."""
        numbers = torch.tensor(flags, dtype=torch.int32)
        with self._together():
            dist.all_reduce(numbers, op=dist.ReduceOp.MAX, group=self.group)
        return [bool(number) for number in numbers.tolist()]

    @contextmanager
    def _together(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            take_the_word()  # torchrun sees the other's end within a tenth of a second, too
            raise Interrupted(lost(error, dist.get_rank(), dist.get_world_size(), self.timeout)) from error


# What c10d's backends say of a peer that is gone, in lower case, and what that means; the first that fits.
_CAUSES = (
    (("timed out", "timeout"), "rank {rank} has waited in vain"),
    (("closed", "reset", "broken pipe", "remote process"), "its connection to rank {rank} is closed"),
)


def lost(error: RuntimeError, rank: int, world: int, timeout: float) -> str:
    """Why a rank ends that waited for the others: in our words; what a backend says otherwise, the whole line of it."""
    line = first_line(error, longest=2000)
    known = [cause for words, cause in _CAUSES if any(word in line.lower() for word in words)]
    cause = known[0].format(rank=rank) if known else f"rank {rank} met: {line}"
    return (
        f"another of the {world} ranks has ended, or has not answered for {timeout:g} s (collective_timeout): {cause}"
    )


def take_the_word() -> None:
    """Of the rank that tells why all end: torchrun's SIGTERM, of another rank's end, comes after its message."""
    if threading.current_thread() is not threading.main_thread():
        speaks()
        return
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # while it is asked, too
    if not speaks():
        signal.signal(signal.SIGTERM, before)


def own_device(name: str) -> str:
    """`auto` and `cuda` are this rank's own GPU.

    Raises:
        ValueError: a named GPU, which every rank would take; more ranks on a machine than it has GPUs.
    """
    if name == "auto" and not torch.cuda.is_available():
        return "cpu"
    if name not in ("auto", "cuda"):
        require(
            not name.startswith("cuda:"), f"device: {name!r} is one GPU; under torchrun say cuda: each rank has one"
        )
        return name
    local, n_gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    require(local < max(n_gpus, 1), f"device: rank {local} of this machine has no GPU, of which it has {n_gpus}")
    return f"cuda:{local}"


@contextmanager
def joined(device: torch.device, timeout: float, n_replicas: int = 1) -> Iterator[MeshPeers]:
    """This process among those that torchrun started.

    Args:
        device: its own.
        timeout: seconds that a rank waits for the others, when they meet and in every collective.
        n_replicas: among which the rows of a batch are split.

    Raises:
        Interrupted: they do not come, or one has ended before. ValueError: n_replicas does not divide them.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    limit = timedelta(seconds=timeout)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        meet(timeout)
        dist.init_process_group(backend, timeout=limit)
        world = dist.get_world_size()
        require(world % n_replicas == 0, f"data_parallel: {n_replicas} replicas must divide the {world} ranks")
        mesh = None if n_replicas == 1 else _mesh(device, n_replicas, limit)
        assert dist.group.WORLD is not None
        peers = MeshPeers(dist.group.WORLD, timeout, mesh)
    except RuntimeError as error:
        line = first_line(error, longest=2000)
        raise Interrupted(f"the {world_size()} ranks did not meet within {timeout:g} s: {line}") from error
    try:
        yield peers
    except BaseException:
        take_the_word()  # before the others see that this rank is gone
        raise
    finally:
        peers.leave()
        with suppress(RuntimeError):
            dist.destroy_process_group()


def _mesh(device: torch.device, n_replicas: int, limit: timedelta) -> DeviceMesh:
    """Of groups that have the timeout: those that init_device_mesh makes have torch's own."""
    numbers_DL = torch.arange(dist.get_world_size()).view(n_replicas, -1)
    groups: list[dist.ProcessGroup] = []
    for each in (numbers_DL.T, numbers_DL):
        group, _ = dist.new_subgroups_by_enumeration(each.tolist(), limit)
        assert isinstance(group, dist.ProcessGroup)
        groups.append(group)
    return DeviceMesh.from_group(groups, device.type, numbers_DL, mesh_dim_names=(ROWS, LATENTS))
