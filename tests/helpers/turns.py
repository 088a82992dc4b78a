"""Ranks that are threads of which one works at a time: Triton's interpreter is for one thread."""

import threading
from contextlib import contextmanager

from thread_peers import together


class TakingTurns:
    """What ranks tell each other; meanwhile others work."""

    def __init__(self, peers, turn):
        self.peers, self.turn, self.rank, self.world = peers, turn, peers.rank, peers.world

    @contextmanager
    def _others_turn(self):
        self.turn.release()
        try:
            yield
        finally:
            self.turn.acquire()

    def gather(self, x):
        with self._others_turn():
            return self.peers.gather(x)

    def exchange(self, x):
        with self._others_turn():
            return self.peers.exchange(x)

    def add_up(self, x):
        with self._others_turn():
            return self.peers.add_up(x)


def taking_turns(world, work):
    """[work(peers) of every rank]."""
    turn = threading.Lock()

    def in_turn(peers):
        with turn:
            return work(TakingTurns(peers, turn))

    return together(world, in_turn)[0]
