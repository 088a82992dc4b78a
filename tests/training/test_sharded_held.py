"""Rows that ranks hold between them, as threads: a shuffle buffer's batches are those of one process to the bit."""

import math

import pytest
import torch
from thread_peers import together

from saevlm_fast.data.mixing import MixingBuffer
from saevlm_fast.data.rows import Activations
from saevlm_fast.errors import ActivationError
from saevlm_fast.training.sharded_held import SharedMixingBuffer, SharedResidentRows
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
            buffer.announce(number % world, len(piece))
            mine = piece if number % world == peers.rank else torch.empty(len(piece), 0)
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


@pytest.mark.parametrize(("world", "replicas"), [(2, 1), (3, 1), (4, 2)])
def test_rows_that_are_dealt_among_devices_are_the_batches_of_the_store(world, replicas):
    x = torch.randn(1001, 5, generator=torch.Generator().manual_seed(0))
    data, rows = Activations.from_tensor(x), torch.arange(0, 1001, 13)

    def work(peers):
        held = SharedResidentRows(data, torch.device("cpu"), peers.ranks)
        return held.batch(rows, whole=False), held.batch(rows, whole=True), len(held.rows_ND)

    found = together(world, work, replicas)[0]
    for rank, (own, whole, _) in enumerate(found):
        assert torch.equal(own, x[rows][cut(len(rows), replicas)[rank // (world // replicas)]])
        assert torch.equal(whole, x[rows])
    sizes = [n for _, _, n in found]
    assert sum(sizes) == 1001
    assert max(sizes) - min(sizes) < 20


def test_a_row_that_is_not_finite_is_named_by_the_rank_that_holds_it():
    x = torch.zeros(1001, 5)
    x[778, 2] = torch.inf
    with pytest.raises(ActivationError, match="row 778"):
        together(3, lambda peers: SharedResidentRows(Activations.from_tensor(x), torch.device("cpu"), peers.ranks))
