"""What the command framework refuses (an unknown option, a missing value), said in one line like everything else."""

from collections.abc import Callable
from typing import Any

import typer

from saevlm_fast.errors import did_you_mean

_Refused: Any = typer.BadParameter.__mro__[2]  # ClickException, of click or of Typer's own copy, by version


def run_app(app: Callable[..., Any], name: str) -> int:
    """The program's exit code. ValueError: the command line is none of it, in one line with a hint."""
    try:
        code = app(prog_name=name, standalone_mode=False)
    except _Refused as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            error.show()
            return 2
        raise ValueError(usage_line(error, name)) from None
    return code if isinstance(code, int) else 0


def usage_line(error: Any, name: str) -> str:
    """Which option or word it is, what is wrong with it, and where to look."""
    context = getattr(error, "ctx", None)
    path, command = (name, None) if context is None else (context.command_path, context.command)
    option = getattr(error, "option_name", None)
    if type(error).__name__ == "NoSuchOption":
        known = [flag for each in getattr(command, "params", ()) for flag in (*each.opts, *each.secondary_opts)]
        said = f"{option}: no such option{did_you_mean(str(option), known)}"
        if option == "--dtype" and path.endswith(" train"):
            said = (
                "--dtype: is gone; steps are float32, which screening in 16 bits makes as fast as they were in bfloat16"
            )
    else:
        said = " ".join(error.format_message().split()).removesuffix(".").replace(". Did you", "; did you")
        said = said[:1].lower() + said[1:]
    return f"{said} ({path} --help lists all)"
