"""docs/settings.md, from the dataclasses: python -m saevlm_fast.cli.reference > docs/settings.md"""

import sys
from typing import Any

from saevlm_fast import cli  # noqa: F401 (makes the commands)
from saevlm_fast.cli.config_file import MADE
from saevlm_fast.cli.names import COMMANDS, default_text, flag_of, is_needed, key_of, ordered
from saevlm_fast.cli.options import Options, WorkOptions
from saevlm_fast.settings import Setting, choices_of, kinds_of, title_of

_HEAD = f"""# Settings

<!-- Made by `python -m saevlm_fast.cli.reference > docs/settings.md`; a test compares them. -->

Every option of every command, with its default, its limits and what the paper (arXiv 2504.02821) uses.

An option is also a key of the TOML file that `--config` reads, with underscores or dashes:

```toml
[train]
activations = "clip-train"
steps = 20_000
groups = [0.0625, 0.125, 0.25, 0.5625]
```

Keys may stand at the top of the file or in a table of the command's name.
The command line wins over the file, and the file over the default.
A key that the command does not have is refused, with the nearest that it has.
Relative paths are relative to the directory that the command runs in.

Every command that makes a result writes its settings beside it: `settings.toml` in a directory, `FILE.settings.toml`
beside a file.
The table `[{MADE}]` in it says how the result was made: command line, directory, time, host, device, commit, versions.
The result is made again with `--config`, and another `--output`:

```sh
saevlm-fast train --config runs/old/settings.toml --output runs/new
```

`--dry-run` opens the inputs, checks the output and prints rows, sizes, memory, disk and time; it writes nothing.
`--json` prints one JSON object and nothing else on stdout.
`saevlm-fast --install-completion` completes commands and options in your shell.
"""

_TABLE_HEAD = ("| Option | Meaning | Default | Paper |", "|---|---|---|---|")


def reference() -> str:
    """The page, as Markdown."""
    parts = [_HEAD, _section("Every command", "", WorkOptions, list(ordered(WorkOptions)))]
    general = {name for name, _ in ordered(WorkOptions)}
    for command in COMMANDS.values():
        own = [(name, known) for name, known in ordered(command.options) if name not in general]
        parts.append(_section(f"saevlm-fast {command.name}", command.help, command.options, own))
    return "\n".join(parts)


def _section(title: str, text: str, cls: Any, settings: list[tuple[str, Setting]]) -> str:
    lines = [f"## {title}", ""]
    if text:
        lines += [text, ""]
    if cls is not WorkOptions and not issubclass(cls, WorkOptions) and issubclass(cls, Options):
        lines += ["It writes nothing, so it has no `--dry-run`.", ""]
    panel = None
    for name, known in settings:
        if title_of(cls, name) != panel:
            lines += [*([""] if panel else []), f"**{title_of(cls, name)}**", "", *_TABLE_HEAD]
            panel = title_of(cls, name)
        lines.append(_setting(cls, name, known))
    return "\n".join(lines) + "\n"


def _setting(cls: Any, name: str, known: Setting) -> str:
    option = f"`{flag_of(name, known)}`" if known.on_command_line else f"`{key_of(name, known)}` (in a file only)"
    meaning = known.help.replace("][", r"]\[")  # which Markdown would take for a reference
    if choices := choices_of(cls, name):
        meaning += f" One of {', '.join(choices)}."
    if known.limits:
        meaning += f" {known.limits[0].upper()}{known.limits[1:]}."
    default = default_text(cls, name, known)
    if default is None:
        off = kinds_of(cls)[name] is bool
        default = "required" if is_needed(cls, name, known) else "off" if off else "none"
    return _row(option, meaning, default, known.paper or "")


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


if __name__ == "__main__":
    sys.stdout.write(reference())
