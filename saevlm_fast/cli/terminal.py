"""What a person sees: the consoles, one kind of progress bar, tables, and the JSON that a program reads instead."""

import json
import math
import os
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Self

from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column, Table

from saevlm_fast.errors import Doubt, printable
from saevlm_fast.urls import redacted_text

SECONDS_A_LINE = 5.0


class _Console(Console):
    """Keeps quiet, and lets the work go on, when who reads the output has gone (a pager, `head`)."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), self.file.fileno())  # else Python would fail on it again when it ends


# No markup and no emoji: a path may hold [brackets] and :tram:.
out, err = _Console(markup=False, emoji=False), _Console(stderr=True, markup=False, emoji=False)
_results = _Console(markup=False, emoji=False)


@contextmanager
def for_a_program(wanted: bool) -> Iterator[None]:
    """Nothing on stdout but what `print_json` prints. Progress is shown on stderr, if that is a terminal."""
    out.quiet = wanted
    try:
        yield
    finally:
        out.quiet = False


def print_json(value: Any) -> None:
    """One JSON object on stdout; NaN and infinities are null."""
    text = json.dumps(_strict(value), indent=2, ensure_ascii=False, allow_nan=False, default=str)
    _results.print(text, highlight=False, soft_wrap=True)


def shown(text: str) -> str:
    """A text as a person may have it: in characters that a terminal takes, and no secret of a URL in it."""
    return printable(redacted_text(text))


def _strict(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(key): _strict(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(each) for each in value]
    return redacted_text(value) if isinstance(value, str) else value


def say(*lines: str) -> None:
    """Lines of the result. Names and answers are other people's text: a terminal escape in them is shown, not sent."""
    for line in lines:
        out.print(shown(line), highlight=False, soft_wrap=True)


def say_list(head: str, items: Iterable[str]) -> None:
    """A line of the result that ends in a list: it goes on below where the terminal is too narrow, between items."""
    lines = [head]
    for item in items:
        if len(lines[-1]) + 2 + len(item) > out.width:
            lines.append("  ")
        lines[-1] += f"  {item}"
    say(*lines)


def tell(text: str) -> None:
    """A line beside the result, on stderr."""
    err.print(shown(text), emoji=False, highlight=False, soft_wrap=True)


def warn(text: str) -> None:
    """A warning, on stderr."""
    err.print(shown(f"warning: {text}"), style="yellow", highlight=False, soft_wrap=True)


@contextmanager
def doubts_once() -> Iterator[None]:
    """What is assumed of an SAE (errors.Doubt) is a line of ours, each once; other warnings are as they are."""
    seen: set[str] = set()
    with warnings.catch_warnings():
        warnings.simplefilter("always", Doubt)
        others = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
            if not issubclass(category, Doubt):
                others(message, category, *where, **more)
            elif str(message) not in seen:
                seen.add(str(message))
                warn(str(message))

        warnings.showwarning = show
        yield


def refuse(text: str) -> None:
    """Why a command did not do its work, on stderr."""
    err.print(shown(f"error: {text}"), style="red", highlight=False, soft_wrap=True)


def print_table(columns: Sequence[str | Column], rows: Iterable[Sequence[str]], plain: bool = False) -> None:
    """A table with a header. The first column is for names, numbers in the others stand on the right.

    plain: without lines between the columns.
    """
    first, *others = columns
    made = [Column(each, justify="right") if isinstance(each, str) else each for each in others]
    table = Table(first, *made, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)) if plain else Table(first, *made)
    for row in rows:
        table.add_row(*map(shown, row))
    out.print(table)


def print_wide_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table of any number of columns: where the terminal is too narrow it goes on below, names first again."""
    widths = [max(map(len, (head, *(row[i] for row in rows)))) + 3 for i, head in enumerate(columns)]
    room, first = out.width - widths[0] - 1, 1
    while first < len(columns):
        last, left = first + 1, room - widths[first]
        while last < len(columns) and widths[last] <= left:
            left -= widths[last]
            last += 1
        print_table((columns[0], *columns[first:last]), [(row[0], *row[first:last]) for row in rows])
        first = last


def print_pairs(rows: Iterable[tuple[str, str]]) -> None:
    """Names and values, without a header; long values are folded."""
    table = Table(show_header=False, box=box.SIMPLE)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*map(shown, row))
    out.print(table)


class Bar:
    """A bar with rate, time left and a text on a terminal; elsewhere a line every few seconds, and one at the end.

        with Bar("harvest", unit="images") as bar:
            bar.update(done, total, "3 skipped")

    The rate counts from the first update on: what comes before is set-up, or was done by an earlier process.
    """

    def __init__(self, what: str, total: int | None = None, unit: str = "", *, speaks: bool = True, lines: bool = True):
        """unit: of what is counted, for the rate; B for bytes. speaks: whether to print anything at all. lines: whether
        to print where there is no terminal."""
        console = err if out.quiet and err.is_terminal else out
        self.what, self.total, self.unit, self.lines = what, total, unit, speaks and lines and not out.quiet
        self.live = speaks and console.is_terminal and not console.quiet
        count: ProgressColumn = DownloadColumn() if unit == "B" else MofNCompleteColumn()
        columns = (
            TextColumn(what),
            count,
            BarColumn(bar_width=20),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[text]}"),
        )
        self.progress = Progress(*columns, console=console, disable=not self.live)
        self.task = self.progress.add_task(what, total=total, rate="", text="")
        self.text = ""
        self.first: tuple[float, int] | None = None
        self.last_line = time.monotonic()

    def __enter__(self) -> Self:
        self.progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """The bar stands still from now on."""
        self.progress.stop()

    def update(self, done: int, total: int | None = None, text: str | None = None, line: bool = True) -> None:
        """done: of all so far. total: if it was not known before. line: whether this may print a line."""
        now = time.monotonic()
        self.total = self.total if total is None else total
        self.text = self.text if text is None else text
        self.first = self.first or (now, done)
        rate = (done - self.first[1]) / max(now - self.first[0], 1e-9)
        shown = f"{rate:.1f} {self.unit}/s" if self.unit and self.unit != "B" and rate > 0 else ""
        self.progress.update(self.task, completed=done, total=self.total, rate=shown, text=self.text)
        last = done == self.total
        if self.live or not (self.lines and line) or not (last or now - self.last_line > SECONDS_A_LINE):
            return
        left = f"{((self.total or done) - done) / rate:.0f} s left" if rate > 0 and not last else ""
        of_all = "" if self.total is None else f"/{self.total:,}"
        counted = "" if self.unit in ("it", "B", "") else f" {self.unit}"
        say("  ".join(filter(None, (f"{self.what} {done:,}{of_all}{counted}", shown, left, self.text))))
        self.last_line = now


def metric_text(value: float) -> str:
    """With four decimals; of what is large, four digits."""
    return f"{value:.4f}" if not abs(value) >= 1e6 else f"{value:.3e}"


class Bars:
    """A bar for every name that is counted, one after another: each stands still once its total is reached, or the next
    one begins, as a terminal has one that moves."""

    def __init__(self, what: str, unit: str):
        self.what, self.unit = what, unit
        self._open: dict[str, Bar] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        for bar in self._open.values():
            bar.close()

    def update(self, name: str, done: int, total: int) -> None:
        """Called with how many are done of a name's total."""
        if name not in self._open:
            for bar in self._open.values():
                bar.close()
            self._open[name] = Bar(f"{self.what}{name}", total, self.unit).__enter__()
        self._open[name].update(done)
        if done == total:
            self._open.pop(name).close()


class TrainBar(Bar):
    """Of a training run: told of every step, and of the metrics of some."""

    def __init__(self, n_steps: int):
        super().__init__("step", n_steps, "it")
        self.evaluation: Bar | None = None

    def on_step(self, step: int) -> None:
        """Called after every step."""
        self.update(step, line=False)

    def on_log(self, step: int, metrics: dict[str, float]) -> None:
        """Called after every logged step."""
        text = (
            f"loss {metrics['losses/overall_loss']:.4f}  ev {metrics['metrics/explained_variance']:.3f}  "
            f"l0 {metrics['metrics/l0']:.1f}  dead {metrics['sparsity/dead_features']}"
        )
        self.update(step, text=text)
        if step == self.total:
            self.close()
            say("saving, then evaluating ...")

    def on_evaluated(self, done: int, total: int) -> None:
        """Called as the evaluation goes on."""
        if self.evaluation is None:
            super().close()
            self.evaluation = Bar("evaluation", total, "rows")
            self.evaluation.__enter__()
        self.evaluation.update(done)

    def close(self) -> None:
        super().close()
        if self.evaluation is not None:
            self.evaluation.close()


class HarvestBar(Bar):
    """Of a harvest; of several ranks the first speaks."""

    def __init__(self, rank: int = 0, world: int = 1):
        what = "harvest" if world == 1 else f"rank 0 of {world}: harvest"
        super().__init__(what, unit="images", speaks=rank == 0)

    def on_images(self, done: int, total: int, n_skipped: int) -> None:
        """Called after every batch with this process's images and all skipped ones."""
        self.update(done, total, f"{n_skipped} skipped" if n_skipped else "")
