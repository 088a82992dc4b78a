"""saevlm-fast inspect: what is at a path."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Column, Table

from saevlm_fast.cli.options import Options, command
from saevlm_fast.cli.terminal import Bar, out, print_pairs, say
from saevlm_fast.errors import printable
from saevlm_fast.settings import setting


@dataclass(frozen=True, kw_only=True)
class InspectArguments(Options):
    """Options of `saevlm-fast inspect`."""

    path: Path = setting(
        help="Store, SAE, run, matrix file, what a command wrote, or a folder of these (a harvest's output).",
        positional=True,
    )
    verify: bool = setting(False, help="Read everything: every checksum, every weight or row finite.")


@command("inspect")
def inspect(options: InspectArguments) -> dict[str, Any]:
    """What is at a path: source, shape, dtype, size on disk, completeness, labels; of a result what made it, and
    its main numbers. Damage is an error, exit code 2."""
    from saevlm_fast.cli.inspect_table import summary_rows
    from saevlm_fast.inspection import inspect as inspect_path
    from saevlm_fast.inspection import verify_inspected

    description = inspect_path(options.path)
    if options.verify:
        with Bar("verify", description["bytes"], "B", lines=False) as bar:
            description["verified"] = verify_inspected(description, bar.update)
    say(description["path"])
    print_pairs(summary_rows(description))
    if description["kind"] == "folder":
        _print_contents(description)
    return description


def _print_contents(description: dict[str, Any]) -> None:
    from saevlm_fast.cli.inspect_table import contents_rows

    shape, size = Column("shape", justify="right"), Column("on disk", justify="right")
    name = Column("name", overflow="fold")
    contents = Table(name, "kind", shape, "dtype", size, "complete", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for item in contents_rows(description):
        contents.add_row(*map(printable, item))
    out.print(contents)
