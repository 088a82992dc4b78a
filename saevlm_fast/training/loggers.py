"""Where a run's metrics go beside metrics.jsonl: TensorBoard, Trackio, Weights & Biases, each behind the same methods.

Where they send things, whose account it is and whether they are online is their own affair: WANDB_MODE, WANDB_API_KEY,
TRACKIO_SPACE_ID, HF_TOKEN and so on. Nothing of that is read or written here.
"""

import contextvars
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from saevlm_fast.errors import first_line
from saevlm_fast.training.evaluate import Metrics

if TYPE_CHECKING:
    from PIL.Image import Image

TENSORBOARD_FOLDER, EVENTS = "tensorboard", "events.out.tfevents.*"
PROJECT = "saevlm-fast"
_MODULES = {"tensorboard": "torch.utils.tensorboard", "trackio": "trackio", "wandb": "wandb"}


class Logger(Protocol):
    """One of them, for one run."""

    def log(self, step: int, metrics: Metrics) -> None:
        """What was measured after a step."""

    def picture(self, step: int, name: str, image: "Image") -> None:
        """An image that belongs to the run as of that step."""

    def pause(self) -> None:
        """The run's directory is about to be renamed: no file in it may be open."""

    def close(self, failed: bool) -> None:
        """The run is over, or is interrupted. failed: by an error."""


class Identity:
    """Of a run, the same when it is resumed.

    Attributes:
        name: also the id that Weights & Biases knows it by. n_steps: steps that are done already.
        config: its settings. directory: where it is now; None of one that is kept nowhere.
        group: what the runs of one command have in common, if there are several.
    """

    def __init__(
        self,
        name: str,
        n_steps: int,
        config: Mapping[str, Any],
        directory: Callable[[], Path | None],
        group: str | None = None,
    ):
        self.name, self.n_steps, self.config, self.directory, self.group = name, n_steps, config, directory, group


def imported(name: str) -> Any:
    """The module of a logger. ValueError: it cannot be imported, with what to install."""
    try:
        with redirect_stdout(sys.stderr):
            return import_module(_MODULES[name])
    except Exception as error:  # a package that is half there fails in ways of its own
        advice = "pip install 'saevlm-fast[watch]'"
        raise ValueError(f"log_to: {name} cannot be imported ({first_line(error)}): {advice}") from error


class TensorBoard:
    """Event files in the run's directory, under tensorboard/."""

    def __init__(self, run: Identity):
        self._writer_class = imported("tensorboard").SummaryWriter
        self._run, self._writer = run, None
        # Of an interrupted run what came after its last checkpoint is hidden: these steps are taken again.
        self._open(purge_step=run.n_steps + 1).add_text("config", _as_markdown(run.config), run.n_steps)

    def _open(self, purge_step: int | None = None) -> Any:
        if self._writer is None:
            directory = self._run.directory()
            assert directory is not None  # RunOptions has seen to it
            folder = directory / TENSORBOARD_FOLDER
            _wait_for_a_later_name(folder)
            self._writer = self._writer_class(str(folder), purge_step=purge_step, flush_secs=10)
        return self._writer

    def log(self, step: int, metrics: Metrics) -> None:
        writer = self._open()
        for name, value in metrics.items():
            writer.add_scalar(name, value, step)

    def picture(self, step: int, name: str, image: "Image") -> None:
        import numpy as np

        self._open().add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def pause(self) -> None:
        if self._writer is not None:
            self._writer.close()  # it opens its file by name at every flush
            self._writer = None

    def close(self, failed: bool) -> None:
        self.pause()


def _wait_for_a_later_name(folder: Path) -> None:
    """A second at most: TensorBoard reads files by name, and hides steps that go back.

    A name is the second of the file, and then a count: of two of one second, ".10" comes before ".9".
    """
    while any(folder.glob(EVENTS.replace("*", f"{int(time.time())}.*"))):
        time.sleep(0.05)


class Trackio:
    """A run of trackio's, on this machine unless its environment names a Space; TRACKIO_PROJECT names the project."""

    def __init__(self, run: Identity):
        self._trackio = imported("trackio")
        # init keeps its run as the current one and ends the one before: here several may be at work at once.
        self._run = contextvars.copy_context().run(
            self._trackio.init,
            project=os.environ.get("TRACKIO_PROJECT", PROJECT),
            name=run.name,
            group=run.group,
            resume="allow",
            config=json.loads(json.dumps(run.config, default=str)),
            embed=False,
        )
        self._logged = getattr(self._run, "_next_step", 0) - 1  # the last step that an interrupted run had logged

    def log(self, step: int, metrics: Metrics) -> None:
        if step > self._logged or _is_evaluation(metrics):
            self._run.log(dict(metrics), step=step)

    def picture(self, step: int, name: str, image: "Image") -> None:
        self._run.log({name: self._trackio.Image(image)}, step=step)

    def pause(self) -> None:
        pass

    def close(self, failed: bool) -> None:
        self._run.finish()


class WandB:
    """A run of wandb's; WANDB_PROJECT names the project, WANDB_MODE=offline keeps it on this machine."""

    def __init__(self, run: Identity):
        self._wandb = imported("wandb")
        self._run = self._wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=run.name,
            name=run.name,
            group=run.group,
            resume="allow",
            config=json.loads(json.dumps(run.config, default=str)),
            reinit="create_new",
            settings=self._wandb.Settings(console="off"),  # progress bars would be thousands of lines
        )

    def log(self, step: int, metrics: Metrics) -> None:
        # It refuses steps before its last one; an interrupted run takes some of them again, with the same metrics.
        if _is_evaluation(metrics):
            self._run.summary.update(dict(metrics))
        elif step >= self._run.step:
            self._run.log(dict(metrics), step=step)

    def picture(self, step: int, name: str, image: "Image") -> None:
        self._run.log({name: self._wandb.Image(image)}, step=max(step, self._run.step))

    def pause(self) -> None:
        pass

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


LOGGERS: dict[str, Callable[[Identity], Logger]] = {"tensorboard": TensorBoard, "trackio": Trackio, "wandb": WandB}


def _is_evaluation(metrics: Metrics) -> bool:
    """Whether these are of the finished SAE, which belong to a step that was logged before."""
    return any(name.startswith("eval/") for name in metrics)


def _as_markdown(config: Mapping[str, Any]) -> str:
    """Indented, which TensorBoard shows as it stands."""
    text = json.dumps(config, indent=2, default=str)
    return "\n".join(f"    {line}" for line in text.splitlines())
