"""Rows that ranks hold between them, as threads: a shuffle buffer's batches are those of one process to the bit."""

import math

import pytest
import torch
from thread_peers import together

from saevlm_fast.data.mixing import MixingBuffer
from saevlm_fast.training.sharded_held import SharedMixingBuffer
from saevlm_fast.training.shards import cut

STEPS, BATCH, CAPACITY, WIDTH, FORWARD = 40, 30, 260, 3, 17


def forwards():
    """Some have no row, others as many as they can."""
    sizes = [0 if n % 7 == 3 else FORWARD - n % 5 for n in range(STEPS * BATCH // (FORWARD - 6))]
    return torch.randn(sum(sizes), WIDTH, generator=torch.Generator().manual_seed(0)).half().split(sizes)


@pytest.mark.parametrize(("world", "replicas"), [(2, 1), (3, 1), (3, 3), (4, 2)])
def test_batches_are_those_of_one_buffer_to_the_bit(world, replicas):
    given = STEPS, BATCH, CAPACITY, WIDTH, 5
    pieces = forwards()
    alone = MixingBuffer(*given, dtype=torch.float16)
    wanted = [each for piece in pieces for each in alone.feed(piece)] + list(alone.drain())

    def work(peers):
        buffer = SharedMixingBuffer(peers.ranks, torch.device("cpu"), *given, dtype=torch.float16)
        found, peeked, held = [], [], []
        for number, piece in enumerate(pieces):
            buffer.maker = number % world
            mine = piece if buffer.maker == peers.rank else torch.empty(len(piece), 0)
            for batch in buffer.feed(mine):
                found.append(batch)
                held.append(len(buffer.rows_RD))
                if buffer.step == 4:
                    peeked = [buffer.peek(5), wanted[5]]
        return found + list(buffer.drain()), peeked, torch.cat(list(buffer.last_rows(50))), max(held)

    for rank, (found, peeked, last, most) in enumerate(together(world, work, replicas)[0]):
        rows = cut(BATCH, replicas)[rank // (world // replicas)]
        assert all(torch.equal(ours, theirs[rows]) for ours, theirs in zip(found, wanted, strict=True))
        assert torch.equal(*peeked)
        assert torch.equal(last, torch.cat(list(alone.last_rows(50))))
        fair = alone.n_places / world
        assert most <= fair + FORWARD + 4 * math.sqrt(fair), "a rank holds its share, and a forward more"
