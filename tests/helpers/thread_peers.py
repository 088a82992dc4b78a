"""Ranks that are threads of one process: training/process_group.py's Peers without torchrun."""

import threading
import time

import torch

from saevlm_fast.peers import Alone, Ranks


class Meeting:
    """What `world` threads tell each other. bytes: what each rank received from others, by kind of collective."""

    def __init__(self, world):
        self.world, self.slots = world, [None] * world
        self.barrier = threading.Barrier(world, timeout=300)
        self.bytes = [{"gather": 0, "exchange": 0, "add_up": 0} for _ in range(world)]

    def along(self, ranks):
        """Some of the ranks among themselves; what they tell each other is counted here."""
        among = Meeting(len(ranks))
        among.bytes = [self.bytes[rank] for rank in ranks]
        return among

    def all(self, rank, x):
        self.slots[rank] = x
        self.barrier.wait()
        found = list(self.slots)
        self.barrier.wait()
        return found


class ThreadPeers:
    timeout = 60.0

    def __init__(self, meeting, rank):
        self.meeting, self.rank, self.world = meeting, rank, meeting.world
        self.ranks = Ranks.of(self)

    def share(self, value=None):
        return self.meeting.all(self.rank, value)[0]

    def collect(self, value):
        return self.meeting.all(self.rank, value)

    def agree(self, *flags):
        return [any(each) for each in zip(*self.meeting.all(self.rank, flags))]

    def to_first(self, x, shapes):
        parts = self.meeting.all(self.rank, x.detach().clone())
        assert [tuple(part.shape) for part in parts] == [tuple(shape) for shape in shapes]
        return parts if self.rank == 0 else None

    def hand_over(self, x, shape, dtype, source, target):
        found = self.meeting.all(self.rank, x.detach().clone())[source]
        assert (tuple(found.shape), found.dtype) == (tuple(shape), dtype)
        return found if self.rank == target else None

    def _count(self, kind, x, share=1):
        self.meeting.bytes[self.rank][kind] += int(x.numel() * x.element_size() * (self.world - 1) * share)

    def gather(self, x):
        self._count("gather", x)
        return torch.stack(self.meeting.all(self.rank, x.clone()))

    def exchange(self, x):
        self._count("exchange", x, 1 / self.world)
        return torch.stack([each[self.rank] for each in self.meeting.all(self.rank, x.clone())])

    def add_up(self, x):
        self._count("add_up", x, 2 / self.world)
        return torch.stack(self.meeting.all(self.rank, x.clone())).sum(0, dtype=x.dtype)


def together(world, work, replicas=1):
    """[work(peers) of every rank], each in a thread. The first failure is raised. peers.ranks: the mesh."""
    meeting, found, failed, parts = Meeting(world), [None] * world, [], world // replicas
    of_latents = [meeting.along(range(d * parts, (d + 1) * parts)) for d in range(replicas)]
    of_rows = [meeting.along(range(part, world, parts)) for part in range(parts)]

    def run(rank):
        try:
            peers, (replica, part) = ThreadPeers(meeting, rank), divmod(rank, parts)
            if replicas > 1:
                latents = ThreadPeers(of_latents[replica], part) if parts > 1 else Alone()
                peers.ranks = Ranks(peers, latents, ThreadPeers(of_rows[part], replica))
            found[rank] = work(peers)
        except BaseException as error:
            failed.append(error)
            time.sleep(0.2)  # whom the barrier has just let go on does so
            for each in (meeting, *of_latents, *of_rows):
                each.barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in failed:
        if not isinstance(error, threading.BrokenBarrierError):
            raise error
    if failed:
        raise failed[0]
    return found, meeting
