"""The directory of a run of several ranks: as checkpoints.py has it, but each rank writes its part of a checkpoint.

    checkpoints/step_XXXXXXXX/train_state_RRRR_of_RRRR.safetensors   of each rank
    checkpoints/step_XXXXXXXX/checkpoint.json                        their digests; sealed

The directory gets its name, in one rename by rank 0, when all of it is on the disk. It holds no SAE of its own: whoever
needs that resumes. Rank 0 does everything else as one process does, so that any number of ranks, one among them, goes
on with what any other has left. All ranks need the same disk.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from saevlm_fast.errors import Interrupted, require
from saevlm_fast.files import atomic_directory
from saevlm_fast.records import write_record
from saevlm_fast.sae import SparseAutoencoder
from saevlm_fast.training.checkpoints import CHECKPOINTS, RUN_FILE, Cadence, RunDirectory, load_checkpoint
from saevlm_fast.training.evaluate import Metrics
from saevlm_fast.training.memory import Written
from saevlm_fast.training.process_group import MeshPeers
from saevlm_fast.training.saved_state import CHECKPOINT_FILE, shard_file, write_state
from saevlm_fast.training.sharded_state import ShardedState
from saevlm_fast.training.state import TrainingState


class SharedRunDirectory(RunDirectory):
    """What a run keeps on disk, for all of its ranks: they call the same methods."""

    def __init__(
        self,
        output: Path,
        checkpoint_every: int | None,
        resume: bool,
        force: bool,
        peers: MeshPeers,
        in_group: bool = False,
    ):
        super().__init__(output, checkpoint_every, resume, force, in_group)
        self.peers, self.leads = peers, peers.rank == 0

    def _written_by(self, device: torch.device) -> Written:
        return Written.BY_RANKS

    @contextmanager
    def locked(self) -> Iterator[None]:
        """By rank 0 for all."""
        with super().locked() if self.leads else nullcontext():
            yield

    def begin(self, state: TrainingState) -> None:
        """As of one process. ValueError: also ranks that do not read the same data, or do not see the same disk."""
        assert isinstance(state, ShardedState)
        state.check_same_data()
        replaces, checkpoint = self.peers.share(self.chosen(state) if self.leads else None)
        if checkpoint is not None:
            self._check_seen(checkpoint)
            load_checkpoint(checkpoint, state)
            state.loaded()
        else:
            state.initialise()
        self.peers.agree(True)  # nothing on disk is touched before every rank has read its data
        if self.leads:
            self.prepared(state, replaces, checkpoint)
        self.path = self.peers.share(self.path)
        self._check_seen(self.path / RUN_FILE)
        self.cadence = Cadence(self.checkpoint_every, state.config.n_steps, state.stepper.n_steps)

    def _check_seen(self, path: Path) -> None:
        seen = self.peers.collect(path.exists())
        blind = ", ".join(str(rank) for rank, sees in enumerate(seen) if not sees)
        require(not blind, f"output: {path}, which rank 0 has, is not there for rank {blind}; all need the same disk")

    def log(self, step: int, metrics: Metrics) -> None:
        if self.leads:
            super().log(step, metrics)

    def diverged(self, step: int) -> str:
        """As of one process; rank 0 has the log."""
        return super().diverged(step) if self.leads else self.kept()

    def after_step(self, state: TrainingState, interrupted: bool) -> None:
        """Write a checkpoint if rank 0's clock says so, or any rank was interrupted: all stop after the same step.

        Raises:
            ValueError, Interrupted: as of one process.
        """
        step = state.stepper.n_steps
        last = step == state.config.n_steps
        interrupted, due = self.peers.agree(interrupted, self.leads and self.cadence.due(step))
        if due or last or interrupted:
            state.check_loss(self.diverged)
            with self.cadence.writing(step):
                self.checkpoint(state)
        if interrupted:
            raise Interrupted(f"interrupted after step {step}; continue with --resume --output {self.output}")

    def checkpoint(self, state: TrainingState) -> None:
        """Every rank's part, then the directory's name, then all but the newest two are dropped."""
        stepper = state.stepper
        final = self.path / CHECKPOINTS / f"step_{stepper.n_steps:08d}"
        if self.peers.share(final.exists()):
            return
        tensors = state.checked_tensors(self.diverged)
        counts = {"n_steps": stepper.n_steps, "n_rows_seen": stepper.n_rows_seen}
        if not self.leads:
            self._write_part(self.peers.share(), tensors, counts, state)
        else:
            final.parent.mkdir(parents=True, exist_ok=True)
            with self.writing(f"the checkpoint {final.name}"), atomic_directory(final) as directory:
                self.peers.share(directory)
                shards = self._write_part(directory, tensors, counts, state)
                record = counts | {"shards": shards, "metrics": self._metrics_so_far()}
                write_record(directory / CHECKPOINT_FILE, record)
            self._drop_old()
        self.peers.agree(True)  # nobody goes on, or ends, before it has its name

    def _write_part(
        self, directory: Path, tensors: dict[str, Any], counts: dict[str, int], state: TrainingState
    ) -> list[dict[str, Any]]:
        """What checkpoint.json says of every rank's file, when all are written.

        OSError: a rank could not write its own, on all of them: none goes on, or removes the directory, before all have
            ended.
        """
        file, digest, said = shard_file(self.peers.rank, self.peers.world), "", ""
        try:
            with self.writing("its part of a checkpoint"):
                digest = write_state(directory / file, {name: t.cpu() for name, t in tensors.items()}, counts)
        except OSError as error:
            said = str(error)
        start, stop = state.latents
        told = self.peers.collect(({"file": file, "start": start, "stop": stop, "sha256": digest}, said))
        for rank, (_, met) in enumerate(told):
            if met:
                raise OSError(f"rank {rank}: {met}")
        shards = [shard for shard, _ in told]
        return sorted(shards, key=lambda shard: int(shard["start"]))  # replicas have theirs between those of others

    def save_whole(self, sae: SparseAutoencoder | None) -> None:
        """The finished SAE, which rank 0 has."""
        if sae is not None:
            self.save(sae)
        self.path = self.output

    def finish(self, step: int, metrics: Metrics) -> None:
        if self.leads:
            super().finish(step, metrics)
