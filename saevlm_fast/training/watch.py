"""Watching a run from elsewhere: what it logs goes to other programs too (loggers.py), and none of them can stop it.

A package that is not installed is refused before the run begins. Whatever goes wrong with a logger later is a warning,
once: it is left out from then on, and the run goes on. Each is at work in a thread of its own (beside.py): steps never
wait for it. It is waited for at the start, before the run's directory moves and at the end, for a minute at most; one
that gives no answer then is left out of all runs that are under way. metrics.jsonl is not of these: it is part of the
run, the same to the byte whether that was interrupted or not, and so holds no rates and no memory.

    watch.json  {"name"}: by which the loggers know the run again when it is resumed; sealed (records.py)
"""

import hashlib
import os
import re
import secrets
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any, Self

import torch

from saevlm_fast import __version__
from saevlm_fast.errors import Interrupted, doubt, first_line
from saevlm_fast.outputs import REPLACEMENT
from saevlm_fast.records import TEXT, Fields, read_record, write_record
from saevlm_fast.training import beside
from saevlm_fast.training.beside import Beside, quiet_stdout
from saevlm_fast.training.evaluate import Metrics
from saevlm_fast.training.loggers import EVENTS, LOGGERS, TENSORBOARD_FOLDER, Identity, Logger, imported

if TYPE_CHECKING:
    from PIL.Image import Image

WATCH_FILE, PICTURE = "watch.json", "contact_sheet"
_LONGEST_NAME = 60
_WATCH = Fields({"name": TEXT}, others=False)

_open: "list[Watch]" = []


class Watch:
    """The loggers of one run.

    with Watch(options.log_to) as watch:
        watch.begin(...)
        watch.log(step, metrics)

    Args:
        names: of loggers; jsonl is none of them. Of several processes of a run the first alone logs.

    Raises:
        ValueError: a package is not installed, with what to install.
    """

    def __init__(self, names: Sequence[str]):
        first = os.environ.get("RANK", "0") == "0"
        self._names = [name for name in names if name in LOGGERS and first]
        for name in self._names:
            imported(name)
        self._loggers: dict[str, Beside[Logger]] = {}
        self._since: tuple[int, int, float] | None = None
        self._device = torch.device("cpu")
        self._quiet, self._is_closing = ExitStack(), False
        self._group: str | None = None

    def __enter__(self) -> Self:
        if self._names:
            self._quiet.enter_context(quiet_stdout())
            _open.append(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._quiet:
            try:
                failed = kind is not None and not issubclass(kind, Interrupted)
                for watch in [self] if self._group is None else list(_open):
                    if watch._group == self._group:  # they end at once, so that their waits do not add up
                        watch._close(failed)
                self._settle()
            finally:
                for name in list(self._loggers):
                    self._loggers.pop(name).leave()
                if self in _open:
                    _open.remove(self)

    def _close(self, failed: bool) -> None:
        if not self._is_closing:
            self._each(lambda logger: logger.close(failed), "the end")
        self._is_closing = True

    def begin(
        self,
        directory: Callable[[], Path | None],
        n_steps: int,
        config: Mapping[str, Any],
        device: torch.device,
        called: str = "",
        group: str | None = None,
    ) -> None:
        """After n_steps steps (0 unless the run is resumed).

        directory: where the run is now; it may move. config: its settings. called: what its name begins with, that of
        the directory if it is empty. group: what several runs of one command have in common.
        """
        if not self._names:
            return
        self._device, self._group = device, group
        said = {**config, "saevlm_fast": __version__, **({} if group is None else {"group": group})}
        run = Identity(self._identity(directory(), called), n_steps, said, directory, group)
        for name in list(self._names):
            self._loggers[name] = Beside(name, partial(LOGGERS[name], run))
            self._settle()  # it may ask for a login

    def _identity(self, directory: Path | None, called: str) -> str:
        """The name of the run, which is kept beside it."""
        if directory is not None and (directory / WATCH_FILE).exists():
            try:
                return str(read_record(directory / WATCH_FILE, _WATCH)["name"])
            except (ValueError, OSError) as error:
                doubt(f"log_to: {first_line(error)}; the run goes on under another name")
        words = _words(called or _place(directory).name)
        name = f"{words}-{secrets.token_hex(4)}"
        if directory is not None:
            write_record(directory / WATCH_FILE, {"name": name})
        return name

    def log(self, step: int, metrics: Metrics) -> None:
        """What was measured after a step, and how the machine does."""
        if self._loggers:
            values = metrics | self._system(step, int(metrics.get("details/n_training_samples", 0)))
            self._each(lambda logger: logger.log(step, values), f"step {step}")

    def pause(self) -> None:
        """The run's directory is about to move."""
        self._each(lambda logger: logger.pause(), "the end of the steps")
        self._settle()

    def finish(self, step: int, metrics: Metrics, picture: "Callable[[], Image | None]") -> None:
        """The evaluation of the finished SAE, and a picture of it, which is only made if somebody looks at it. Nothing
        comes after it."""
        self._each(lambda logger: logger.log(step, metrics), "the evaluation")
        try:
            image = picture() if self._loggers else None
        except Exception as error:
            doubt(f"log_to: no contact sheet could be made ({first_line(error)})")
            image = None
        if image is not None:
            self._each(lambda logger: logger.picture(step, PICTURE, image), "the contact sheet")
        self._close(failed=False)  # and waited for at the end: those of several runs end at once

    def _each(self, act: Callable[[Logger], None], when: str) -> None:
        for logger in list(self._loggers.values()):  # a run in another thread may leave one
            logger.tell(when, act)
        self._hear()

    def _settle(self) -> None:
        """Waits for all of them. Who does not want to wait (Ctrl-C) waits for none of them any more."""
        deadline = monotonic() + beside.PATIENCE_SECONDS
        asked = {name: logger.asked() for name, logger in self._loggers.items()}
        try:
            for name, done in asked.items():
                self._loggers[name].settle(done, deadline)
        finally:
            self._hear()
            silent = [name for name, done in asked.items() if not done.is_set()]
            for watch in list(_open) if silent else ():
                watch._names = [name for name in watch._names if name not in silent]
                for name in silent:
                    watch._leave(name)

    def _hear(self) -> None:
        """What went wrong in somebody else's code must not cost the run."""
        for name, logger in list(self._loggers.items()):
            if logger.failure is not None:
                self._leave(name)
                doubt(f"log_to: {name} {logger.failure}; the run goes on without it")

    def _leave(self, name: str) -> None:
        if name in self._loggers:
            self._loggers.pop(name).leave()

    def _system(self, step: int, n_rows_seen: int) -> Metrics:
        """Rates since the last call, memory of the process, and of the GPU if there is one."""
        now, gib = monotonic(), 1 << 30
        found = {"system/memory_gib": process_bytes() / gib}
        if self._since is not None and now > (before := self._since)[2]:
            found["system/steps_per_second"] = (step - before[0]) / (now - before[2])
            found["system/rows_per_second"] = (n_rows_seen - before[1]) / (now - before[2])
        self._since = step, n_rows_seen, now
        if self._device.type == "cuda":
            free, total = torch.cuda.mem_get_info(self._device)
            found["system/gpu_memory_gib"] = (total - free) / gib
            found["system/gpu_peak_allocated_gib"] = torch.cuda.max_memory_allocated(self._device) / gib
            with suppress(Exception):  # needs nvidia-ml-py or amdsmi
                found["system/gpu_utilisation_percent"] = float(torch.cuda.utilization(self._device))
        return found


def remove_watched(output: Path) -> None:
    """What loggers wrote into the directory of a run, and nothing else that lies there."""
    (output / WATCH_FILE).unlink(missing_ok=True)
    folder = output / TENSORBOARD_FOLDER
    if folder.is_symlink():
        folder.unlink()
    elif folder.is_dir():
        for file in folder.glob(EVENTS):
            file.unlink()
        with suppress(OSError):  # not empty
            folder.rmdir()


def process_bytes() -> int:
    """Memory of this process that is resident; of systems that do not say, the most that it has been."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        import resource  # not on Windows

        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else 1024 * most


def group_of(output: Path | None) -> str:
    """What the runs below one directory have in common, the same when they are resumed."""
    if output is None:
        return f"grid-{secrets.token_hex(4)}"
    digest = hashlib.sha256(os.fsencode(output.absolute())).hexdigest()
    return f"{_words(output.absolute().name)}-{digest[:8]}"


def _words(text: str) -> str:
    """As it may stand in the name of a run."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", text)[:_LONGEST_NAME] or "run"


def _place(directory: Path | None) -> Path:
    """The directory that users know a run by: not its replacement in it."""
    if directory is None:
        return Path("run")
    resolved = directory.absolute()
    return resolved.parent if resolved.name == REPLACEMENT else resolved
