"""The directory of a run: begun, resumed or replaced, with checkpoints and metrics.

    cfg.json, sae_weights.safetensors  the finished SAE, SAELens v6 layout
    metrics.jsonl                      one line a logged step; the last one of a run that diverged has a loss of null
    metrics.jsonl.sha256               of a finished run, as sha256sum writes and checks it
    run.json                           the settings, checked by --resume; sealed (records.py)
    watch.json, tensorboard/           of a run that other programs watch (watch.py)
    checkpoints/step_XXXXXXXX/         the same SAE files as of that step, train_state.safetensors, and
        checkpoint.json                {"n_steps", "n_rows_seen", "files": {name: SHA-256 of each of the three},
                                       "metrics": {"bytes", "sha256"} of metrics.jsonl as it was}; sealed

Runs of before have neither checkpoint.json nor other digests, and are resumed without. Everything is written under a
temporary name and renamed; a checkpoint directory appears whole or not at all. The order of the rows is a function of
(seed, step), so a run that was killed and resumed takes the same steps as one that was not: bit-identical weights on
the CPU. A GPU's checkpoint is copied there (snapshot.py), and goes to the host and to the disk beside the steps that
follow. A run that replaces another has all this in .replacement until its SAE is finished (outputs.py).
"""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from saevlm_fast.errors import Interrupted, first_line, require, while_writing
from saevlm_fast.files import (
    TEMPORARY_PREFIX,
    atomic_directory,
    atomic_write,
    remove,
    remove_leftovers,
    remove_leftovers_of,
    sha256_file,
)
from saevlm_fast.harvesting.stores import HARVEST_FILE
from saevlm_fast.outputs import begin_replacement, is_being_swapped, output_lock, publish, settle, workplace
from saevlm_fast.records import (
    RECORD,
    Fields,
    Kind,
    check_record,
    check_same_settings,
    parse_json,
    read_record,
    whole,
    write_record,
)
from saevlm_fast.sae import CONFIG_FILE, WEIGHTS_FILE, SparseAutoencoder
from saevlm_fast.training.evaluate import Metrics
from saevlm_fast.training.memory import KEPT_CHECKPOINTS, Written, check_disk
from saevlm_fast.training.saved_state import (
    CHECKPOINT_FILE,
    STATE_FILE,
    check_checkpoint,
    checkpoint_record,
    read_state,
    write_state,
)
from saevlm_fast.training.snapshot import Snapshot
from saevlm_fast.training.state import DATA_DIGEST, MONO_DIGEST, TrainingState
from saevlm_fast.training.watch import remove_watched

METRICS_FILE, METRICS_DIGEST_FILE, RUN_FILE, CHECKPOINTS = (
    "metrics.jsonl",
    "metrics.jsonl.sha256",
    "run.json",
    "checkpoints",
)
FILES = (CONFIG_FILE, WEIGHTS_FILE, METRICS_FILE, METRICS_DIGEST_FILE, RUN_FILE)  # of a run; the last says it is one
LOSS = "losses/overall_loss"
_LOGGED = Fields({"step": whole()})
_DIVERGED = Fields({"step": whole(), LOSS: Kind("null", lambda value: value is None)})
_LONGEST_LINE = 1 << 16  # bytes, of the log
STORE_FILE = "index.json"  # of a store of activations
_RUN = Fields({"sae": RECORD, "train": RECORD, "data": RECORD}, others=False)
_CHECKPOINTS_A_RUN = 20
_CHECKPOINT_PAUSE = 30.0  # seconds of work that may be lost rather than saved
_CHECKPOINT_COSTS = 20  # work between two checkpoints, in units of what writing one takes: a twentieth of the time


class Cadence:
    """After which steps a checkpoint is written (that of the last step, or of an interrupt, is written anyway).

    At every `every` steps, exactly; or, if that is None, once a twentieth of the run's n_steps, 30 s, and 20 times what
    the last one took have all passed since the last one (or the start, after step `last`). What it costs is thus in
    proportion to what it saves: with the default a kill loses the longest of these three.
    """

    def __init__(self, every: int | None, n_steps: int, last: int):
        self.exact = every is not None
        self.every = every or max(1, n_steps // _CHECKPOINTS_A_RUN)
        self.last, self.took, self.ended = last, 0.0, monotonic()

    def due(self, step: int) -> bool:
        """Whether one is to be written after that step."""
        if self.exact:
            return step % self.every == 0
        pause = max(_CHECKPOINT_PAUSE, _CHECKPOINT_COSTS * self.took)
        return step - self.last >= self.every and monotonic() - self.ended >= pause

    @contextmanager
    def writing(self, step: int) -> Iterator[None]:
        """Around the writing of that step's."""
        start = monotonic()
        yield
        self.last, self.ended = step, monotonic()
        self.took = self.ended - start


class RunDirectory:
    """What a run keeps on disk; methods in the order they happen.

    Args:
        output: the directory. checkpoint_every: as Cadence's `every`.
        resume: continue the run in it. force: replace it, once the new SAE is finished.
        in_group: one of several that are trained together, of which it was told together what may not fit.

    Attributes:
        path: where the run is: `output`, or its replacement while that is made.
    """

    def __init__(self, output: Path, checkpoint_every: int | None, resume: bool, force: bool, in_group: bool = False):
        self.in_group = in_group
        self.output, self.checkpoint_every, self.resume, self.force = output, checkpoint_every, resume, force
        self.path = output
        self._written: Future[None] | None = None  # the checkpoint that is being written beside the steps

    @contextmanager
    def locked(self) -> Iterator[None]:
        """For this process alone. ValueError: another one has it, or it cannot be written."""
        with output_lock(self.output, directory=True):
            try:
                yield
            finally:
                self.wait()

    def used(self) -> bool:
        """Whether a run is there.

        Raises:
            ValueError: one is, and neither resume nor force says what becomes of it; or files of a run's names are
                there that are of no run, which nothing says may be removed; or a store or a harvest is.
        """
        if is_being_swapped(self.output):
            used = True
        else:
            used = _holds_run(self.output)
            names = () if used else (*FILES, CHECKPOINTS, STORE_FILE, HARVEST_FILE)
            foreign = [name for name in names if os.path.lexists(self.output / name)]
            require(
                not foreign,
                f"output: {self.output} holds {', '.join(foreign)}, but no run ({RUN_FILE} says what is one), and "
                "nothing else is replaced; name another directory",
            )
        require(
            not used or self.resume or self.force,
            f"output: {self.output} already holds a run; use --resume to continue or --force to replace",
        )
        return used

    def begin(self, state: TrainingState) -> None:
        """Start, replace or resume (a run killed before it wrote anything starts); refuses to touch a run untold.

        Raises:
            ValueError: the directory is used otherwise, resume meets other settings, other data or a damaged
                checkpoint, or the data is not finite.
        """
        replaces, checkpoint = self.chosen(state)
        if checkpoint is not None:
            load_checkpoint(checkpoint, state)
        else:
            state.initialise()
        # Only now that the data has been read is anything on disk touched: bad data must not cost an older run.
        self.prepared(state, replaces, checkpoint)
        self.cadence = Cadence(self.checkpoint_every, state.config.n_steps, state.stepper.n_steps)

    def chosen(self, state: TrainingState) -> tuple[bool, Path | None]:
        """Whether a run is replaced, and the checkpoint to go on from. ValueError: as `begin`, the data apart."""
        settle(self.output, _remove_run)
        replaces = self.used() and self.force
        self.path = self.output if replaces else workplace(self.output)
        resumed = self.resume and (self.path / RUN_FILE).exists()
        self._settings = state.settings(sampled=resumed and DATA_DIGEST not in read_settings(self.path)["data"])
        if resumed:
            before = state.config.without_removed(read_settings(self.path)["train"], self.path / RUN_FILE)
            train = dict.fromkeys(before) | self._settings["train"]  # also what is not given any more
            asked = self._settings | {"train": train, "data": {MONO_DIGEST: None} | self._settings["data"]}
            check_same_settings(self.path / RUN_FILE, asked, free=("path",))  # data may move
            for name in FILES:  # and no others': a score may be written beside them meanwhile
                remove_leftovers_of(self.path / name)
            remove_leftovers(self.path / CHECKPOINTS)
            self._drop_old()  # a kill may have come before that
        else:
            steps = state.config.n_steps, self.checkpoint_every
            check_disk(self.output, [state.sae_config], *steps, self._written_by(state.device), not self.in_group)
        return replaces, latest_checkpoint(self.path) if self.resume else None

    def _written_by(self, device: torch.device) -> Written:
        return Written.by(device)

    def prepared(self, state: TrainingState, replaces: bool, checkpoint: Path | None) -> None:
        """Settings and metrics as the steps that follow need them. ValueError: metrics that were altered."""
        if checkpoint is not None:
            check_metrics(self.path, checkpoint)
            (self.path / METRICS_DIGEST_FILE).unlink(missing_ok=True)  # before the log that it is of is cut
            self._truncate_metrics(state.stepper.n_steps)
        if replaces:
            self.path = begin_replacement(self.output)
        if not (self.path / RUN_FILE).exists():
            write_record(self.path / RUN_FILE, self._settings)
        if checkpoint is None:
            (self.path / METRICS_FILE).unlink(missing_ok=True)
        (self.path / METRICS_DIGEST_FILE).unlink(missing_ok=True)

    def _truncate_metrics(self, n_steps: int) -> None:
        """Drop logged steps after that one, which a resumed run is about to repeat."""
        path = self.path / METRICS_FILE
        if not path.is_file():
            return
        kept, logged = [], path.read_text(encoding="utf-8", errors="replace")
        for line in logged.splitlines():
            try:
                record = parse_json(line.encode(), path)
                check_record(record, _LOGGED, path, ValueError)
            except ValueError:
                break  # the line that was being written when the run was killed
            if record.get("step", math.inf) <= n_steps and not any(key.startswith("eval/") for key in record):
                kept.append(line + "\n")
        if "".join(kept) != logged:
            with atomic_write(path) as temporary:
                temporary.write_text("".join(kept))

    def log(self, step: int, metrics: Metrics) -> None:
        """Append one line of strict JSON to metrics.jsonl; what is not a number (the variance of one row) is null."""
        finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        path = self.path / METRICS_FILE
        with self.writing("the log", path), open(path, "a") as file:
            file.write(json.dumps({"step": step, **finite}, allow_nan=False) + "\n")

    def after_step(self, state: TrainingState, interrupted: bool) -> None:
        """Write a checkpoint if one is due.

        Raises:
            ValueError: NaN or inf in the loss or the weights: no checkpoint is written.
            Interrupted: after the checkpoint, if `interrupted`.
        """
        step = state.stepper.n_steps
        last = step == state.config.n_steps
        if self.cadence.due(step) or last or interrupted:
            state.check_loss(self.diverged)
            with self.cadence.writing(step):
                self.checkpoint(state)
        if last or interrupted:
            self.wait()
        if interrupted:
            raise Interrupted(f"interrupted after step {step}; continue with --resume --output {self.output}")

    def checkpoint(self, state: TrainingState) -> None:
        """Write checkpoints/step_N whole, then drop all but the newest two.

        A GPU's is copied there, and goes to the host and to the disk beside the steps that follow: `wait` waits for
        it, and raises what went wrong. One is written at a time.
        """
        self.wait()
        stepper = state.stepper
        final = self.path / CHECKPOINTS / f"step_{stepper.n_steps:08d}"
        if final.exists():
            return
        tensors, sae = state.checked_tensors(self.diverged), state.export()
        counts = {"n_steps": stepper.n_steps, "n_rows_seen": stepper.n_rows_seen}
        if self._written_by(state.device) is not Written.BESIDE_STEPS:  # a CPU has the steps to do
            now = {name: tensor.cpu() for name, tensor in tensors.items()}, sae.cpu()
            self._write(final, lambda: now, counts, self._metrics_so_far())
            return
        write = partial(self._write, final, Snapshot(tensors, sae).on_host, counts, self._metrics_so_far())
        with_one_thread = ThreadPoolExecutor(1, "checkpoint")
        self._written = with_one_thread.submit(write)
        with_one_thread.shutdown(wait=False)

    def wait(self) -> None:
        """Until no checkpoint is being written. OSError: it could not be."""
        if self._written is not None:
            try:
                self._written.result()
            finally:
                self._written = None if self._written.done() else self._written  # Ctrl-C: it goes on

    def _write(
        self,
        final: Path,
        on_host: Callable[[], tuple[dict[str, Tensor], SparseAutoencoder]],
        counts: dict[str, int],
        metrics: dict[str, Any],
    ) -> None:
        tensors, sae = on_host()
        final.parent.mkdir(parents=True, exist_ok=True)
        with self.writing(f"the checkpoint {final.name}"), atomic_directory(final) as directory:
            sae.save_pretrained(directory)
            files = {STATE_FILE: write_state(directory / STATE_FILE, tensors, counts)}
            files |= {name: sha256_file(directory / name) for name in (CONFIG_FILE, WEIGHTS_FILE)}
            write_record(directory / CHECKPOINT_FILE, counts | {"files": files, "metrics": metrics})
        self._drop_old()

    def _drop_old(self) -> None:
        for old in checkpoints(self.path)[:-KEPT_CHECKPOINTS]:
            doomed = old.with_name(TEMPORARY_PREFIX + old.name)  # a kill must not leave half a checkpoint by this name
            old.rename(doomed)
            shutil.rmtree(doomed)

    def kept(self) -> str:
        """What is left of the run if it ends now."""
        self.wait()
        last = latest_checkpoint(self.path)
        return (
            f"the last good checkpoint is {last}"
            if last
            else "no checkpoint had been written; force (--force) replaces it"
        )

    def diverged(self, step: int) -> str:
        """What is left of a run whose loss or weights are no numbers after that step, which is its log's last line; if
        there is no room for the line, that too. What ended the run is told in any case."""
        untold = ""
        try:
            self._truncate_metrics(step - 1)  # weights are looked at after the step's line has been written
            self.log(step, {LOSS: math.nan})
        except OSError as error:
            untold = f"; {METRICS_FILE} does not say so ({first_line(error)})"
        with suppress(OSError):  # of the checkpoint that was being written
            self.wait()
        return self.kept() + untold

    def writing(self, what: str, path: Path | None = None) -> AbstractContextManager[None]:
        """Around what is written: a full disk leaves the newest checkpoint."""
        last = latest_checkpoint(self.path)
        kept = f"{last} is whole, from which resume (--resume) goes on once there is room" if last else ""
        return while_writing(what, kept or "no checkpoint had been written", path)

    def _metrics_so_far(self) -> dict[str, Any]:
        """What the checkpoint remembers of the log, which must then be on the disk as well."""
        logged = b""
        if (self.path / METRICS_FILE).is_file():
            with open(self.path / METRICS_FILE, "rb") as file:
                logged = file.read()
                os.fsync(file.fileno())
        return {"bytes": len(logged), "sha256": hashlib.sha256(logged).hexdigest()}

    def save(self, sae: SparseAutoencoder) -> None:
        """The finished SAE; what the run replaces is removed."""
        with self.writing("the finished SAE"):
            sae.save_pretrained(self.path)
        if self.path != self.output:
            publish(self.output, _remove_run)
            self.path = self.output

    def finish(self, step: int, metrics: Metrics) -> None:
        """Log the evaluation, after which nothing is logged any more."""
        self.log(step, metrics)
        with atomic_write(self.path / METRICS_DIGEST_FILE) as temporary:
            temporary.write_text(f"{sha256_file(self.path / METRICS_FILE)}  {METRICS_FILE}\n", encoding="utf-8")

    def saved(self) -> str:
        """What has become of the finished SAE."""
        return f"the SAE is finished and saved in {self.output}"


def _holds_run(output: Path) -> bool:
    """Whether a run of ours is there, finished or not: it wrote its settings before all else."""
    try:
        settings = json.loads((output / RUN_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(settings, dict) and {"sae", "train", "data"} <= settings.keys()


def _remove_run(output: Path) -> None:
    """What a run wrote, and nothing else that lies there."""
    directory = output / CHECKPOINTS
    if directory.is_symlink():
        directory.unlink()  # never what it leads to
    else:
        remove_leftovers(directory)
        for checkpoint in checkpoints(output):
            remove(checkpoint)
        with suppress(OSError):  # not there, or not empty
            directory.rmdir()
    remove_watched(output)
    for name in FILES:
        (output / name).unlink(missing_ok=True)


def read_settings(output: Path) -> dict[str, Any]:
    """The settings of a run. ValueError: run.json is missing, damaged or altered."""
    return read_record(output / RUN_FILE, _RUN)


def load_checkpoint(checkpoint: Path, state: TrainingState) -> None:
    """The state goes on from a checkpoint. ValueError: it is damaged, or cannot be of this run."""
    try:
        counts = check_checkpoint(checkpoint, *state.latents)
        state.load(read_state(checkpoint, state.device, *state.latents), *counts)
    except (torch.OutOfMemoryError, MemoryError, PermissionError):
        raise  # no fault of the checkpoint
    except (SafetensorError, OSError, KeyError, TypeError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"resume: {checkpoint} is damaged, delete it to resume from the one before ({first_line(error)})"
        ) from error


def check_metrics(output: Path, checkpoint: Path | None) -> None:
    """That metrics.jsonl begins as it did at that checkpoint and, of a finished run, ends as it did.

    Raises:
        ValueError: it was altered. One that is gone is not missed: it decides nothing.
    """
    path, digest_file = output / METRICS_FILE, output / METRICS_DIGEST_FILE
    if not path.is_file():
        return
    logged, advice = path.read_bytes(), "move it away to go on without it"
    record = checkpoint_record(checkpoint) if checkpoint else None
    if record is not None:
        n_bytes, digest = record["metrics"]["bytes"], record["metrics"]["sha256"]
        same = hashlib.sha256(logged[:n_bytes]).hexdigest() == digest
        require(same, f"{path}: altered, its SHA-256 up to that step is not the one in {checkpoint}; {advice}")
    if digest_file.is_file():
        same = digest_file.read_bytes() == f"{hashlib.sha256(logged).hexdigest()}  {METRICS_FILE}\n".encode()
        require(same, f"{path}: altered, its SHA-256 is not the one in {digest_file.name}; {advice}")


def diverged_at(output: Path) -> int | None:
    """The step after which a run's loss or weights were no numbers, by the last line of its log; None if they are."""
    path = output / METRICS_FILE
    if not path.is_file():
        return None
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - _LONGEST_LINE))
        lines = file.read().splitlines()
    with suppress(ValueError, IndexError):
        record = parse_json(lines[-1], path)
        check_record(record, _DIVERGED, path, ValueError)
        return int(record["step"])
    return None


def checkpoints(output: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    return sorted((Path(output) / CHECKPOINTS).glob("step_" + "[0-9]" * 8))


def latest_checkpoint(output: Path) -> Path | None:
    """The newest complete checkpoint of a run, if any."""
    found = checkpoints(output)
    return found[-1] if found else None
