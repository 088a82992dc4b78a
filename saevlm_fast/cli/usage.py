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


def _words(command: Any) -> list[str]:
    """The arguments that stand without a name, as SOURCE."""
    return [each.name.upper() for each in command.params if each.param_type_name == "argument"]


def _instead(option: str, command: Any) -> str:
    """The option that is nearest; or, for --sae, the word that the SAE is here."""
    if command is None:
        return ""
    if option == "--sae" and (words := _words(command)):
        return f"; {words[0]} stands without a name, as {command.name} {' '.join(words)}"
    return did_you_mean(option, [flag for each in command.params for flag in (*each.opts, *each.secondary_opts)])


def usage_line(error: Any, name: str) -> str:
    """Which option or word it is, what is wrong with it, and where to look."""
    context = getattr(error, "ctx", None)
    path, command = (name, None) if context is None else (context.command_path, context.command)
    option = getattr(error, "option_name", None)
    if type(error).__name__ == "NoSuchOption":
        said = f"{option}: no such option{_instead(str(option), command)}"
        if option == "--dtype" and path.endswith(" train"):
            said = (
                "--dtype: is gone; steps are float32, which screening in 16 bits makes as fast as they were in bfloat16"
            )
    else:
        said = " ".join(error.format_message().split()).removesuffix(".").replace(". Did you", "; did you")
        said = said[:1].lower() + said[1:]
        if "unexpected extra argument" in said and command is not None and not _words(command):
            said += f": all that {command.name} takes is given by an option"
    return f"{said} ({path} --help lists all)"
