"""Commands in processes of their own: killed at random points and resumed, and two on one output."""

import itertools
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from saevlm_fast import outputs
from saevlm_fast.cli import main
from saevlm_fast.data.rows import open_activations
from saevlm_fast.files import sha256_file
from small_world import words

_PROCESSES = multiprocessing.get_context("fork")  # torch is there at once
LONGEST = 120.0
CUT = ("replace", "rename", "unlink", "rmdir", "mkdir", "fsync")  # of os: where what lies on the disk changes
OUTPUTS = {
    "synthetic": "out",
    "harvest": "out",
    "train": "out",
    "demo": "out",
    "ms-score": "out.parquet",
    "evaluate": "out",
    "top-images": "out",
    "cross-modal": "out",
    "name": "out.parquet",
    "report": "out",
    "steering-score": "out.json",
    "steerability": "out.parquet",
    "erase": "out.json",
}


class Ended(NamedTuple):
    """How a process ended, and what it wrote on stdout and stderr."""

    code: int | None
    text: str


def _command(call: list[str], place: Path, log: Path, cut_at: int | None) -> None:
    os.chdir(place)
    with open(log, "w", encoding="utf-8") as stream:
        sys.stdout = sys.stderr = stream
        sys.argv = ["saevlm-fast", *call]
        os.environ["COLUMNS"] = "200"
        outputs.LOCK_SECONDS = 0.1
        changes = _count_changes(cut_at)
        try:
            main()
        finally:
            _count_of(log).write_text(str(next(changes)), encoding="utf-8")


def _count_of(log: Path) -> Path:
    return log.with_name(f"{log.name}.changes")


def _count_changes(cut_at: int | None) -> Iterator[int]:
    """Of what is on the disk, by this process, which is killed in place of number `cut_at`."""
    numbers = itertools.count()

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if next(numbers) == cut_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return call

    for name in CUT:
        setattr(os, name, counted(getattr(os, name)))
    return numbers


class Process:
    """A command at work in a directory."""

    def __init__(self, call: list[str], place: Path, log: Path, cut_at: int | None = None):
        self.log = log
        self._process = _PROCESSES.Process(target=_command, args=(call, place, log, cut_at))
        self._process.start()

    def end(self, after: float | None = None) -> Ended:
        """Waits; after: seconds from now, when it is killed. Killed as well: what takes too long."""
        self._process.join(LONGEST if after is None else after)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        return Ended(self._process.exitcode, self.log.read_text(encoding="utf-8") if self.log.exists() else "")

    def is_alive(self) -> bool:
        return self._process.is_alive()


# Killed and resumed ---------------------------------------------------------------------------------------------------

KILLED = {
    "train": words("train", steps="40", checkpoint_every="7", log_every="3"),
    "harvest": words("harvest", limit="12", images_per_shard="1", batch_size="2", point="residual,projection"),
    "steering-score": words("steering-score", latents="0:16", config="blocks.toml"),
    "evaluate": words("evaluate", controls="untrained,raw"),
}


def result(name: str, place: Path) -> Any:
    """What must be the same however often a run was cut, and the names of all that lies in the output's directory."""
    output = place / OUTPUTS[name]
    names = sorted(str(path.relative_to(place)) for path in place.rglob("*"))
    if name == "train":
        return names, [sha256_file(output / file) for file in ("sae_weights.safetensors", "metrics.jsonl")]
    if name == "steering-score":
        return names, sha256_file(output)
    if name == "evaluate":
        files = [output / "evaluation.json", *sorted(output.rglob("*.parquet"))]
        return names, [sha256_file(file) for file in files]
    stores = [open_activations(index.parent) for index in sorted(output.rglob("index.json"))]
    rows = [(store.n_rows, [x.tolist() for _, x in store.chunks(64)], store.items().to_pydict()) for store in stores]
    return names, rows


def cut_runs(world: Path, name: str, n: int, seed: int = 0, tell: Callable[[str], None] = print) -> Counter[str]:
    """n runs that are killed once or several times and resumed, against one that was not.

    Half are killed in place of a change of what is on the disk, half after a time. Outcomes: "the same", "another
    result", "not resumed"; and "kills", how many there were.
    """
    whole = _fresh(world, f"{name}-whole")
    start = time.monotonic()
    ended = Process(KILLED[name], whole, world.with_name("log")).end()
    seconds = time.monotonic() - start
    assert ended.code == 0, ended.text
    n_changes = int(_count_of(world.with_name("log")).read_text())
    expected = result(name, _output_only(whole))
    draw = random.Random(f"{seed} {name}")
    counts: Counter[str] = Counter()
    for number in range(n):
        place = _fresh(world, f"{name}-cut")
        at = f"run {number}:"
        for again in range(draw.choice((1, 1, 2, 3))):
            more = ["--resume"] if again else []
            by_time = draw.random() < 0.5
            point = draw.random()
            cut = None if by_time else int(point * n_changes)
            process = Process([*KILLED[name], *more], place, world.with_name("log"), cut)
            ended = process.end(point * seconds if by_time else None)
            counts["kills"] += ended.code == -signal.SIGKILL
            at += f" {point * seconds:.3f} s" if by_time else f" change {cut}"
            if ended.code not in (0, -signal.SIGKILL):
                tell(f"not resumed: {name}, {at}: exit {ended.code}: {ended.text[-400:]}")
        ended = Process([*KILLED[name], "--resume"], place, world.with_name("log")).end()
        kind = "not resumed" if ended.code else "the same"
        if not ended.code and (found := result(name, _output_only(place))) != expected:
            kind = "another result"
            more, fewer = (sorted(set(one[0]) - set(other[0])) for one, other in ((found, expected), (expected, found)))
            ended = Ended(0, f"more names {more}, fewer {fewer}")
        counts[kind] += 1
        if kind != "the same":
            tell(f"{kind}: {name}, {at}: exit {ended.code}: {ended.text[-1500:]}")
    return counts


def _fresh(world: Path, name: str) -> Path:
    """A directory from which a world is reached, and in which nothing else lies."""
    place = world.with_name(name)
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    for each in world.iterdir():
        (place / each.name).symlink_to(each)
    return place


def _output_only(place: Path) -> Path:
    for each in place.iterdir():
        if each.is_symlink():
            each.unlink()
    return place


# Two on one output ----------------------------------------------------------------------------------------------------


def paired_runs(
    world: Path, names: Iterable[str], n: int, seed: int = 0, tell: Callable[[str], None] = print
) -> dict[str, Counter[str]]:
    """n pairs of each command on one output: "one worked, one refused", or what else happened."""
    return {name: _pairs(world, name, n, random.Random(f"{seed} {name}"), tell) for name in names}


def _pairs(world: Path, name: str, n: int, draw: random.Random, tell: Callable[[str], None]) -> Counter[str]:
    call = KILLED.get(name) or [word for word in words(name) if word != "--dry-run"]
    counts: Counter[str] = Counter()
    for number in range(n):
        place = _fresh(world, f"{name}-pair")
        pair = [Process(call, place, world.with_name("log-0"))]
        delay = draw.choice((0.0, draw.random() * 0.3))
        time.sleep(delay)
        pair.append(Process(call, place, world.with_name("log-1")))
        if name == "demo":  # a minute of work: the one that is not refused is let go on for a second
            deadline = time.monotonic() + LONGEST
            while all(each.is_alive() for each in pair) and time.monotonic() < deadline:
                time.sleep(0.02)
            ended = [each.end(1.0) for each in pair]
            ended = [Ended(0, each.text) if each.code == -signal.SIGKILL else each for each in ended]
        else:
            ended = [each.end() for each in pair]
        refused = [each for each in ended if each.code == 2 and each.text.startswith("error: output: ")]
        one_line = all(each.text.count("\n") == 1 for each in refused)
        good = sorted(str(each.code) for each in ended) == ["0", "2"] and len(refused) == 1 and one_line
        good = good and (place / OUTPUTS[name]).exists()
        counts["one worked, one refused" if good else "other"] += 1
        if not good:
            tell(f"other: {name}, pair {number}, {delay:.2f} s apart: {ended}")
    return counts
