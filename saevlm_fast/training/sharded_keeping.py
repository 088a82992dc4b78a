"""The first epoch of a shared pass as a harvest on the disk: the units are dealt among ranks, each written by one.

A forward's rows are handed by the rank that made them to the one that writes their unit, by way of the host.

Shape suffixes: M rows of a forward, D width.
"""

from saevlm_fast.harvesting.forward import on_host
from saevlm_fast.harvesting.stores import BatchRows, UnitPieces
from saevlm_fast.harvesting.stream import Keeping, TowerStream
from saevlm_fast.training.one_pass import rows_of
from saevlm_fast.training.process_group import MeshPeers


class SharedKeeping(Keeping):
    """Keeping of all ranks, which call its methods at once: unit u is written by rank u mod R. Of rows that another
    rank has made, what is said of them is known, and values are [M, 0]."""

    def __init__(self, stream: TowerStream, peers: MeshPeers):
        self.peers = peers
        super().__init__(stream)

    def _open(self) -> None:
        """Rank 0 finds the place and prepares it; then each rank has its own part of every store's index.

        ValueError: as Keeping's; a rank does not see what rank 0 has prepared.
        """
        if self.peers.rank == 0:
            super()._open()
        self.peers.agree(True)
        if self.peers.rank > 0:
            self.stores.check_prepared(self.peers.rank)

    @property
    def _part(self) -> int | None:
        return self.peers.rank

    def _writes(self, unit: int) -> bool:
        return unit % self.peers.world == self.peers.rank

    def _held(self, number: int, rows: list[BatchRows]) -> list[BatchRows]:
        """On the host of the rank that writes them; nothing elsewhere."""
        unit, maker = number // self.per_unit, number % self.peers.world
        writer, dtype, found = unit % self.peers.world, self.stream.config.torch_store_dtype, []
        for store, each in zip(self.plan.stores, rows):
            shape = len(each.image_of_row), store.width
            if maker == writer:
                found.append(on_host(each))
                continue
            values_MD = self.peers.hand_over(rows_of(each), shape, dtype, maker, writer)
            if values_MD is not None:
                found.append(each._replace(values=values_MD))
        return found if self._writes(unit) else []

    def _write(self, unit: int, pieces: UnitPieces) -> None:
        if self._writes(unit):
            super()._write(unit, pieces)

    def _finish(self) -> None:
        """By rank 0, once all have written theirs; nobody goes on before it has."""
        self.peers.agree(True)
        if self.peers.rank == 0:
            super()._finish()
        self.peers.agree(True)
