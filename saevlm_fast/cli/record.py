"""settings.toml: the settings a result was made with, in a form that --config reads, and what it was made by.

[train]         every setting that was not left open, as the command's options have it
[made]          command line, working directory, time, host, device, commit; [made.versions]; [made.resolved]: what
                followed from the settings and the data

Of work that went on with --resume, command line and working directory are those of the call that makes the same from
the start. `began` is when that was, and `calls` are all that differ, the first one first; the rest is of the last, also
settings that make no other result, as the device.
"""

import os
import platform
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from saevlm_fast import __version__
from saevlm_fast.cli.config_file import MADE
from saevlm_fast.cli.from_anywhere import placed
from saevlm_fast.cli.names import called, key_of, ordered
from saevlm_fast.cli.options import Options
from saevlm_fast.cli.ranks import n_processes
from saevlm_fast.cli.toml import toml_text
from saevlm_fast.errors import Interrupted, require, while_writing
from saevlm_fast.settings import settings_of
from saevlm_fast.urls import redacted_text

SETTINGS_FILE = "settings.toml"
_ANYWHERE = {"output", "device", "batch_size"}  # settings that make no other result
PACKAGES = ("torch", "triton", "numpy", "safetensors", "pyarrow", "transformers", "open_clip_torch", "timm")


def settings_path(result: Path) -> Path:
    """Where the settings of a result stand: in a directory (or what will replace its contents), or beside a file."""
    from saevlm_fast.outputs import workplace

    if result.is_dir():
        return workplace(result) / SETTINGS_FILE
    return result.with_name(f"{result.name}.{SETTINGS_FILE}")


def interrupted_run(
    error: Interrupted, output: Path, records: "Sequence[Record]", force: bool, ranks: bool
) -> Interrupted:
    """What ends an interrupted training command: how it goes on.

    records: of what it makes, that of all last; none where another rank writes them. What lies in place of settings
    that have not been written may be of a run that was to be replaced.
    """
    from saevlm_fast.outputs import workplace

    what, settings = str(error).partition(";")[0], shlex.quote(str(workplace(output) / SETTINGS_FILE))
    if not all(record.written for record in (records if force else records[-1:])):
        again = "start again with the same command" if force else "continue with the same command and --resume"
        return Interrupted(f"{what}; {again}")
    program = "torchrun ... -m saevlm_fast.cli" if ranks else "saevlm-fast"
    return Interrupted(f"{what}; continue with: {program} train --config {settings} --resume")


class Record:
    """Writes the settings beside a result: once, as soon as there is a place for them."""

    def __init__(self, command: str, options: Options, result: Path, **resolved: Any):
        self.command, self.options, self.result, self.resolved = command, options, result, resolved
        self.written = False

    def write(self) -> None:
        """Atomically. OSError: it cannot be written."""
        if self.written:
            return
        from saevlm_fast.files import atomic_write, remove_leftovers_of

        path, settings = settings_path(self.result), recorded(self.options)
        made = self._with_calls_before(made_by(self.options), settings, path)
        document = {self.command: settings, MADE: made | ({"resolved": self.resolved} if self.resolved else {})}
        kind: Any = type(self.options)
        known = settings_of(kind).get("output")
        other = "ANOTHER_OUTPUT " if known is not None and known.positional else ""
        note = f"# Repeat it: saevlm-fast {self.command} {other}--config {path.name}"
        note += "\n" if other else ", and another --output\n"
        remove_leftovers_of(path)  # of one that was killed at this: the output is locked
        kept = ""
        if not self.result.is_dir():  # it is whole by now, and old settings are of what it has replaced
            path.unlink(missing_ok=True)
            kept = f"{self.result} is whole without them; what made it is not beside it"
        with while_writing("the record of its settings", kept), atomic_write(path) as temporary:
            temporary.write_text(note + toml_text(document), encoding="utf-8")
        self.written = True

    def _with_calls_before(self, made: dict[str, Any], settings: dict[str, Any], path: Path) -> dict[str, Any]:
        """`made`, and of what is resumed how it was begun, which the settings in its place say."""
        try:
            document = tomllib.loads(path.read_text(encoding="utf-8")) if getattr(self.options, "resume", False) else {}
            asked, before = dict(document[self.command]), document[MADE]
            begun = {"command_line": before["command_line"], "directory": before["directory"]}
            calls = [*before.get("calls", [before["command_line"]]), made["command_line"]]
            began = before.get("began", before["at"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return made  # there is nothing before it, or it is damaged
        as_before = all(asked.get(name) == settings.get(name) for name in {*asked, *settings} - _ANYWHERE)
        if self.options.resume_adds and not as_before:
            begun, began = {}, made["at"]
        return made | begun | {"began": began, "calls": list(dict.fromkeys(calls))}


def check_recorded(
    command: str, options: Options, result: Path, resolved: dict[str, Any], free: tuple[str, ...] = ()
) -> None:
    """That a finished result was made with these settings, and the same followed from its inputs.

    free: settings that may differ.

    Raises:
        ValueError: the first that differs, with both values; no settings beside it, or damaged ones.
    """
    path = settings_path(result)
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
        before = {**document[command], **document[MADE]["resolved"]}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        advice = "so what it was made of is not known; --force makes it anew"
        raise ValueError(f"output: {result} already exists without sound settings ({path.name}), {advice}") from error
    now = recorded(options) | resolved
    for name in sorted((now.keys() | before.keys()) - set(free)):
        was, asked = before.get(name), now.get(name)
        # An older version wrote a text that names a place as it was given.
        same = was == asked or (isinstance(was, str) and was == getattr(options, name, None))
        message = (
            f"resume: {called(options, '', name)} is {asked}, but {result} was made with {was}; --force makes it anew"
        )
        require(same, message)


def recorded(options: Options) -> dict[str, Any]:
    """The settings as TOML has them: the same from anywhere, and what was left open is not there."""
    values: dict[str, Any] = {}
    cls: Any = type(options)
    for name, known in ordered(cls):
        value = options.said(name)
        if known.tables and not value:
            continue
        if not known.recorded or value is None:
            continue
        value = (
            [placed(name, known, each) for each in value] if isinstance(value, tuple) else placed(name, known, value)
        )
        values[key_of(name, known)] = value
    return values


def made_by(options: Options) -> dict[str, Any]:
    """Command line, place, time, host, device, commit and versions."""
    made = {
        "command_line": shlex.join(["saevlm-fast", *map(redacted_text, sys.argv[1:])]),
        "ranks": n if (n := n_processes()) > 1 else None,  # of torchrun, which started that many of this command
        "directory": os.getcwd(),
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "host": platform.node(),
        "platform": platform.platform(),
        "device": _device(getattr(options, "device", "cpu")),
        "commit": commit(),
        "versions": versions(),
    }
    return {name: value for name, value in made.items() if value is not None}


def versions() -> dict[str, str]:
    """Of this package, Python, and what it is built on, as far as it is installed."""
    found = {"saevlm-fast": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """Of the checkout that the program runs from, with "+changes" where files differ from it; None outside of one."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        git = ["git", "-C", str(root)]
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10)
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return head.stdout.strip() + ("+changes" if changed.stdout.strip() else "") if head.returncode == 0 else None


def _device(name: str) -> str:
    import torch

    from saevlm_fast.runtime import resolve_device

    device = resolve_device(name)
    if device.type == "cuda":
        return f"{device}: {torch.cuda.get_device_name(device)}"
    return f"cpu: {platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
